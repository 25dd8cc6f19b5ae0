"""What one step() call works on: every matrix with its tensors of this moment, its state and its layouts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import starmap
from typing import Any

import torch
from torch import Tensor

from frugal_dist.config import HYPERPARAMETERS, FrugalConfig, config_from, python_value
from frugal_dist.projection.basis import Basis, basis_of
from frugal_dist.projection.blocks import active_blocks, active_count
from frugal_dist.projection.coordinates import NOTHING, Selection, whole_block
from frugal_dist.projection.registry import PROJECTIONS, dim_left_free, draw_selection, selection_size, undivided
from frugal_dist.sharding.collectives import Ranks
from frugal_dist.sharding.placement import FREE_DIM, compute_layout
from frugal_dist.sharding.redistribution import Redistribution, RedistributionPlan
from frugal_dist.sharding.shard import Box, Interval, LocalShard, ParamSpec, Storage
from frugal_dist.sharding.table import Matrix, Table
from frugal_dist.sharding.tile import Layout, Tile, Tiles, split_evenly
from frugal_dist.step.state import Counters, MatrixState
from frugal_dist.step.statistics import RefreshStats
from frugal_dist.update.lines import Part, sums_asked
from frugal_dist.update.moment_storage import Extent, Shape
from frugal_dist.update.remainder import REMAINDER, keeps_remainders
from frugal_dist.update.rules import STATE_FULL

_AS_THEY_ARE = frozenset((float, int, str, bool, type(None)))


@dataclass
class Agreed:
    """Counts of a matrix that all ranks agreed on, and how many calls ago.

    ``asleep``: it was frozen on all ranks, and none had a gradient; nobody is asked again before it is unfrozen.
    """

    updates: int
    refreshed_at: int
    calls: int = 0
    asleep: bool = False


@dataclass
class Site:
    """Where a parameter lies on this rank, found once: its part, and each of its matrices with this rank's tiles.

    ``direct``: its own tensor is the one tile of its one matrix. ``rows``: of its states among all counters.
    ``mats`` and ``regular`` are kept from call to call; the rest is what they were made for.
    """

    part: LocalShard
    members: list[tuple[Matrix, Tiles]]
    direct: bool
    prefixes: list[str]
    rows: list[int]
    mats: list[LocalMatrix] = field(default_factory=list)
    regular: LocalParameter | None = None
    store: dict[str, Tensor] | None = None
    config: FrugalConfig | None = None
    shape: torch.Size | None = None
    dtype: torch.dtype | None = None
    device: torch.device | None = None


@dataclass
class Runtime:
    """Everything that is fixed once the first step has seen the engine. Nothing in it is saved; all of it derives."""

    ranks: Ranks
    storage: Storage
    originals: Sequence[ParamSpec]
    table: Table
    shard_replicas: bool
    bucket_bytes: int
    routes: dict[int, RedistributionPlan] = field(default_factory=dict)
    cuts: dict[int, LocalSelection] = field(default_factory=dict)
    agreed: dict[int, Agreed] = field(default_factory=dict)
    failures: dict[int, int] = field(default_factory=dict)
    buckets: dict[tuple[int, ...], list[list[int]]] = field(default_factory=dict)
    extents: dict[int, tuple[int, RedistributionPlan, list[Extent]]] = field(default_factory=dict)
    sites: dict[int, Site] = field(default_factory=dict)
    settings: dict[int, tuple[list[Any], FrugalConfig]] = field(default_factory=dict)
    refresh_stats: RefreshStats = field(default_factory=RefreshStats)

    def give_to(self, index: int, owner: int) -> None:
        """Matrix ``index`` is computed and refreshed by ``owner``, whoever the table says."""
        matrices = list(self.table.matrices)
        matrices[index] = replace(matrices[index], owner=owner)
        self.table = replace(self.table, matrices=tuple(matrices))
        self.__dict__.pop("by_original", None)
        self.sites.clear()

    def site(self, i: int) -> Site:
        """Where parameter i lies."""
        if i not in self.sites:
            original, part = self.originals[i], self.storage.part(i)
            matrices = self.by_original.get(i, [])
            members = [(matrix, matrix.storage[self.ranks.rank]) for matrix in matrices]
            names = [matrix.name for matrix in matrices] if original.projected else [original.name]
            alone = not isinstance(part, Interval) and (original.stack == 1 or not original.projected)
            prefixes = ["" if alone else f"{name}/" for name in names]
            rows = [matrix.index for matrix in matrices]
            if not original.projected:
                rows = [len(self.table.matrices) + bisect_left(self.table.regular, i)]
            direct = isinstance(part, Box) and len(original.shape) == 2 and bool(members) and len(members[0][1]) == 1
            self.sites[i] = Site(part, members, direct, prefixes, rows)
        return self.sites[i]

    def config(self, group: int, options: dict[str, Any]) -> FrugalConfig:
        """The checked settings of a group, the same object as long as they are the same."""
        given = map(options.get, HYPERPARAMETERS)
        plain, values = _AS_THEY_ARE, []
        for value in given:
            as_it_is = type(value) in plain or (isinstance(value, tuple) and plain.issuperset(map(type, value)))
            values.append(value if as_it_is else python_value(value))
        known = self.settings.get(group)
        if known is None or known[0] != values:
            known = self.settings[group] = values, config_from(options)
        return known[1]

    @cached_property
    def counters(self) -> Counters:
        """Of all matrices and, behind them, the regular parameters."""
        return Counters(len(self.table.matrices) + len(self.table.regular))

    @cached_property
    def by_original(self) -> dict[int, list[Matrix]]:
        """The matrices of every projected parameter."""
        by_original: dict[int, list[Matrix]] = {i: [] for i, one in enumerate(self.originals) if one.projected}
        for matrix in self.table.matrices:  # an empty stack has none
            by_original[matrix.original].append(matrix)
        return by_original


@dataclass
class LocalParameter:
    """A regular parameter, or this rank's part of it; ``shape`` is the whole one's. As LocalMatrix, kept without its
    tensors.
    """

    name: str
    shape: tuple[int, ...]
    config: FrugalConfig
    decay: float
    state: MatrixState
    weight: Tensor
    grad: Tensor | None
    part: LocalShard
    frozen: bool

    @property
    def shapes(self) -> list[Shape]:
        """Of the one piece that it is here."""
        return [tuple(self.weight.shape)]

    @property
    def device(self) -> torch.device:
        """Of its weights."""
        return self.weight.device


@dataclass
class LocalMatrix:
    """One matrix, kept from call to call, with its tensors of one call: ``weights`` and ``grads`` are 2-D, one for each
    of ``tiles``, this rank's part.

    ``dtype``: of moments, bases and exchanged pieces. ``family`` and ``side`` are those of its settings at this call.
    """

    matrix: Matrix
    config: FrugalConfig
    decay: float
    state: MatrixState
    tiles: Tiles
    weights: list[Tensor]
    grads: list[Tensor] | None
    device: torch.device
    weight_dtype: torch.dtype
    frozen: bool
    dtype: torch.dtype
    family: str
    side: str

    @property
    def shapes(self) -> list[Shape]:
        """Of its tiles here."""
        return [(tile.height, tile.width) for tile in self.tiles]

    @property
    def numbered(self) -> bool:
        """Whether of bases the numbers of their columns are kept."""
        return self.chooses and PROJECTIONS[self.config.projection].dictionary is not None

    @property
    def basis_dtype(self) -> torch.dtype:
        """Of bases between refreshes; they compute in ``dtype``."""
        if self.numbered:
            return torch.int32
        return torch.bfloat16 if self.config.basis_dtype == "bf16" else self.dtype

    def kept_shapes(self, r: int) -> dict[str, Shape]:
        """Shapes of what is kept of the basis between refreshes, by part."""
        if not self.chooses:
            return {}
        return PROJECTIONS[self.config.projection].kept_shapes(self.side, self.matrix.rows, self.matrix.cols, r)

    @cached_property
    def chooses(self) -> bool:
        """Whether there is a basis to be found: not where it has no columns, or nothing is left out."""
        return self.family == "basis" and self.config.density > 0 and not undivided(self.config)

    def basis(self) -> Basis | None:
        """The basis to compute with, or None before the first refresh and on ranks that do not use it."""
        if not self.chooses:
            return self._no_choice() if self.state.counter("refreshes") else None
        kept = self.state.basis(self.side)
        return None if kept is None else self.usable(kept)

    def free(self) -> dict[str, Tensor]:
        """What the state-free rule keeps, where the matrix is whole."""
        state, keeps = self.state, self.config.keeps
        return {name: state.store[state.prefix + name] for name in keeps} if keeps else {}

    def _no_choice(self) -> Basis:
        """Everything, or no column."""
        if self.config.density > 0:
            return Basis()
        length = self.matrix.rows if self.side == "left" else self.matrix.cols
        return basis_of({self.side: torch.zeros(length, 0, dtype=self.dtype, device=self.device)})

    def usable(self, kept: Basis) -> Basis:
        """What is kept, to compute with: in ``dtype``, or with what its numbers choose from."""
        if kept.left is None and kept.right is None:
            return self._no_choice()
        part = kept.right if kept.left is None else kept.left
        if part is not None and part.dtype is self.dtype:  # nearly always; numbers of columns are integers
            return kept
        dictionary = PROJECTIONS[self.config.projection].dictionary
        return kept.to(self.dtype) if dictionary is None else Basis(kept.left, kept.right, dictionary=dictionary)

    @property
    def size(self) -> int:
        """What the next refresh will select: r, or a number of columns, rows, entries or blocks."""
        if self.family == "blocks":
            return active_count(self.config, self.matrix.blocks)
        return selection_size(self.config, self.matrix.name, self.matrix.rows, self.matrix.cols)

    def local_grad(self, tile: Tile) -> Tensor:
        """The gradient of one storage tile of this rank; zeros if there is none."""
        position = self.tiles.index(tile)
        return self.grads[position] if self.grads is not None else torch.zeros_like(self.weights[position])

    def local_weight(self, tile: Tile) -> Tensor:
        """The weights of one storage tile of this rank."""
        return self.weights[self.tiles.index(tile)]

    @property
    def empty(self) -> bool:
        return self.matrix.empty

    def is_due(self, updates: int | None = None, refreshed_at: int | None = None) -> bool:
        """Whether update number ``updates`` (from 0) starts with a refresh; by default as this rank counts.

        ``refreshed_at`` is -1 before the first. A late refresh (retry) does not shift the schedule: it only has to fall
        into the running period. Staggered matrices refresh some updates after the first of the cycle; blocks are chosen
        together, also at density 0.
        """
        counts, config = self.state.counts, self.config
        updates = counts["updates"] if updates is None else updates
        refreshed_at = counts["refreshed_at"] if refreshed_at is None else refreshed_at
        gap, shift = config.update_gap, 0
        if config.refresh_schedule == "staggered" and PROJECTIONS[config.projection].family != "blocks":
            shift = self.matrix.block * gap // self.matrix.blocks
        return refreshed_at < 0 or (updates - shift) // gap > (refreshed_at - shift) // gap


def same_slots(mat: LocalMatrix) -> bool:
    """Whether a rank keeps the same slots of R whatever is selected: columns stored at full width, rows at full height.

    Otherwise how many selected entries a rank holds changes from refresh to refresh.
    """
    chosen, whole = PROJECTIONS[mat.config.projection], (mat.matrix.rows, mat.matrix.cols)
    if chosen.family == "blocks":
        return False
    tiles = [tile for rank in mat.matrix.storage for tile in rank]
    return all((tile.height, tile.width)[dim] == whole[dim] for dim in chosen.lines(mat.side) for tile in tiles)


def free_dim_of(mat: LocalMatrix) -> int | None:
    """The dim along which a selection is the same everywhere, and replicas share it: rows of selected columns, columns
    of selected rows, the longer side of blocks and of selections of everything. None: there is none.
    """
    rows, cols = mat.matrix.rows, mat.matrix.cols
    if PROJECTIONS[mat.config.projection].family == "blocks":
        return whole_block(rows, cols).free_dim
    return dim_left_free(mat.config, rows, cols, mat.state.counter("size") or mat.size)


@dataclass(frozen=True)
class CoordinatePiece:
    """The selected entries of one storage tile, and this rank's share of their state among the tile's holders."""

    tile: Tile
    selection: Selection
    shape: Shape
    holders: tuple[int, ...]
    bounds: tuple[tuple[int, int], ...]
    rank: int
    start: int = 0
    """The column of the whole R at which the tile's part begins, where that matters."""

    @property
    def size(self) -> Shape:
        return self.tile.height, self.tile.width

    @property
    def shared(self) -> bool:
        return len(self.holders) > 1

    def share_shape(self, rank: int) -> Shape:
        start, stop = self.bounds[self._place(rank)]
        dim = self.selection.free_dim
        return (*self.shape[:dim], stop - start, *self.shape[dim + 1 :])

    def share(self, rank: int) -> Extent:
        """A rank's share of the tile's part of R."""
        along = self.selection.free_dim == len(self.shape) - 1
        return Extent(self.share_shape(rank), self.start + (self.bounds[self._place(rank)][0] if along else 0))

    @property
    def mine(self) -> Shape:
        return self.share_shape(self.rank)

    @property
    def my_bounds(self) -> tuple[int, int]:
        return self.bounds[self._place(self.rank)]

    def _place(self, rank: int) -> int:
        """Where a rank stands among the holders; with all ranks, a search for each would be quadratic."""
        all_hold = rank < len(self.holders) and self.holders[rank] == rank
        return rank if all_hold else self.holders.index(rank)


