"""The step of all matrices of one call: what is stored where it computes first, then the rest in packed exchanges.

Which matrices communicate, in which buckets and with what sizes follows from the table alone; a rank without a gradient
sends zeros and takes part all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from frugal_dist.projection.basis import Basis
from frugal_dist.sharding.collectives import add_up, all_gather, all_to_all
from frugal_dist.sharding.redistribution import RedistributionPlan, fill_buckets
from frugal_dist.sharding.tile import Tile
from frugal_dist.step.runtime import (
    CoordinatePiece,
    LocalMatrix,
    Runtime,
    basis_moments,
    basis_route,
    local_selection,
    part_of,
    remainders_of,
    sums_of,
)
from frugal_dist.update.kernels.jobs import Noise, TileUpdate
from frugal_dist.update.lines import Sums, without_tile
from frugal_dist.update.local import (
    add_coordinates_,
    basis_delta,
    coordinate_share,
    decay_,
    lines_delta,
    rounds_once,
    step_tiles,
)
from frugal_dist.update.precision import Rounded, narrow_, widened
from frugal_dist.update.remainder import keeps_remainders
from frugal_dist.update.stochastic_rounding import keys_of, rounds_stochastically

Lists = list[list[Tensor]]
WIDE = 1 << 21
"""Entries of low-precision matrices that have fp32 copies at once, if it is not one larger matrix: small ones share
calls."""


def step_matrices(runtime: Runtime, mats: Sequence[LocalMatrix], stepped: Sequence[LocalMatrix]) -> None:
    """Update the matrices ``stepped``; ``mats`` are all of the call, so that every rank joins every exchange."""
    states = [mat.state for mat in stepped]
    try:
        for state in states:
            state.counts["step"] += 1
        remote = [] if runtime.ranks.alone else [mat for mat in mats if travels(runtime, mat)]
        far = {mat.matrix.index for mat in remote}
        _step_here(runtime, [mat for mat in stepped if mat.matrix.index not in far] if far else stepped)
        if remote:
            active = {mat.matrix.index for mat in stepped}
            for bucket in buckets_of(runtime, remote):
                _step_bucket(runtime, bucket, active)
        for state in states:
            state.counts["updates"] += 1
        runtime.counters.advance(states, 2)
    except BaseException:
        for state in states:  # what they count is not what the tensors say
            state.forget()
        raise


def _rounds(mat: LocalMatrix) -> bool:
    return rounds_stochastically(mat.config, mat.weight_dtype)


def _widens(mat: LocalMatrix) -> bool:
    """Whether low-precision weights need more than one rounding to the nearest: weight decay by itself would be lost
    below their last place.
    """
    return mat.weight_dtype != mat.dtype and (mat.decay != 0.0 or _rounds(mat) or keeps_remainders(mat.config))


def _widened(mat: LocalMatrix) -> LocalMatrix:
    """The matrix with fp32 weights of its own for the time of the step, where a step is more than one rounding."""
    if not _widens(mat):
        return mat
    remainders = remainders_of(mat)
    if remainders is None:
        return replace(mat, weights=[widened(weight, None) for weight in mat.weights])
    weights = [widened(*pair) for pair in zip(mat.weights, remainders, strict=True)]
    grads = None if mat.grads is None else [grad.to(mat.dtype) for grad in mat.grads]  # in fp32, as with masters
    return replace(mat, weights=weights, grads=grads, weight_dtype=mat.dtype)


def _round_back(mat: LocalMatrix, wide: LocalMatrix) -> None:
    if wide is mat:
        return
    matrix = mat.matrix
    remainders: Sequence[Tensor | None] = remainders_of(mat) or [None] * len(mat.weights)
    whose = Rounded(mat.config, matrix.name, (matrix.rows, matrix.cols), mat.state.counts["updates"])
    for tile, weight, value, rest in zip(mat.tiles, mat.weights, wide.weights, remainders, strict=True):
        narrow_(weight, value, rest, whose, [((tile.rows, tile.cols), weight, value)])


def _decay(mat: LocalMatrix) -> None:
    for weight in mat.weights:
        decay_(weight, mat.config.lr, mat.decay)


# --- matrices that compute where they are stored ---------------------------------------------------


def _step_here(runtime: Runtime, mats: Sequence[LocalMatrix]) -> None:
    """All together; a few at a time what needs fp32 weights for its step, as no kernel rounds it by itself."""
    alone: list[LocalMatrix] = []
    together: list[LocalMatrix] = []
    updates: list[TileUpdate] = []
    for mat in mats:
        if mat.weight_dtype is mat.dtype or not _widens(mat):
            together.append(mat)
            continue
        own = [] if keeps_remainders(mat.config) else _updates(runtime, [mat])
        if own and all(map(rounds_once, own)):
            updates += own
        else:
            alone.append(mat)
    step_tiles([*_updates(runtime, together), *updates])
    if not alone:
        return
    for bucket in fill_buckets([(sum(weight.numel() for weight in mat.weights),) for mat in alone], WIDE):
        mats = [alone[i] for i in bucket]
        wides = [_widened(mat) for mat in mats]
        step_tiles(_updates(runtime, wides))
        for mat, wide in zip(mats, wides, strict=True):
            _round_back(mat, wide)


def _updates(runtime: Runtime, mats: Sequence[LocalMatrix]) -> list[TileUpdate]:
    """What there is to do. Nearly always one tile for a matrix: nothing is called for it here."""
    updates: list[TileUpdate] = []
    cuts = runtime.cuts
    for mat in mats:
        if mat.family == "basis":
            updates += _basis_updates(runtime, mat, mat.decay)
            continue
        counts, config, decay, grads = mat.state.counts, mat.config, mat.decay, mat.grads
        assert grads is not None
        cut = cuts.get(mat.matrix.index)
        if cut is None or cut.key != (counts["refreshes"], counts["size"], mat.device):
            cut = local_selection(runtime, mat)
        step = counts["step"]
        noises = _noises(mat) if mat.weight_dtype is not mat.dtype else None
        moments = [()] * len(grads) if cut.nothing else mat.state.moments(config, cut.extents)
        for k, grad in enumerate(grads):
            selection, noise = None if cut.nothing else cut.pieces[k].selection, None if noises is None else noises[k]
            updates.append(TileUpdate(mat.weights[k], grad, selection, moments[k], step, decay, config, noise))
    return updates


def _noises(mat: LocalMatrix) -> list[Noise | None]:
    """How each tile is rounded by a kernel that can; to the nearest where its weights are fp32 copies by now."""
    if not _rounds(mat) or any(weight.dtype != mat.weight_dtype for weight in mat.weights):
        return [None] * len(mat.tiles)
    keys = keys_of(mat.config.seed, mat.matrix.name, mat.state.counts["updates"])
    cols = mat.matrix.cols
    return [Noise(keys, tile.rows[0] * cols + tile.cols[0], cols) for tile in mat.tiles]


def _basis_updates(runtime: Runtime, mat: LocalMatrix, decay: float) -> list[TileUpdate]:
    """The compute tiles of a basis projection whose weights are here and nowhere else."""
    plan, basis, grads, updates = basis_route(runtime, mat), mat.basis(), mat.grads, []
    assert grads is not None
    moments = basis_moments(runtime, mat, plan)
    for tile, home, here, moment in zip(plan.tiles, plan.home, plan.in_place, moments, strict=True):
        if here:
            assert basis is not None and home is not None
            position = mat.tiles.index(home)
            weight, grad = mat.weights[position], grads[position]
            if tile is not home and tile != home:
                area = tile.within(home)
                weight, grad = weight[area], grad[area]
            step = mat.state.counts["step"]
            kind = None, basis, mat.side, (mat.matrix.rows, mat.matrix.cols), mat.free()
            updates.append(TileUpdate(weight, grad, None, moment, step, decay, mat.config, *kind))
    return updates


# --- matrices that need an exchange ----------------------------------------------------------------


@dataclass
class PendingUpdate:
    """What one matrix sends and receives, per rank; ``finish`` runs when everything has arrived."""

    send: Lists
    recv: Lists
    finish: Callable[[], None]


@dataclass
class Packing:
    """All parcels of a bucket, in matrix order."""

    size: int
    parcels: list[PendingUpdate] = field(default_factory=list)

    def merged(self, which: str) -> Lists:
        lists: Lists = [[] for _ in range(self.size)]
        for parcel in self.parcels:
            for rank, pieces in enumerate(getattr(parcel, which)):
                lists[rank].extend(pieces)
        return lists


def travels(runtime: Runtime, mat: LocalMatrix) -> bool:
    """Whether any rank exchanges anything for this matrix; the same answer on every rank.

    A matrix that never was refreshed is not stepped by anyone.
    """
    if runtime.ranks.alone or mat.empty or mat.state.counter("refreshes") == 0:
        return False
    return exchanges(runtime, mat) or bool(sums_of(runtime, mat))


def exchanges(runtime: Runtime, mat: LocalMatrix) -> bool:
    """Whether updates of this matrix go from rank to rank; gradients do only where they do."""
    if mat.family == "basis":
        plan = basis_route(runtime, mat)
        return plan.travels_in or plan.travels_out
    if not runtime.shard_replicas or mat.matrix.copies == 1:
        return False
    return not local_selection(runtime, mat).nothing


def buckets_of(runtime: Runtime, mats: Sequence[LocalMatrix]) -> list[list[LocalMatrix]]:
    """Equal dtype and equal kind of collective in a bucket, bounded by ``bucket_bytes``.

    Routes and parts are fixed for the run, so the same matrices always fall into the same buckets.
    """
    key = tuple(mat.matrix.index for mat in mats)
    if key not in runtime.buckets:
        runtime.buckets[key] = _fill(runtime, mats)
    return [[mats[i] for i in bucket] for bucket in runtime.buckets[key]]


def _fill(runtime: Runtime, mats: Sequence[LocalMatrix]) -> list[list[int]]:
    groups: dict[tuple[str, bool], list[int]] = {}
    for i, mat in enumerate(mats):
        groups.setdefault((str(mat.dtype), mat.matrix.replicated), []).append(i)
    buckets = []
    for key in sorted(groups):
        same = groups[key]
        numels = [_numel_per_rank(runtime, mats[i]) for i in same]
        limit = runtime.bucket_bytes // mats[same[0]].dtype.itemsize
        buckets += [[same[i] for i in bucket] for bucket in fill_buckets(numels, limit)]
    return buckets


def _numel_per_rank(runtime: Runtime, mat: LocalMatrix) -> tuple[int, ...]:
    if mat.family == "basis":
        return basis_route(runtime, mat).numel_per_rank
    return mat.matrix.sizes


def _step_bucket(runtime: Runtime, mats: Sequence[LocalMatrix], active: set[int]) -> None:
    ranks, like = runtime.ranks, torch.empty(0, dtype=mats[0].dtype, device=mats[0].device)
    narrow = {mat.matrix.index: mat for mat in mats}
    # What arrives is added to weights that are not stepped here, too: another rank may have had a gradient.
    mats = [_widened(mat) if mat.matrix.index in active or keeps_remainders(mat.config) else mat for mat in mats]
    for mat in mats:
        if mat.matrix.index in active:
            _decay(mat)
    gradients = fetch_gradients(runtime, mats, like)
    directed = _directed(runtime, mats, gradients, active, like)
    packing = Packing(ranks.size)
    for mat in mats:
        if mat.family == "basis":
            deltas = directed.get(mat.matrix.index)
            packing.parcels.append(_basis_parcel(runtime, mat, gradients, mat.matrix.index in active, deltas))
        else:
            packing.parcels.append(_coordinate_parcel(runtime, mat, mat.matrix.index in active))
    if not any(exchanges(runtime, mat) for mat in mats):
        pass  # sums were all they had to tell each other
    elif mats[0].matrix.replicated:
        mine = packing.merged("send")[ranks.rank]
        all_gather(ranks, mine, packing.merged("recv"), like)
    else:
        all_to_all(ranks, packing.merged("send"), packing.merged("recv"), like)
    for parcel, mat in zip(packing.parcels, mats, strict=True):
        parcel.finish()
        _round_back(narrow[mat.matrix.index], mat)


def fetch_gradients(runtime: Runtime, mats: Sequence[LocalMatrix], like: Tensor) -> dict[tuple[int, Tile], Tensor]:
    """The gradients of compute tiles that are not part of one local storage tile."""
    ranks = runtime.ranks
    send: Lists = [[] for _ in range(ranks.size)]
    recv: Lists = [[] for _ in range(ranks.size)]
    gradients: dict[tuple[int, Tile], Tensor] = {}
    plans = [(mat, basis_route(runtime, mat)) for mat in mats if mat.family == "basis"]
    for mat, plan in plans:
        for tile, home in zip(plan.tiles, plan.home, strict=True):
            if home is None:
                gradients[mat.matrix.index, tile] = torch.empty(
                    tile.height, tile.width, dtype=like.dtype, device=like.device
                )
        for move in plan.gradient_in:
            if move.source == ranks.rank:
                piece = mat.local_grad(move.source_tile)[move.area.within(move.source_tile)]
                if move.target == ranks.rank:
                    gradients[mat.matrix.index, move.target_tile][move.area.within(move.target_tile)] = piece
                else:
                    send[move.target].append(piece)
            else:
                target = gradients[mat.matrix.index, move.target_tile]
                recv[move.source].append(target[move.area.within(move.target_tile)])
    if any(plan.travels_in for _, plan in plans):
        all_to_all(ranks, send, recv, like)
    return gradients


def _directed(
    runtime: Runtime,
    mats: Sequence[LocalMatrix],
    gradients: dict[tuple[int, Tile], Tensor],
    active: set[int],
    like: Tensor,
) -> dict[int, dict[Tile, Tensor]]:
    """The updates, by matrix and compute tile, by rules that ask for sums over what lies on several ranks.

    All matrices ask together, each time in one packed all-reduce. A rank without a gradient or a tile adds nothing.
    """
    asking: dict[int, list[Sums]] = {}
    tiles: dict[int, list[Tile]] = {}
    for mat in mats:
        if not sums_of(runtime, mat):
            continue
        index, part = mat.matrix.index, part_of(runtime, mat)
        jobs = _jobs(runtime, mat, basis_route(runtime, mat), gradients) if index in active else {}
        tiles[index] = list(jobs)
        asking[index] = [lines_delta(job, part.cut) for job in jobs.values()]
        if not jobs:
            empty = without_tile(mat.config.treatment, part, mat.state.counter("size"), like, mat.config)
            asking[index] = [empty]
    directions: dict[int, list[Tensor]] = {index: [] for index in asking}
    answers: dict[int, Tensor | None] = dict.fromkeys(asking)
    while answers:
        sums: dict[int, Tensor] = {}
        for index, answer in answers.items():
            for rule in asking[index]:
                try:
                    asked = next(rule) if answer is None else rule.send(answer)
                    sums[index] = sums[index] + asked if index in sums else asked
                except StopIteration as done:
                    directions[index].append(done.value)
        totals = add_up(runtime.ranks, list(sums.values()), like)
        answers = dict(zip(sums, totals, strict=True))
    return {index: dict(zip(tiles[index], directions[index], strict=False)) for index in directions}


def _basis_parcel(
    runtime: Runtime,
    mat: LocalMatrix,
    gradients: dict[tuple[int, Tile], Tensor],
    active: bool,
    directed: dict[Tile, Tensor] | None,
) -> PendingUpdate:
    """Compute this rank's tiles; send each holder of a tile its part of the update. ``directed``: it is known."""
    plan, rank = basis_route(runtime, mat), runtime.ranks.rank
    if active and directed is None:
        step_tiles(_basis_updates(runtime, mat, 0.0))  # their weights have decayed, with those of all other tiles
    elif active and directed is not None:
        for tile, home, here in zip(plan.tiles, plan.home, plan.in_place, strict=True):
            if here:
                assert home is not None
                mat.local_weight(home)[tile.within(home)].add_(directed[tile])
    deltas = _deltas(runtime, mat, plan, gradients, active, directed)
    if plan.gathered:
        return _gathered_parcel(runtime, mat, plan, deltas)
    send: Lists = [[] for _ in range(runtime.ranks.size)]
    recv: Lists = [[] for _ in range(runtime.ranks.size)]
    arrivals: list[tuple[Tile, Tile, Tensor]] = []
    for move in plan.update_out:
        if move.source == rank:
            piece = deltas[move.source_tile][move.area.within(move.source_tile)]
            if move.target != rank:
                send[move.target].append(piece)
        else:
            piece = torch.empty(move.area.height, move.area.width, dtype=mat.dtype, device=mat.device)
            recv[move.source].append(piece)
        if move.target == rank:
            arrivals.append((move.target_tile, move.area, piece))
    return PendingUpdate(send, recv, lambda: _add_all(mat, arrivals))


