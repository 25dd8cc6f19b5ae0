"""What becomes of the moments at a refresh: reset, keep, or project into the new subspace."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from frugal_dist.projection.basis import Basis
from frugal_dist.projection.coordinates import Selection
from frugal_dist.projection.registry import PROJECTIONS, dim_left_free, takes_everything
from frugal_dist.sharding.collectives import all_to_all
from frugal_dist.sharding.redistribution import RedistributionPlan
from frugal_dist.sharding.tile import Tile
from frugal_dist.step.runtime import (
    CoordinatePiece,
    LocalMatrix,
    Runtime,
    basis_extents,
    cut_selection,
    same_slots,
    shares_of,
    whole_selection,
)
from frugal_dist.update.moment_storage import cut
from frugal_dist.update.rules import STATE_FULL


def carry_basis_moments(mat: LocalMatrix, plan: RedistributionPlan, new: Basis) -> None:
    """Treat the state at a basis refresh. With "keep", moments of another r (density changed) are projected."""
    state, mode, config = mat.state, mat.config.on_refresh, mat.config
    then, now = basis_extents(mat, plan, state.counter("size")), basis_extents(mat, plan, mat.size)
    old = mat.basis()
    carried: dict[str, list[Tensor]] = {}
    if old is not None and (mode == "project" or (mode == "keep" and then != now)):
        old, new = (basis.shown(mat.matrix.rows, mat.matrix.cols, mat.dtype) for basis in (old, new))
        for moment in STATE_FULL[config.state_full].moments:
            pieces = state.numbers(config, then, only=moment.name)[moment.name]
            carried[moment.name] = [moment.carry(piece, old, new) for piece in pieces]
    state.ensure_moments(config, now, mat.dtype, mat.device)
    state.write(config, now, carried)
    if mode == "reset":
        state.reset()


def may_move_between_ranks(mat: LocalMatrix) -> bool:
    """Whether "keep" may ever move moments between ranks that hold no replicas of each other."""
    coordinates = PROJECTIONS[mat.config.projection].family == "coordinates" and not mat.empty
    return coordinates and mat.config.on_refresh == "keep" and not same_slots(mat)


def moves_between_ranks(runtime: Runtime, mat: LocalMatrix, old_counters: tuple[int, int]) -> bool:
    """Whether "keep" or "project" of a coordinate projection moves moments from rank to rank at a refresh.

    Decided from the layout and agreed counts alone; ``old_counters`` are (refreshes, size) before it. "project" follows
    entries, and entries stay where they are stored; only replicas that share a list of single entries hand them around,
    or those that begin or cease to share a whole matrix, along its longer dim.
    """
    mode = _treatment(mat, old_counters)
    if runtime.ranks.alone or mat.family != "coordinates" or mode == "reset" or mat.size == 0:
        return False
    rows, cols = mat.matrix.rows, mat.matrix.cols
    if mode == "keep":
        every_slot_stays = takes_everything(mat.config, rows, cols, mat.size)
        return not (every_slot_stays or same_slots(mat))
    if not runtime.shard_replicas or mat.matrix.copies == 1:
        return False
    before, now = (dim_left_free(mat.config, rows, cols, size) for size in (old_counters[1] or mat.size, mat.size))
    return now is None or before != now


def _treatment(mat: LocalMatrix, old_counters: tuple[int, int]) -> str:
    """With another density there are other slots: then "keep" can only keep the entries that stay selected."""
    mode, (refreshes, size) = mat.config.on_refresh, old_counters
    return "project" if mode == "keep" and refreshes and size != mat.size else mode


def move_coordinate_moments(
    runtime: Runtime,
    mat: LocalMatrix,
    old: Sequence[CoordinatePiece],
    new: Sequence[CoordinatePiece],
    old_counters: tuple[int, int],
) -> None:
    """Treat the state at a coordinate or block refresh; ``old_counters`` are (refreshes, size) before it.

    keep: slot i of the new selection takes over slot i of the old one. project: entries that stay selected keep their
    moments, new ones start at zero. Blocks are always cleared.
    """
    state, config, mode = mat.state, mat.config, _treatment(mat, old_counters)
    first = old_counters[0] == 0
    now = shares_of(new)
    if first or mode == "reset" or mat.family == "blocks":
        state.ensure_moments(config, now, mat.dtype, mat.device)
        state.reset()
        return
    travels = moves_between_ranks(runtime, mat, old_counters)
    if mode == "keep" and not travels:
        return  # the same slots stay here, in the same order
    old_values = state.flat(config, shares_of(old))
    old_ids = _ids(mat, old, whole_selection(mat, old_counters[0] - 1, old_counters[1]), mode)
    new_ids = _ids(mat, new, whole_selection(mat, old_counters[0], mat.size), mode)
    for name in old_values:
        state.put(name, None)
    values = list(old_values.values())
    size = sum(prod(extent.shape) for extent in now)
    columns = [torch.zeros(size, dtype=mat.dtype, device=mat.device) for _ in values]
    _place(columns, new_ids, values, old_ids)
    if travels:
        _trade(runtime, mat, mode, old_counters, columns, new_ids, values, old_ids)
    state.ensure_moments(config, now, mat.dtype, mat.device)
    state.write(config, now, {name: cut(column, now) for name, column in zip(old_values, columns, strict=True)})


def _trade(runtime: Runtime, mat: LocalMatrix, mode: str, old_counters: tuple[int, int], columns: Sequence[Tensor],
           new_ids: Tensor, values: Sequence[Tensor], old_ids: Tensor) -> None:  # fmt: skip
    """Fetch the moments that other ranks held. Every rank draws every rank's selections, so nothing is negotiated."""
    ranks = runtime.ranks
    old_whole = whole_selection(mat, old_counters[0] - 1, old_counters[1])
    new_whole = whole_selection(mat, old_counters[0], mat.size)
    send: list[list[Tensor]] = [[] for _ in range(ranks.size)]
    recv: list[list[Tensor]] = [[] for _ in range(ranks.size)]
    landing = []
    for other in range(ranks.size):
        if other == ranks.rank:
            continue
        theirs_new = _ids(mat, cut_selection(runtime, mat, new_whole, other), new_whole, mode)
        theirs_old = _ids(mat, cut_selection(runtime, mat, old_whole, other), old_whole, mode)
        outgoing, incoming = _common(old_ids, theirs_new), _common(new_ids, theirs_old)
        send[other] = [value[_positions(old_ids, outgoing)] for value in values]
        recv[other] = [torch.empty(len(incoming), dtype=mat.dtype, device=mat.device) for _ in values]
        landing.append((incoming, recv[other]))
    all_to_all(ranks, send, recv, torch.empty(0, dtype=mat.dtype, device=mat.device))
    for incoming, buffers in landing:
        where = _positions(new_ids, incoming)
        for column, buffer in zip(columns, buffers, strict=True):
            column[where] = buffer


