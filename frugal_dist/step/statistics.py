"""Figures of the refreshes: how much of the gradient the state-full part catches, and how far the bases turn.

Every rank counts what it sees, each matrix or tile on one rank only, so that sums over the ranks are the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from frugal_dist.projection.basis import Basis, down

Number = float | Tensor


@dataclass
class RefreshStats:
    """Sums since they were last taken.

    ``refreshed``: matrices (for coordinates: their tiles). ``energy``: sum of squares of their gradients at the
    refresh, ``captured``: of what the state-full rule gets of them. ``overlap``: summed over the ``turned`` bases that
    replaced another, the mean squared cosine between the old subspace and the new one: 1 where they are the same.
    """

    refreshed: int = 0
    energy: Number = 0.0
    captured: Number = 0.0
    turned: int = 0
    overlap: Number = 0.0

    def add_part(self, grads: Sequence[Tensor], captured: Sequence[Tensor]) -> None:
        """A refreshed matrix or tile: its gradient, and the part of it that is state-full."""
        self.add_energies(_energy(grads), _energy(captured))

    def add_basis(self, grad: Tensor, basis: Basis, captured: Tensor | None) -> None:
        """A new basis, on the rank that computed it from the whole gradient, and what it catches of it, if known."""
        caught = _energy([down(grad, basis)]) if captured is None else captured.to(grad.device)
        self.add_energies(_energy([grad]), caught)

    def add_energies(self, energy: Number, captured: Number) -> None:
        """A refreshed matrix whose energies are known."""
        self.refreshed += 1
        self.energy = _added(self.energy, energy)
        self.captured = _added(self.captured, captured)

    def add_turn(self, old: Basis | None, new: Basis) -> None:
        """A basis that takes the place of another; nothing is counted where they cannot be compared."""
        if old is None:
            return  # the first one
        numbered = new.dictionary is not None
        if not numbered and [part.shape[0] for part in old.parts] != [part.shape[0] for part in new.parts]:
            return  # on another side
        self.turned += 1
        cosine = _common if numbered else _cosine
        cosines = [cosine(before, after) for before, after in zip(old.parts, new.parts, strict=True)]
        self.overlap = _added(self.overlap, torch.stack(cosines).mean())

    def take(self) -> list[float]:
        """The sums as numbers, in the order of the fields; counting begins anew. Waits for the device."""
        sums = [float(getattr(self, entry.name)) for entry in fields(self)]
        self.__init__()  # type: ignore[misc]
        return sums


@dataclass(frozen=True)
class RefreshReport:
    """What the sums over all ranks say; NaN for what was not seen.

    ``residual_energy``: share of the gradients' energy that only the state-free rule gets. ``overlap``: mean over the
    bases that took the place of another.
    """

    matrices: int
    residual_energy: float
    overlap: float
    turned: int = field(default=0)

    @classmethod
    def of(cls, sums: Sequence[float]) -> RefreshReport:
        """From ``RefreshStats.take()``, added over the ranks."""
        refreshed, energy, captured, turned, overlap = sums
        nan = float("nan")
        return cls(
            matrices=int(refreshed),
            residual_energy=1.0 - captured / energy if energy > 0.0 else nan,
            overlap=overlap / turned if turned else nan,
            turned=int(turned),
        )


def _added(total: Number, more: Number) -> Number:
    """Their sum, where ``total`` lies: a process may have a model on several GPUs."""
    return total + (more.to(total.device) if isinstance(total, Tensor) and isinstance(more, Tensor) else more)


_PIECE = 1 << 22


def _energy(tensors: Sequence[Tensor]) -> Number:
    """In pieces: torch squares and widens in copies, which should not be as large as the matrix."""
    pieces = [piece for tensor in tensors if tensor.numel() for piece in tensor.reshape(-1).split(_PIECE)]
    energies = [piece.float().square().sum(dtype=torch.float64) for piece in pieces]
    return torch.stack(energies).sum() if energies else 0.0


def _common(old: Tensor, new: Tensor) -> Tensor:
    """The same of columns of one orthonormal matrix, by their numbers."""
    return torch.isin(new, old).sum(dtype=torch.float64) / min(new.numel(), old.numel())


def _cosine(old: Tensor, new: Tensor) -> Tensor:
    """||old^T new||^2 / r of two orthonormal bases of shape (length, r); the smaller r counts."""
    product = old.to(new.dtype).T @ new
    return product.square().sum(dtype=torch.float64) / min(product.shape)
