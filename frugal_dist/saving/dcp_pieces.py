"""What torch.distributed.checkpoint gets of divided state, so that it can load it on another number of ranks.

It takes equal keys for copies, so it gets rectangles of the whole (``Pieces``). Where the number of selected entries
changes from refresh to refresh, moments have the shape of the matrix: its template, made before loading, must fit. For
everyone else this would only be several times the bytes.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from frugal_dist.engines.pieces import Pieces
from frugal_dist.projection.registry import PROJECTIONS
from frugal_dist.sharding.shard import Box, Interval
from frugal_dist.sharding.tile import split_evenly
from frugal_dist.step.runtime import (
    CoordinatePiece,
    LocalMatrix,
    LocalParameter,
    Runtime,
    basis_extents,
    basis_route,
    cut_selection,
    extents_of,
    free_dim_of,
    local_selection,
    moment_names,
    regular_extents,
    whole_selection,
)
from frugal_dist.update.remainder import REMAINDER


def for_dcp(runtime: Runtime, mat: LocalMatrix, name: str, value: Tensor, part: bool) -> tuple[Tensor, bool]:
    """A moment as torch.distributed.checkpoint can load it on other ranks; (itself, whether it is a part) if there are
    no rectangles of it.
    """
    if mat.family == "basis" and not mat.empty:
        return (_basis_pieces(runtime, mat, value), False) if part else (value, part)
    if not isinstance(runtime.storage.part(mat.matrix.original), Box) or mat.empty:
        return value, part
    if not sizes_change(runtime, mat):
        return (_line_pieces(runtime, mat, value), False) if part else (value, part)
    dense, along = _to_dense(runtime, mat, name), free_dim_of(mat)
    if not part:
        return dense, part
    shared = runtime.shard_replicas and mat.matrix.copies > 1
    if shared and along is None:
        return dense, part
    shape, rectangles = (mat.matrix.rows, mat.matrix.cols), []
    for tile in mat.tiles:  # one, or none
        begin, view = [tile.rows[0], tile.cols[0]], dense
        if shared and along is not None:
            ranks = mat.matrix.held[tile]
            start, stop = split_evenly(dense.shape[along], len(ranks), mat.matrix.index)[
                ranks.index(runtime.ranks.rank)
            ]
            begin[along] += start
            view = dense.narrow(along, start, stop - start)
        rectangles.append((tuple(begin), view))
    return Pieces(shape, dense, rectangles), False


def _basis_pieces(runtime: Runtime, mat: LocalMatrix, value: Tensor) -> Pieces:
    """Moments in a basis, where they are computed."""
    plan, r = basis_route(runtime, mat), mat.state.counter("size")
    shape = {"right": (mat.matrix.rows, r), "left": (r, mat.matrix.cols), "full": (r, r)}[mat.side]
    rectangles, start = [], 0
    for tile, (size, _) in zip(plan.tiles, basis_extents(mat, plan, r), strict=True):
        view = value.view(-1)[start : start + prod(size)].view(size)
        begin = {"right": (tile.rows[0], 0), "left": (0, tile.cols[0]), "full": (0, 0)}[mat.side]
        rectangles.append((begin, view))
        start += prod(size)
    return Pieces(shape, value, rectangles)


def _line_pieces(runtime: Runtime, mat: LocalMatrix, value: Tensor) -> Pieces:
    """Whole rows of the selected columns. Before the first refresh zeros, as many as the density asks for now."""
    size = mat.state.counter("size") or mat.size
    pieces = cut_selection(runtime, mat, whole_selection(mat, 0, size), runtime.ranks.rank)
    heights = [piece.my_bounds[1] - piece.my_bounds[0] for piece in pieces]
    if mat.state.counter("refreshes") == 0 and value.numel() != sum(heights) * size:
        value = value.new_zeros((heights[0], size) if len(heights) == 1 else (sum(heights) * size,))
    rectangles, start = [], 0
    for piece, height in zip(pieces, heights, strict=True):
        view = value.view(-1)[start : start + height * size].view(height, size)
        rectangles.append(((piece.tile.rows[0] + piece.my_bounds[0], 0), view))
        start += view.numel()
    return Pieces((mat.matrix.rows, size), value, rectangles)


def _to_dense(runtime: Runtime, mat: LocalMatrix, name: str) -> Tensor:
    """A moment in the shape of the tile, zero elsewhere. On the CPU: as large as AdamW's moments, it may not fit
    beside the model.
    """
    if len(mat.tiles) != 1:
        return torch.zeros(0, dtype=mat.dtype, device="cpu")
    dense = torch.zeros(mat.tiles[0].height, mat.tiles[0].width, dtype=mat.dtype, device="cpu")
    if mat.state.counter("refreshes"):  # otherwise they are zeros, in whatever size the first density made them
        (piece,) = local_selection(runtime, mat).pieces
        values = torch.zeros(piece.shape, dtype=mat.dtype, device="cpu")
        (own,) = mat.state.numbers(mat.config, [piece.share(piece.rank)], only=name)[name]
        _share(piece, values).copy_(own)
        piece.selection.to(dense.device).put_(dense, values)
    return dense


def from_dense(mat: LocalMatrix, piece: CoordinatePiece, saved: Tensor) -> Tensor:
    """This rank's share of moments that were saved in the shape of the tile."""
    dense = saved.view(piece.size)
    kept = _share(piece, piece.selection.take(dense)).contiguous().clone()
    if int(torch.count_nonzero(kept)) != int(torch.count_nonzero(dense)):
        raise ValueError(
            f"{mat.matrix.name}: the loaded moments are of other entries than this run's selection. They were saved "
            "with another seed, or layers stood in another order."
        )
    return kept


