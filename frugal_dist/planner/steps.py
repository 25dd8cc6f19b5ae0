"""What an ordinary step sends, bucket by bucket as the step packs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from frugal_dist import stepping
from frugal_dist.planner.totals import ITEM
from frugal_dist.sharding.plan import Move
from frugal_dist.sharding.tile import elements
from frugal_dist.work import Runtime, Work, basis_route, coordinate_cut


@dataclass(frozen=True)
class Bucket:
    """Matrices that travel together, by position. ``padded``: elements that each replica sends, None if none are."""

    works: tuple[int, ...]
    padded: int | None


def step_buckets(runtime: Runtime, works: Sequence[Work]) -> list[Bucket]:
    """The same on every rank."""
    position = {work.matrix.index: i for i, work in enumerate(works)}
    found = []
    for bucket in stepping.buckets_of(runtime, [work for work in works if stepping.travels(runtime, work)]):
        padded = None
        if bucket[0].matrix.replicated:
            padded = max(map(sum, zip(*(_shares(runtime, work) for work in bucket), strict=True)))
        found.append(Bucket(tuple(position[work.matrix.index] for work in bucket), padded))
    return found


def plan_step(runtime: Runtime, works: Sequence[Work], buckets: Sequence[Bucket]) -> tuple[Counter[str], int]:
    """Collectives, and bytes that this rank sends."""
    calls: Counter[str] = Counter()
    sent, rank = 0, runtime.ranks.rank
    for bucket in buckets:
        members = [works[i] for i in bucket.works]
        routes = [basis_route(runtime, work) for work in members if work.family == "basis"]
        if any(route.travels_in for route in routes):
            calls["all_to_all"] += 1
            sent += sum(away(route.gradient_in, rank) for route in routes)
        if bucket.padded is not None:
            calls["all_gather"] += 1
            sent += bucket.padded * (runtime.ranks.size - 1)
        else:
            calls["all_to_all"] += 1
            sent += sum(_sent_back(runtime, work) for work in members)
    return calls, ITEM * sent


def away(legs: Iterable[Move], rank: int) -> int:
    """Elements that ``rank`` sends to others."""
    return sum(leg.area.numel for leg in legs if leg.source == rank != leg.target)


def _shares(runtime: Runtime, work: Work) -> list[int]:
    """Elements of the update that each replica computes for all."""
    if work.family == "basis":
        return [elements(tiles) for tiles in basis_route(runtime, work).layout]
    pieces = coordinate_cut(runtime, work).pieces
    return [sum(prod(piece.share_shape(rank)) for piece in pieces) for rank in range(runtime.ranks.size)]


def _sent_back(runtime: Runtime, work: Work) -> int:
    """Elements of updates that this rank computed for others."""
    if work.family == "basis":
        return away(basis_route(runtime, work).update_out, runtime.ranks.rank)
    pieces = coordinate_cut(runtime, work).pieces
    return sum(prod(piece.mine) * (len(piece.holders) - 1) for piece in pieces)
