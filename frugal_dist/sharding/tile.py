"""Tiles and layouts: which rank holds which rectangle of a matrix. Pure data, no tensors, no communication."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple


class Tile(NamedTuple):
    """A rectangle of a matrix: half-open ranges of rows and columns, both non-empty in a layout."""

    rows: tuple[int, int]
    cols: tuple[int, int]

    @property
    def height(self) -> int:
        return self.rows[1] - self.rows[0]

    @property
    def width(self) -> int:
        return self.cols[1] - self.cols[0]

    @property
    def numel(self) -> int:
        return self.height * self.width

    def contains(self, other: Tile) -> bool:
        return (
            self.rows[0] <= other.rows[0]
            and other.rows[1] <= self.rows[1]
            and self.cols[0] <= other.cols[0]
            and other.cols[1] <= self.cols[1]
        )

    def within(self, outer: Tile) -> tuple[slice, slice]:
        """Index of this tile in a tensor that holds ``outer``."""
        r, c = outer.rows[0], outer.cols[0]
        return slice(self.rows[0] - r, self.rows[1] - r), slice(self.cols[0] - c, self.cols[1] - c)


Tiles = tuple[Tile, ...]
Layout = tuple[Tiles, ...]
"""For every rank its tiles of one matrix."""
Holders = dict[Tile, tuple[int, ...]]
"""Every distinct tile with the ranks that hold it."""


def overlap(a: Tile, b: Tile) -> Tile | None:
    """The common rectangle, None if empty."""
    rows = (max(a.rows[0], b.rows[0]), min(a.rows[1], b.rows[1]))
    cols = (max(a.cols[0], b.cols[0]), min(a.cols[1], b.cols[1]))
    return Tile(rows, cols) if rows[0] < rows[1] and cols[0] < cols[1] else None


def whole(rows: int, cols: int) -> Tiles:
    """The layout of a rank that holds all of a rows x cols matrix."""
    return (Tile((0, rows), (0, cols)),) if rows * cols else ()


def box_tiles(rows: tuple[int, int], cols: tuple[int, int]) -> Tiles:
    """One rectangle, or nothing if it is empty."""
    return (Tile(rows, cols),) if rows[0] < rows[1] and cols[0] < cols[1] else ()


def interval_tiles(start: int, stop: int, cols: int) -> Tiles:
    """A flat row-major interval as up to three tiles: tail of a row, whole rows, head of a row."""
    if start >= stop:
        return ()
    first, last = start // cols, (stop - 1) // cols
    head, tail = start - first * cols, stop - last * cols
    if first == last:
        return box_tiles((first, first + 1), (head, tail))
    body = (first if head == 0 else first + 1, last + 1 if tail == cols else last)
    return (
        *(box_tiles((first, first + 1), (head, cols)) if head else ()),
        *box_tiles(body, (0, cols)),
        *(box_tiles((last, last + 1), (0, tail)) if tail != cols else ()),
    )


def elements(tiles: Iterable[Tile]) -> int:
    """How many elements the tiles hold together."""
    return sum(tile.numel for tile in tiles)


def cuts(bounds: Iterable[tuple[int, int]], length: int) -> list[int]:
    """Sorted distinct end points of ranges, 0 and ``length`` included."""
    return sorted({0, length, *(point for pair in bounds for point in pair)})


def check_cover(name: str, layout: Layout, rows: int, cols: int) -> None:
    """ValueError unless the tiles cover each element equally often (once, or once per replica), at least once."""
    counts = _copies([tile for rank in layout for tile in rank], rows, cols)
    if rows * cols and (len(counts) != 1 or 0 in counts):
        raise ValueError(
            f"{name} ({rows}x{cols}): the ranks' parts do not cover it evenly (copies per element: {sorted(counts)}). "
            "This engine stores it in a way frugal_dist does not know; nothing was updated."
        )


def _copies(tiles: Sequence[Tile], rows: int, cols: int) -> set[int]:
    """How often elements are covered: all counts that occur. Goes down the rows, past few tiles at a time."""
    waiting = sorted(tiles, key=lambda tile: tile.rows, reverse=True)
    active: list[Tile] = []
    counts = set()
    for y in cuts((tile.rows for tile in tiles), rows)[:-1]:
        active = [tile for tile in active if tile.rows[1] > y]
        while waiting and waiting[-1].rows[0] <= y:
            active.append(waiting.pop())
        changes = dict.fromkeys(cuts((tile.cols for tile in active), cols)[:-1], 0)
        for tile in active:
            changes[tile.cols[0]] += 1
            if tile.cols[1] < cols:
                changes[tile.cols[1]] -= 1
        counts |= set(accumulate(changes.values()))
    return counts


def holders(layout: Layout) -> Holders:
    """Every distinct tile with the ranks that hold it. ValueError if tiles of different ranks overlap in part."""
    by_tile: dict[Tile, list[int]] = {}
    for rank, tiles in enumerate(layout):
        for tile in tiles:
            by_tile.setdefault(tile, []).append(rank)
    return {tile: tuple(ranks) for tile, ranks in by_tile.items()}


def is_replicated(layout: Layout) -> bool:
    """Every rank holds the same tiles."""
    return all(tiles == layout[0] for tiles in layout)


def owned(tiles: Tiles, tile: Tile) -> Tile | None:
    """The local tile that contains ``tile``, if any."""
    return next((outer for outer in tiles if outer.contains(tile)), None)


def split_evenly(length: int, parts: int, rotate: int = 0) -> list[tuple[int, int]]:
    """``parts`` consecutive ranges whose lengths differ by at most 1; the longer ones start at part ``rotate``."""
    return split_by_weight(length, [1] * parts, rotate)


def split_by_weight(length: int, weights: Sequence[int], rotate: int = 0) -> list[tuple[int, int]]:
    """Consecutive ranges in proportion to ``weights``, by largest remainder, ties from part ``rotate`` on."""
    total, parts = sum(weights), len(weights)
    assert total > 0
    sizes = [length * weight // total for weight in weights]
    order = sorted(range(parts), key=lambda i: (-(length * weights[i] % total), (i - rotate) % parts))
    for i in order[: length - sum(sizes)]:
        sizes[i] += 1
    bounds, start = [], 0
    for size in sizes:
        bounds.append((start, start + size))
        start += size
    return bounds