@dataclass(frozen=True)
class LocalSelection:
    """A selection on this rank. ``nothing``: no rank has a state-full entry."""

    key: tuple[int, int, torch.device]
    pieces: list[CoordinatePiece]
    nothing: bool

    @cached_property
    def extents(self) -> list[Extent]:
        """Of this rank's shares of R."""
        return shares_of(self.pieces)


def basis_route(runtime: Runtime, mat: LocalMatrix) -> RedistributionPlan:
    """Where a basis matrix computes; the same answer on every rank, and for the whole run: the state lies there."""
    if mat.matrix.index not in runtime.routes:
        runtime.routes[mat.matrix.index] = route_to(runtime, mat, basis_layout(runtime, mat))
    return runtime.routes[mat.matrix.index]


def basis_layout(runtime: Runtime, mat: LocalMatrix, choice: str | None = None) -> Layout:
    """The compute layout for the present density; ``choice`` overrides the configured one, but not the rules' needs."""
    return compute_layout(
        mat.matrix.storage,
        mat.matrix.rows,
        mat.matrix.cols,
        mat.side,
        mat.size,
        mat.matrix.index,
        mat.matrix.owner,
        "whole" if mat.config.undivided else choice or mat.config.compute_layout,
        runtime.shard_replicas,
        mat.numbered,
    )


