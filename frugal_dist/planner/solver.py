"""Memory that the owner of a matrix takes to compute its basis. Estimates: libraries do not tell what they need."""

from __future__ import annotations

import math
from collections.abc import Callable

from frugal_dist.planner.totals import ITEM
from frugal_dist.projection.basis import basis_shapes
from frugal_dist.projection.subspace import OVERSAMPLING

WIDE = 8
"""Bytes of an fp64 number."""


def solver_bytes(method: str, rows: int, cols: int, side: str, r: int) -> int:
    """What computing a basis holds at most at one time, beside the gradient. ``method``: an svd_method, or "random"."""
    return _BYTES[method](rows, cols, side, r)


def _exact(rows: int, cols: int, side: str, r: int) -> int:
    """The copy that the solver overwrites, U, S, Vt, and the workspace of divide and conquer."""
    k = min(rows, cols)
    return ITEM * (rows * cols + (rows + cols + 1) * k + 4 * k * k)


def _subspace(rows: int, cols: int, side: str, r: int) -> int:
    """More columns than r: the last QR, or what the rounds leave beside a Gram matrix in fp64 and its eigenvectors."""
    outer, inner = (cols, rows) if side == "left" else (rows, cols)
    width = min(r + math.ceil(OVERSAMPLING * r), rows, cols)
    rounds = (outer + 3 * inner) * width + width * width
    return max(ITEM * rounds, (ITEM * 2 * (outer + inner) + WIDE * outer) * width + WIDE * 4 * width * width)


def _gram64(rows: int, cols: int, side: str, r: int) -> int:
    """In fp64: the gradient; its Gram matrix, the eigenvectors and their workspace, or the other side's vectors."""
    k, long = min(rows, cols), max(rows, cols)
    other = side == "full" or (side == "left") == (rows >= cols)
    return WIDE * (rows * cols + max(4 * k * k, other * (k * k + 2 * long * r + r * r)))


def _random(rows: int, cols: int, side: str, r: int) -> int:
    """Gaussian columns and what they are orthonormalised to, in fp64, and the result."""
    return max(
        WIDE * (2 * length * width + width * width) + ITEM * length * width
        for length, width in basis_shapes(side, rows, cols, r).values()
    )


_BYTES: dict[str, Callable[[int, int, str, int], int]] = {
    "exact": _exact,
    "subspace": _subspace,
    "gram64": _gram64,
    "random": _random,
}
