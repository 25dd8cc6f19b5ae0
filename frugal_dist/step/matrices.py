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
from frugal_dist.update.remainder import joined, keeps_remainders, split_
from frugal_dist.update.rounding import keys_of, round_stochastically_, rounds_stochastically, row_starts

Lists = list[list[Tensor]]
WIDE = 1 << 21
"""Entries of low-precision matrices that have fp32 copies at once, if it is not one larger matrix: small ones share
calls."""


def step_matrices(runtime: Runtime, works: Sequence[LocalMatrix], stepped: Sequence[LocalMatrix]) -> None:
    """Update the matrices ``stepped``; ``works`` are all of the call, so that every rank joins every exchange."""
    states = [work.state for work in stepped]
    try:
        for state in states:
            state.counts["step"] += 1
        remote = [] if runtime.ranks.alone else [work for work in works if travels(runtime, work)]
        far = {work.matrix.index for work in remote}
        _step_here(runtime, [work for work in stepped if work.matrix.index not in far] if far else stepped)
        if remote:
            active = {work.matrix.index for work in stepped}
            for bucket in buckets_of(runtime, remote):
                _step_bucket(runtime, bucket, active)
        for state in states:
            state.counts["updates"] += 1
        runtime.counters.advance(states, 2)
    except BaseException:
        for state in states:  # what they count is not what the tensors say
            state.forget()
        raise


def _rounds(work: LocalMatrix) -> bool:
    return rounds_stochastically(work.config, work.weight_dtype)


def _widens(work: LocalMatrix) -> bool:
    """Whether low-precision weights need more than one rounding to the nearest: weight decay by itself would be lost
    below their last place.
    """
    return work.weight_dtype != work.dtype and (work.decay != 0.0 or _rounds(work) or keeps_remainders(work.config))


def _widened(work: LocalMatrix) -> LocalMatrix:
    """The matrix with fp32 weights of its own for the time of the step, where a step is more than one rounding."""
    if not _widens(work):
        return work
    remainders = remainders_of(work)
    if remainders is not None:  # all in fp32, as it would be with masters
        weights = [joined(*pair) for pair in zip(work.weights, remainders, strict=True)]
        grads = None if work.grads is None else [grad.to(work.dtype) for grad in work.grads]
        return replace(work, weights=weights, grads=grads, weight_dtype=work.dtype)
    return replace(work, weights=[weight.float() for weight in work.weights])


def _round_back(work: LocalMatrix, wide: LocalMatrix) -> None:
    if wide is work:
        return
    remainders = remainders_of(work)
    if remainders is not None:
        for weight, rest, exact in zip(work.weights, remainders, wide.weights, strict=True):
            split_(weight, rest, exact)
        return
    matrix, updates = work.matrix, work.state.counts["updates"]
    stochastic = _rounds(work)
    for tile, weight, value in zip(work.tiles, work.weights, wide.weights, strict=True):
        if not stochastic:
            weight.copy_(value)
            continue
        starts = row_starts((tile.rows, tile.cols), (matrix.rows, matrix.cols), weight.device)
        round_stochastically_(weight, value, starts, seed=work.config.seed, name=matrix.name, step=updates)


def _decay(work: LocalMatrix) -> None:
    for weight in work.weights:
        decay_(weight, work.config.lr, work.decay)


# --- matrices that compute where they are stored ---------------------------------------------------


def _step_here(runtime: Runtime, works: Sequence[LocalMatrix]) -> None:
    """All together; a few at a time what needs fp32 weights for its step, as no kernel rounds it by itself."""
    alone: list[LocalMatrix] = []
    together: list[LocalMatrix] = []
    for work in works:
        narrow = work.weight_dtype is not work.dtype and _widens(work)
        by_itself = narrow and (keeps_remainders(work.config) or not all(map(rounds_once, _updates(runtime, [work]))))
        (alone if by_itself else together).append(work)
    step_tiles(_updates(runtime, together))
    for bucket in fill_buckets([(sum(weight.numel() for weight in work.weights),) for work in alone], WIDE):
        works = [alone[i] for i in bucket]
        wides = [_widened(work) for work in works]
        step_tiles(_updates(runtime, wides))
        for work, wide in zip(works, wides, strict=True):
            _round_back(work, wide)


