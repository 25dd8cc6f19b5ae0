"""What an engine must tell: where this rank's part of each parameter lies, and its tensors at this moment.

An engine is one class with these methods; nothing above this file knows which engine runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from math import prod
from typing import Any, Protocol

from torch import Tensor

from frugal_dist.sharding.collectives import Ranks
from frugal_dist.sharding.tile import Tile, Tiles, box_tiles, interval_tiles

Span = tuple[int, int]


@dataclass(frozen=True)
class ParamSpec:
    """A parameter as the user's model has it. ``shape`` is the full shape, whatever this rank holds."""

    name: str
    shape: tuple[int, ...]
    projected: bool
    decay: bool
    group: int
    position: int

    @property
    def stack(self) -> int:
        """Number of matrices: 1, or the leading dim of expert weights."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.shape[-2], self.shape[-1]


@dataclass(frozen=True)
class Box:
    """A rectangular part of a parameter: one half-open range per dim."""

    spans: tuple[Span, ...]

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of this rank's tensor."""
        return tuple(stop - start for start, stop in self.spans)

    def tiles(self, original: ParamSpec, matrix: int) -> Tiles:
        stack = self.spans[0] if len(self.spans) == 3 else (0, 1)
        inside = stack[0] <= matrix < stack[1]
        return box_tiles(self.spans[-2], self.spans[-1]) if inside else ()

    def views(self, local: Tensor, original: ParamSpec, matrix: int, tiles: Tiles) -> list[Tensor]:
        """2-D tensors, one for each of ``tiles``, which are those of that matrix."""
        if not tiles:
            return []
        return [local if local.dim() == 2 else local[matrix - self.spans[0][0]]]

    def boxes(self, local: Tensor) -> Iterator[tuple[Box, Tensor]]:
        """The part in rectangles, each with its view of ``local``."""
        yield self, local

    def lines(self, whole: tuple[int, ...]) -> list[tuple[tuple[int, ...], int]]:
        """Where the part lies in the lines of the parameter as (first dim, rest): shapes, and where their lines begin.
        What is cut in between of several dims has lines of its own.
        """
        return [(self.local_shape, self.spans[-1][0] if 0 < len(whole) < 3 else 0)]

    def rows(self, start: int, stop: int) -> Box:
        """Some entries of the first dim, counted from the first one here."""
        return Box(((self.spans[0][0] + start, self.spans[0][0] + stop), *self.spans[1:])) if self.spans else self


@dataclass(frozen=True)
class Grid:
    """A part that lies apart: of each dim some ranges, one after the other in memory, as where several layers that were
    packed into one are cut one by one.
    """

    ranges: tuple[tuple[Span, ...], ...]

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of this rank's tensor."""
        return tuple(sum(stop - start for start, stop in spans) for spans in self.ranges)

    def tiles(self, original: ParamSpec, matrix: int) -> Tiles:
        stack = self.ranges[0] if len(self.ranges) == 3 else ((0, 1),)
        inside = any(start <= matrix < stop for start, stop in stack)
        return tuple(Tile(rows, cols) for rows, cols in product(*self.ranges[-2:])) if inside else ()

    def views(self, local: Tensor, original: ParamSpec, matrix: int, tiles: Tiles) -> list[Tensor]:
        """2-D tensors, one for each of ``tiles``, which are those of that matrix."""
        if not tiles:
            return []
        if local.dim() == 3:
            held = [member for span in self.ranges[0] for member in range(*span)]
            local = local[held.index(matrix)]
        return [local[rows, cols] for rows, cols in product(*map(_consecutive, self.ranges[-2:]))]

    def boxes(self, local: Tensor) -> Iterator[tuple[Box, Tensor]]:
        """The part in rectangles, each with its view of ``local``."""
        for spans, where in zip(product(*self.ranges), product(*map(_consecutive, self.ranges)), strict=True):
            yield Box(spans), local[where]

    def lines(self, whole: tuple[int, ...]) -> list[tuple[tuple[int, ...], int]]:
        """As ``Box.lines``; what is put together here is a line of its own."""
        return [(self.local_shape, 0)]

    def rows(self, start: int, stop: int) -> Grid:
        """Some entries of the first dim, counted from the first one here."""
        spans = []
        for (first, last), where in zip(self.ranges[0], _consecutive(self.ranges[0]), strict=True):
            top, bottom = max(start, where.start), min(stop, where.stop)
            if top < bottom:
                spans.append((first + top - where.start, last - (where.stop - bottom)))
        return Grid((tuple(spans), *self.ranges[1:]))


