"""The ranks of a training as a group: it is made first, so that a rank that cannot begin is not missed but heard.

What they wait for is said, who is missing is named, and what fails on one fails on all.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, TypeVar, cast

from frugal_dist.checkpoint.disk import appears
from frugal_dist.training.distributed.place import DistEnv
from frugal_dist.training.distributed.process import beside, tell

# torch is imported inside the functions: once the terminal is protected from its output.

FIRST_WORD, LATER_WORDS = 60.0, 300.0
"""Seconds until a wait says what it waits for, and between later words."""
ROLL_CALL = 5.0
"""Seconds in which the ranks that live notice a loss and answer: short, as launchers give little time."""
APPEARS_WITHIN = 10.0
"""Seconds that a network file system gets to show rank 0's new file to the other ranks."""

T = TypeVar("T")
_JOINED = count()


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


@contextmanager
def waiting(what: str, speaks: bool = True) -> Iterator[None]:
    """While this lasts: after a minute, and then every five, "waiting for WHAT"; nobody could tell it from a hang.

    Args:
        what: What is waited for, with the names of what could be wrong about it.
        speaks: Whether on the terminal; otherwise in this rank's log.
    """

    def speak(done: threading.Event) -> None:
        begin, next_word = time.monotonic(), FIRST_WORD
        while not done.wait(next_word):
            text = f"waiting for {what}, for {(time.monotonic() - begin) / 60:.0f} min"
            next_word = LATER_WORDS
            if speaks:
                tell(text)
            else:
                print(text, file=sys.stderr, flush=True)

    with beside("waiting", speak):
        yield


# --- the group -------------------------------------------------------------------------------------------------------


@contextmanager
def process_group(place: DistEnv) -> Iterator[None]:
    """The process group of these ranks, for the time of the context. A process alone needs none.

    After an error the group stays where leaving it would wait for ranks that may never come, see ``_left``.

    Raises ValueError if this rank has no GPU of its own on a machine with GPUs, and RankLost, naming it, in place of a
    broken connection to a rank that is no longer there.
    """
    from torch import distributed

    roll = _join(place) if place.world > 1 and not distributed.is_initialized() else None
    try:
        with _left():
            yield
    except Exception as error:
        told = error if roll is None else roll.explained(error)
        if told is error:
            raise
        raise told from error


@contextmanager
def _left() -> Iterator[None]:
    """Leave the process group, if there is one, at the end of the context.

    To leave NCCL's a rank waits for all others. One that has failed alone would not come to say so, nor end, while they
    sit in a collective: it keeps the group, and its process ends as it is. Gloo's is left at once, and the others hear.
    """
    from torch import distributed

    from frugal_dist.training.engines.collectives import leave

    done = False
    try:
        yield
        done = True
    finally:
        if done or (distributed.is_initialized() and _backends() <= {"gloo"}):
            leave()


def _backends() -> set[str]:
    """Of the process group, whose configuration reads "cpu:gloo,cuda:nccl" or "gloo"."""
    from torch import distributed

    return {part.rpartition(":")[2] for part in distributed.get_backend_config().split(",")}


def _join(place: DistEnv) -> RollCall:
    import torch
    from torch import distributed

    from frugal_dist.training.engines.collectives import gathered

    first, rank, world = _met(place)
    # A name of its own each time: who trains twice in a process must not meet the addresses of the time before.
    store = distributed.PrefixStore(f"training{next(_JOINED)}", first)  # type: ignore[attr-defined]
    index = _agreed_gpu(place, torch.cuda.device_count() if torch.cuda.is_available() else 0, store)
    device = None if index is None else torch.device("cuda", index)
    if device is not None:
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes the GPU of this number
    distributed.init_process_group(
        "gloo" if device is None else "cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=world, device_id=device
    )
    return RollCall(store, place.rank, gathered(own_name(place.rank)))


@cache
def _met(place: DistEnv) -> tuple[Any, int, int]:
    """The store where ranks meet, this rank, their number: torch's rendezvous. ValueError if its port is taken.

    Once per process, which may train several times: at a second meeting a quick rank would find the store of the first,
    which rank 0 is about to close.
    """
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    where = f"{place.address}:{place.port} (MASTER_ADDR, MASTER_PORT)"
    speaks = place.local_rank == 0 or place.rank == 1
    try:
        with waiting(f"all {place.world} ranks to meet at {where}, where rank 0 listens", speaks):
            met: tuple[Any, int, int] = next(rendezvous("env://"))
            return met
    except distributed.DistNetworkError as error:
        if place.rank == 0 and "EADDRINUSE" in str(error):
            text = f"MASTER_PORT={place.port} is taken on this host by another process: give a free one to all ranks."
            raise ValueError(text) from error
        raise