def _updates(runtime: Runtime, works: Sequence[LocalMatrix]) -> list[TileUpdate]:
    """What there is to do. Nearly always one tile for a matrix: nothing is called for it here."""
    found: list[TileUpdate] = []
    cuts = runtime.cuts
    for work in works:
        if work.family == "basis":
            found += _basis_updates(runtime, work, work.decay)
            continue
        counts, config, decay, grads = work.state.counts, work.config, work.decay, work.grads
        assert grads is not None
        cut = cuts.get(work.matrix.index)
        if cut is None or cut.key != (counts["refreshes"], counts["size"], work.device):
            cut = local_selection(runtime, work)
        step = counts["step"]
        noises = _noises(work) if work.weight_dtype is not work.dtype else None
        moments = [()] * len(grads) if cut.nothing else work.state.moments(config, cut.extents)
        for k, grad in enumerate(grads):
            selection, noise = None if cut.nothing else cut.pieces[k].selection, None if noises is None else noises[k]
            found.append(TileUpdate(work.weights[k], grad, selection, moments[k], step, decay, config, noise))
    return found


def _noises(work: LocalMatrix) -> list[Noise | None]:
    """How each tile is rounded by a kernel that can; to the nearest where its weights are fp32 copies by now."""
    if not _rounds(work) or any(weight.dtype != work.weight_dtype for weight in work.weights):
        return [None] * len(work.tiles)
    keys = keys_of(work.config.seed, work.matrix.name, work.state.counts["updates"])
    cols = work.matrix.cols
    return [Noise(keys, tile.rows[0] * cols + tile.cols[0], cols) for tile in work.tiles]


def _basis_updates(runtime: Runtime, work: LocalMatrix, decay: float) -> list[TileUpdate]:
    """The compute tiles of a basis projection whose weights are here and nowhere else."""
    plan, basis, grads, found = basis_route(runtime, work), work.basis(), work.grads, []
    assert grads is not None
    moments = basis_moments(runtime, work, plan)
    for tile, home, here, moment in zip(plan.tiles, plan.home, plan.in_place, moments, strict=True):
        if here:
            assert basis is not None and home is not None
            position = work.tiles.index(home)
            weight, grad = work.weights[position], grads[position]
            if tile is not home and tile != home:
                area = tile.within(home)
                weight, grad = weight[area], grad[area]
            step = work.state.counts["step"]
            kind = None, basis, work.side, (work.matrix.rows, work.matrix.cols), work.free()
            found.append(TileUpdate(weight, grad, None, moment, step, decay, work.config, *kind))
    return found


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


def travels(runtime: Runtime, work: LocalMatrix) -> bool:
    """Whether any rank exchanges anything for this matrix; the same answer on every rank.

    A matrix that never was refreshed is not stepped by anyone.
    """
    if runtime.ranks.alone or work.empty or work.state.counter("refreshes") == 0:
        return False
    return exchanges(runtime, work) or bool(sums_of(runtime, work))


def exchanges(runtime: Runtime, work: LocalMatrix) -> bool:
    """Whether updates of this matrix go from rank to rank; gradients do only where they do."""
    if work.family == "basis":
        plan = basis_route(runtime, work)
        return plan.travels_in or plan.travels_out
    if not runtime.shard_replicas or work.matrix.copies == 1:
        return False
    return not local_selection(runtime, work).nothing


