"""Coordinate projections: columns, rows, randk, randperm. They select entries and contract nothing.

A selection of a whole m x n matrix is drawn from one seeded function, so every rank draws the same without talking,
and nothing has to be stored. ``local`` narrows it to a tile; ``slots`` say which entries of the whole R those are.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from frugal_dist.projection.shapes import Rect, longer_dim


def select_indices(length: int, count: int, *, seed: int, name: str, refresh: int) -> Tensor:
    """``count`` distinct numbers below ``length``, sorted, the same on every machine with the same torch.

    The one source of randomness of columns, rows, randk (flat, row-major), randperm and blocks.
    Exact: every subset is equally likely. Takes time and memory of about one pass over ``length`` floats.

    Args:
        length: how many things there are: columns, rows, entries or matrices.
        count: how many are chosen, 0 to ``length``.
        seed: the hyperparameter.
        name: of the parameter, "blocks" for whole matrices: each has a selection of its own.
        refresh: the number of the refresh.

    Returns:
        int64 of shape (count,), on the CPU, ascending.

    Raises:
        ValueError: if ``count`` is below 0 or above ``length``.
    """
    if not 0 <= count <= length:
        raise ValueError(f"cannot select {count} of {length} indices for {name!r}")
    generator = seeded_generator(seed, name, refresh, length, count)
    if count in (0, length):
        return torch.arange(count, device="cpu")
    if length <= 1 << 14:
        return torch.randperm(length, generator=generator, device="cpu")[:count].sort().values
    return _sparse_subset(length, count, generator)


def seeded_generator(seed: int, name: str, refresh: int, *sizes: int) -> torch.Generator:
    """A CPU generator from hashlib, never ``hash()``: that one differs between processes."""
    digest = hashlib.sha256("|".join(map(str, ("frugal", seed, name, refresh, *sizes))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % (1 << 63))


def _sparse_subset(length: int, count: int, generator: torch.Generator) -> Tensor:
    """A uniform subset without sorting or permuting everything.

    Toss a coin for each index, then remove or add a uniform few to reach ``count``: given its size, a coin subset is
    uniform, and so is a uniform subset of it, or it with a uniform subset of its complement.
    """
    chosen = torch.rand(length, generator=generator, dtype=torch.float32, device="cpu") < count / length
    surplus = int(torch.count_nonzero(chosen)) - count
    flipped = _sample(chosen if surplus > 0 else ~chosen, abs(surplus), generator)
    chosen[flipped] = surplus < 0
    return torch.nonzero(chosen).view(-1)


def _sample(allowed: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """``number`` distinct positions, uniformly among those that ``allowed`` marks.

    Few marks are listed and shuffled; many are hit soon by drawing at random, without a list of all of them.
    """
    if 2 * int(torch.count_nonzero(allowed)) <= allowed.numel():
        pool = torch.nonzero(allowed).view(-1)
        return pool[torch.randperm(pool.numel(), generator=generator, device="cpu")[:number]]
    positions: dict[int, None] = {}
    while len(positions) < number:
        drawn = torch.randint(allowed.numel(), (2 * number,), generator=generator, device="cpu")
        positions.update(dict.fromkeys(drawn[allowed[drawn]].tolist()))
    return torch.tensor(list(positions)[:number], dtype=torch.int64, device="cpu")


_CHUNK = 1 << 22
"""Entries that are written at once: a bound for the temporary int64 copy of their indices."""


class Selection(Protocol):
    """Which entries of a matrix (or of one tile of it) are state-full. R is a dense tensor of just those.

    ``free_dim`` is the dim of R along which replicas may share the work; ``complete``: nothing is left state-free.
    """

    @property
    def free_dim(self) -> int: ...

    @property
    def complete(self) -> bool: ...

    def take(self, x: Tensor) -> Tensor:
        """R of a 2-D tensor, copied (``Everything``: the tensor itself)."""

    def put_(self, x: Tensor, values: Tensor) -> None:
        """Overwrite the selected entries of ``x``."""

    def local(self, tile: Rect) -> Selection:
        """The selection within a tile, in the tile's own indices."""

    def slots(self, tile: Rect) -> Tensor:
        """Where the tile's part of R lies in the whole matrix' R: flat positions, shaped as the part."""

    def begin(self, tile: Rect) -> int:
        """In which column of the whole matrix' R the tile's part begins; a flat R is one row. 0 where the part is
        scattered over it.
        """

    def shape(self, rows: int, cols: int) -> tuple[int, ...]:
        """R's shape for a tensor of rows x cols."""

    def to(self, device: torch.device) -> Selection:
        """The same with its indices on ``device``."""


