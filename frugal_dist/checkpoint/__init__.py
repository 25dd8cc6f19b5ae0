"""Portable checkpoints: save on any engine and number of ranks, load on any other, and resume."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from frugal_dist.checkpoint.errors import CheckpointError, DamagedError, MismatchError, StorageError
from frugal_dist.checkpoint.extra import load_schedule
from frugal_dist.checkpoint.folder import latest_step, read_latest, step_folder, write_step
from frugal_dist.checkpoint.loading import read_checkpoint
from frugal_dist.checkpoint.savers import loaders, savers
from frugal_dist.checkpoint.unwrapping import unwrap
from frugal_dist.checkpoint.weights import SavedWeights
from frugal_dist.checkpoint.writing import write_checkpoint
from frugal_dist.config import check_choice
from frugal_dist.notices import notice
from frugal_dist.sharding.collectives import Ranks

__all__ = [
    "CheckpointError",
    "DamagedError",
    "MismatchError",
    "SavedWeights",
    "StorageError",
    "latest",
    "load",
    "load_latest",
    "load_schedule",
    "save",
    "save_step",
    "unwrap",
]


def save(
    path: str | os.PathLike[str],
    model_or_engine: Any,
    optimizer: Any,
    extra: dict[str, Any] | None = None,
    *,
    on_error: str = "raise",
    process_group: Any = None,
) -> bool:
    """Save weights, optimizer state, learning rates, RNG states and ``extra`` to the folder ``path``: did it work?

    Collective: every rank calls it.

    Args:
        path: the checkpoint's folder. One of the same name is replaced only when the new one is complete, and only if
            it is a checkpoint.
        model_or_engine: the model, wrapped or not, or DeepSpeed's engine.
        optimizer: a Frugal or a wrapper around one (``engine.optimizer``).
        extra: this rank's own: numbers, text, tensors, and lists, tuples and dicts of them, such as data positions and
            ``state_dict()`` of schedulers.
        on_error: "raise", or "warn": if the disk is to blame (full, read-only, not shared), rank 0 warns and all ranks
            return False.
        process_group: of pipeline stages that of all ranks which hold the model ("auto": all there are). Every stage
            saves its layers, under the names that they have in the whole model. None: the optimizer's own ranks.

    Raises:
        CheckpointError: (a ValueError) on all ranks alike if any of them fails; no partial files stay, the previous
            checkpoint is untouched, and training can go on.
    """
    frugal = unwrap(optimizer)
    ranks = savers(frugal, process_group)
    return _tolerant(ranks, on_error, lambda: write_checkpoint(Path(path), model_or_engine, frugal, extra, ranks))


def load(
    path: str | os.PathLike[str],
    model_or_engine: Any,
    optimizer: Any,
    on_mismatch: str = "error",
    *,
    verify: bool = True,
    rng: bool = True,
    process_group: Any = None,
) -> dict[str, Any]:
    """Load what ``save`` wrote, on whatever engine and number of ranks runs now; returns this rank's ``extra``.

    Collective. With as many ranks as saved it, every rank gets its own ``extra`` and RNG states back; further ranks get
    rank 0's ``extra`` and RNG streams of their own.

    Args:
        path: the checkpoint's folder.
        model_or_engine: the model, wrapped or not, or DeepSpeed's engine.
        optimizer: a Frugal or a wrapper around one.
        on_mismatch: "error", or "refresh": where hyperparameters changed that the low-rank state depends on, keep the
            weights and counts and start with a fresh subspace at the next step.
        verify: compare the checksums of all files first, shared among the ranks.
        rng: restore the generators of torch, Python and NumPy.
        process_group: as for ``save``. The stages need not be those that saved.

    Raises:
        CheckpointError: (a ValueError) on all ranks alike, naming the file and what differs; nothing is changed then.
    """
    check_choice("on_mismatch", on_mismatch, ("error", "refresh"))
    frugal = unwrap(optimizer)
    ranks = loaders(frugal, process_group)
    return read_checkpoint(Path(path), model_or_engine, frugal, on_mismatch, verify, rng, ranks)


def save_step(
    root: str | os.PathLike[str],
    step: int,
    model_or_engine: Any,
    optimizer: Any,
    extra: dict[str, Any] | None = None,
    *,
    keep_last: int | None = 3,
    keep_every: int | None = None,
    on_error: str = "raise",
    process_group: Any = None,
) -> bool:
    """``save`` to ``root/step_000123``, name it the latest, then remove old checkpoints; whether it worked.

    Args:
        root: the folder of all checkpoints of a run.
        step: the number of updates made so far.
        model_or_engine: as for ``save``.
        optimizer: as for ``save``.
        extra: as for ``save``.
        keep_last: how many of the newest stay (None: all).
        keep_every: steps divisible by it stay as well.
        on_error: as for ``save``.
        process_group: as for ``save``.

    Raises:
        ValueError: for a ``keep_last`` or ``keep_every`` below 1.
        CheckpointError: as ``save``.
    """
    for key, value in (("keep_last", keep_last), ("keep_every", keep_every)):
        if value is not None and value < 1:
            raise ValueError(f"{key}={value} must be at least 1, or None.")
    frugal, folder = unwrap(optimizer), Path(root)
    ranks = savers(frugal, process_group)
    return _tolerant(
        ranks, on_error, lambda: write_step(folder, step, model_or_engine, frugal, extra, keep_last, keep_every, ranks)
    )


def load_latest(
    root: str | os.PathLike[str],
    model_or_engine: Any,
    optimizer: Any,
    on_mismatch: str = "error",
    *,
    on_damaged: str = "error",
    verify: bool = True,
    rng: bool = True,
    process_group: Any = None,
) -> tuple[int, dict[str, Any]] | None:
    """``load`` the checkpoint that ``root/latest`` names; (step, this rank's extra), or None if there is none yet.

    Args:
        root: the folder of all checkpoints of a run.
        model_or_engine: as for ``load``.
        optimizer: as for ``load``.
        on_mismatch: as for ``load``.
        on_damaged: "error", or "previous": warn and take the one before if files are missing, cut off or changed.
        verify: as for ``load``.
        rng: as for ``load``.
        process_group: as for ``load``.

    Raises:
        CheckpointError: as ``load``; with ``on_damaged="previous"`` a DamagedError only if no checkpoint is whole.
    """
    check_choice("on_mismatch", on_mismatch, ("error", "refresh"))
    check_choice("on_damaged", on_damaged, ("error", "previous"))
    frugal = unwrap(optimizer)
    ranks = loaders(frugal, process_group)
    return read_latest(Path(root), model_or_engine, frugal, on_mismatch, on_damaged, verify, rng, ranks)


def latest(root: str | os.PathLike[str]) -> Path | None:
    """The folder of the newest checkpoint under ``root``, None if there is none. For ``load`` and the export.

    Args:
        root: the folder of all checkpoints of a run, as given to ``save_step``.

    Raises:
        CheckpointError: (a ValueError) if ``root`` is a file.
    """
    step = latest_step(Path(root))
    return None if step is None else step_folder(Path(root), step)


def _tolerant(ranks: Ranks, on_error: str, write: Callable[[], None]) -> bool:
    check_choice("on_error", on_error, ("raise", "warn"))
    try:
        write()
    except StorageError as error:
        if on_error == "raise":
            raise
        if ranks.rank == 0:
            notice(f"The checkpoint was not written, training goes on. {error}")
        return False
    return True
