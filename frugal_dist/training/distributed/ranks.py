"""The ranks of a training as a group: it is made first, so that a rank that cannot begin is not missed but heard."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, TypeVar, cast

from frugal_dist.training.distributed.place import DistEnv
from frugal_dist.training.distributed.rollcall import PeerFailed, RollCall, is_mistake, own_name
from frugal_dist.training.distributed.waiting import waiting

# torch is imported inside the functions: once the terminal is protected from its output.

T = TypeVar("T")
_JOINED = count()


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


def _met(place: DistEnv) -> tuple[Any, int, int]:
    """The store where ranks meet, this rank, their number: torch's rendezvous. ValueError if its port is taken."""
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
    ValueError if this rank has none of its own, and OthersFailed if another has none.
    """
    index, trouble = None, f"{own_name(place.rank)} sees no GPU, but others do: see nvidia-smi and CUDA_VISIBLE_DEVICES"
    try:
        if count:
            index, trouble = gpu_index(place, count), ""
    except ValueError as error:
        trouble = str(error)
    store.set(f"gpu/{place.rank}", json.dumps([count, trouble]))
    found = [json.loads(store.get(f"gpu/{rank}")) for rank in range(place.world)]
    if not any(seen for seen, _ in found):
        return None
    told = [text for _, text in found]
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


def together(action: Callable[[], T]) -> T:
    """``action()``, which communicates with nobody; if it fails on any rank, no rank goes on.

    Called by all ranks. Raises what the action raised, or OthersFailed where it worked, or where a rank before this one
    failed with the same words.
    """
    result: T | None = None
    trouble: Exception | None = None
    try:
        result = action()
    except Exception as error:  # the others must hear of it, whatever it is
        trouble = error
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
