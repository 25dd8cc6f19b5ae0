"""A folder of checkpoints: step_000100, step_000200, ... and ``latest``, a text file that names the newest of them.

``latest`` is replaced in one go after the checkpoint has its name, so that a job killed at any moment finds the one or
the other. Old checkpoints go last, and never the one that ``latest`` names.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from frugal_dist.checkpoint.disk import flush_folder, read_bytes, write_bytes
from frugal_dist.checkpoint.errors import CheckpointError, DamagedError, together
from frugal_dist.checkpoint.files import clear_stale, complete_folder, remove
from frugal_dist.checkpoint.index import INDEX
from frugal_dist.checkpoint.loading import read_checkpoint
from frugal_dist.checkpoint.writing import write_checkpoint
from frugal_dist.notices import notice
from frugal_dist.optimizer import Frugal
from frugal_dist.sharding.collectives import Ranks, gather_objects

LATEST = "latest"
_STEP = re.compile(r"^step_(\d{6,18})$|^\.step_(\d{6,18})\.old$")


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step_{step:06d}"


def steps_in(root: Path) -> list[int]:
    """The steps of all complete checkpoints, ascending. Whether their files are sound is seen when they are loaded."""
    if not root.exists():
        return []
    if not root.is_dir():
        raise CheckpointError(
            f"{root} is a file, but checkpoints are kept in a folder. Remove it, or choose another name."
        )
    steps = {step for entry in root.iterdir() if (step := _step_of(entry.name)) is not None}
    return sorted(step for step in steps if (complete_folder(step_folder(root, step)) / INDEX).exists())


def latest_step(root: Path) -> int | None:
    """The step that ``latest`` names, or the newest there is if it names none; None if there is no checkpoint."""
    try:
        named = _step_of(read_bytes(root / LATEST).decode("utf-8").strip())
    except (CheckpointError, UnicodeDecodeError):
        named = None
    return max(steps_in(root), default=None) if named is None else named


def _step_of(name: str) -> int | None:
    match = _STEP.match(name)
    return int(match[1] or match[2]) if match else None


def write_step(
    root: Path,
    step: int,
    model_or_engine: Any,
    frugal: Frugal,
    extra: dict[str, Any] | None,
    keep_last: int | None,
    keep_every: int | None,
    ranks: Ranks,
) -> None:
    """Save, name the checkpoint the latest, then remove old ones. Collective."""
    folder = step_folder(root, step)
    write_checkpoint(folder, model_or_engine, frugal, extra, ranks)

    def settle() -> None:
        write_latest(root, folder.name)
        clear_stale(root, r"step_\d{6,}")
        for old in superseded(steps_in(root), step, keep_last, keep_every):
            remove(step_folder(root, old))

    together(ranks, lambda: settle() if ranks.rank == 0 else None)


def write_latest(root: Path, name: str) -> None:
    """Replace ``latest`` in one go."""
    fresh = root / f".{LATEST}.partial"
    write_bytes(fresh, f"{name}\n".encode())
    os.replace(fresh, root / LATEST)
    flush_folder(root)


def superseded(steps: list[int], now: int, keep_last: int | None, keep_every: int | None) -> list[int]:
    """Which checkpoints may go: neither among the last, nor a multiple, nor from beyond ``now``.

    Steps beyond ``now`` belong to a run that was abandoned for an earlier checkpoint; this one will overwrite them.
    """
    past = [step for step in steps if step <= now]
    if keep_last is None:
        return []
    kept = set(past[-keep_last:])
    return [step for step in past if step not in kept and not (keep_every and step % keep_every == 0)]


def read_latest(
    root: Path,
    model_or_engine: Any,
    frugal: Frugal,
    on_mismatch: str,
    on_damaged: str,
    verify: bool,
    rng: bool,
    ranks: Ranks,
) -> tuple[int, dict[str, Any]] | None:
    """Load the newest checkpoint; (step, extra), or None if there is none. Collective."""
    candidates = _candidates(ranks, root)
    for position, step in enumerate(candidates):
        folder, older = step_folder(root, step), candidates[position + 1 :]
        try:
            return step, read_checkpoint(folder, model_or_engine, frugal, on_mismatch, verify, rng, ranks)
        except DamagedError as error:  # on all ranks alike
            if not older:
                raise
            previous = step_folder(root, older[0])
            if on_damaged != "previous":
                raise DamagedError(
                    f'{error} The one before is {previous}: load that, or pass on_damaged="previous".'
                ) from error
            if ranks.rank == 0:
                notice(f"{error} Going back to {previous}.")
    return None


def _candidates(ranks: Ranks, root: Path) -> list[int]:
    """From the latest backwards, as rank 0 sees them. Newer ones are of an abandoned run, or were never finished."""

    def look() -> list[int]:
        newest = latest_step(root)
        return [] if newest is None else [newest, *(step for step in reversed(steps_in(root)) if step < newest)]

    candidates: list[int] = gather_objects(ranks, together(ranks, look))[0]
    return candidates
