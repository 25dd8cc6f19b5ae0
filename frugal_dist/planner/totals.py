"""State of all ranks at once, from layouts alone: going through a thousand ranks one by one would take an hour."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from frugal_dist.projection.coordinates import NOTHING, Selection
from frugal_dist.projection.numerics import compute_dtype
from frugal_dist.sharding.shard import LocalShard
from frugal_dist.sharding.tile import split_evenly, whole
from frugal_dist.step.inputs import StepInputs
from frugal_dist.step.runtime import LocalMatrix, Runtime, basis_route, basis_tile_shapes, moment_names, whole_selection
from frugal_dist.step.state import COUNTERS, FREE, MatrixState
from frugal_dist.update.remainder import keeps_remainders

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
        entry = len(moment_names(one.config)) * compute_dtype(one.weight.dtype).itemsize
        entry += LOW * keeps_remainders(one.config)
        counters = counter_bytes(one.state)
        for rank, mine in enumerate(parts):
            found[rank] += counters + entry * prod(mine[i].local_shape)
    return found


def papers_bytes(load: StepInputs) -> int:
    """State as the papers count it: the moments of the whole model, once; no bases, no counters."""
    entries = sum(prod(one.shape) * len(moment_names(one.config)) for one in load.regular)
    for work in load.works:
        rows, cols = work.matrix.rows, work.matrix.cols
        if _has_basis(work):
            (shape,) = basis_tile_shapes(work.side, whole(rows, cols), work.size)
        else:
            shape = _selection(work).shape(rows, cols)
        entries += prod(shape) * len(moment_names(work.config))
    return ITEM * entries


def counter_bytes(state: MatrixState) -> int:
    """Of the counters, which every rank has."""
    return sum(tensor.element_size() for tensor in map(state.get, COUNTERS) if tensor is not None)


def _has_basis(work: LocalMatrix) -> bool:
    return work.family == "basis" and not work.empty


def _bases(runtime: Runtime, work: LocalMatrix) -> list[int]:
    """Moments and bases of a matrix on every rank."""
    entry = len(moment_names(work.config)) * work.dtype.itemsize
    side, r = work.side, work.size  # looked up once, not for each of a thousand ranks
    shapes = work.kept_shapes(r).values()
    basis = work.basis_dtype.itemsize * sum(prod(shape) for shape in shapes)
    shape = work.matrix.rows, work.matrix.cols
    basis += work.dtype.itemsize * sum(prod(FREE[name][0](*shape)) for name in work.config.keeps)
    layout = basis_route(runtime, work).layout
    moments = [entry * sum(prod(shape) for shape in basis_tile_shapes(side, tiles, r)) for tiles in layout]
    return [size + basis * bool(tiles) for size, tiles in zip(moments, layout, strict=True)]


def _coordinates(runtime: Runtime, work: LocalMatrix) -> list[int]:
    """Moments of a matrix on every rank; those that hold the same tile share them, or each has all."""
    found = [0] * runtime.ranks.size
    entry, selection = len(moment_names(work.config)) * work.dtype.itemsize, _selection(work)
    for tile, ranks in work.matrix.held.items():
        local = selection.local(tile)
        shape, dim = local.shape(tile.height, tile.width), local.free_dim
        line = prod(shape[:dim]) * prod(shape[dim + 1 :])
        shares = split_evenly(shape[dim], len(ranks), work.matrix.index)
        for rank, (start, stop) in zip(ranks, shares, strict=True):
            found[rank] += entry * line * (stop - start if runtime.shard_replicas else shape[dim])
    return found


def _selection(work: LocalMatrix) -> Selection:
    return NOTHING if work.empty else whole_selection(work, 0, work.size)
