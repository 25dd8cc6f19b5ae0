"""State-free rules that need norms of whole rows, columns or matrices.

They are generators: where a sum runs along the dim that is cut, they yield this tile's and are sent that of the whole
matrix. So the same rule steps a matrix that is whole and one in parts, and all ranks ask in the same order.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from frugal_dist.update.definition import RuleSettings, StateFree

Sums = Generator[Tensor, Tensor, Tensor]
"""Yields sums over a tile, is sent those over its matrix, returns a direction."""

ROUNDS = 5
"""Of sinkhorn, as in its paper."""
_TINY = 1e-8
"""Below it a norm counts as this, as in SCALE and Fira."""


class Part(NamedTuple):
    """A tile of a matrix of ``shape`` with a basis on ``side``; ``cut``: the dim along which it is not whole."""

    shape: tuple[int, int]
    side: str
    cut: int | None

    def squares(self, values: Tensor, dims: tuple[int, ...]) -> Sums:
        """Sums of squares along ``dims``."""
        norms: Tensor = torch.linalg.vector_norm(values, dim=dims, keepdim=True)
        return self.total(norms.square_(), dims)

    def total(self, here: Tensor, dims: tuple[int, ...]) -> Sums:
        """A tile's sums along ``dims``, with those of other tiles."""
        total = here
        if self.cut in dims:
            total = yield here
        return total


def _normalized(dim: int) -> StateFree:
    """Each row (column) divided by its root mean square (SCALE, arXiv 2506.16659; columns are for embeddings)."""

    def lines(rest: Tensor, part: Part) -> Sums:
        squares = yield from part.squares(rest, (dim,))
        return rest.div_((squares / part.shape[dim]).sqrt_().clamp_(min=_TINY))

    name, side = ("normalized", "right") if dim == 1 else ("normalized_columns", "left")
    return StateFree(name=name, direction=None, lines=lines, free_side=side)


def sinkhorn(rest: Tensor, part: Part) -> Sums:
    """Rows and columns divided by their root mean squares in turn (SinkGD, arXiv 2502.06742).

    Dividing all rows makes their mean squares 1 whatever they were divided by before, so one factor for each row and
    column says it all, and a round is two products of the squares with a vector.
    """
    squares = rest.square()
    cols = rest.new_ones(1, rest.shape[1])  # factors of mean squares
    rows = rest.new_ones(rest.shape[0], 1)
    for _ in range(ROUNDS):
        sums = yield from part.total(squares @ cols.T, (1,))
        rows = torch.where(sums > 0.0, part.shape[1] / sums, 0.0)
        sums = yield from part.total(rows.T @ squares, (0,))
        cols = torch.where(sums > 0.0, part.shape[0] / sums, 0.0)
    return rest.mul_(rows.sqrt_()).mul_(cols.sqrt_())


def softsign(rest: Tensor, part: Part) -> Sums:
    """Sign for entries above the mean size of all, below it their share of that (SoftSignum, arXiv 2605.31371)."""
    sizes = yield from part.total(rest.abs().sum((0, 1), keepdim=True), (0, 1))
    mean = (sizes / (part.shape[0] * part.shape[1])).clamp_(min=torch.finfo(rest.dtype).tiny)
    return rest.div_(mean).clamp_(-1.0, 1.0)


def unchanged(rest: Tensor, part: Part) -> Sums:
    """As it is."""
    yield from ()
    return rest


def _ratio(low: Tensor, update: Tensor, part: Part, dims: tuple[int, ...]) -> Sums:
    """Norms of R's update over those of R along ``dims``."""
    above = yield from part.squares(update, dims)
    below = yield from part.squares(low, dims)
    return above.sqrt().div_(below.sqrt().add_(_TINY))


NORMALIZED, NORMALIZED_COLUMNS = _normalized(1), _normalized(0)
SINKHORN = StateFree(name="sinkhorn", direction=None, lines=sinkhorn)
SOFTSIGN = StateFree(name="softsign", direction=None, lines=softsign)
SCALED = StateFree(name="scaled", direction=None, lines=unchanged, scaled=True)
"""As large beside the residual as the update is beside R (Fira, arXiv 2410.01623)."""


def _averaged(rest: Tensor, kept: Sequence[Tensor], config: RuleSettings) -> Tensor:
    """Divided by the roots of moving averages of the mean squares of its rows and columns."""
    rows, cols = kept
    squares = rest.square()
    rows.lerp_(squares.mean(1), 1.0 - config.momentum)
    cols.lerp_(squares.mean(0), 1.0 - config.momentum)
    root_rows, root_cols = rows.add(config.eps).sqrt_(), cols.add(config.eps).sqrt_()
    return rest.div_(root_rows.unsqueeze(1) * root_cols)