def buckets_of(runtime: Runtime, works: Sequence[LocalMatrix]) -> list[list[LocalMatrix]]:
    """Equal dtype and equal kind of collective in a bucket, bounded by ``bucket_bytes``.

    Routes and parts are fixed for the run, so the same matrices always fall into the same buckets.
    """
    key = tuple(work.matrix.index for work in works)
    if key not in runtime.buckets:
        runtime.buckets[key] = _fill(runtime, works)
    return [[works[i] for i in bucket] for bucket in runtime.buckets[key]]


def _fill(runtime: Runtime, works: Sequence[LocalMatrix]) -> list[list[int]]:
    groups: dict[tuple[str, bool], list[int]] = {}
    for i, work in enumerate(works):
        groups.setdefault((str(work.dtype), work.matrix.replicated), []).append(i)
    buckets = []
    for key in sorted(groups):
        same = groups[key]
        loads = [_load(runtime, works[i]) for i in same]
        limit = runtime.bucket_bytes // works[same[0]].dtype.itemsize
        buckets += [[same[i] for i in bucket] for bucket in fill_buckets(loads, limit)]
    return buckets


def _load(runtime: Runtime, work: LocalMatrix) -> tuple[int, ...]:
    if work.family == "basis":
        return basis_route(runtime, work).load
    return work.matrix.sizes


def _step_bucket(runtime: Runtime, works: Sequence[LocalMatrix], active: set[int]) -> None:
    ranks, like = runtime.ranks, torch.empty(0, dtype=works[0].dtype, device=works[0].device)
    narrow = {work.matrix.index: work for work in works}
    # What arrives is added to weights that are not stepped here, too: another rank may have had a gradient.
    works = [_widened(work) if work.matrix.index in active or keeps_remainders(work.config) else work for work in works]
    for work in works:
        if work.matrix.index in active:
            _decay(work)
    gradients = fetch_gradients(runtime, works, like)
    directed = _directed(runtime, works, gradients, active, like)
    packing = Packing(ranks.size)
    for work in works:
        if work.family == "basis":
            deltas = directed.get(work.matrix.index)
            packing.parcels.append(_basis_parcel(runtime, work, gradients, work.matrix.index in active, deltas))
        else:
            packing.parcels.append(_coordinate_parcel(runtime, work, work.matrix.index in active))
    if not any(exchanges(runtime, work) for work in works):
        pass  # sums were all they had to tell each other
    elif works[0].matrix.replicated:
        mine = packing.merged("send")[ranks.rank]
        all_gather(ranks, mine, packing.merged("recv"), like)
    else:
        all_to_all(ranks, packing.merged("send"), packing.merged("recv"), like)
    for parcel, work in zip(packing.parcels, works, strict=True):
        parcel.finish()
        _round_back(narrow[work.matrix.index], work)


def fetch_gradients(runtime: Runtime, works: Sequence[LocalMatrix], like: Tensor) -> dict[tuple[int, Tile], Tensor]:
    """The gradients of compute tiles that are not part of one local storage tile."""
    ranks = runtime.ranks
    send: Lists = [[] for _ in range(ranks.size)]
    recv: Lists = [[] for _ in range(ranks.size)]
    found: dict[tuple[int, Tile], Tensor] = {}
    plans = [(work, basis_route(runtime, work)) for work in works if work.family == "basis"]
    for work, plan in plans:
        for tile, home in zip(plan.tiles, plan.home, strict=True):
            if home is None:
                found[work.matrix.index, tile] = torch.empty(
                    tile.height, tile.width, dtype=like.dtype, device=like.device
                )
        for move in plan.gradient_in:
            if move.source == ranks.rank:
                piece = work.local_grad(move.source_tile)[move.area.within(move.source_tile)]
                if move.target == ranks.rank:
                    found[work.matrix.index, move.target_tile][move.area.within(move.target_tile)] = piece
                else:
                    send[move.target].append(piece)
            else:
                target = found[work.matrix.index, move.target_tile]
                recv[move.source].append(target[move.area.within(move.target_tile)])
    if any(plan.travels_in for _, plan in plans):
        all_to_all(ranks, send, recv, like)
    return found


