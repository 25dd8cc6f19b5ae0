"""random: orthonormalised Gaussian columns, drawn from the seed; gaussian: as they are drawn."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import frugal_dist.projection.coordinates as coordinates
from frugal_dist.projection.basis import Basis, basis_of, basis_shapes, dense
from frugal_dist.projection.definition import Drawing, ProjectionSettings, sided
from frugal_dist.projection.numerics import FP32, FP64
from frugal_dist.projection.shapes import round_of


def random_basis(
    rows: int, cols: int, side: str, r: int, *, seed: int, name: str, refresh: int, dtype: torch.dtype
) -> Basis:
    """Orthonormalised Gaussian columns on the CPU, from (seed, name, refresh)."""
    parts = {}
    for part, (length, width) in basis_shapes(side, rows, cols, r).items():
        generator = coordinates.seeded_generator(seed, f"{name}|{part}", refresh, length, width)
        gaussian = torch.randn(length, width, generator=generator, dtype=torch.float64, device="cpu")
        parts[part] = dense(torch.linalg.qr(gaussian).Q.to(dtype))
    return basis_of(parts)


def gaussian_columns(
    rows: int, cols: int, side: str, r: int, *, seed: int, name: str, refresh: int, dtype: torch.dtype
) -> Basis:
    """Independent Gaussian entries of variance 1/r on the CPU, from (seed, name, refresh): lengths stay on average."""
    parts = {}
    for part, (length, width) in basis_shapes(side, rows, cols, r).items():
        generator = coordinates.seeded_generator(seed, f"{name}|{part}", refresh, length, width)
        gaussian = torch.randn(length, width, generator=generator, dtype=torch.float64, device="cpu")
        parts[part] = gaussian.div_(width**0.5).to(dtype)
    return basis_of(parts)


def _compute(grad: Tensor, drawing: Drawing, warm: Basis | None) -> Basis:
    return _drawn(random_basis, grad, drawing)


def _drawn(draw: Callable[..., Basis], grad: Tensor, drawing: Drawing) -> Basis:
    return draw(
        *(drawing.rows, drawing.cols, drawing.side, drawing.size),
        seed=drawing.config.seed,
        name=drawing.name,
        refresh=drawing.refresh,
        dtype=grad.dtype,
    )


def _scratch(config: ProjectionSettings, rows: int, cols: int, side: str, r: int) -> int:
    """Gaussian columns and what they are orthonormalised to, in fp64, and the result."""
    return max(
        FP64 * (2 * length * width + width * width) + FP32 * length * width
        for length, width in basis_shapes(side, rows, cols, r).values()
    )


RANDOM = sided(
    name="random",
    family="basis",
    depends_on=("side",),
    compute=_compute,
    from_gradient=False,
    scratch=_scratch,
)

GAUSSIAN = sided(
    name="gaussian",
    family="basis",
    depends_on=("side",),
    share=lambda density, number: max(1, round_of(density, number)),
    written="r = max(1, round({density:g} * {dim}))",
    orthonormal=False,
    compute=lambda grad, drawing, warm: _drawn(gaussian_columns, grad, drawing),
    from_gradient=False,
    scratch=_scratch,
)
"""APOLLO's (arXiv 2412.05270): for norms of gradients, not for their rests. The smallest densities are one column."""