@dataclass(frozen=True)
class Columns:
    """R = G[:, index]."""

    index: Tensor
    free_dim: int = 0
    complete: bool = False
    memo: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    """What kernels derive from the index, once."""

    def take(self, x: Tensor) -> Tensor:
        return x.gather(1, self._expanded(x))  # on the CPU 1.5 times as fast as index_select

    def put_(self, x: Tensor, values: Tensor) -> None:
        x.scatter_(1, self._expanded(x), values)

    def _expanded(self, x: Tensor) -> Tensor:
        return self.index.expand(x.shape[0], -1)

    def local(self, tile: Rect) -> Columns:
        return Columns(self.index[_within(self.index, tile.cols)] - tile.cols[0])

    def slots(self, tile: Rect) -> Tensor:
        columns = torch.nonzero(_within(self.index, tile.cols)).view(1, -1)
        return _span(tile.rows).view(-1, 1) * self.index.numel() + columns

    def begin(self, tile: Rect) -> int:
        return int((self.index < tile.cols[0]).sum())

    def shape(self, rows: int, cols: int) -> tuple[int, ...]:
        return (rows, self.index.numel())

    def to(self, device: torch.device) -> Columns:
        return Columns(self.index.to(device))


@dataclass(frozen=True)
class Rows:
    """R = G[index, :]. ``width`` is the number of columns of the whole matrix."""

    index: Tensor
    width: int
    free_dim: int = 1
    complete: bool = False
    memo: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def take(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.index)

    def put_(self, x: Tensor, values: Tensor) -> None:
        x.index_copy_(0, self.index, values)

    def local(self, tile: Rect) -> Rows:
        return Rows(self.index[_within(self.index, tile.rows)] - tile.rows[0], self.width)

    def slots(self, tile: Rect) -> Tensor:
        rows = torch.nonzero(_within(self.index, tile.rows)).view(-1, 1)
        return rows * self.width + _span(tile.cols).view(1, -1)

    def begin(self, tile: Rect) -> int:
        return tile.cols[0]

    def shape(self, rows: int, cols: int) -> tuple[int, ...]:
        return (self.index.numel(), cols)

    def to(self, device: torch.device) -> Rows:
        return Rows(self.index.to(device), self.width)


@dataclass(frozen=True)
class Submatrix:
    """R = G[rows, :][:, cols]: randperm on both sides."""

    row_index: Tensor
    col_index: Tensor
    free_dim: int = 0
    complete: bool = False

    def take(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.row_index).index_select(1, self.col_index)

    def put_(self, x: Tensor, values: Tensor) -> None:
        x[self.row_index.view(-1, 1), self.col_index.view(1, -1)] = values.to(x.dtype)

    def local(self, tile: Rect) -> Submatrix:
        rows, cols = _within(self.row_index, tile.rows), _within(self.col_index, tile.cols)
        return Submatrix(self.row_index[rows] - tile.rows[0], self.col_index[cols] - tile.cols[0])

    def slots(self, tile: Rect) -> Tensor:
        rows = torch.nonzero(_within(self.row_index, tile.rows)).view(-1, 1)
        cols = torch.nonzero(_within(self.col_index, tile.cols)).view(1, -1)
        return rows * self.col_index.numel() + cols

    def begin(self, tile: Rect) -> int:
        return int((self.col_index < tile.cols[0]).sum())

    def shape(self, rows: int, cols: int) -> tuple[int, ...]:
        return (self.row_index.numel(), self.col_index.numel())

    def to(self, device: torch.device) -> Submatrix:
        return Submatrix(self.row_index.to(device), self.col_index.to(device))


