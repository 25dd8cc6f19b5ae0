"""The refresh of bases: gradients are gathered by their owners, each basis is computed once, then broadcast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frugal_dist.notices import notice
from frugal_dist.projection.basis import Basis, basis_of, basis_shapes
from frugal_dist.projection.definition import Drawing
from frugal_dist.projection.registry import PROJECTIONS
from frugal_dist.sharding.collectives import all_to_all
from frugal_dist.sharding.placement import owner_layout, transfers_for
from frugal_dist.sharding.redistribution import fill_buckets, limit_for_owners
from frugal_dist.sharding.tile import owned, whole
from frugal_dist.step.basis_broadcast import broadcast_bases
from frugal_dist.step.runtime import LocalMatrix, Runtime, basis_route
from frugal_dist.step.statistics import RefreshStats


def refresh_bases(runtime: Runtime, mats: Sequence[LocalMatrix]) -> None:
    """In bounded buckets, so that scratch stays small and a long SVD never runs into a collective's time-out."""
    for bucket in buckets_of(runtime, mats):
        _refresh_bucket(runtime, bucket)


def buckets_of(runtime: Runtime, mats: Sequence[LocalMatrix]) -> list[list[LocalMatrix]]:
    """The matrices that are gathered and published together."""
    buckets = []
    for dtype in sorted({mat.dtype for mat in mats}, key=str):
        same = [mat for mat in mats if mat.dtype == dtype]
        numels = [refresh_numel(runtime, mat) for mat in same]
        limit = limit_for_owners(numels, runtime.bucket_bytes // dtype.itemsize)
        buckets += [[same[i] for i in bucket] for bucket in fill_buckets(numels, limit)]
    return buckets


def refresh_numel(runtime: Runtime, mat: LocalMatrix) -> tuple[int, ...]:
    """Elements that each rank may hold for this refresh: the whole matrix at the owner, and parts that travel to it."""
    matrix = mat.matrix
    travels = owned(matrix.storage[matrix.owner], whole(matrix.rows, matrix.cols)[0]) is None
    parts = list(matrix.sizes) if travels else [0] * len(matrix.sizes)
    parts[matrix.owner] += matrix.rows * matrix.cols
    return tuple(parts)


def _refresh_bucket(runtime: Runtime, mats: Sequence[LocalMatrix]) -> None:
    """All owners compute at the same time; only then the first of them publishes."""
    gathered, warm = _gather(runtime, mats)
    computed = {
        mat.matrix.index: _compute(mat, gathered[mat.matrix.index], warm.get(mat.matrix.index), runtime.refresh_stats)
        for mat in mats
        if mat.matrix.owner == runtime.ranks.rank
    }
    for owner in range(runtime.ranks.size):
        mine = [mat for mat in mats if mat.matrix.owner == owner]
        if mine:
            broadcast_bases(runtime, mine, [computed.get(mat.matrix.index) for mat in mine], owner)


def warm_source(runtime: Runtime, mat: LocalMatrix) -> int | None:
    """The rank that has the old basis when a refresh starts from it and the owner does not; None: nothing to send."""
    matrix = mat.matrix
    starts_warm = PROJECTIONS[mat.config.projection].starts_warm(mat.config)
    if not starts_warm or mat.state.counter("refreshes") == 0:
        return None
    users = [rank for rank, tiles in enumerate(basis_route(runtime, mat).layout) if tiles]
    return None if matrix.owner in users else users[0]


def _send_warm(runtime: Runtime, mat: LocalMatrix, send: list[list[Tensor]], recv: list[list[Tensor]]) -> Basis | None:
    """Queue the old basis for its owner; returns the one that this rank, if it is the owner, will start from."""
    source, rank = warm_source(runtime, mat), runtime.ranks.rank
    if source is None:
        return mat.basis()
    if rank == source:
        basis = mat.basis()
        assert basis is not None
        send[mat.matrix.owner] += basis.parts
    if rank != mat.matrix.owner:
        return None
    shapes = basis_shapes(mat.side, mat.matrix.rows, mat.matrix.cols, mat.state.counter("size"))
    basis = basis_of({part: torch.empty(size, dtype=mat.dtype, device=mat.device) for part, size in shapes.items()})
    recv[source] += basis.parts
    return basis


def _gather(runtime: Runtime, mats: Sequence[LocalMatrix]) -> tuple[dict[int, Tensor], dict[int, Basis | None]]:
    """The whole gradients of the matrices this rank owns, and the bases that their refresh starts from."""
    ranks = runtime.ranks
    send: list[list[Tensor]] = [[] for _ in range(ranks.size)]
    recv: list[list[Tensor]] = [[] for _ in range(ranks.size)]
    gradients, landing = {}, []
    warm: dict[int, Basis | None] = {}
    travels = False
    for mat in mats:
        warm[mat.matrix.index] = _send_warm(runtime, mat, send, recv)
        travels = travels or warm_source(runtime, mat) is not None
        matrix = mat.matrix
        everything = whole(matrix.rows, matrix.cols)[0]
        home = owned(matrix.storage[matrix.owner], everything)
        if home is not None:
            if matrix.owner == ranks.rank:
                gradients[matrix.index] = mat.local_grad(home)
            continue
        travels = True
        if matrix.owner == ranks.rank:
            gradients[matrix.index] = torch.empty(matrix.rows, matrix.cols, dtype=mat.dtype, device=mat.device)
        target = owner_layout(ranks.size, matrix.owner, matrix.rows, matrix.cols)
        for move in transfers_for(matrix.held, target, ranks.rank, matrix.index):
            if move.source == ranks.rank:
                piece = mat.local_grad(move.source_tile)[move.area.within(move.source_tile)]
                if move.target == ranks.rank:
                    gradients[matrix.index][move.area.within(everything)] = piece
                else:
                    send[move.target].append(piece)
            else:
                landing.append(gradients[matrix.index][move.area.within(everything)])
                recv[move.source].append(landing[-1])
    if travels:
        all_to_all(ranks, send, recv, torch.empty(0, dtype=mats[0].dtype, device=mats[0].device))
    return gradients, warm


# --- on the owner alone: wherever and in whatever precision that works -----------------------------


def _compute(mat: LocalMatrix, grad: Tensor, warm: Basis | None, stats: RefreshStats) -> Basis | None:
    """The new basis, or None. Never raises: the other ranks are waiting for the outcome."""
    number, matrix = mat.state.counter("refreshes"), mat.matrix
    drawing = Drawing(mat.config, matrix.name, matrix.rows, matrix.cols, number, mat.side, mat.size)
    compute = PROJECTIONS[mat.config.projection].compute
    troubles = []
    for place, dtype in ((_fastest, mat.dtype), (_cpu, mat.dtype), (_cpu, torch.float64)):
        try:
            computed = compute(grad.to(place(grad), dtype), drawing, warm)
            basis = computed.moved(mat.device, mat.dtype)
            if all(bool(torch.isfinite(part).all()) for part in basis.parts):
                _count(stats, grad, basis, computed.captured)
                return basis
            troubles.append("the result is not finite")
        except Exception as error:  # whatever went wrong becomes a status; a traceback here would hang the others
            troubles.append(f"{type(error).__name__}: {error}")
    notice(f"{mat.matrix.name}: the refresh failed on its owner: {'; '.join(troubles)}")
    return None


def _fastest(grad: Tensor) -> torch.device:
    """Where the gradient lies, or the GPU if it is offloaded: a large SVD takes that one seconds, a CPU minutes.

    A GPU that this process does not use so far stays alone: whoever trains on the CPU of such a machine means it.
    """
    offloaded = grad.device.type == "cpu" and torch.cuda.is_initialized()
    return torch.device("cuda") if offloaded else grad.device


def _cpu(grad: Tensor) -> torch.device:
    return torch.device("cpu")


def _count(stats: RefreshStats, grad: Tensor, basis: Basis, captured: Tensor | None) -> None:
    """Figures are not worth a basis that was found, nor the ranks that wait for it."""
    try:
        stats.add_basis(grad.to(basis.parts[0].dtype), basis, captured)
    except Exception as error:  # no memory left, say
        notice(f"the figures of a refresh could not be computed: {type(error).__name__}: {error}")
