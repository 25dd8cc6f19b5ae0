"""The only collectives of a step: packed pieces between ranks. Sizes come from agreed tables, never from tensors.

Every function is a no-op on one process. Calls go through ``torch.distributed`` at call time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The ranks that run this optimizer together. ``group`` is None for a process that is alone."""

    group: Any
    rank: int
    size: int

    @cached_property
    def alone(self) -> bool:
        return self.size == 1

    def device(self, tensor_device: torch.device) -> torch.device:
        """Where collectives on tensors of this device run: there, or where the backend can."""
        types = {device.type for device in self.group._device_types}
        if not types or tensor_device.type in types:  # a group without a list takes what it is given
            return tensor_device
        return torch.device(sorted(types)[0])


ALONE = Ranks(group=None, rank=0, size=1)


def is_initialized() -> bool:
    """Whether there is a default process group."""
    return dist.is_available() and dist.is_initialized()


def speaks() -> bool:
    """Whether this process says what concerns all ranks: the first one, also before the process group is made."""
    if is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def ranks_of(process_group: Any) -> Ranks:
    """``process_group``: "auto" (the default group if initialised), None (alone) or a ProcessGroup."""
    if isinstance(process_group, str):
        if process_group != "auto":
            raise ValueError(f"process_group={process_group!r}: use 'auto', None or a torch ProcessGroup.")
        if not is_initialized():
            return ALONE
        process_group = dist.group.WORLD
    if process_group is None:
        return ALONE
    size = dist.get_world_size(process_group)
    return ALONE if size == 1 else Ranks(process_group, dist.get_rank(process_group), size)


def global_ranks(ranks: Ranks) -> tuple[int, ...]:
    """Their numbers among all processes."""
    if ranks.alone:
        return (dist.get_rank() if is_initialized() else 0,)
    return tuple(dist.get_process_group_ranks(ranks.group))


def outlives_its_process(process_group: Any) -> bool:
    """Whether "auto" means the same ranks as ``process_group``, so that another process can find them again."""
    if process_group is None or isinstance(process_group, str):
        return True
    return is_initialized() and dist.get_world_size(process_group) == dist.get_world_size()


def gather_objects(ranks: Ranks, value: object) -> list[Any]:
    """A small ``value`` of every rank, on all of them; for set-up, saving and loading."""
    if ranks.alone:
        return [value]
    by_rank: list[Any] = [None] * ranks.size
    dist.all_gather_object(by_rank, value, group=ranks.group)
    return by_rank


def attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What ``action`` returns or raises, whatever it is: a rank that raises alone leaves the others hanging.

    Whoever calls this tells the other ranks of the error, and decides what each of them raises.
    """
    try:
        return action(), None
    except Exception as error:
        return None, error


def _as_value_error(error: Exception) -> tuple[type[ValueError], str]:
    return ValueError, str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def together(
    ranks: Ranks,
    action: Callable[[], T],
    describe: Callable[[Exception], tuple[type[ValueError], str]] = _as_value_error,
) -> T:
    """Run ``action`` everywhere; this rank's result, or the first rank's error on all ranks alike. Collective.

    Args:
        ranks: Those that call this.
        action: Must not communicate: a rank whose action fails does not wait for the others.
        describe: As what an error is raised on all ranks.
    """
    result, error = attempt(action)
    try:
        for rank, told in enumerate(gather_objects(ranks, None if error is None else describe(error))):
            if told is not None:
                kind, text = told
                raise kind(text if ranks.alone else f"rank {rank}: {text}") from error
    finally:
        del error  # its traceback leads to this frame, and to the tensors of the action's
    return cast("T", result)


def agree_max(ranks: Ranks, values: Sequence[int], device: torch.device) -> list[int]:
    """Elementwise maximum over the ranks of a short list of integers."""
    if ranks.alone or not values:
        return list(values)
    vector = torch.tensor(list(values), dtype=torch.int64, device=ranks.device(device))
    dist.all_reduce(vector, op=dist.ReduceOp.MAX, group=ranks.group)
    return [int(value) for value in vector.tolist()]


def add_up(ranks: Ranks, pieces: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """The sums of ``pieces`` over the ranks, in one collective; all list the same pieces and get the same bytes."""
    if ranks.alone or not pieces:
        return list(pieces)
    packed = _pack(pieces, like.dtype, ranks.device(like.device))
    dist.all_reduce(packed, group=ranks.group)
    sums = [torch.empty_like(piece, dtype=like.dtype) for piece in pieces]
    _unpack(packed, sums)
    return sums


def all_to_all(ranks: Ranks, send: Sequence[Sequence[Tensor]], recv: Sequence[Sequence[Tensor]], like: Tensor) -> None:
    """Send ``send[k]`` to rank k and fill ``recv[k]`` from rank k: one collective, packed in ``like``'s dtype.

    Both sides must list the same pieces in the same order. Empty lists are fine; every rank must call.
    """
    assert not send[ranks.rank] and not recv[ranks.rank], "a rank does not write to itself"
    device = ranks.device(like.device)
    outgoing = _pack([piece for pieces in send for piece in pieces], like.dtype, device)
    sizes = [sum(piece.numel() for piece in pieces) for pieces in recv]
    incoming = torch.empty(sum(sizes), dtype=like.dtype, device=device)
    dist.all_to_all_single(
        incoming,
        outgoing,
        output_split_sizes=sizes,
        input_split_sizes=[sum(piece.numel() for piece in pieces) for pieces in send],
        group=ranks.group,
    )
    _unpack(incoming, [piece for pieces in recv for piece in pieces])


def all_gather(ranks: Ranks, mine: Sequence[Tensor], recv: Sequence[Sequence[Tensor]], like: Tensor) -> None:
    """Every rank sends ``mine`` to all; ``recv[k]`` is filled from rank k, the own rank's included.

    Padded to the longest contribution, which every rank can compute from the shapes in ``recv``.
    """
    device = ranks.device(like.device)
    longest = max(sum(piece.numel() for piece in pieces) for pieces in recv)
    outgoing = torch.zeros(longest, dtype=like.dtype, device=device)
    packed = _pack(mine, like.dtype, device)
    outgoing[: packed.numel()].copy_(packed)
    incoming = torch.empty(longest * ranks.size, dtype=like.dtype, device=device)
    _gather_flat()(incoming, outgoing, group=ranks.group)
    for rank, pieces in enumerate(recv):
        _unpack(incoming[rank * longest : (rank + 1) * longest], pieces)


def _gather_flat() -> Any:
    """Newer torch (2.13) renamed all_gather_into_tensor and warns about the old name."""
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def broadcast(ranks: Ranks, source: int, pieces: Sequence[Tensor], like: Tensor) -> None:
    """Overwrite ``pieces`` on all ranks with those of group rank ``source``; the source uses the same bytes."""
    if ranks.alone or not pieces:
        return
    packed = _pack(pieces, like.dtype, ranks.device(like.device))
    dist.broadcast(packed, src=dist.get_global_rank(ranks.group, source), group=ranks.group)
    _unpack(packed, pieces)


def _pack(pieces: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    packed = torch.empty(sum(piece.numel() for piece in pieces), dtype=dtype, device=device)
    _copy(packed, pieces, outward=False)
    return packed


def _unpack(packed: Tensor, pieces: Sequence[Tensor]) -> None:
    _copy(packed, pieces, outward=True)


def _copy(packed: Tensor, pieces: Sequence[Tensor], outward: bool) -> None:
    """All at once: on a GPU one kernel for many pieces, not one for each."""
    full = [piece for piece in pieces if piece.numel()]
    parts = packed[: sum(piece.numel() for piece in full)].split([piece.numel() for piece in full])
    views = [part.view(piece.shape) for part, piece in zip(parts, full, strict=True)]
    if full:
        torch._foreach_copy_(*((full, views) if outward else (views, full)))
