"""What a refresh sends and holds on one rank, beside the step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod

from frugal_dist import refresh
from frugal_dist.moments import moves_between_ranks
from frugal_dist.planner.moves import moments_sent
from frugal_dist.planner.steps import away
from frugal_dist.planner.totals import ITEM
from frugal_dist.projection.basis import basis_shapes
from frugal_dist.sharding.plan import Move, moves_for, owner_layout
from frugal_dist.sharding.tile import owned, whole
from frugal_dist.work import Runtime, Work

INTEGER = 8
"""Bytes of what ranks agree on."""


@dataclass
class RefreshPlan:
    """``calls`` counts collectives; ``sent`` and ``gathered`` are bytes.

    ``gathered``: what the rank holds at most of gradients, and of bases that a refresh starts from, on their way to
    their owners, and as an owner.
    """

    calls: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    gathered: int = 0


@dataclass(frozen=True)
class CommonRefresh:
    """What is the same on every rank: how many integers all agree on, the bytes of moments that each rank sends, and
    the matrices with bases that travel together, by position.
    """

    agreed: int
    moves: int
    moved: list[int]
    buckets: list[list[int]]


def common_refresh(runtime: Runtime, works: Sequence[Work]) -> CommonRefresh:
    """A refresh of all matrices, later than their first."""
    moving = [work for work in works if moves_between_ranks(runtime, work, (1, work.size))]
    moved = [sum(sent) for sent in zip(*(moments_sent(runtime, work) for work in moving), strict=True)]
    bases = [work for work in works if work.family == "basis" and not work.empty]
    position = {work.matrix.index: i for i, work in enumerate(works)}
    return CommonRefresh(
        refresh.numbers_agreed(runtime, works),
        len(moving),
        moved or [0] * runtime.ranks.size,
        [[position[work.matrix.index] for work in bucket] for bucket in refresh.buckets_of(runtime, bases)],
    )


def plan_refresh(runtime: Runtime, works: Sequence[Work], common: CommonRefresh) -> RefreshPlan:
    """That refresh on this rank."""
    found = RefreshPlan()
    if runtime.ranks.alone:
        return found
    found.calls["all_reduce"] += common.agreed > 0
    found.calls["all_to_all"] += common.moves
    found.sent += INTEGER * common.agreed + common.moved[runtime.ranks.rank]
    for bucket in common.buckets:
        _plan_bucket(runtime, [works[i] for i in bucket], found)
    return found


def _plan_bucket(runtime: Runtime, works: Sequence[Work], found: RefreshPlan) -> None:
    """Gradients go to their owners, and the bases that these start from and lack; then bases to those who use them."""
    rank, gathered = runtime.ranks.rank, 0
    travels = False
    for work in works:
        matrix, elements = work.matrix, _basis_elements(work)
        if (source := refresh.warm_source(runtime, work)) is not None:
            travels = True
            found.sent += ITEM * elements * (rank == source)
            gathered += elements * ((rank == source) + 2 * (rank == matrix.owner))  # packed, and unpacked
        if owned(matrix.storage[matrix.owner], whole(matrix.rows, matrix.cols)[0]) is None:
            travels = True
            target = owner_layout(runtime.ranks.size, matrix.owner, matrix.rows, matrix.cols)
            legs = moves_for(matrix.held, target, rank, matrix.index)
            found.sent += ITEM * away(legs, rank)
            gathered += away(legs, rank) + _arriving(legs, rank)
            gathered += matrix.rows * matrix.cols * (rank == matrix.owner)
        if rank == matrix.owner:
            published = elements if refresh.used_by_others(runtime, work) else 0
            found.sent += ITEM * (1 + published)  # 1: the status
    found.calls["all_to_all"] += travels
    found.calls["broadcast"] += len({work.matrix.owner for work in works})
    found.gathered = max(found.gathered, ITEM * gathered)


def _arriving(legs: Iterable[Move], rank: int) -> int:
    return sum(leg.area.numel for leg in legs if leg.target == rank != leg.source)


def _basis_elements(work: Work) -> int:
    return sum(prod(s) for s in basis_shapes(work.side, work.matrix.rows, work.matrix.cols, work.size).values())