def part_of(runtime: Runtime, mat: LocalMatrix) -> Part:
    """How the compute tiles of a basis matrix lie in it; the same on every rank."""
    divided = basis_route(runtime, mat).divided
    return Part((mat.matrix.rows, mat.matrix.cols), mat.side, FREE_DIM[mat.side] if divided else None)


def sums_of(runtime: Runtime, mat: LocalMatrix) -> tuple[int, ...]:
    """How many numbers all ranks add up at a step of this matrix, one time after the other: nothing, if no norm runs
    across what is cut.
    """
    if mat.family != "basis" or mat.empty or runtime.ranks.alone or not mat.config.by_lines:
        return ()
    if mat.state.counter("refreshes") == 0:
        return ()
    return sums_asked(mat.config.treatment, part_of(runtime, mat), mat.state.counter("size"))


def route_to(runtime: Runtime, mat: LocalMatrix, layout: Layout) -> RedistributionPlan:
    """This rank's route from storage to a compute layout."""
    return Redistribution(mat.matrix.storage, layout).route(runtime.ranks.rank, mat.matrix.index)


def whole_selection(mat: LocalMatrix, refresh: int, size: int) -> Selection:
    """The state-full entries of the whole matrix after refresh number ``refresh`` (0 first)."""
    matrix, config = mat.matrix, mat.config
    if PROJECTIONS[config.projection].family == "blocks":  # also at density 0, where earlier refreshes had active ones
        active = matrix.block in active_blocks(config, matrix.blocks, refresh, size)
        return whole_block(matrix.rows, matrix.cols) if active else NOTHING
    return draw_selection(config, matrix.name, matrix.rows, matrix.cols, refresh, size)


