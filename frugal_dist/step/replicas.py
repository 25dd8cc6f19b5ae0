"""Replicas must be equal bit for bit: compare fingerprints at each refresh, resynchronise if they differ.

What differs before the first refresh is no replica, and refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frugal_dist.notices import notice
from frugal_dist.sharding.collectives import all_to_all
from frugal_dist.sharding.tile import Tile
from frugal_dist.step.runtime import LocalMatrix, Runtime, remainders_of

_ABSENT = -(2**62)
_MODULUS = 2**61
_PIECE = 2**20
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprints(runtime: Runtime, mats: Sequence[LocalMatrix]) -> list[int]:
    """Two numbers, h and -h, for every replicated tile of every matrix: their maxima differ iff the replicas do."""
    entries = replicated(runtime, mats)
    looked_at = [runtime.ranks.rank in ranks and _moves(mat) for mat, _, ranks in entries]
    mine = [
        torch.stack(list(map(fingerprint, _bits(mat, tile)))).sum()
        for (mat, tile, _), look in zip(entries, looked_at, strict=True)
        if look
    ]
    together = [mark.to(mine[0].device) for mark in mine]  # a process may have a model on several GPUs
    marks = iter((torch.stack(together).cpu() % _MODULUS).tolist() if mine else [])
    values = []
    for look in looked_at:
        mark = next(marks) if look else None
        values += [_ABSENT, _ABSENT] if mark is None else [mark, -mark]
    return values


def _moves(mat: LocalMatrix) -> bool:
    """Frozen weights beside adapters are not worth reading. Who does not look agrees with everybody."""
    return not mat.frozen or mat.grads is not None


def mismatched(
    runtime: Runtime, mats: Sequence[LocalMatrix], agreed: Sequence[int]
) -> list[tuple[LocalMatrix, Tile, tuple[int, ...]]]:
    """The replicated tiles whose copies are not equal, as far as anybody looked."""
    entries = replicated(runtime, mats)
    marks = zip(agreed[::2], agreed[1::2], strict=True)
    return [entry for entry, (most, less) in zip(entries, marks, strict=True) if most not in (_ABSENT, -less)]


def resynchronise(runtime: Runtime, broken: Sequence[tuple[LocalMatrix, Tile, tuple[int, ...]]]) -> None:
    """Give every holder the first holder's weights and say so. All ranks call with the same list.

    Raises ValueError for a matrix that was never refreshed: DDP has made true replicas equal by then.
    """
    for mat, _, ranks in broken:
        if mat.state.counter("refreshes") == 0:
            raise ValueError(
                f"{mat.matrix.name}: ranks {ranks} hold different weights under this name before its first refresh. "
                "If they are replicas, broadcast rank 0's first, as DDP does; if only some ranks hold replicas, pass "
                "process_group= those. Tensor and expert parallelism with ordinary tensors are not supported."
            )
    for mat, tile, ranks in broken:
        send: list[list[Tensor]] = [[] for _ in range(runtime.ranks.size)]
        recv: list[list[Tensor]] = [[] for _ in range(runtime.ranks.size)]
        if runtime.ranks.rank == ranks[0]:
            for other in ranks[1:]:
                send[other] += _bits(mat, tile)
        elif runtime.ranks.rank in ranks:
            recv[ranks[0]] += _bits(mat, tile)
        all_to_all(runtime.ranks, send, recv, torch.empty(0, dtype=mat.weight_dtype, device=mat.device))
        if runtime.ranks.rank == 0:
            notice(
                f"{mat.matrix.name}: the replicas on ranks {ranks} had different weights; all now have "
                f"rank {ranks[0]}'s. "
                "Something outside the optimizer changed one of them, or gradients were not averaged."
            )


def _bits(mat: LocalMatrix, tile: Tile) -> list[Tensor]:
    """The weights of a tile and, as if they were of their dtype, which all backends send, their remainders."""
    remainders, weight = remainders_of(mat), mat.local_weight(tile)
    return [weight] if remainders is None else [weight, remainders[mat.tiles.index(tile)].view(weight.dtype)]


def replicated(runtime: Runtime, mats: Sequence[LocalMatrix]) -> list[tuple[LocalMatrix, Tile, tuple[int, ...]]]:
    """Every tile that more than one rank holds, with those ranks."""
    return [(mat, tile, ranks) for mat in mats for tile, ranks in mat.matrix.held.items() if len(ranks) > 1]


def fingerprint(weight: Tensor) -> Tensor:
    """A sum over the bits, weighted so that swapped entries show; in pieces, to keep the 64-bit copies small."""
    bits = weight.reshape(-1).view(_BITS[weight.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    for start in range(0, bits.numel(), _PIECE):
        piece = bits[start : start + _PIECE].to(torch.int64, copy=True).remainder_(2**31)
        places = torch.arange(start, start + piece.numel(), device=weight.device)
        total += piece.mul_(places.remainder_(8191).add_(1)).sum()
    return total
