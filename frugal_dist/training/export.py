"""From a checkpoint of any engine to a Hugging Face model folder, on one process and without a GPU."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from frugal_dist.training.card import told
from frugal_dist.training.exported_model import Restored, restore, without_deepspeeds_search
from frugal_dist.training.folders import give_ordinary_permissions


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    restored: Restored

    def report(self) -> str:
        """For the terminal: what was written, with which tokenizer, or why without."""
        restored = self.restored
        what = f"{type(restored.model).__name__}, {restored.parameters:,} parameters, {restored.dtype}"
        lines = [f"{restored.source} -> {self.folder}: {what}"]
        if restored.tokenizer_source is not None:
            lines.append(f"Tokenizer: {restored.tokenizer_source}")
        else:
            why = f": {restored.trouble}" if restored.trouble else ""
            lines.append(f"Without a tokenizer{why or ';'} {'Add' if why else 'add'} one with --tokenizer DIR.")
        return "\n".join(lines)


def export(
    checkpoint: Path,
    out: Path,
    config: Path | None = None,
    tokenizer: Path | None = None,
    dtype: str | None = None,
    verify: bool = True,
) -> Exported:
    """Write safetensors, config and tokenizer to ``out``, for ``AutoModelForCausalLM.from_pretrained``, or
    ``AutoModelForSequenceClassification`` where such a model was saved; a model card, and the run's recipe.

    ``checkpoint``: a checkpoint, a folder of them or a run, of which the latest is taken. ``config``: of the model, a
    folder or a JSON file; not needed if a Hugging Face model was saved. ``tokenizer``: a folder, a tokenizer.json or a
    hub name; None takes the run's, if there is one. ``dtype``: fp32, bf16, fp16, or None for the dtype of the saved
    weights. Raises ValueError, naming what differs, if checkpoint, config and tokenizer do not fit together or ``out``
    cannot be written; nothing is written then.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already; choose another name.")
    restored = restore(checkpoint, config, tokenizer, dtype, verify)
    with without_deepspeeds_search(), _told_of_disks(out):
        _write(Path(os.path.realpath(out)), restored, told(restored, out.name))
    return Exported(out, restored)


def _write(out: Path, restored: Restored, more: Mapping[str, str]) -> None:
    """Under another name until all is there. ``out`` does not exist, or is empty. ``more``: texts by name."""
    working = out.with_name(f".{out.name}.partial")
    shutil.rmtree(working, ignore_errors=True)
    try:
        working.mkdir(parents=True)
        restored.model.save_pretrained(working)
        if restored.tokenizer is not None:
            restored.tokenizer.save_pretrained(working)
        for name, text in more.items():
            (working / name).write_text(text, encoding="utf-8")
        give_ordinary_permissions(working)
        if out.exists():
            out.rmdir()
        working.rename(out)
    finally:
        shutil.rmtree(working, ignore_errors=True)


@contextmanager
def _told_of_disks(out: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(
            f"--out {out} cannot be written: {why}. Nothing is left there; choose another place."
        ) from error