RACS = StateFree(
    name="racs",
    direction=None,
    lines=unchanged,
    averages=_averaged,
    keeps=("free_rows", "free_cols"),
)
"""Row and column scaled SGD (arXiv 2502.07752), the averages as pytorch_optimizer has them; it wants a growth_limit."""

COMBINES: Collection[str] = ("add", "scale", "scale_matrix")
"""How R's update becomes that of a matrix: added to the rest's, or as a factor of the whole gradient (APOLLO, arXiv
2412.05270), one for each of R's lines or one for all.
"""
_LINES_OF_R = {"right": (1,), "left": (0,), "full": (0, 1)}
"""Along which R's lines run that are lines of the matrix: rows for a right basis, columns for a left one."""


class Treatment(NamedTuple):
    """What becomes of the rest, or of the whole gradient where ``combine`` scales it. ``limit``: of growth, 0: none."""

    rule: StateFree
    combine: str
    limit: float

    def leaves_nothing(self, part: Part, r: int) -> bool:
        """Whether there is no rest: no gradient has one (density 1), or it is not stepped."""
        rows, cols = part.shape
        square = {"right": r == cols, "left": r == rows, "full": r == rows == cols}[part.side]
        return self.combine == "add" and (self.rule.lines is None or square)

    def directed(self, rest: Tensor, low: Tensor, update: Tensor, part: Part, free: Mapping[str, Tensor],
                 config: RuleSettings, unit: float) -> Sums:  # fmt: skip
        """The direction of the rest of a tile, in its memory. ``unit``: of norms whose growth is limited."""
        if self.combine != "add":
            dims = (0, 1) if self.combine == "scale_matrix" else _LINES_OF_R[part.side]
            factor = yield from _ratio(low, update, part, dims)
            rest.mul_(factor)
        else:
            assert self.rule.lines is not None
            rest = yield from self.rule.lines(rest, part)
            if self.rule.averages is not None:
                rest = self.rule.averages(rest, [free[name] for name in self.rule.keeps], config)
            if self.rule.scaled:
                factor = yield from _ratio(low, update, part, _LINES_OF_R[part.side])
                rest.mul_(factor)
        if self.limit > 0.0:
            squares = yield from part.squares(rest, (0, 1))
            if "free_norm" in free:
                _limit_growth_(rest, squares.sqrt().view(1).div_(unit), free["free_norm"], self.limit)
        return rest


def _limit_growth_(direction: Tensor, now: Tensor, before: Tensor, most: float) -> None:
    """Let the norm of a direction, which is ``now``, become ``most`` times what it was at most (Fira).

    ``before`` holds the last one and gets this one; 0 is none.
    """
    excess = torch.where(before > 0.0, (now / (before + _TINY)).clamp_(min=most).div_(most), 1.0)
    direction.div_(excess)
    before.copy_(now / excess)


def without_tile(treatment: Treatment, part: Part, r: int, like: Tensor, config: RuleSettings) -> Sums:
    """What a rank asks, and adds, that has no tile of a matrix: the sums over nothing."""
    rows, cols = part.shape
    empty = {"right": ((0, cols), (0, r)), "left": ((rows, 0), (r, 0))}[part.side]
    rest, low = (like.new_zeros(size) for size in empty)
    if treatment.leaves_nothing(part, r):
        return unchanged(rest, part)
    return treatment.directed(rest, low, low.clone(), part, {}, config, 1.0)


@lru_cache(maxsize=4096)
def sums_asked(treatment: Treatment, part: Part, r: int) -> tuple[int, ...]:
    """How many numbers the ranks add up, one time after the other, for a matrix that is cut."""
    if part.cut is None or treatment.rule.averages is not None:
        return ()
    asking, counts = without_tile(treatment, part, r, torch.empty(0, device="cpu"), _NO_SETTINGS), []
    try:
        asked = next(asking)
        while True:
            counts.append(asked.numel())
            asked = asking.send(asked)
    except StopIteration:
        return tuple(counts)


class _NoSettings(NamedTuple):
    """Sums over nothing need none."""

    beta_pair: tuple[float, float] = (0.0, 0.0)
    eps: float = 0.0
    momentum: float = 0.0


_NO_SETTINGS = _NoSettings()


def alone(asking: Sums) -> Tensor:
    """The direction of a tile that is its whole matrix."""
    try:
        asked = next(asking)
        while True:
            asked = asking.send(asked)
    except StopIteration as done:
        direction: Tensor = done.value
        return direction
