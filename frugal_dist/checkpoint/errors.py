"""What can go wrong with a checkpoint, and how all ranks hear of it together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from frugal_dist.sharding import collectives
from frugal_dist.sharding.collectives import Ranks

T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read. The text names the file and what differs."""


class StorageError(CheckpointError):
    """The disk, not the program: full, read-only, gone, or not shared by all ranks."""


class DamagedError(CheckpointError):
    """Files are missing, cut off, changed or from different checkpoints; or it is not one of ours."""


class MismatchError(CheckpointError):
    """A sound checkpoint of another model or of other hyperparameters."""


def together(ranks: Ranks, action: Callable[[], T]) -> T:
    """``collectives.together``, where every error is that of a checkpoint. Collective."""
    return collectives.together(ranks, action, _described)


def _described(error: Exception) -> tuple[type[ValueError], str]:
    if isinstance(error, CheckpointError):
        kinds = (kind for kind in (StorageError, DamagedError, MismatchError) if isinstance(error, kind))
        return next(kinds, CheckpointError), str(error)
    if isinstance(error, OSError):
        at = error.filename2 or error.filename  # of a rename: the name that could not be taken
        place = f"{at}: " if at else ""
        return StorageError, f"{place}{error.strerror or error}"
    if isinstance(error, ValueError):
        return CheckpointError, str(error)
    return CheckpointError, f"{type(error).__name__}: {error}"
