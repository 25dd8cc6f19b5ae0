"""The refresh of bases that are columns of a fixed matrix: ranks add up what the columns catch of their tiles.

No gradient is gathered and no basis sent, beside what every step moves to its compute tiles: owners get a number for
each column from each rank that computes, choose, and tell all ranks the numbers of the columns. They decide ties, so
ranks never differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frugal_dist.notices import notice
from frugal_dist.projection.basis import Basis, basis_of, down
from frugal_dist.projection.dictionary import column_energies, largest
from frugal_dist.sharding.collectives import all_gather, all_to_all
from frugal_dist.sharding.tile import Tile, holders
from frugal_dist.step.basis_broadcast import adopt, count_failure
from frugal_dist.step.matrices import buckets_of, fetch_gradients
from frugal_dist.step.runtime import LocalMatrix, Runtime, basis_route

_FAILED = -1
"""In the place of the number of a column."""


def refresh_columns(runtime: Runtime, mats: Sequence[LocalMatrix]) -> None:
    """In the buckets of steps, which bound what is gathered of gradients."""
    for bucket in buckets_of(runtime, mats):
        _refresh_bucket(runtime, bucket)


def senders_of(runtime: Runtime, mat: LocalMatrix) -> list[int]:
    """The ranks that add to the energies of a matrix: the first that computes each tile."""
    return sorted({ranks[0] for ranks in holders(basis_route(runtime, mat).layout).values()})


def lengths_of(mat: LocalMatrix) -> list[int]:
    """Of how many columns each part of the basis is chosen."""
    length = {"left": mat.matrix.rows, "right": mat.matrix.cols}
    return [length[part] for part in parts_of(mat)]


def parts_of(mat: LocalMatrix) -> list[str]:
    """The parts of the basis, in the order in which they travel."""
    return list(mat.kept_shapes(mat.size))


def _refresh_bucket(runtime: Runtime, mats: Sequence[LocalMatrix]) -> None:
    ranks, like = runtime.ranks, torch.empty(0, dtype=mats[0].dtype, device=mats[0].device)
    fetched = {} if ranks.alone else fetch_gradients(runtime, mats, like)
    grads = {mat.matrix.index: _counted(runtime, mat, fetched) for mat in mats}
    sums = _added(runtime, mats, [_energies(mat, grads[mat.matrix.index]) for mat in mats])
    chosen = _told(runtime, mats, [_choose(runtime, mat, total) for mat, total in zip(mats, sums, strict=True)])
    first = torch.stack([basis.parts[0][0] for basis in chosen]).tolist()
    for mat, basis, number in zip(mats, chosen, first, strict=True):
        if number == _FAILED:
            count_failure(runtime, mat, mat.matrix.owner)
            continue
        if mat.side == "full":  # a whole matrix, on one rank
            _count_whole(runtime, mat, basis, grads[mat.matrix.index])
        adopt(runtime, mat, basis)


def _count_whole(runtime: Runtime, mat: LocalMatrix, basis: Basis, grads: Sequence[Tensor]) -> None:
    """Figures are not worth a basis that was chosen, nor the ranks that wait for it."""
    try:
        for grad in grads:
            caught = down(grad, mat.usable(basis).shown(mat.matrix.rows, mat.matrix.cols, mat.dtype))
            runtime.refresh_stats.add_part([grad], [caught])
    except Exception as error:  # no memory left, say
        notice(f"the figures of a refresh could not be computed: {type(error).__name__}: {error}")


def _counted(runtime: Runtime, mat: LocalMatrix, fetched: dict[tuple[int, Tile], Tensor]) -> list[Tensor]:
    """The gradients of the compute tiles that this rank is the first to have."""
    plan, rank = basis_route(runtime, mat), runtime.ranks.rank
    held = holders(plan.layout)
    return [
        fetched[mat.matrix.index, tile] if home is None else mat.local_grad(home)[tile.within(home)].to(mat.dtype)
        for tile, home in zip(plan.tiles, plan.home, strict=True)
        if held[tile][0] == rank
    ]


def _energies(mat: LocalMatrix, grads: Sequence[Tensor]) -> Tensor:
    """What the columns of all parts catch here, one part behind the other. Never raises, as the others are waiting: NaN
    says that it failed.
    """
    total = torch.zeros(sum(lengths_of(mat)), dtype=torch.float64, device=mat.device)
    try:
        for grad in grads:
            total += torch.cat(list(column_energies(grad, mat.side).values()))
    except Exception as error:  # no memory left, say
        notice(f"{mat.matrix.name}: the refresh failed on a rank: {type(error).__name__}: {error}")
        total.fill_(torch.nan)
    return total


def _added(runtime: Runtime, mats: Sequence[LocalMatrix], mine: Sequence[Tensor]) -> list[Tensor]:
    """The energies of the whole matrices this rank owns, added in the order of the ranks; of the others its own."""
    ranks = runtime.ranks
    if ranks.alone:
        return list(mine)
    send: list[list[Tensor]] = [[] for _ in range(ranks.size)]
    recv: list[list[Tensor]] = [[] for _ in range(ranks.size)]
    arrivals: list[list[Tensor]] = [[] for _ in mats]
    travels = False
    for mat, own, parts in zip(mats, mine, arrivals, strict=True):
        owner = mat.matrix.owner
        for sender in senders_of(runtime, mat):
            travels = travels or sender != owner
            if owner == ranks.rank:
                parts.append(own if sender == owner else torch.empty_like(own))
                if sender != owner:
                    recv[sender].append(parts[-1])
            elif sender == ranks.rank:
                send[owner].append(own)
    if travels:
        all_to_all(ranks, send, recv, torch.empty(0, dtype=torch.float64, device=mats[0].device))
    totals = []
    for own, parts in zip(mine, arrivals, strict=True):
        total = parts[0].clone() if parts else own
        for part in parts[1:]:
            total += part
        totals.append(total)
    return totals


def _choose(runtime: Runtime, mat: LocalMatrix, energies: Tensor) -> Basis:
    """The columns that catch most; numbers that mean failure where that is not known, and room for them elsewhere.
    Never raises, as the others are waiting.
    """
    try:
        if mat.matrix.owner == runtime.ranks.rank and bool(torch.isfinite(energies).all()):
            parts = dict(zip(parts_of(mat), energies.split(lengths_of(mat)), strict=True))
            chosen = largest(parts, mat.size)
            if mat.side != "full":
                runtime.refresh_stats.add_energies(energies.sum(), energies[chosen.parts[0]].sum())
            return chosen
    except Exception as error:  # no memory left, say
        notice(f"{mat.matrix.name}: the refresh failed on its owner: {type(error).__name__}: {error}")
    return basis_of(
        {
            part: torch.full(shape, _FAILED, dtype=mat.basis_dtype, device=mat.device)
            for part, shape in mat.kept_shapes(mat.size).items()
        }
    )


def _told(runtime: Runtime, mats: Sequence[LocalMatrix], chosen: list[Basis]) -> list[Basis]:
    """What every owner chose, on all ranks."""
    ranks = runtime.ranks
    if not ranks.alone:
        recv: list[list[Tensor]] = [[] for _ in range(ranks.size)]
        for mat, basis in zip(mats, chosen, strict=True):
            recv[mat.matrix.owner] += basis.parts
        mine = [part.clone() for part in recv[ranks.rank]]
        all_gather(ranks, mine, recv, torch.empty(0, dtype=torch.int32, device=mats[0].device))
    return chosen
