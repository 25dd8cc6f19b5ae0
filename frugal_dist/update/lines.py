"""State-free rules that need whole rows, columns or matrices: their norms."""

from __future__ import annotations

import torch
from torch import Tensor

from frugal_dist.update.definition import StateFree

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


def _longer_lines(side: str, rows: int, cols: int, r: int) -> tuple[int, ...]:
    """Of R by lines along its longer dim; those are whole where a cut leaves the dim of the matrix that is in R."""
    low = {"right": (rows, r), "left": (r, cols), "full": (r, r)}[side]
    return (0,) if low[0] < low[1] else (1,)


def ratio(low: Tensor, update: Tensor, dim: int) -> Tensor:
    """Norms of R's update over those of R along ``dim``."""
    above: Tensor = torch.linalg.vector_norm(update, dim=dim, keepdim=True)
    return above.div_(torch.linalg.vector_norm(low, dim=dim, keepdim=True).add_(_TINY))


NORMALIZED, NORMALIZED_COLUMNS = _normalized(1), _normalized(0)
SINKHORN = StateFree(name="sinkhorn", direction=sinkhorn, whole=_everything)
SOFTSIGN = StateFree(name="softsign", direction=softsign, whole=_everything)
SCALED = StateFree(name="scaled", direction=lambda rest: rest, whole=_longer_lines, factor=ratio)
"""As large beside the residual as the update is beside R (Fira, arXiv 2410.01623)."""
