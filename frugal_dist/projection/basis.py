"""Bases: down(G) = G Q (right), P^T G (left) or P^T G Q (full); up() is the adjoint.

All functions work on a whole matrix and on a compute tile alike: a right basis leaves rows free, a left one columns,
so a tile that is cut only along its free dimension needs nothing from elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from frugal_dist.projection.products import MATMULS

Dictionary = Callable[[int, torch.dtype, torch.device], Tensor]
"""(length, dtype, device): the square orthonormal matrix whose columns are chosen from."""


@dataclass(slots=True)  # not frozen: every matrix makes one at every step, which would take three times as long
class Basis:
    """Orthonormal columns: ``left`` (P, rows x r) and/or ``right`` (Q, cols x r), contiguous. Never changed.

    Contiguous down to the strides of dims of length 1, which BLAS looks at: the last bits depend on them, and are to be
    the same on the rank that computed a basis, on those that received it, and on all after a resume. They compute in
    fp32 or fp64, and may be kept in bf16. Without parts it is everything. ``captured``: the sum of squares of what they
    catch of the matrix they were just found from (fp64, no dimensions), where that cost nothing. With a ``dictionary``
    the parts are the numbers of its columns (int32, r), and ``shown`` makes the columns of them for the time of a
    computation.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    captured: Tensor | None = None
    dictionary: Dictionary | None = None

    @property
    def parts(self) -> list[Tensor]:
        return [part for part in (self.left, self.right) if part is not None]

    def shown(self, rows: int, cols: int, dtype: torch.dtype) -> Basis:
        """The columns of a basis of rows x cols matrices; itself where they are there."""
        if self.dictionary is None:
            return self
        left, right = (
            None if part is None else self.dictionary(length, dtype, part.device).index_select(1, part)
            for part, length in ((self.left, rows), (self.right, cols))
        )
        return Basis(left, right)

    def to(self, dtype: torch.dtype) -> Basis:
        """The same columns in another dtype; itself if it has it already."""
        if all(part.dtype == dtype for part in self.parts):
            return self
        return self.moved(self.parts[0].device, dtype)

    def moved(self, device: torch.device, dtype: torch.dtype) -> Basis:
        """The columns alone, elsewhere and in another dtype."""
        left, right = (None if part is None else dense(part.to(device, dtype)) for part in (self.left, self.right))
        return Basis(left, right)


def basis_of(
    parts: Mapping[str, Tensor], captured: Tensor | None = None, dictionary: Dictionary | None = None
) -> Basis:
    """From its parts by name."""
    return Basis(parts.get("left"), parts.get("right"), captured, dictionary)


def dense(part: Tensor) -> Tensor:
    """Itself or a copy with the strides of a new tensor; ``contiguous()`` lets any strides of a single column pass."""
    expected = (part.shape[1], 1)
    return part if part.stride() == expected else part.clone(memory_format=torch.contiguous_format)


def basis_shapes(side: str, rows: int, cols: int, r: int) -> dict[str, tuple[int, int]]:
    """Shapes of the parts by name, in the order in which they travel."""
    shapes = {"left": (rows, r), "right": (cols, r)}
    return shapes if side == "full" else {side: shapes[side]}


def down(grad: Tensor, basis: Basis, matmul: str = "fp32") -> Tensor:
    """R, the projected gradient."""
    multiply = MATMULS[matmul].multiply
    low = grad if basis.left is None else multiply(basis.left.T, grad)
    return low if basis.right is None else multiply(low, basis.right)


def up(low: Tensor, basis: Basis) -> Tensor:
    """The adjoint of ``down``: back to the shape of the gradient."""
    high = low if basis.left is None else basis.left @ low
    return high if basis.right is None else high @ basis.right.T


def add_up_(out: Tensor, low: Tensor, basis: Basis, alpha: float = 1.0, matmul: str = "fp32") -> Tensor:
    """Out += alpha * up(low), without a temporary of out's size."""
    products = MATMULS[matmul]
    if basis.right is None:
        if basis.left is None:
            return out.add_(low, alpha=alpha)
        return products.add_(out, basis.left, low, alpha=alpha)
    low = low if basis.left is None else products.multiply(basis.left, low)
    return products.add_(out, low, basis.right.T, alpha=alpha)


def residual(grad: Tensor, low: Tensor, basis: Basis, matmul: str = "fp32") -> Tensor:
    """Grad - up(low), in a new tensor."""
    products = MATMULS[matmul]
    if basis.right is None:
        assert basis.left is not None
        return products.add(grad, basis.left, low, alpha=-1.0)
    low = low if basis.left is None else products.multiply(basis.left, low)
    return products.add(grad, low, basis.right.T, alpha=-1.0)


def spans_everything(basis: Basis) -> bool:
    """Whether no gradient has a residual (density 1): what is left would be rounding noise, whose signs are steps."""
    left, right = basis.left, basis.right
    return (left is None or left.shape[0] == left.shape[1]) and (right is None or right.shape[0] == right.shape[1])


def silence_noise_(rest: Tensor, grad: Tensor, side: str, threshold: float) -> Tensor:
    """Zero the rows (columns for a left basis) of a residual that are rounding noise relative to the gradient's.

    With r >= rank(G) the residual is about 1e-6 of G, yet its sign would move nearly every entry by a full step.
    """
    if threshold > 0.0:
        dim = 0 if side == "left" else 1
        noise = rest.norm(dim=dim, keepdim=True) <= threshold * grad.norm(dim=dim, keepdim=True)
        rest.masked_fill_(noise, 0.0)
    return rest


def carry_first(moment: Tensor, old: Basis, new: Basis) -> Tensor:
    """A first moment in a new basis: m <- (P'^T P) m (Q^T Q')."""
    return _carry(moment, old, new, squared=False)


def carry_second(moment: Tensor, old: Basis, new: Basis) -> Tensor:
    """A second moment in a new basis: the squared overlaps keep it non-negative and exact for independent entries."""
    return _carry(moment, old, new, squared=True)


def _carry(moment: Tensor, old: Basis, new: Basis, squared: bool) -> Tensor:
    if old.left is not None and new.left is not None:
        overlap = new.left.T @ old.left
        moment = (overlap.square() if squared else overlap) @ moment
    if old.right is not None and new.right is not None:
        overlap = old.right.T @ new.right
        moment = moment @ (overlap.square() if squared else overlap)
    return moment