def local_selection(runtime: Runtime, mat: LocalMatrix) -> LocalSelection:
    """The selection of a coordinate or block projection since its last refresh, cut for this rank; drawn once."""
    refreshes, size = mat.state.counter("refreshes"), mat.state.counter("size")
    known = runtime.cuts.get(mat.matrix.index)
    key = (refreshes, size, mat.device)
    if known is None or known.key != key:
        selection = whole_selection(mat, refreshes - 1, size) if refreshes else NOTHING
        pieces = cut_selection(runtime, mat, selection, runtime.ranks.rank)
        known = LocalSelection(key, pieces, selection is NOTHING)
        runtime.cuts[mat.matrix.index] = known
    return known


def cut_selection(runtime: Runtime, mat: LocalMatrix, selection: Selection, rank: int) -> list[CoordinatePiece]:
    """The pieces of a selection on ``rank``: one per storage tile, shared evenly among the tile's holders."""
    pieces, blocky = [], mat.config.form.blocky
    for tile in mat.matrix.storage[rank]:
        ranks = mat.matrix.held[tile] if runtime.shard_replicas else (rank,)
        local = selection.local(tile)
        shape = local.shape(tile.height, tile.width)
        bounds = split_evenly(shape[local.free_dim], len(ranks), mat.matrix.index)
        start = selection.begin(tile) if blocky else 0
        pieces.append(CoordinatePiece(tile, local.to(mat.device), shape, ranks, tuple(bounds), rank, start))
    return pieces