def _directed(
    runtime: Runtime,
    works: Sequence[LocalMatrix],
    gradients: dict[tuple[int, Tile], Tensor],
    active: set[int],
    like: Tensor,
) -> dict[int, dict[Tile, Tensor]]:
    """The updates, by matrix and compute tile, by rules that ask for sums over what lies on several ranks.

    All matrices ask together, each time in one packed all-reduce. A rank without a gradient or a tile adds nothing.
    """
    asking: dict[int, list[Sums]] = {}
    tiles: dict[int, list[Tile]] = {}
    for work in works:
        if not sums_of(runtime, work):
            continue
        index, part = work.matrix.index, part_of(runtime, work)
        jobs = _jobs(runtime, work, basis_route(runtime, work), gradients) if index in active else {}
        tiles[index] = list(jobs)
        asking[index] = [lines_delta(job, part.cut) for job in jobs.values()]
        if not jobs:
            empty = without_tile(work.config.treatment, part, work.state.counter("size"), like, work.config)
            asking[index] = [empty]
    found: dict[int, list[Tensor]] = {index: [] for index in asking}
    answers: dict[int, Tensor | None] = dict.fromkeys(asking)
    while answers:
        sums: dict[int, Tensor] = {}
        for index, answer in answers.items():
            for rule in asking[index]:
                try:
                    asked = next(rule) if answer is None else rule.send(answer)
                    sums[index] = sums[index] + asked if index in sums else asked
                except StopIteration as done:
                    found[index].append(done.value)
        totals = add_up(runtime.ranks, list(sums.values()), like)
        answers = dict(zip(sums, totals, strict=True))
    return {index: dict(zip(tiles[index], found[index], strict=False)) for index in found}


def _basis_parcel(
    runtime: Runtime,
    work: LocalMatrix,
    gradients: dict[tuple[int, Tile], Tensor],
    active: bool,
    directed: dict[Tile, Tensor] | None,
) -> PendingUpdate:
    """Compute this rank's tiles; send each holder of a tile its part of the update. ``directed``: it is known."""
    plan, rank = basis_route(runtime, work), runtime.ranks.rank
    if active and directed is None:
        step_tiles(_basis_updates(runtime, work, 0.0))  # their weights have decayed, with those of all other tiles
    elif active and directed is not None:
        for tile, home, here in zip(plan.tiles, plan.home, plan.in_place, strict=True):
            if here:
                assert home is not None
                work.local_weight(home)[tile.within(home)].add_(directed[tile])
    deltas = _deltas(runtime, work, plan, gradients, active, directed)
    if plan.gathered:
        return _gathered_parcel(runtime, work, plan, deltas)
    send: Lists = [[] for _ in range(runtime.ranks.size)]
    recv: Lists = [[] for _ in range(runtime.ranks.size)]
    arrivals: list[tuple[Tile, Tile, Tensor]] = []
    for move in plan.update_out:
        if move.source == rank:
            piece = deltas[move.source_tile][move.area.within(move.source_tile)]
            if move.target != rank:
                send[move.target].append(piece)
        else:
            piece = torch.empty(move.area.height, move.area.width, dtype=work.dtype, device=work.device)
            recv[move.source].append(piece)
        if move.target == rank:
            arrivals.append((move.target_tile, move.area, piece))
    return PendingUpdate(send, recv, lambda: _add_all(work, arrivals))


def _gathered_parcel(
    runtime: Runtime, work: LocalMatrix, plan: RedistributionPlan, deltas: dict[Tile, Tensor]
) -> PendingUpdate:
    """Replicas: everyone gets everyone's update, so all add identical bits."""
    home = work.tiles[0]
    send: Lists = [[] for _ in range(runtime.ranks.size)]
    send[runtime.ranks.rank] = [deltas[tile] for tile in plan.tiles]
    recv = [
        [torch.empty(tile.height, tile.width, dtype=work.dtype, device=work.device) for tile in tiles]
        for tiles in plan.layout
    ]
    arrivals = [
        (home, tile, piece)
        for tiles, pieces in zip(plan.layout, recv, strict=True)
        for tile, piece in zip(tiles, pieces, strict=True)
    ]
    return PendingUpdate(send, recv, lambda: _add_all(work, arrivals))


