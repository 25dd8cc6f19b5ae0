"""Who is missing when ranks lose each other: not every launcher tells which rank died, but the others can find out."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from typing import Any

# torch is imported inside the functions: once the terminal is protected from its output.

PATIENCE = 5.0
"""Seconds in which the ranks that live notice a loss and answer: short, as launchers give little time."""


class RankLost(RuntimeError):
    """Ranks that others waited for did not answer any more."""


class PeerFailed(RuntimeError):
    """This rank could go on, but another could not; what is to be said, another one says.

    ``mistake``: what the other met was the user's to mend, see ``is_mistake``.
    """

    def __init__(self, text: str, mistake: bool = False) -> None:
        super().__init__(text)
        self.mistake = mistake


def is_mistake(error: BaseException) -> bool:
    """Whether the user is to change something before the same command can work: exit code 2, not 1."""
    if isinstance(error, PeerFailed):
        return error.mistake
    return isinstance(error, ValueError | ImportError | FileNotFoundError | NotADirectoryError | PermissionError)


@dataclass(frozen=True)
class RollCall:
    """``store`` is one that all ranks reach; ``names`` are of all ranks, with host and process."""

    store: Any
    rank: int
    names: list[str]

    def explained(self, error: Exception) -> Exception:
        """The error that this rank met or, in place of a lost connection, who is missing.

        Every rank that fails must call this, as that is its answer to the others. Of those that live the first names
        the missing; if that is rank 0, all do.
        """
        lost = _is_about_a_connection(error)
        try:
            self._answer()
            missing = self._missing() if lost else []
        except Exception:  # the store lives with rank 0, or with its host's torchrun
            missing = [0] if lost and self.rank else []
        if not missing:
            return error
        who = ", ".join(self.names[rank] for rank in missing)
        text = f"no word from {who}: killed, out of memory, stuck, or its host is gone"
        first = min(set(range(len(self.names))).difference(missing))
        return RankLost(text) if self.rank == first or missing == [0] else PeerFailed(text)

    def _answer(self) -> None:
        self.store.set(_key(self.rank), "here")

    def _missing(self) -> list[int]:
        """The ranks that have not answered in time."""
        waiting = set(range(len(self.names)))
        end = time.monotonic() + PATIENCE
        while waiting and time.monotonic() < end:
            waiting = {rank for rank in waiting if not self.store.check([_key(rank)])}
            time.sleep(0.1)
        return sorted(waiting)


def _key(rank: int) -> str:
    return f"frugal_dist/failed/{rank}"


def _is_about_a_connection(error: Exception) -> bool:
    """Torch has its own class for NCCL's errors, none for gloo's."""
    from torch import distributed

    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def own_name(rank: int) -> str:
    """A rank as people find it."""
    return f"rank {rank} ({socket.gethostname()}, process {os.getpid()})"