def _consecutive(ranges: Sequence[Span]) -> list[slice]:
    """Where ranges of the whole lie in a tensor that has them one after the other."""
    ends = list(accumulate(stop - start for start, stop in ranges))
    return [slice(end - (stop - start), end) for end, (start, stop) in zip(ends, ranges, strict=True)]


@dataclass(frozen=True)
class Interval:
    """A flat row-major interval of a parameter, as ZeRO cuts it."""

    start: int
    stop: int

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of this rank's tensor."""
        return (self.stop - self.start,)

    def tiles(self, original: ParamSpec, matrix: int) -> Tiles:
        first, last = self._clip(original, matrix)
        return interval_tiles(first, last, original.matrix_shape[1])

    def views(self, local: Tensor, original: ParamSpec, matrix: int, tiles: Tiles) -> list[Tensor]:
        """2-D views of the flat ``local``, one for each of ``tiles``, which are those of that matrix."""
        size, cols = original.matrix_shape[0] * original.matrix_shape[1], original.matrix_shape[1]
        offset = matrix * size - self.start
        return [local[_flat_span(tile, cols, offset)].view(tile.height, tile.width) for tile in tiles]

    def boxes(self, local: Tensor) -> Iterator[tuple[Box, Tensor]]:
        """The part as a range of the flat parameter, with its memory."""
        yield Box(((self.start, self.stop),)), local

    def lines(self, whole: tuple[int, ...]) -> list[tuple[tuple[int, ...], int]]:
        """As ``Box.lines``: up to three, one behind the other in memory."""
        width = prod(whole[1:]) if len(whole) > 1 else prod(whole)
        tiles = interval_tiles(self.start, self.stop, width)
        return [((tile.height, tile.width), tile.cols[0]) for tile in tiles]

    def rows(self, start: int, stop: int) -> Interval:
        """Some entries, counted from the first one here."""
        return Interval(self.start + start, self.start + stop)

    def _clip(self, original: ParamSpec, matrix: int) -> Span:
        size = original.matrix_shape[0] * original.matrix_shape[1]
        return max(self.start - matrix * size, 0), min(self.stop - matrix * size, size)


LocalShard = Box | Grid | Interval


def _flat_span(tile: Tile, cols: int, offset: int) -> slice:
    """A tile of an interval is contiguous: part of one row, or whole rows."""
    start = tile.rows[0] * cols + tile.cols[0] + offset
    return slice(start, start + tile.numel)


class Storage(Protocol):
    """One engine's storage. ``i`` counts the original parameters. Tensors are looked up anew on every call."""

    @property
    def shares_replicas(self) -> bool:
        """Whether replicas share the low-rank state unless told otherwise."""

    def call(self) -> Sequence[int]:
        """The parameters that this step() call is about, the same on every rank."""

    def complete_gradients(self, ranks: Ranks) -> None:
        """Add up gradients of which the ranks hold addends. Collective, before anything else of a step."""

    def part(self, i: int) -> LocalShard:
        """Which part of parameter i this rank holds."""

    def moves_elsewhere(self) -> bool:
        """Whether another call of the same training step has, or may have, gradients that are not zero. Agreed."""

    def param(self, i: int) -> Tensor:
        """The tensor in ``param_groups`` that parameter i lives in: the key of its state."""

    def frozen(self, i: int) -> bool:
        """Whether the program has frozen parameter i (``requires_grad``); it is the same program on every rank."""

    def options(self, i: int) -> dict[str, Any]:
        """The parameter group, with the hyperparameters of this moment."""

    def tensors(self, i: int) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        """``param``; this rank's part of it, a plain tensor: shaped as the box, or flat; the gradient of that part,
        averaged and accumulated, None if there is none; and ``frozen``.
        """