def _share(piece: CoordinatePiece, values: Tensor) -> Tensor:
    start, stop = piece.my_bounds
    return values.narrow(piece.selection.free_dim, start, stop - start)


def sizes_change(runtime: Runtime, mat: LocalMatrix) -> bool:
    """Whether a refresh may change how many entries of this rank are selected. Of columns it does not, where rows are
    stored whole and are what replicas share.
    """
    boxed = isinstance(runtime.storage.part(mat.matrix.original), Box)
    coordinates = mat.family != "basis" and not mat.empty
    columns = tuple(PROJECTIONS[mat.config.projection].lines(mat.side)) == (1,)
    whole_rows = all(tile.width == mat.matrix.cols for tiles in mat.matrix.storage for tile in tiles)
    return boxed and coordinates and not (columns and free_dim_of(mat) == 0 and whole_rows)


def decoded_moments(runtime: Runtime, mat: LocalMatrix) -> dict[str, Tensor]:
    """Coded moments as numbers, by which torch.distributed.checkpoint can load them on other ranks."""
    state, names = mat.state, moment_names(mat.config)
    if state.counter("refreshes") == 0:  # zeros, in whatever size the first density made them
        return {name: state.store[state.prefix + name].to(mat.dtype) for name in names}
    values = state.flat(mat.config, extents_of(runtime, mat))
    return {name: values[name].view(state.store[state.prefix + name].shape) for name in names}


def decoded_regular(one: LocalParameter) -> dict[str, Tensor]:
    """The same of a regular parameter."""
    values = one.state.flat(one.config, regular_extents(one))
    return {name: value.view(one.weight.shape) for name, value in values.items()}


def remainder_pieces(mat: LocalMatrix, value: Tensor) -> Pieces:
    """Remainders are cut as the weights are."""
    rectangles = [
        ((tile.rows[0], tile.cols[0]), view)
        for tile, view in zip(mat.tiles, mat.state.pieces(REMAINDER, mat.shapes), strict=True)
    ]
    return Pieces((mat.matrix.rows, mat.matrix.cols), value, rectangles)


def regular_pieces(one: LocalParameter, value: Tensor) -> Pieces:
    """What is cut as a regular parameter is."""
    assert not isinstance(one.part, Interval)
    boxes = one.part.boxes(value.view(one.weight.shape))
    return Pieces(one.shape, value, [(tuple(start for start, _ in box.spans), view) for box, view in boxes])
