"""Bases of columns of one fixed orthonormal matrix: those that catch most of a gradient, kept as their numbers.

No decomposition is needed, and no matrix need be whole anywhere: the energies that the columns catch of a gradient are
sums over those of its tiles that hold whole lines. ``dct`` is the one such projection (Modoranu et al., arXiv
2505.17967).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from frugal_dist.projection.basis import Basis, basis_of, basis_shapes
from frugal_dist.projection.definition import Drawing, ProjectionSettings, sided
from frugal_dist.projection.numerics import FP32

_PIECE, _CUDA_PIECE = 1 << 18, 1 << 24
"""Entries that are transformed at one time: they stay in the cache, or are worth the launches."""
_LEAST = 1e-30


@cache
def dct_columns(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthonormal DCT-II: cos(pi (2 j + 1) k / (2 n)) in row j and column k, scaled. Made once, for all."""
    with torch.inference_mode(False):
        columns = torch.empty(length, length, dtype=dtype, device=device)
        numbers = torch.arange(length, dtype=torch.int64, device="cpu")
        for rows in numbers.split(max(1, _PIECE // max(length, 1))):
            turns = (2 * rows.view(-1, 1) + 1) * numbers % (4 * length)  # exact, where the product may be large
            columns[rows[0] : rows[-1] + 1] = torch.cos(turns.double() * (math.pi / (2 * length))).to(device, dtype)
        columns.mul_(math.sqrt(2.0 / length))[:, :1].mul_(math.sqrt(0.5))
    return columns


def column_energies(grad: Tensor, side: str) -> dict[str, Tensor]:
    """By part: how much each column of the whole square matrix catches of a tile, as sums of squares in fp64.

    ``grad`` holds whole rows for a right basis, whole columns for a left one, and everything for both.
    """
    lines = {"right": grad, "left": grad.T}
    chosen = lines if side == "full" else {side: lines[side]}
    return {part: _energies(chosen[part]) for part in basis_shapes(side, 0, 0, 0)}


def _energies(lines: Tensor) -> Tensor:
    """Of the DCT-II of each line, by a real Fourier transform of its even entries and its odd ones backwards (Makhoul
    1980): turned by a quarter of their frequency, its real parts are the lower coefficients, its imaginary ones the
    upper.
    """
    length, device = lines.shape[1], lines.device
    numbers = torch.arange(length, device=device)
    order = torch.cat((numbers[::2], numbers[1::2].flip(0)))
    angles = numbers[: length // 2 + 1].double() * (-math.pi / (2 * length))
    largest = torch.stack(torch.aminmax(lines)).abs().max().clamp_(min=_LEAST)  # squares of less would be lost in fp32
    turn = torch.complex(angles.cos().to(lines.dtype), angles.sin().to(lines.dtype)).div_(largest)
    squares = torch.zeros(len(angles), 2, dtype=torch.float64, device=device)
    piece = _CUDA_PIECE if lines.is_cuda else _PIECE
    for part in lines.split(max(1, piece // length)):
        squares += torch.view_as_real(torch.fft.rfft(part.index_select(1, order)).mul_(turn)).square_().sum(0)
    upper = squares[1 : (length + 1) // 2, 1].flip(0)
    total = torch.cat((squares[: length - len(upper), 0], upper)).mul_(largest.double().square() * (2.0 / length))
    total[0] *= 0.5
    return total


def largest(energies: Mapping[str, Tensor], r: int) -> Basis:
    """The numbers of the ``r`` columns that catch most, in their own order; of equal ones the first."""
    return basis_of({part: _first(values, r) for part, values in energies.items()}, dictionary=dct_columns)


def _first(values: Tensor, r: int) -> Tensor:
    ordered = values.sort(descending=True, stable=True).indices
    return ordered[:r].sort().values.to(torch.int32)


def _compute(grad: Tensor, drawing: Drawing, warm: Basis | None) -> Basis:
    numbers = largest(column_energies(grad, drawing.side), drawing.size)
    return numbers.shown(drawing.rows, drawing.cols, grad.dtype)


def _scratch(config: ProjectionSettings, rows: int, cols: int, side: str, r: int) -> int:
    """The fixed matrix, and a piece of the gradient in order, and transformed."""
    length = max(size for size, _ in basis_shapes(side, rows, cols, r).values())
    return FP32 * length * length + 2 * FP32 * min(rows * cols, _CUDA_PIECE)


DCT = sided(
    name="dct",
    family="basis",
    depends_on=("side",),
    dictionary=dct_columns,
    compute=_compute,
    scratch=_scratch,
)
