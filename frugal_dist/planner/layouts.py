"""Which part of every parameter each engine gives to a rank, from shapes alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

from frugal_dist.planner.mesh import mesh_parts, read_sizes
from frugal_dist.sharding.shard import Box, Interval, LocalShard, ParamSpec

Parts = list[LocalShard]
ALIGNMENT = 2
"""ZeRO-1/2 pad a group to this many elements per rank (nccl_start_alignment_factor of DeepSpeed)."""


@dataclass(frozen=True)
class EngineLayout:
    """``parts(originals, rank, ranks)``; ``shares``: whether replicas share the low-rank state by default.

    ``masters``: whether fp32 weights are kept beside the model's own. ``cuts_*``: what a rank holds its part of only.
    """

    name: str
    parts: Callable[[Sequence[ParamSpec], int, int], Parts]
    shares: bool
    masters: bool
    cuts_weights: bool
    cuts_gradients: bool
    copies: int = 1
    """How many ranks work on the same rows of a batch: those of tensor parallelism."""


def engine_layout(name: str) -> EngineLayout:
    """The engine of this name: single, ddp, fsdp2, hsdp:4 (4 ranks share a copy), zero0-3, or a mesh of several axes
    (``read_sizes``). ValueError otherwise.
    """
    sizes = read_sizes(name)
    if sizes is not None:
        return EngineLayout(
            name,
            lambda o, rank, ranks: mesh_parts(sizes.filled(name, ranks), o, rank, ranks),
            True,
            False,
            True,
            True,
            sizes.tensor,
        )
    hybrid = re.fullmatch(r"hsdp:(\d+)", name)
    if hybrid:
        shards = int(hybrid.group(1))
        return EngineLayout(
            name, lambda o, rank, ranks: _rows(o, *_shard(rank, ranks, shards)), True, False, True, True
        )
    if name not in ENGINES:
        raise ValueError(
            f"engine is {name!r}; choose one of {', '.join(ENGINES)} or hsdp:SHARDS, such as hsdp:8, or "
            "a mesh, such as fsdp2:4xtp:2, hsdp:2x4xtp:2 or fsdp2xep:2."
        )
    return ENGINES[name]


def _shard(rank: int, ranks: int, shards: int) -> tuple[int, int]:
    if shards < 1 or ranks % shards:
        raise ValueError(f"engine hsdp:{shards}: {ranks} ranks do not divide into groups of {shards}.")
    return rank % shards, shards


def _whole(originals: Sequence[ParamSpec], rank: int, ranks: int) -> Parts:
    return [Box(tuple((0, size) for size in original.shape)) for original in originals]


def _rows(originals: Sequence[ParamSpec], rank: int, ranks: int) -> Parts:
    """FSDP2 cuts dim 0 as torch.chunk does: equal parts, rounded up, the last ones short or empty."""
    parts: Parts = []
    for original in originals:
        length = original.shape[0]
        share = -(-length // ranks)
        span = (min(rank * share, length), min((rank + 1) * share, length))
        parts.append(Box((span, *((0, size) for size in original.shape[1:]))))
    return parts


def _flat_groups(originals: Sequence[ParamSpec], rank: int, ranks: int) -> Parts:
    """ZeRO-1/2 cut the concatenation of each group into equal intervals."""
    share = {group: _share(originals, group, ranks) for group in {original.group for original in originals}}
    offset = dict.fromkeys(share, 0)
    parts: Parts = []
    for original in originals:
        size, group = prod(original.shape), original.group
        start = rank * share[group] - offset[group]
        parts.append(Interval(min(max(start, 0), size), min(max(start + share[group], 0), size)))
        offset[group] += size
    return parts


def _share(originals: Sequence[ParamSpec], group: int, ranks: int) -> int:
    total = sum(prod(original.shape) for original in originals if original.group == group)
    unit = ALIGNMENT * ranks
    return -(-total // unit) * ALIGNMENT


def _flat_each(originals: Sequence[ParamSpec], rank: int, ranks: int) -> Parts:
    """ZeRO-3 cuts each parameter into equal intervals, rounded up."""
    parts: Parts = []
    for original in originals:
        size = prod(original.shape)
        share = -(-size // ranks)
        parts.append(Interval(min(rank * share, size), min((rank + 1) * share, size)))
    return parts


ENGINES = {
    "single": EngineLayout("single", _whole, True, False, False, False),
    "ddp": EngineLayout("ddp", _whole, True, False, False, False),
    "fsdp2": EngineLayout("fsdp2", _rows, True, False, True, True),
    "zero0": EngineLayout("zero0", _whole, False, True, False, False),
    "zero1": EngineLayout("zero1", _flat_groups, True, True, False, False),
    "zero2": EngineLayout("zero2", _flat_groups, True, True, False, True),
    "zero3": EngineLayout("zero3", _flat_each, True, True, True, True),
}