def _agreed_gpu(place: DistEnv, count: int, store: Any) -> int | None:
    """The GPU of this rank among ``count`` that it sees; None if no rank sees any.

    Told through the store, before there is a group: ranks with and without GPUs would wait in different ones. Raises
    ValueError if this rank has none of its own, and PeerFailed if another has none.
    """
    index, trouble = None, f"{own_name(place.rank)} sees no GPU, but others do: see nvidia-smi and CUDA_VISIBLE_DEVICES"
    try:
        if count:
            index, trouble = gpu_index(place, count), ""
    except ValueError as error:
        trouble = str(error)
    store.set(f"gpu/{place.rank}", json.dumps([count, trouble]))
    reports = [json.loads(store.get(f"gpu/{rank}")) for rank in range(place.world)]
    if not any(seen for seen, _ in reports):
        return None
    told = [text for _, text in reports]
    if trouble and told.index(trouble) == place.rank:
        raise ValueError(trouble)
    failed = [f"rank {rank} failed: {text}" for rank, text in enumerate(told) if text]
    if failed:
        raise PeerFailed("; ".join(failed))
    return index


def gpu_index(place: DistEnv, count: int) -> int:
    """The GPU of this rank among those it can see: its own one if the launcher shows it no other.

    Raises ValueError if there are fewer than ranks on this host.
    """
    if count == 1 and place.local_world > 1:
        return 0  # as with Slurm's --gpus-per-task
    if place.local_rank >= count:
        raise ValueError(
            f"rank {place.rank} is number {place.local_rank} of its host and needs a GPU of its own, but sees {count}: "
            "start as many ranks on a host as it has GPUs."
        )
    return place.local_rank


# --- who is missing when ranks lose each other: not every launcher tells, but the others can find out ----------------


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
        end = time.monotonic() + ROLL_CALL
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


# --- deciding together -----------------------------------------------------------------------------------------------


def together(action: Callable[[], T]) -> T:
    """``action()``, which communicates with nobody; if it fails on any rank, no rank goes on.

    Called by all ranks. Raises what the action raised, or PeerFailed where it worked, or where a rank before this one
    failed with the same words; ``sharding.collectives.together`` raises the first rank's error on all.
    """
    from frugal_dist.sharding.collectives import attempt

    result, trouble = attempt(action)
    agree(trouble)
    return cast(T, result)


def agree(trouble: Exception | None) -> None:
    """Tell all ranks what went wrong on this one; raises if anything went wrong on any, see ``together``."""
    from torch import distributed

    from frugal_dist.training.engines.collectives import gathered

    rank = distributed.get_rank() if distributed.is_initialized() else 0
    own = None if trouble is None else (f"{type(trouble).__name__}: {trouble}", is_mistake(trouble))
    with waiting("other ranks, which still do what this one has done; see their output.rank*.txt", speaks=rank < 2):
        told = gathered(own)
    failed = {number: one for number, one in enumerate(told) if one is not None}
    if trouble is not None and told.index(told[rank]) == rank:
        raise trouble
    if failed:
        text = "; ".join(f"rank {number} failed: {text}" for number, (text, _) in failed.items())
        raise PeerFailed(text, all(mistake for _, mistake in failed.values()))


def check_shared(folder: Path, rank: int) -> None:
    """Called by all ranks. ValueError on each host that does not see what rank 0 writes in this folder."""
    from frugal_dist.training.engines.collectives import gathered

    own = folder / f".seen-by-all-{secrets.token_hex(8)}"
    try:
        together(lambda: own.touch() if rank == 0 else None)
        name = gathered(own.name)[0]
        together(lambda: _check_seen(folder / name))
    finally:
        if rank == 0:
            with suppress(OSError):
                own.unlink(missing_ok=True)


def _check_seen(path: Path) -> None:
    if not appears(path, APPEARS_WITHIN):
        raise ValueError(
            f"{path.parent} on {socket.gethostname()} is not the folder in which rank 0 writes, so no checkpoint "
            "could be saved: choose a --folder on a file system that all hosts share."
        )
