"""Other ways to the top-r singular vectors of a finite matrix than a full SVD: subspace iteration, and Gram + eigh.

Both end in singular vectors (Rayleigh-Ritz), never in an arbitrary basis of the subspace: Adam works elementwise, so a
rotated basis is another optimizer. Both are functions of their arguments alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import frugal_dist.projection.coordinates as coordinates
from frugal_dist.projection.basis import Basis

OVERSAMPLING = 0.25
WARM_ITERATIONS, COLD_ITERATIONS = 2, 6


def subspace_svd(grad: Tensor, side: str, r: int, warm: Basis | None, *, seed: int, name: str, refresh: int) -> Basis:
    """The leading singular vectors by subspace iteration from the old basis ``warm``, with a quarter of extra columns.

    Random columns, a function of (seed, name, refresh), fill up what ``warm`` lacks. In each round one of the two
    halves is orthonormalised; the last round orthonormalises both and rotates to singular vectors.
    """
    if side == "left":
        matrix, start = grad.T, None if warm is None else warm.left
    else:
        matrix, start = grad, None if warm is None else warm.right
    vectors = _start(matrix, start, r, seed, name, refresh)
    rounds = COLD_ITERATIONS if start is None else WARM_ITERATIONS
    for _ in range(rounds - 1):
        vectors = torch.linalg.qr(matrix.T @ (matrix @ vectors)).Q
    outer = torch.linalg.qr(matrix @ vectors).Q
    inner, triangle = torch.linalg.qr(matrix.T @ outer)
    turn_inner, _, turn_outer = torch.linalg.svd(triangle)  # G ~ outer (inner triangle)^T
    first = (inner @ turn_inner[:, :r]).contiguous()
    if side != "full":
        return Basis(**{side: first})
    return Basis(left=(outer @ turn_outer.T[:, :r]).contiguous(), right=first)


def _start(matrix: Tensor, warm: Tensor | None, r: int, seed: int, name: str, refresh: int) -> Tensor:
    """Columns of about unit length: r and a quarter more, at most as many as the matrix has singular vectors.

    Not orthonormal: the first round makes them so.
    """
    length = matrix.shape[1]
    width = min(r + math.ceil(OVERSAMPLING * r), *matrix.shape)
    known = [] if warm is None else [warm[:, :width].to(matrix.device, matrix.dtype)]
    missing = width - sum(part.shape[1] for part in known)
    generator = coordinates.seeded_generator(seed, f"{name}|subspace", refresh, length, missing)
    extra = torch.randn(length, missing, generator=generator, dtype=torch.float64, device="cpu")
    extra /= math.sqrt(length)
    return torch.cat([*known, extra.to(matrix.device, matrix.dtype)], dim=1)


def gram_svd(grad: Tensor, side: str, r: int) -> Basis:
    """The leading singular vectors from the eigenvectors of the smaller Gram matrix, in fp64.

    In fp32 squaring the condition number would spoil what the residual's signs depend on; in fp64 it does not.
    """
    wide = grad.double()
    tall = wide.shape[0] >= wide.shape[1]
    matrix = wide if tall else wide.T
    inner = torch.linalg.eigh(matrix.T @ matrix).eigenvectors.flip(1)[:, :r]
    found = {"right" if tall else "left": inner}
    other = "left" if tall else "right"
    if side in (other, "full"):
        found[other] = torch.linalg.qr(matrix @ inner).Q
    wanted = ("left", "right") if side == "full" else (side,)
    return Basis(**{part: found[part].to(grad.dtype).contiguous() for part in wanted})