@dataclass(frozen=True)
class Flat:
    """R = G.flatten()[index], row-major; ``width`` is the number of columns the index counts with.

    The index is kept as int32: int64 would cost as much as both moments.
    """

    index: Tensor
    width: int
    free_dim: int = 0
    complete: bool = False
    memo: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def take(self, x: Tensor) -> Tensor:
        return x.reshape(-1).index_select(0, self.index)

    def put_(self, x: Tensor, values: Tensor) -> None:
        if x.is_contiguous():
            flat = x.view(-1)
            for index, part in zip(self.index.split(_CHUNK), values.split(_CHUNK), strict=True):
                flat.index_copy_(0, index.long(), part)
        else:
            index = self.index.long()
            x[index // self.width, index % self.width] = values

    def local(self, tile: Rect) -> Flat:
        if tile.cols == (0, self.width):  # whole rows: one run of the flat index
            start = tile.rows[0] * self.width
            kept = self.index[_within(self.index, (start, tile.rows[1] * self.width))]
            return Flat(_narrow_int(kept - start), self.width)
        index = self.index[self._inside(tile)]
        rows, cols = index // self.width - tile.rows[0], index % self.width - tile.cols[0]
        width = tile.cols[1] - tile.cols[0]
        return Flat(_narrow_int(rows * width + cols), width)

    def slots(self, tile: Rect) -> Tensor:
        return torch.nonzero(self._inside(tile)).view(-1)

    def begin(self, tile: Rect) -> int:
        return int((self.index < tile.rows[0] * self.width).sum()) if tile.cols == (0, self.width) else 0

    def shape(self, rows: int, cols: int) -> tuple[int, ...]:
        return (self.index.numel(),)

    def to(self, device: torch.device) -> Flat:
        return Flat(_narrow_int(self.index).to(device), self.width)

    def _inside(self, tile: Rect) -> Tensor:
        return _within(self.index // self.width, tile.rows) & _within(self.index % self.width, tile.cols)


@dataclass(frozen=True)
class Everything:
    """R = G: an active block, or a selection of all entries. Nothing is copied."""

    width: int
    free_dim: int = 0
    complete: bool = True

    def take(self, x: Tensor) -> Tensor:
        return x

    def put_(self, x: Tensor, values: Tensor) -> None:
        if values is not x:
            x.copy_(values)

    def local(self, tile: Rect) -> Everything:
        return Everything(self.width, self.free_dim)

    def slots(self, tile: Rect) -> Tensor:
        return _span(tile.rows).view(-1, 1) * self.width + _span(tile.cols).view(1, -1)

    def begin(self, tile: Rect) -> int:
        return tile.cols[0]

    def shape(self, rows: int, cols: int) -> tuple[int, ...]:
        return (rows, cols)

    def to(self, device: torch.device) -> Everything:
        return self


NOTHING = Columns(torch.empty(0, dtype=torch.int64, device="cpu"))


def whole_block(rows: int, cols: int) -> Everything:
    """An active block: everything, shared along its longer side."""
    return Everything(cols, free_dim=longer_dim(rows, cols))


def _within(index: Tensor, bounds: tuple[int, int]) -> Tensor:
    return (index >= bounds[0]) & (index < bounds[1])


def _span(bounds: tuple[int, int]) -> Tensor:
    return torch.arange(bounds[0], bounds[1], device="cpu")


def _narrow_int(index: Tensor) -> Tensor:
    """int32 where it fits: half the bytes, and gathers accept it."""
    fits = index.numel() == 0 or int(index.max()) < 2**31
    return index.to(torch.int32) if fits else index