def _ids(mat: LocalMatrix, pieces: Sequence[CoordinatePiece], selection: Selection, mode: str) -> Tensor:
    """What each moment on a rank belongs to: a slot of R ("keep") or an entry of the matrix ("project"), flat."""
    parts = []
    for piece in pieces:
        ids = selection.slots(piece.tile) if mode == "keep" else _entries(piece, mat.matrix.cols)
        start, stop = piece.my_bounds
        parts.append(ids.reshape(piece.shape).narrow(piece.selection.free_dim, start, stop - start).reshape(-1))
    return torch.cat(parts).to(mat.device) if parts else torch.empty(0, dtype=torch.int64, device=mat.device)


def _entries(piece: CoordinatePiece, cols: int) -> Tensor:
    """Flat positions in the matrix of a piece's entries, shaped as its R."""
    tile: Tile = piece.tile
    rows = torch.arange(*tile.rows, device="cpu").view(-1, 1) * cols
    grid = rows + torch.arange(*tile.cols, device="cpu").view(1, -1)
    return piece.selection.to(torch.device("cpu")).take(grid)


def _common(a: Tensor, b: Tensor) -> Tensor:
    """Sorted common values."""
    return a[torch.isin(a, b)].sort().values


def _positions(ids: Tensor, wanted: Tensor) -> Tensor:
    """Where each of ``wanted`` stands in ``ids`` (all present)."""
    order = ids.argsort()
    return order[torch.searchsorted(ids[order], wanted)]


def _place(columns: Sequence[Tensor], new_ids: Tensor, values: Sequence[Tensor], old_ids: Tensor) -> None:
    common = _common(new_ids, old_ids)
    target, source = _positions(new_ids, common), _positions(old_ids, common)
    for column, value in zip(columns, values, strict=True):
        column[target] = value[source]
