"""svd (GaLore, FRUGAL): the leading singular vectors of the gradient, by one of three methods."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from frugal_dist.projection.basis import Basis
from frugal_dist.projection.definition import Drawing, sided
from frugal_dist.projection.numerics import FP32, FP64
from frugal_dist.projection.subspace import OVERSAMPLING, gram_svd, subspace_svd


def exact_svd(grad: Tensor, side: str, r: int) -> Basis:
    """The top-r singular vectors of a finite matrix (GaLore's and FRUGAL's projector).

    Copies what it keeps: a view would keep the whole factor alive. Raises what torch.linalg.svd raises.
    """
    # LAPACK takes a wide matrix 1.8 times as long as its transpose, but gives other signs to the vectors, and moments
    # kept over a refresh (on_refresh="keep") would not follow the authors' code any more.
    left, values, right_t = torch.linalg.svd(grad, full_matrices=False)
    return Basis(
        left=left[:, :r].clone(memory_format=torch.contiguous_format) if side in ("left", "full") else None,
        right=right_t[:r].T.clone(memory_format=torch.contiguous_format) if side in ("right", "full") else None,
        captured=values[:r].double().square().sum(),
    )


def _subspace(grad: Tensor, drawing: Drawing, warm: Basis | None) -> Basis:
    seed, name, refresh = drawing.config.seed, drawing.name, drawing.refresh
    return subspace_svd(grad, drawing.side, drawing.size, warm, seed=seed, name=name, refresh=refresh)


# Bytes that a method takes at most at one time, beside the gradient.


def _exact_bytes(rows: int, cols: int, side: str, r: int) -> int:
    """The copy that the solver overwrites, U, S, Vt, and the workspace of divide and conquer."""
    k = min(rows, cols)
    return FP32 * (rows * cols + (rows + cols + 1) * k + 4 * k * k)


def _subspace_bytes(rows: int, cols: int, side: str, r: int) -> int:
    """More columns than r: the last QR, or what the rounds leave beside a Gram matrix in fp64 and its eigenvectors."""
    outer, inner = (cols, rows) if side == "left" else (rows, cols)
    width = min(r + math.ceil(OVERSAMPLING * r), rows, cols)
    rounds = (outer + 3 * inner) * width + width * width
    return max(FP32 * rounds, (FP32 * 2 * (outer + inner) + FP64 * outer) * width + FP64 * 4 * width * width)


def _gram64_bytes(rows: int, cols: int, side: str, r: int) -> int:
    """In fp64: the gradient; its Gram matrix, the eigenvectors and their workspace, or the other side's vectors."""
    k, long = min(rows, cols), max(rows, cols)
    other = side == "full" or (side == "left") == (rows >= cols)
    return FP64 * (rows * cols + max(4 * k * k, other * (k * k + 2 * long * r + r * r)))


@dataclass(frozen=True)
class SvdMethod:
    """One of ``svd_method``: how the vectors are computed, what that takes, and whether it starts from the old ones."""

    compute: Callable[[Tensor, Drawing, Basis | None], Basis]
    scratch: Callable[[int, int, str, int], int]
    starts_warm: bool = False


METHODS = {
    "exact": SvdMethod(lambda grad, drawing, warm: exact_svd(grad, drawing.side, drawing.size), _exact_bytes),
    "subspace": SvdMethod(_subspace, _subspace_bytes, starts_warm=True),
    "gram64": SvdMethod(lambda grad, drawing, warm: gram_svd(grad, drawing.side, drawing.size), _gram64_bytes),
}

SVD = sided(
    name="svd",
    family="basis",
    depends_on=("side",),
    own={"svd_method": "computes no SVD"},
    within_rank=True,
    compute=lambda grad, drawing, warm: METHODS[drawing.config.svd_method].compute(grad, drawing, warm),
    starts_warm=lambda config: METHODS[config.svd_method].starts_warm,
    scratch=lambda config, *sizes: METHODS[config.svd_method].scratch(*sizes),
)