def _add_all(work: LocalMatrix, arrivals: Sequence[tuple[Tile, Tile, Tensor]]) -> None:
    for home, area, piece in arrivals:
        work.local_weight(home)[area.within(home)].add_(piece)


def _deltas(
    runtime: Runtime,
    work: LocalMatrix,
    plan: RedistributionPlan,
    gradients: dict[tuple[int, Tile], Tensor],
    active: bool,
    directed: dict[Tile, Tensor] | None,
) -> dict[Tile, Tensor]:
    """The updates of the compute tiles that are not stepped in place; zeros for a matrix that is skipped."""
    remote = [tile for tile, here in zip(plan.tiles, plan.in_place, strict=True) if not here]
    if not active:
        return {tile: torch.zeros(tile.height, tile.width, dtype=work.dtype, device=work.device) for tile in remote}
    if directed is not None:
        return {tile: directed[tile] for tile in remote}
    jobs = _jobs(runtime, work, plan, gradients)
    return {tile: basis_delta(jobs[tile]) for tile in remote}


def _jobs(
    runtime: Runtime, work: LocalMatrix, plan: RedistributionPlan, gradients: dict[tuple[int, Tile], Tensor]
) -> dict[Tile, TileUpdate]:
    """The compute tiles of a matrix that is stepped; their weights may be elsewhere."""
    found: dict[Tile, TileUpdate] = {}
    basis: Basis | None = work.basis()
    moments = basis_moments(runtime, work, plan) if plan.tiles else []
    for tile, home, moment in zip(plan.tiles, plan.home, moments, strict=True):
        assert basis is not None
        key = (work.matrix.index, tile)
        grad = gradients[key] if home is None else work.local_grad(home)[tile.within(home)]
        # One tile writes what the rule keeps; the others read it as it was.
        free = {name: value.clone() for name, value in work.free().items()} if found else work.free()
        kind = None, basis, work.side, (work.matrix.rows, work.matrix.cols), free
        found[tile] = TileUpdate(grad, grad, None, moment, work.state.counts["step"], 0.0, work.config, *kind)
    return found


def _coordinate_parcel(runtime: Runtime, work: LocalMatrix, active: bool) -> PendingUpdate:
    """Each holder of a tile computes its share of the state-full update; the state-free step is everybody's own."""
    ranks = runtime.ranks
    cut = local_selection(runtime, work)
    pieces, moments = cut.pieces, work.state.moments(work.config, cut.extents)
    gathered = work.matrix.replicated
    send: Lists = [[] for _ in range(ranks.size)]
    recv: Lists = [[] for _ in range(ranks.size)]
    updates = []
    for position, (piece, moment) in enumerate(zip(pieces, moments, strict=True)):
        update = torch.zeros(piece.shape, dtype=work.dtype, device=work.device)
        updates.append(update)
        share = torch.zeros(piece.mine, dtype=work.dtype, device=work.device)
        if active and work.grads is not None:
            grad, counter = work.grads[position], work.state.counts["step"]
            share = coordinate_share(grad, piece.selection, piece.my_bounds, moment, counter, work.config)
        _post(piece, share, update, send, recv, gathered)
    return PendingUpdate(send, recv, lambda: _finish_coordinates(work, pieces, updates, active))


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
    work: LocalMatrix, pieces: Sequence[CoordinatePiece], updates: Sequence[Tensor], active: bool
) -> None:
    if not active or work.grads is None:
        return
    for piece, weight, grad, update in zip(pieces, work.weights, work.grads, updates, strict=True):
        add_coordinates_(weight, grad, piece.selection, update, work.config)
