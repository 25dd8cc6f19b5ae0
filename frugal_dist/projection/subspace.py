"""Other ways to the top-r singular vectors of a finite matrix than a full SVD: subspace iteration, and Gram + eigh.

Both end in singular vectors (Rayleigh-Ritz), never in an arbitrary basis of the subspace: Adam works elementwise, so a
rotated basis is another optimizer. Both are functions of their arguments alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import frugal_dist.projection.coordinates as coordinates
from frugal_dist.projection.basis import Basis, basis_of, dense

# Chosen on the gradients of a small LLaMA (docs/performance.md): more of either costs time, less costs signs.
OVERSAMPLING = 3 / 16
WARM_ROUNDS, COLD_ROUNDS = 2, 5


def subspace_svd(grad: Tensor, side: str, r: int, warm: Basis | None, *, seed: int, name: str, refresh: int) -> Basis:
    """The leading singular vectors by shifted subspace iteration from the old basis ``warm``.

    Random columns, a function of (seed, name, refresh), fill up what ``warm`` lacks, with 3/16 more. Each round
    multiplies by GᵀG (by GGᵀ for the left) and orthonormalises; all but the first subtract a multiple of the columns,
    which damps the singular values that are not wanted (the shift of dashSVD, Feng et al. 2024).
    """
    if side == "left":
        matrix, start = grad.T, None if warm is None else warm.left
    else:
        matrix, start = grad, None if warm is None else warm.right
    vectors = _start(matrix, start, r, seed, name, refresh)
    room = vectors.shape[1] < min(matrix.shape)  # else there is nothing to damp
    for round_number in range(COLD_ROUNDS if start is None else WARM_ROUNDS):
        image = matrix @ vectors
        image_back = matrix.T @ image
        if room and round_number:
            # Shifts up to half of the k-th eigenvalue help, k the number of columns. Their smallest Rayleigh quotient
            # is near it, and needs neither a decomposition nor a wait for the GPU.
            image_back.addcmul_(vectors, image.square().sum(0).min(), value=-0.5)
        vectors = torch.linalg.qr(image_back).Q
    turn, captured = _leading(matrix @ vectors, r)  # Rayleigh-Ritz
    inner = dense(vectors @ turn.to(matrix.dtype))
    if side != "full":
        return basis_of({side: inner}, captured)
    return Basis(left=dense(torch.linalg.qr(matrix @ inner).Q), right=inner, captured=captured)


def _leading(matrix: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The r leading right singular vectors as columns and the sum of their squared singular values, in fp64.

    By the Gram matrix: in fp32 squaring the condition number would spoil what the residual's signs depend on; in fp64
    it does not.
    """
    wide = matrix.double()
    values, vectors = torch.linalg.eigh(wide.T @ wide)
    return vectors.flip(1)[:, :r], values[-r:].clamp(min=0).sum()


def _start(matrix: Tensor, warm: Tensor | None, r: int, seed: int, name: str, refresh: int) -> Tensor:
    """Columns of about unit length: r and some more, at most as many as the matrix has singular vectors.

    Not orthonormal: the first round makes them so.
    """
    length = matrix.shape[1]
    width = min(r + math.ceil(OVERSAMPLING * r), *matrix.shape)
    known = [] if warm is None else [warm[:, :width].to(matrix.device, matrix.dtype)]
    missing = width - sum(part.shape[1] for part in known)
    generator = coordinates.seeded_generator(seed, f"{name}|subspace", refresh, length, missing)
    extra = torch.randn(length, missing, generator=generator, dtype=torch.float32, device="cpu")
    extra /= math.sqrt(length)
    return torch.cat([*known, extra.to(matrix.device, matrix.dtype)], dim=1)


def gram_svd(grad: Tensor, side: str, r: int) -> Basis:
    """The leading singular vectors from the eigenvectors of the smaller Gram matrix, in fp64."""
    wide = grad.double()
    tall = wide.shape[0] >= wide.shape[1]
    matrix = wide if tall else wide.T
    inner, captured = _leading(matrix, r)
    bases = {"right" if tall else "left": inner}
    other = "left" if tall else "right"
    if side in (other, "full"):
        bases[other] = torch.linalg.qr(matrix @ inner).Q
    wanted = ("left", "right") if side == "full" else (side,)
    return basis_of({part: dense(bases[part].to(grad.dtype)) for part in wanted}, captured)
