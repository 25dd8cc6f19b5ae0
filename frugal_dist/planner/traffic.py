"""What a step and a refresh send on one rank, and which moments change ranks at a refresh."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from frugal_dist.planner.totals import ITEM
from frugal_dist.projection.basis import basis_shapes
from frugal_dist.projection.coordinates import Selection
from frugal_dist.sharding.placement import Transfer, owner_layout, transfers_for
from frugal_dist.sharding.tile import elements, owned, whole
from frugal_dist.step import basis_broadcast, basis_refresh, column_refresh, decide, matrices
from frugal_dist.step.moments import moves_between_ranks
from frugal_dist.step.runtime import (
    CoordinatePiece,
    LocalMatrix,
    Runtime,
    basis_route,
    cut_selection,
    local_selection,
    moment_names,
    sums_of,
    whole_selection,
)


@dataclass(frozen=True)
class Bucket:
    """Matrices that travel together, by index. ``padded``: elements that each replica sends, None if none are."""

    mats: tuple[int, ...]
    padded: int | None


Calls = Sequence[Sequence[LocalMatrix]]
"""The matrices of a training step, by the calls in which they are stepped: all in one, or unit by unit in backward."""


def step_buckets(runtime: Runtime, calls: Calls) -> list[Bucket]:
    """The same on every rank."""
    buckets = []
    for mats in calls:
        for bucket in matrices.buckets_of(runtime, [mat for mat in mats if matrices.travels(runtime, mat)]):
            padded = None
            if bucket[0].matrix.replicated:
                padded = max(map(sum, zip(*(_shares(runtime, mat) for mat in bucket), strict=True)))
            buckets.append(Bucket(tuple(mat.matrix.index for mat in bucket), padded))
    return buckets


def plan_step(runtime: Runtime, mats: Sequence[LocalMatrix], buckets: Sequence[Bucket]) -> tuple[Counter[str], int]:
    """Collectives, and bytes that this rank sends."""
    calls: Counter[str] = Counter()
    sent, rank = 0, runtime.ranks.rank
    for bucket in buckets:
        members = [mats[i] for i in bucket.mats]
        routes = [basis_route(runtime, mat) for mat in members if mat.family == "basis"]
        rounds = [sums_of(runtime, mat) for mat in members]
        for asked in range(max(map(len, rounds))):
            calls["all_reduce"] += 1
            sent += sum(numbers[asked] for numbers in rounds if asked < len(numbers))
        if any(route.travels_in for route in routes):
            calls["all_to_all"] += 1
            sent += sum(away(route.gradient_in, rank) for route in routes)
        if not any(matrices.exchanges(runtime, mat) for mat in members):
            continue
        if bucket.padded is not None:
            calls["all_gather"] += 1
            sent += bucket.padded * (runtime.ranks.size - 1)
        else:
            calls["all_to_all"] += 1
            sent += sum(_sent_back(runtime, mat) for mat in members)
    return calls, ITEM * sent


def away(legs: Iterable[Transfer], rank: int) -> int:
    """Elements that ``rank`` sends to others."""
    return sum(leg.area.numel for leg in legs if leg.source == rank != leg.target)


def _shares(runtime: Runtime, mat: LocalMatrix) -> list[int]:
    """Elements of the update that each replica computes for all."""
    if mat.family == "basis":
        return [elements(tiles) for tiles in basis_route(runtime, mat).layout]
    pieces = local_selection(runtime, mat).pieces
    return [sum(prod(piece.share_shape(rank)) for piece in pieces) for rank in range(runtime.ranks.size)]


def _sent_back(runtime: Runtime, mat: LocalMatrix) -> int:
    """Elements of updates that this rank computed for others."""
    if mat.family == "basis":
        return away(basis_route(runtime, mat).update_out, runtime.ranks.rank)
    pieces = local_selection(runtime, mat).pieces
    return sum(prod(piece.mine) * (len(piece.holders) - 1) for piece in pieces)


# What a refresh sends and holds on one rank, beside the step.


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
    """What is the same on every rank: how many integers all agree on, call by call, the bytes of moments that each rank
    sends, and the matrices with bases that travel together, by position; ``numbered``: those whose bases are numbers of
    columns.
    """

    agreed: list[int]
    moves: int
    moved: list[int]
    buckets: list[list[int]]
    numbered: list[list[int]]


def common_refresh(runtime: Runtime, calls: Calls) -> CommonRefresh:
    """A refresh of all matrices, later than their first."""
    moving = [mat for mats in calls for mat in mats if moves_between_ranks(runtime, mat, (1, mat.size))]
    moved = [sum(sent) for sent in zip(*(moments_sent(runtime, mat) for mat in moving), strict=True)]
    computed, numbered = [], []
    for mats in calls:
        bases = [mat for mat in mats if mat.chooses and not mat.empty]
        computed += basis_refresh.buckets_of(runtime, [mat for mat in bases if not mat.numbered])
        numbered += matrices.buckets_of(runtime, [mat for mat in bases if mat.numbered])
    return CommonRefresh(
        [decide.numbers_agreed(runtime, mats) for mats in calls],
        len(moving),
        moved or [0] * runtime.ranks.size,
        *([[mat.matrix.index for mat in bucket] for bucket in buckets] for buckets in (computed, numbered)),
    )


def plan_refresh(runtime: Runtime, mats: Sequence[LocalMatrix], common: CommonRefresh) -> RefreshPlan:
    """That refresh on this rank."""
    plan = RefreshPlan()
    if runtime.ranks.alone:
        return plan
    plan.calls["all_reduce"] += sum(numbers > 0 for numbers in common.agreed)
    plan.calls["all_to_all"] += common.moves
    plan.sent += INTEGER * sum(common.agreed) + common.moved[runtime.ranks.rank]
    for bucket in common.buckets:
        _plan_bucket(runtime, [mats[i] for i in bucket], plan)
    for bucket in common.numbered:
        _plan_numbers(runtime, [mats[i] for i in bucket], plan)
    return plan


NUMBER, ENERGY = 4, 8
"""Bytes of the number of a column, and of what it catches."""


def _plan_numbers(runtime: Runtime, mats: Sequence[LocalMatrix], plan: RefreshPlan) -> None:
    """Gradients go to their compute tiles, as at a step; energies to the owners; numbers of columns to all."""
    rank, routes = runtime.ranks.rank, [basis_route(runtime, mat) for mat in mats]
    plan.calls["all_to_all"] += any(route.travels_in for route in routes)
    plan.sent += ITEM * sum(away(route.gradient_in, rank) for route in routes)
    arriving = sum(_arriving(route.gradient_in, rank) for route in routes)
    plan.gathered = max(plan.gathered, 2 * ITEM * arriving)  # packed, and unpacked
    told, travels = [0] * runtime.ranks.size, False
    for mat in mats:
        senders = column_refresh.senders_of(runtime, mat)
        travels = travels or senders != [mat.matrix.owner]
        if rank in senders and rank != mat.matrix.owner:
            plan.sent += ENERGY * sum(column_refresh.lengths_of(mat))
        told[mat.matrix.owner] += sum(map(prod, mat.kept_shapes(mat.size).values()))
    plan.calls["all_to_all"] += travels
    plan.calls["all_gather"] += 1
    plan.sent += NUMBER * max(told) * (runtime.ranks.size - 1)


def _plan_bucket(runtime: Runtime, mats: Sequence[LocalMatrix], plan: RefreshPlan) -> None:
    """Gradients go to their owners, and the bases that these start from and lack; then bases to those who use them."""
    rank, gathered = runtime.ranks.rank, 0
    travels = False
    for mat in mats:
        matrix, elements = mat.matrix, _basis_elements(mat)
        if (source := basis_refresh.warm_source(runtime, mat)) is not None:
            travels = True
            plan.sent += ITEM * elements * (rank == source)
            gathered += elements * ((rank == source) + 2 * (rank == matrix.owner))  # packed, and unpacked
        if owned(matrix.storage[matrix.owner], whole(matrix.rows, matrix.cols)[0]) is None:
            travels = True
            target = owner_layout(runtime.ranks.size, matrix.owner, matrix.rows, matrix.cols)
            legs = transfers_for(matrix.held, target, rank, matrix.index)
            plan.sent += ITEM * away(legs, rank)
            gathered += away(legs, rank) + _arriving(legs, rank)
            gathered += matrix.rows * matrix.cols * (rank == matrix.owner)
        if rank == matrix.owner:
            published = elements if basis_broadcast.used_by_others(runtime, mat) else 0
            plan.sent += ITEM * (1 + published)  # 1: the status
    plan.calls["all_to_all"] += travels
    plan.calls["broadcast"] += len({mat.matrix.owner for mat in mats})
    plan.gathered = max(plan.gathered, ITEM * gathered)


def _arriving(legs: Iterable[Transfer], rank: int) -> int:
    return sum(leg.area.numel for leg in legs if leg.target == rank != leg.source)


def _basis_elements(mat: LocalMatrix) -> int:
    return sum(prod(s) for s in basis_shapes(mat.side, mat.matrix.rows, mat.matrix.cols, mat.size).values())


# Moments that change ranks at a refresh of coordinates, on all ranks at once: who holds what before and after it.


def moments_sent(runtime: Runtime, mat: LocalMatrix) -> list[int]:
    """Bytes that each rank sends to others at the second refresh, by "keep" or "project". Later ones draw anew.

    Replicas that do not share send what they hold to everyone who holds it afterwards, each of them the same.
    """
    mat = replace(mat, device=torch.device("cpu"))  # what is drawn counts, also where tensors are empty
    old, new = (whole_selection(mat, refresh, mat.size) for refresh in (0, 1))
    before, after = _holder_of_each(runtime, mat, old), _holder_of_each(runtime, mat, new)
    if mat.config.on_refresh == "project":  # a moment follows its entry, with "keep" its place in R
        before, after = _by_entry(mat, old, before), _by_entry(mat, new, after)
    wanted = before[(before >= 0) & (after >= 0)]
    staying = before[(before >= 0) & (before == after)]
    size, copies = runtime.ranks.size, 1 if runtime.shard_replicas else mat.matrix.copies
    sent = copies * torch.bincount(wanted, minlength=size) - torch.bincount(staying, minlength=size)
    entry = ITEM * len(moment_names(mat.config))
    return [entry * int(sent[first]) for first in _firsts(mat, size, alone=copies == 1)]


def _firsts(mat: LocalMatrix, size: int, alone: bool) -> list[int]:
    """For every rank the first one that holds the same: itself if it is ``alone`` with its moments."""
    firsts = list(range(size))
    for ranks in () if alone else mat.matrix.held.values():
        for rank in ranks:
            firsts[rank] = ranks[0]
    return firsts


def _holder_of_each(runtime: Runtime, mat: LocalMatrix, selection: Selection) -> Tensor:
    """For every entry of R, flat, the rank that holds its moments; the first one of replicas that do not share."""
    matrix = mat.matrix
    (everything,), held = whole(matrix.rows, matrix.cols), matrix.held
    where = torch.empty(matrix.rows, matrix.cols, dtype=torch.int32, device="cpu")
    for number, tile in enumerate(held):
        where[tile.within(everything)] = number
    tiles = selection.take(where).reshape(-1)
    holders = torch.tensor([ranks[0] for ranks in held.values()], device="cpu")[tiles]
    if runtime.shard_replicas and matrix.copies > 1:
        for number, (tile, ranks) in enumerate(held.items()):
            (piece,) = (one for one in cut_selection(runtime, mat, selection, ranks[0]) if one.tile == tile)
            holders[tiles == number] = _sharers(piece)
    return holders


def _sharers(piece: CoordinatePiece) -> Tensor:
    """Which of its holders has the state of each entry of a piece, flat."""
    widths = torch.tensor([stop - start for start, stop in piece.bounds], device="cpu")
    line = torch.tensor(piece.holders, device="cpu").repeat_interleave(widths)
    lying = [-1 if dim == piece.selection.free_dim else 1 for dim in range(len(piece.shape))]
    return line.view(lying).expand(piece.shape).reshape(-1)


def _by_entry(mat: LocalMatrix, selection: Selection, held: Tensor) -> Tensor:
    """``held`` of the entries of R, as that of all entries of the matrix; -1 for those that are not selected."""
    rows, cols = mat.matrix.rows, mat.matrix.cols
    by_entry = torch.full((rows, cols), -1, dtype=held.dtype, device="cpu")
    selection.put_(by_entry, held.view(selection.shape(rows, cols)))
    return by_entry.view(-1)
