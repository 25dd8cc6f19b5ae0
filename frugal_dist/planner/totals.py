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
from frugal_dist.update.forms import Extent, entry_bytes
from frugal_dist.update.remainder import keeps_remainders
from frugal_dist.update.rules import STATE_FULL

ITEM = 4
"""Bytes of an fp32 number: masters, moments, bases and what travels."""
LOW = 2
"""Bytes of a remainder."""


def state_of_ranks(runtime: Runtime, load: StepInputs, parts: Sequence[Sequence[LocalShard]]) -> list[int]:
    """Bytes of optimizer state on every rank after the first refresh. ``parts``: of each rank, by parameter."""
    found = [0] * runtime.ranks.size
    for work in load.works:
        counters, kept = counter_bytes(work.state), LOW * keeps_remainders(work.config)
        for rank, held in enumerate(work.matrix.sizes):
            found[rank] += kept * held
        for rank, size in enumerate(_bases(runtime, work) if _has_basis(work) else _coordinates(runtime, work)):
            found[rank] += counters + size
    numbers = [i for i, original in enumerate(runtime.originals) if not original.projected]
    for i, one in zip(numbers, load.regular, strict=True):
        counters, dtype = counter_bytes(one.state), compute_dtype(one.weight.dtype)
        kept = LOW * keeps_remainders(one.config)
        for rank, mine in enumerate(parts):
            moments = _moments(one.config, part_extents(one.config, mine[i], one.shape), dtype)
            found[rank] += counters + moments + kept * prod(mine[i].local_shape)
    return found


def papers_bytes(load: StepInputs) -> int:
    """State as the papers count it: the moments of the whole model, once; no bases, no counters."""
    found = sum(_moments(one.config, [Extent(one.shape)]) for one in load.regular)
    for work in load.works:
        rows, cols = work.matrix.rows, work.matrix.cols
        if _has_basis(work):
            extents = tile_extents(work.side, whole(rows, cols), work.size)
        else:
            extents = [Extent(_selection(work).shape(rows, cols))]
        found += _moments(work.config, extents)
    return found


def _moments(config: FrugalConfig, extents: Sequence[Extent], dtype: torch.dtype = torch.float32) -> int:
    return entry_bytes(config.form, STATE_FULL[config.state_full].names, extents, dtype)


def counter_bytes(state: MatrixState) -> int:
    """Of the counters, which every rank has."""
    return sum(tensor.element_size() for tensor in map(state.get, COUNTERS) if tensor is not None)


def _has_basis(work: LocalMatrix) -> bool:
    return work.family == "basis" and not work.empty


def _bases(runtime: Runtime, work: LocalMatrix) -> list[int]:
    """Moments and bases of a matrix on every rank."""
    side, r = work.side, work.size  # looked up once, not for each of a thousand ranks
    shapes = work.kept_shapes(r).values()
    basis = work.basis_dtype.itemsize * sum(prod(shape) for shape in shapes)
    shape = work.matrix.rows, work.matrix.cols
    basis += work.dtype.itemsize * sum(prod(FREE[name][0](*shape)) for name in work.config.keeps)
    layout = basis_route(runtime, work).layout
    moments = [_moments(work.config, tile_extents(side, tiles, r), work.dtype) for tiles in layout]
    return [size + basis * bool(tiles) for size, tiles in zip(moments, layout, strict=True)]


def _coordinates(runtime: Runtime, work: LocalMatrix) -> list[int]:
    """Moments of a matrix on every rank; those that hold the same tile share them, or each has all."""
    found = [0] * runtime.ranks.size
    selection = _selection(work)
    for tile, ranks in work.matrix.held.items():
        local = selection.local(tile)
        shape, dim = local.shape(tile.height, tile.width), local.free_dim
        begin = selection.begin(tile) if work.config.form.blocky else 0
        shares = split_evenly(shape[dim], len(ranks), work.matrix.index)
        bounds = shares if runtime.shard_replicas else [(0, shape[dim])] * len(ranks)
        piece = CoordinatePiece(tile, local, shape, ranks, tuple(bounds), ranks[0], begin)
        for rank in ranks:
            found[rank] += _moments(work.config, [piece.share(rank)], work.dtype)
    return found


def _selection(work: LocalMatrix) -> Selection:
    return NOTHING if work.empty else whole_selection(work, 0, work.size)