def _gathered_parcel(
    runtime: Runtime, mat: LocalMatrix, plan: RedistributionPlan, deltas: dict[Tile, Tensor]
) -> PendingUpdate:
    """Replicas: everyone gets everyone's update, so all add identical bits."""
    home = mat.tiles[0]
    send: Lists = [[] for _ in range(runtime.ranks.size)]
    send[runtime.ranks.rank] = [deltas[tile] for tile in plan.tiles]
    recv = [
        [torch.empty(tile.height, tile.width, dtype=mat.dtype, device=mat.device) for tile in tiles]
        for tiles in plan.layout
    ]
    arrivals = [
        (home, tile, piece)
        for tiles, pieces in zip(plan.layout, recv, strict=True)
        for tile, piece in zip(tiles, pieces, strict=True)
    ]
    return PendingUpdate(send, recv, lambda: _add_all(mat, arrivals))


def _add_all(mat: LocalMatrix, arrivals: Sequence[tuple[Tile, Tile, Tensor]]) -> None:
    for home, area, piece in arrivals:
        mat.local_weight(home)[area.within(home)].add_(piece)


def _deltas(
    runtime: Runtime,
    mat: LocalMatrix,
    plan: RedistributionPlan,
    gradients: dict[tuple[int, Tile], Tensor],
    active: bool,
    directed: dict[Tile, Tensor] | None,
) -> dict[Tile, Tensor]:
    """The updates of the compute tiles that are not stepped in place; zeros for a matrix that is skipped."""
    remote = [tile for tile, here in zip(plan.tiles, plan.in_place, strict=True) if not here]
    if not active:
        return {tile: torch.zeros(tile.height, tile.width, dtype=mat.dtype, device=mat.device) for tile in remote}
    if directed is not None:
        return {tile: directed[tile] for tile in remote}
    jobs = _jobs(runtime, mat, plan, gradients)
    return {tile: basis_delta(jobs[tile]) for tile in remote}


