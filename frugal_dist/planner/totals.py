"""State of all ranks at once, from layouts alone: going through a thousand ranks one by one would take an hour."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from frugal_dist.config import FrugalConfig
from frugal_dist.projection.coordinates import NOTHING, Selection
from frugal_dist.projection.numerics import compute_dtype
from frugal_dist.sharding.shard import LocalShard
from frugal_dist.sharding.tile import split_evenly, whole
from frugal_dist.step.inputs import StepInputs
from frugal_dist.step.runtime import (
    CoordinatePiece,
    LocalMatrix,
    Runtime,
    basis_route,
    part_extents,
    tile_extents,
    whole_selection,
)
from frugal_dist.step.state import COUNTERS, FREE, MatrixState
from frugal_dist.update.moment_storage import Extent, entry_bytes
from frugal_dist.update.remainder import keeps_remainders
from frugal_dist.update.rules import STATE_FULL

ITEM = 4
"""Bytes of an fp32 number: masters, moments, bases and what travels."""
LOW = 2
"""Bytes of a remainder."""


def state_of_ranks(runtime: Runtime, inputs: StepInputs, parts: Sequence[Sequence[LocalShard]]) -> list[int]:
    """Bytes of optimizer state on every rank after the first refresh. ``parts``: of each rank, by parameter."""
    state_bytes = [0] * runtime.ranks.size
    for mat in inputs.mats:
        counters, kept = counter_bytes(mat.state), LOW * keeps_remainders(mat.config)
        for rank, held in enumerate(mat.matrix.sizes):
            state_bytes[rank] += kept * held
        for rank, size in enumerate(_bases(runtime, mat) if _has_basis(mat) else _coordinates(runtime, mat)):
            state_bytes[rank] += counters + size
    numbers = [i for i, original in enumerate(runtime.originals) if not original.projected]
    for i, one in zip(numbers, inputs.regular, strict=True):
        counters, dtype = counter_bytes(one.state), compute_dtype(one.weight.dtype)
        kept = LOW * keeps_remainders(one.config)
        for rank, mine in enumerate(parts):
            moments = _moments(one.config, part_extents(one.config, mine[i], one.shape), dtype)
            state_bytes[rank] += counters + moments + kept * prod(mine[i].local_shape)
    return state_bytes


def papers_bytes(inputs: StepInputs) -> int:
    """State as the papers count it: the moments of the whole model, once; no bases, no counters."""
    total = sum(_moments(one.config, [Extent(one.shape)]) for one in inputs.regular)
    for mat in inputs.mats:
        rows, cols = mat.matrix.rows, mat.matrix.cols
        if _has_basis(mat):
            extents = tile_extents(mat.side, whole(rows, cols), mat.size)
        else:
            extents = [Extent(_selection(mat).shape(rows, cols))]
        total += _moments(mat.config, extents)
    return total


def _moments(config: FrugalConfig, extents: Sequence[Extent], dtype: torch.dtype = torch.float32) -> int:
    return entry_bytes(config.form, STATE_FULL[config.state_full].names, extents, dtype)


def counter_bytes(state: MatrixState) -> int:
    """Of the counters, which every rank has."""
    return sum(tensor.element_size() for tensor in map(state.get, COUNTERS) if tensor is not None)


def _has_basis(mat: LocalMatrix) -> bool:
    return mat.family == "basis" and not mat.empty


def _bases(runtime: Runtime, mat: LocalMatrix) -> list[int]:
    """Moments and bases of a matrix on every rank."""
    side, r = mat.side, mat.size  # looked up once, not for each of a thousand ranks
    shapes = mat.kept_shapes(r).values()
    basis = mat.basis_dtype.itemsize * sum(prod(shape) for shape in shapes)
    shape = mat.matrix.rows, mat.matrix.cols
    basis += mat.dtype.itemsize * sum(prod(FREE[name][0](*shape)) for name in mat.config.keeps)
    layout = basis_route(runtime, mat).layout
    moments = [_moments(mat.config, tile_extents(side, tiles, r), mat.dtype) for tiles in layout]
    return [size + basis * bool(tiles) for size, tiles in zip(moments, layout, strict=True)]


def _coordinates(runtime: Runtime, mat: LocalMatrix) -> list[int]:
    """Moments of a matrix on every rank; those that hold the same tile share them, or each has all."""
    moment_bytes = [0] * runtime.ranks.size
    selection = _selection(mat)
    for tile, ranks in mat.matrix.held.items():
        local = selection.local(tile)
        shape, dim = local.shape(tile.height, tile.width), local.free_dim
        begin = selection.begin(tile) if mat.config.form.blocky else 0
        shares = split_evenly(shape[dim], len(ranks), mat.matrix.index)
        bounds = shares if runtime.shard_replicas else [(0, shape[dim])] * len(ranks)
        piece = CoordinatePiece(tile, local, shape, ranks, tuple(bounds), ranks[0], begin)
        for rank in ranks:
            moment_bytes[rank] += _moments(mat.config, [piece.share(rank)], mat.dtype)
    return moment_bytes


def _selection(mat: LocalMatrix) -> Selection:
    return NOTHING if mat.empty else whole_selection(mat, 0, mat.size)
