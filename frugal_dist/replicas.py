"""Replicas must be equal bit for bit: compare fingerprints at each refresh, resynchronise if they differ."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from frugal_dist.sharding.exchange import all_to_all
from frugal_dist.sharding.tile import Tile, holders
from frugal_dist.work import Runtime, Work

_ABSENT = -(2**62)
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprints(runtime: Runtime, works: Sequence[Work]) -> list[int]:
    """Two numbers, h and -h, for every replicated tile of every work: their maxima differ iff the replicas do."""
    values = []
    for work, tile, ranks in _replicated(runtime, works):
        if runtime.ranks.rank in ranks:
            mark = _fingerprint(work.local_weight(tile))
            values += [mark, -mark]
        else:
            values += [_ABSENT, _ABSENT]
    return values


def mismatched(
    runtime: Runtime, works: Sequence[Work], agreed: Sequence[int]
) -> list[tuple[Work, Tile, tuple[int, ...]]]:
    """The replicated tiles whose copies are not equal."""
    entries = _replicated(runtime, works)
    return [entry for i, entry in enumerate(entries) if agreed[2 * i] != -agreed[2 * i + 1]]


def resynchronise(runtime: Runtime, broken: Sequence[tuple[Work, Tile, tuple[int, ...]]]) -> None:
    """Give every holder the first holder's weights and say so. All ranks call with the same list."""
    for work, tile, ranks in broken:
        send: list[list[Tensor]] = [[] for _ in range(runtime.ranks.size)]
        recv: list[list[Tensor]] = [[] for _ in range(runtime.ranks.size)]
        if runtime.ranks.rank == ranks[0]:
            for other in ranks[1:]:
                send[other].append(work.local_weight(tile))
        elif runtime.ranks.rank in ranks:
            recv[ranks[0]].append(work.local_weight(tile))
        all_to_all(runtime.ranks, send, recv, torch.empty(0, dtype=work.weight_dtype, device=work.device))
        if runtime.ranks.rank == 0:
            warnings.warn(
                f"{work.matrix.name}: the replicas on ranks {ranks} had different weights; all now have "
                f"rank {ranks[0]}'s. "
                "Something outside the optimizer changed one of them, or gradients were not averaged.",
                stacklevel=2,
            )


def _replicated(runtime: Runtime, works: Sequence[Work]) -> list[tuple[Work, Tile, tuple[int, ...]]]:
    return [
        (work, tile, ranks) for work in works for tile, ranks in holders(work.matrix.storage).items() if len(ranks) > 1
    ]


def _fingerprint(weight: Tensor) -> int:
    """A sum over the bits, weighted so that swapped entries show."""
    bits = weight.contiguous().view(_BITS[weight.element_size()]).view(-1).to(torch.int64)
    weights = torch.arange(bits.numel(), device=bits.device).remainder_(8191).add_(1)
    return int((bits.remainder(2**31) * weights).sum()) % (2**61)