def shares_of(pieces: Sequence[CoordinatePiece]) -> list[Extent]:
    """This rank's shares of R."""
    return [piece.share(piece.rank) for piece in pieces]


def basis_extents(mat: LocalMatrix, plan: RedistributionPlan, r: int) -> list[Extent]:
    """R on each compute tile of this rank."""
    return tile_extents(mat.side, plan.tiles, r)


def basis_moments(runtime: Runtime, mat: LocalMatrix, plan: RedistributionPlan) -> list[tuple[Tensor, ...]]:
    """The moments on each compute tile of this rank."""
    index, r = mat.matrix.index, mat.state.counts["size"]
    known = runtime.extents.get(index)
    if known is None or known[0] != r or known[1] is not plan:
        known = runtime.extents[index] = r, plan, basis_extents(mat, plan, r)
    return mat.state.moments(mat.config, known[2])


def tile_extents(side: str, tiles: Tiles, r: int) -> list[Extent]:
    """R on each of some compute tiles."""
    return [_TILE_EXTENT[side](tile, r) for tile in tiles]


_TILE_EXTENT: dict[str, Callable[[Tile, int], Extent]] = {
    "right": lambda tile, r: Extent((tile.height, r)),
    "left": lambda tile, r: Extent((r, tile.width), tile.cols[0]),
    "full": lambda tile, r: Extent((r, r)),
}


def extents_of(runtime: Runtime, mat: LocalMatrix) -> list[Extent]:
    """R on this rank since the last refresh, of which there was one."""
    if mat.family == "basis" and not mat.empty:
        return basis_extents(mat, basis_route(runtime, mat), mat.state.counter("size"))
    return local_selection(runtime, mat).extents


def regular_extents(one: LocalParameter) -> list[Extent]:
    """A regular parameter on this rank."""
    return part_extents(one.config, one.part, one.shape)


def part_extents(config: FrugalConfig, part: LocalShard, whole: Shape) -> list[Extent]:
    """A part of a regular parameter of shape ``whole``: all of it, or as its lines lie where that matters."""
    return list(starmap(Extent, part.lines(whole))) if config.form.blocky else [Extent(part.local_shape)]


def moment_names(config: FrugalConfig) -> tuple[str, ...]:
    """The moments of the state-full rule."""
    return STATE_FULL[config.state_full].names


def remainders_of(one: LocalMatrix | LocalParameter) -> list[Tensor] | None:
    """Of its weights here, tile by tile; None where it keeps none. What was frozen so far gets its own now."""
    if not keeps_remainders(one.config):
        return None
    one.state.ensure_remainder(one.shapes, one.device)
    return one.state.pieces(REMAINDER, one.shapes)