def _jobs(
    runtime: Runtime, mat: LocalMatrix, plan: RedistributionPlan, gradients: dict[tuple[int, Tile], Tensor]
) -> dict[Tile, TileUpdate]:
    """The compute tiles of a matrix that is stepped; their weights may be elsewhere."""
    jobs: dict[Tile, TileUpdate] = {}
    basis: Basis | None = mat.basis()
    moments = basis_moments(runtime, mat, plan) if plan.tiles else []
    for tile, home, moment in zip(plan.tiles, plan.home, moments, strict=True):
        assert basis is not None
        key = (mat.matrix.index, tile)
        grad = gradients[key] if home is None else mat.local_grad(home)[tile.within(home)]
        # One tile writes what the rule keeps; the others read it as it was.
        free = {name: value.clone() for name, value in mat.free().items()} if jobs else mat.free()
        kind = None, basis, mat.side, (mat.matrix.rows, mat.matrix.cols), free
        jobs[tile] = TileUpdate(grad, grad, None, moment, mat.state.counts["step"], 0.0, mat.config, *kind)
    return jobs


def _coordinate_parcel(runtime: Runtime, mat: LocalMatrix, active: bool) -> PendingUpdate:
    """Each holder of a tile computes its share of the state-full update; the state-free step is everybody's own."""
    ranks = runtime.ranks
    cut = local_selection(runtime, mat)
    pieces, moments = cut.pieces, mat.state.moments(mat.config, cut.extents)
    gathered = mat.matrix.replicated
    send: Lists = [[] for _ in range(ranks.size)]
    recv: Lists = [[] for _ in range(ranks.size)]
    updates = []
    for position, (piece, moment) in enumerate(zip(pieces, moments, strict=True)):
        update = torch.zeros(piece.shape, dtype=mat.dtype, device=mat.device)
        updates.append(update)
        share = torch.zeros(piece.mine, dtype=mat.dtype, device=mat.device)
        if active and mat.grads is not None:
            grad, counter = mat.grads[position], mat.state.counts["step"]
            share = coordinate_share(grad, piece.selection, piece.my_bounds, moment, counter, mat.config)
        _post(piece, share, update, send, recv, gathered)
    return PendingUpdate(send, recv, lambda: _finish_coordinates(mat, pieces, updates, active))


def _post(piece: CoordinatePiece, share: Tensor, update: Tensor, send: Lists, recv: Lists, gathered: bool) -> None:
    for holder, (start, stop) in zip(piece.holders, piece.bounds, strict=True):
        window = update.narrow(piece.selection.free_dim, start, stop - start)
        if holder == piece.rank:
            window.copy_(share)
            if gathered:
                send[holder].append(share)
                recv[holder].append(window)
        else:
            recv[holder].append(window)
            if not gathered:
                send[holder].append(share)


def _finish_coordinates(
    mat: LocalMatrix, pieces: Sequence[CoordinatePiece], updates: Sequence[Tensor], active: bool
) -> None:
    if not active or mat.grads is None:
        return
    for piece, weight, grad, update in zip(pieces, mat.weights, mat.grads, updates, strict=True):
        add_coordinates_(weight, grad, piece.selection, update, mat.config)
