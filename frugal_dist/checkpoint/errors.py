"""What can go wrong with a checkpoint, and how all ranks hear of it together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from frugal_dist.sharding.collectives import Ranks, gather_objects

T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read. The text names the file and what differs."""


class StorageError(CheckpointError):
    """The disk, not the program: full, read-only, gone, or not shared by all ranks."""


class DamagedError(CheckpointError):
    """Files are missing, cut off, changed or from different checkpoints; or it is not one of ours."""


class MismatchError(CheckpointError):
    """A sound checkpoint of another model or of other hyperparameters."""


_KINDS = {kind.__name__: kind for kind in (CheckpointError, StorageError, DamagedError, MismatchError)}


def together(ranks: Ranks, action: Callable[[], T]) -> T:
    """Run ``action`` everywhere; this rank's result, or the first rank's error on all ranks alike. Collective.

    ``action`` must not communicate: a rank whose action fails does not wait for the others.
    """
    result, trouble, cause = None, None, None
    try:
        result = action()
    except Exception as error:  # whatever it is: a rank that raises alone leaves the others hanging
        trouble, cause = _described(error), error
    for rank, found in enumerate(gather_objects(ranks, trouble)):
        if found is not None:
            kind, text = found
            raise _KINDS[kind](text if ranks.alone else f"rank {rank}: {text}") from cause
    return cast("T", result)


def _described(error: Exception) -> tuple[str, str]:
    if isinstance(error, CheckpointError):
        return next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _KINDS), str(error)
    if isinstance(error, OSError):
        at = error.filename2 or error.filename  # of a rename: the name that could not be taken
        place = f"{at}: " if at else ""
        return StorageError.__name__, f"{place}{error.strerror or error}"
    if isinstance(error, ValueError):
        return CheckpointError.__name__, str(error)
    return CheckpointError.__name__, f"{type(error).__name__}: {error}"
