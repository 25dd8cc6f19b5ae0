"""Portable checkpoints: save on any engine and number of ranks, load on any other, and go on."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from frugal_dist.checkpoint.errors import CheckpointError, DamagedError, MismatchError, StorageError
from frugal_dist.checkpoint.loading import read_checkpoint
from frugal_dist.checkpoint.writing import write_checkpoint
from frugal_dist.config import check_choice
from frugal_dist.optimizer import Frugal

__all__ = [
    "CheckpointError",
    "DamagedError",
    "MismatchError",
    "StorageError",
    "load",
    "save",
]


def save(
    path: str | os.PathLike[str],
    model_or_engine: Any,
    optimizer: Any,
    extra: dict[str, Any] | None = None,
    *,
    on_error: str = "raise",
) -> bool:
    """Save weights, optimizer state, learning rates, RNG states and ``extra`` to the folder ``path``: did it work?

    Collective: every rank calls it. ``optimizer`` is a Frugal or a wrapper around one (``engine.optimizer``). ``extra``
    is the rank's own: numbers, text, tensors, and lists, tuples and dicts of them, such as data positions and
    ``state_dict()`` of schedulers. A folder of the same name is replaced only when the new one is complete, and only if
    it is a checkpoint.

    Raises CheckpointError (a ValueError) on all ranks alike if any of them fails; no partial files stay, the previous
    checkpoint is untouched, and training can go on. ``on_error="warn"``: if the disk is to blame (full, read-only, not
    shared), rank 0 warns instead, and all ranks return False.
    """
    check_choice("on_error", on_error, ("raise", "warn"))
    frugal = unwrap(optimizer)
    try:
        write_checkpoint(Path(path), model_or_engine, frugal, extra)
    except StorageError as error:
        if on_error == "raise":
            raise
        if frugal.everything()[0].ranks.rank == 0:
            warnings.warn(f"The checkpoint {path} was not written, training goes on: {error}", stacklevel=2)
        return False
    return True


def load(
    path: str | os.PathLike[str],
    model_or_engine: Any,
    optimizer: Any,
    on_mismatch: str = "error",
    *,
    verify: bool = True,
    rng: bool = True,
) -> dict[str, Any]:
    """Load what ``save`` wrote, on whatever engine and number of ranks runs now; returns this rank's ``extra``.

    Collective. With as many ranks as saved it, every rank gets its own ``extra`` and RNG states back; further ranks get
    rank 0's ``extra`` and RNG streams of their own.

    ``on_mismatch``: "error", or "refresh": where hyperparameters changed that the low-rank state depends on, keep the
    weights and counts and start with a fresh subspace at the next step. ``verify``: compare the checksums of all files
    first, shared among the ranks. ``rng``: restore the generators of torch, Python and NumPy.

    Raises CheckpointError (a ValueError) on all ranks alike, naming the file and what differs; nothing is changed then.
    """
    check_choice("on_mismatch", on_mismatch, ("error", "refresh"))
    return read_checkpoint(Path(path), model_or_engine, unwrap(optimizer), on_mismatch, verify, rng)


def unwrap(optimizer: Any) -> Frugal:
    """The Frugal inside DeepSpeed's or Accelerate's wrappers."""
    inner = optimizer
    while inner is not None and not isinstance(inner, Frugal):
        inner = getattr(inner, "optimizer", None)
    if inner is None:
        raise ValueError(f"{type(optimizer).__name__} does not contain a Frugal optimizer.")
    return inner
