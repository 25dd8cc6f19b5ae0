"""From storage layout to compute layout, and who owns which refresh. Pure: every rank computes the same answer.

A compute layout never splits a contraction: it cuts a matrix only along the dim that its basis leaves free (rows for
a right basis, columns for a left one), or gives it whole to one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from frugal_dist.sharding.tile import (
    Holders,
    Layout,
    Tile,
    box_tiles,
    cuts,
    elements,
    holders,
    overlap,
    split_by_weight,
    whole,
)

FEW_RANKS = 8
"""Up to here a basis on every rank costs less than what whole-matrix owners send (r = n/4, square matrices)."""

FREE_DIM = {"right": 0, "left": 1, "full": None}


@dataclass(frozen=True)
class Transfer:
    """A rectangle that travels: ``area`` of the source's tile to the target's tile."""

    source: int
    target: int
    source_tile: Tile
    target_tile: Tile
    area: Tile


def free_cut(storage: Layout, rows: int, cols: int, free_dim: int, index: int) -> Layout:
    """Split the free dim into runs with equal sets of holders, and each run in proportion to what they hold of it.

    ``index`` rotates remainders from matrix to matrix, so that no rank collects them all. A row that two ranks share
    becomes a compute tile of its own: whole rows stay views.
    """
    length, other = (rows, cols) if free_dim == 0 else (cols, rows)
    runs = _runs(storage, length, free_dim)
    layout: list[list[Tile]] = [[] for _ in storage]
    for (start, stop), weights in runs:
        parts = split_by_weight(stop - start, [weight for _, weight in weights], index)
        for (rank, _), (a, b) in zip(weights, parts, strict=True):
            span, rest = (start + a, start + b), (0, other)
            layout[rank].extend(box_tiles(span, rest) if free_dim == 0 else box_tiles(rest, span))
    return tuple(tuple(tiles) for tiles in layout)


Weights = tuple[tuple[int, int], ...]
"""(rank, elements per line) of those who hold any, by rank: few, however many ranks there are."""


def _runs(storage: Layout, length: int, free_dim: int) -> list[tuple[tuple[int, int], Weights]]:
    """Maximal ranges of the free dim over which every rank holds the same number of elements per line."""
    spans = [[(t.rows, t.width) if free_dim == 0 else (t.cols, t.height) for t in tiles] for tiles in storage]
    points = cuts((span for rank in spans for span, _ in rank), length)
    changes: dict[int, list[tuple[int, int]]] = {point: [] for point in points}
    for rank, parts in enumerate(spans):
        for (start, stop), extent in parts:
            changes[start].append((rank, extent))
            changes[stop].append((rank, -extent))
    runs: list[tuple[tuple[int, int], Weights]] = []
    held: dict[int, int] = {}
    for start, stop in pairwise(points):
        for rank, extent in changes[start]:
            held[rank] = held.get(rank, 0) + extent
        weights = tuple(sorted((rank, extent) for rank, extent in held.items() if extent))
        held = dict(weights)
        if runs and runs[-1][1] == weights:
            runs[-1] = ((runs[-1][0][0], stop), weights)
        else:
            runs.append(((start, stop), weights))
    return runs


def owner_layout(ranks: int, owner: int, rows: int, cols: int) -> Layout:
    """The whole matrix on one rank."""
    return tuple(whole(rows, cols) if rank == owner else () for rank in range(ranks))


def assign_owners(costs: Sequence[float], ranks: int, known: Sequence[int] = ()) -> list[int]:
    """An owner for each matrix: longest first onto the least loaded rank; ties go to the lower rank.

    ``known``: owners that the first matrices have already.
    """
    cost_of_rank, owners = [0.0] * ranks, [*known, *[0] * (len(costs) - len(known))]
    for cost, owner in zip(costs, known, strict=False):
        cost_of_rank[owner] += cost
    for index in sorted(range(len(known), len(costs)), key=lambda i: (-costs[i], i)):
        owner = min(range(ranks), key=lambda rank: (cost_of_rank[rank], rank))
        owners[index] = owner
        cost_of_rank[owner] += costs[index]
    return owners


def refresh_cost(rows: int, cols: int) -> float:
    """Work of an SVD, up to a constant: m n min(m, n)."""
    return float(rows) * cols * min(rows, cols)


@dataclass(frozen=True)
class CutCost:
    """Bytes per rank that decide between cutting the free dim and whole-matrix owners."""

    ranks: int
    cut_exchange: float
    cut_memory: float
    owner_exchange: float
    owner_memory: float

    @property
    def prefers_owner(self) -> bool:
        """Owners pay when replicating the basis costs more memory than owners cost in traffic, and never on few ranks.

        A cut spreads state and work evenly; whole matrices on few ranks do not, whatever the bytes say.
        """
        return self.ranks > FEW_RANKS and self.cut_memory > self.owner_memory + self.owner_exchange


@lru_cache(maxsize=16)  # most matrices of a model have the shape and the storage of another
def compute_cost(
    storage: Layout, rows: int, cols: int, side: str, r: int, itemsize: int = 4, numbered: bool = False
) -> CutCost:
    """The cost rule of a basis projection, in bytes per rank (mean over ranks).

    cut: gradient in and update out for what is not where it is computed, and the basis on every rank.
    owner: the whole matrix to its owner and back, the basis once. ``numbered``: the numbers of its columns are kept.
    """
    ranks = len(storage)
    basis = (1 if numbered else rows if side == "left" else cols) * r * itemsize
    moved = 0
    free_dim = FREE_DIM[side]
    if free_dim is not None:
        for mine, theirs in zip(storage, free_cut(storage, rows, cols, free_dim, 0), strict=True):
            kept = sum(area.numel for a in mine for b in theirs if (area := overlap(a, b)) is not None)
            moved += elements(theirs) - kept
    return CutCost(
        ranks=ranks,
        cut_exchange=2.0 * moved * itemsize / ranks,
        cut_memory=float(basis),
        owner_exchange=2.0 * rows * cols * itemsize * (ranks - 1) / ranks / ranks,
        owner_memory=basis / ranks,
    )


def compute_layout(
    storage: Layout,
    rows: int,
    cols: int,
    side: str,
    r: int,
    index: int,
    owner: int,
    choice: str,
    shard_replicas: bool,
    numbered: bool = False,
) -> Layout:
    """Where a basis projection of one matrix computes. ``choice``: "auto" by cost, "cut", "owner", or "whole": nowhere
    in parts.

    ``numbered``: of the basis the numbers of its columns are kept.
    Replicas with ``shard_replicas`` off compute what they store, as long as that splits no contraction.
    """
    ranks, undivided = len(storage), "full" if choice == "whole" else side
    if (
        ranks == 1
        or rows * cols == 0
        or (not shard_replicas and _all_copied(storage) and _contraction_whole(storage, rows, cols, undivided))
    ):
        return storage
    free_dim = FREE_DIM[side]
    if free_dim is None or choice in ("owner", "whole"):
        return owner_layout(ranks, owner, rows, cols)
    if choice == "auto" and compute_cost(storage, rows, cols, side, r, numbered=numbered).prefers_owner:
        return owner_layout(ranks, owner, rows, cols)
    return free_cut(storage, rows, cols, free_dim, index)


def _all_copied(storage: Layout) -> bool:
    return all(len(ranks) > 1 for ranks in holders(storage).values())


def _contraction_whole(storage: Layout, rows: int, cols: int, side: str) -> bool:
    tiles = [tile for rank in storage for tile in rank]
    return all((side == "left" or t.width == cols) and (side == "right" or t.height == rows) for t in tiles)


def transfers_for(held: Holders, target: Layout, rank: int, index: int) -> list[Transfer]:
    """All moves this rank takes part in, in an order that sender and receiver agree on. ``held``: of the source.

    Each target tile is filled once from holders of the source (itself where it can, else
    spread over the holders). Both layouts' tiles are exact copies of each other or disjoint within a layout.
    """
    mine = [(piece, ranks) for piece, ranks in held.items() if rank in ranks]
    transfers: list[Transfer] = []
    for other, tiles in enumerate(target):
        for tile in tiles:
            for piece, ranks in held.items() if other == rank else mine:
                area = overlap(piece, tile)
                if area is None:
                    continue
                sender = other if other in ranks else ranks[(other + index) % len(ranks)]
                if rank in (sender, other):
                    transfers.append(Transfer(sender, other, piece, tile, area))
    return transfers
