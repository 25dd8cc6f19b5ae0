"""State-free rules that need whole rows, columns or matrices: their norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from frugal_dist.update.definition import Settings, StateFree

ROUNDS = 5
"""Of sinkhorn, as in its paper."""
_TINY = 1e-8
"""Below it a norm counts as this, as in SCALE and Fira."""
_LEAST = 1e-12


def _everything(side: str, rows: int, cols: int, r: int) -> tuple[int, ...]:
    return 0, 1


def _root_mean_square(rest: Tensor, dim: int, least: float = _TINY) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rest, dim=dim, keepdim=True)
    return norms.div_(rest.shape[dim] ** 0.5).clamp_(min=least)


def _normalized(dim: int) -> StateFree:
    """Each row (column) divided by its root mean square (SCALE, arXiv 2506.16659; columns are for embeddings)."""
    return StateFree(
        name="normalized" if dim == 1 else "normalized_columns",
        direction=lambda rest: rest.div_(_root_mean_square(rest, dim)),
        whole=lambda side, rows, cols, r: (dim,),
        free_side="right" if dim == 1 else "left",
    )


def sinkhorn(rest: Tensor) -> Tensor:
    """Rows and columns divided by their root mean squares in turn (SinkGD, arXiv 2502.06742)."""
    for _ in range(ROUNDS):
        for dim in (1, 0):
            rest.div_(_root_mean_square(rest, dim, _LEAST))
    return rest


def softsign(rest: Tensor) -> Tensor:
    """Sign for entries above the mean size of all, below it their share of that (SoftSignum, arXiv 2605.31371)."""
    mean = rest.abs().mean().clamp_(min=torch.finfo(rest.dtype).tiny)
    return rest.div_(mean).clamp_(-1.0, 1.0)


def _lines_of_r(side: str, rows: int, cols: int, r: int) -> tuple[int, ...]:
    """R's lines along those of the matrix: rows for a right basis, columns for a left one. Whole in every cut."""
    return {"right": (1,), "left": (0,), "full": (0, 1)}[side]


def ratio(low: Tensor, update: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Norms of R's update over those of R along ``dims``."""
    above: Tensor = torch.linalg.vector_norm(update, dim=dims, keepdim=True)
    return above.div_(torch.linalg.vector_norm(low, dim=dims, keepdim=True).add_(_TINY))


NORMALIZED, NORMALIZED_COLUMNS = _normalized(1), _normalized(0)
SINKHORN = StateFree(name="sinkhorn", direction=sinkhorn, whole=_everything)
SOFTSIGN = StateFree(name="softsign", direction=softsign, whole=_everything)
SCALED = StateFree(name="scaled", direction=lambda rest: rest, whole=_lines_of_r, factor=ratio)
"""As large beside the residual as the update is beside R (Fira, arXiv 2410.01623)."""


def _averaged(rest: Tensor, kept: Sequence[Tensor], config: Settings) -> Tensor:
    """Divided by the roots of moving averages of the mean squares of its rows and columns."""
    rows, cols = kept
    squares = rest.square()
    rows.lerp_(squares.mean(1), 1.0 - config.momentum)
    cols.lerp_(squares.mean(0), 1.0 - config.momentum)
    root_rows, root_cols = rows.add(config.eps).sqrt_(), cols.add(config.eps).sqrt_()
    return rest.div_(root_rows.unsqueeze(1) * root_cols)


RACS = StateFree(
    name="racs",
    direction=lambda rest: rest,
    whole=_everything,
    averages=_averaged,
    keeps=("free_rows", "free_cols"),
)
"""Row and column scaled SGD (arXiv 2502.07752), the averages as pytorch_optimizer has them; it wants a growth_limit."""

COMBINES: dict[str, Callable[[str, int, int, int], tuple[int, ...]] | None] = {
    "add": None,
    "scale": _lines_of_r,
    "scale_matrix": _everything,
}
"""How R's update becomes that of a matrix: added to the rest's, or as a factor of the whole gradient (APOLLO, arXiv
2412.05270), one for each of R's lines or one for all. Of the latter the dims that must be whole.
"""


def limit_growth_(direction: Tensor, before: Tensor, most: float, unit: float) -> None:
    """Let the norm of ``direction``, in units of ``unit``, grow to ``most`` times what is was at most (Fira).

    ``before`` holds the last one and gets this one; 0 is none.
    """
    now = torch.linalg.vector_norm(direction) / unit
    excess = torch.where(before > 0.0, (now / (before + _TINY)).clamp_(min=most).div_(most), 1.0)
    direction.div_(excess)
    before.copy_(now / excess)
