"""What the owner of a matrix does at a refresh: compute its basis, where and in whatever precision that works."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from frugal_dist.notices import notice
from frugal_dist.projection.basis import Basis, exact_svd, random_basis
from frugal_dist.projection.subspace import gram_svd, subspace_svd
from frugal_dist.step.runtime import LocalMatrix
from frugal_dist.step.statistics import RefreshStats


def compute_basis(work: LocalMatrix, grad: Tensor, warm: Basis | None, figures: RefreshStats) -> Basis | None:
    """The new basis, or None. Never raises: the other ranks are waiting for the outcome."""
    refresh_number = work.state.counter("refreshes")
    troubles = []
    for place, dtype in ((_fastest, work.dtype), (_cpu, work.dtype), (_cpu, torch.float64)):
        try:
            found = _basis_of(work, grad.to(place(grad), dtype), refresh_number, warm)
            basis = found.moved(work.device, work.dtype)
            if all(bool(torch.isfinite(part).all()) for part in basis.parts):
                _count(figures, grad, basis, found.captured)
                return basis
            troubles.append("the result is not finite")
        except Exception as error:  # whatever went wrong becomes a status; a traceback here would hang the others
            troubles.append(f"{type(error).__name__}: {error}")
    notice(f"{work.matrix.name}: the refresh failed on its owner: {'; '.join(troubles)}")
    return None


def _fastest(grad: Tensor) -> torch.device:
    """Where the gradient lies, or the GPU if it is offloaded: a large SVD takes that one seconds, a CPU minutes.

    A GPU that this process does not use so far stays alone: whoever trains on the CPU of such a machine means it.
    """
    offloaded = grad.device.type == "cpu" and torch.cuda.is_initialized()
    return torch.device("cuda") if offloaded else grad.device


def _cpu(grad: Tensor) -> torch.device:
    return torch.device("cpu")


def _count(figures: RefreshStats, grad: Tensor, basis: Basis, captured: Tensor | None) -> None:
    """Figures are not worth a basis that was found, nor the ranks that wait for it."""
    try:
        figures.add_basis(grad.to(basis.parts[0].dtype), basis, captured)
    except Exception as error:  # no memory left, say
        notice(f"the figures of a refresh could not be computed: {type(error).__name__}: {error}")


def _basis_of(work: LocalMatrix, grad: Tensor, number: int, warm: Basis | None) -> Basis:
    name, seed, side, r = work.matrix.name, work.config.seed, work.side, work.size
    if work.config.projection == "random":
        rows, cols = grad.shape
        return random_basis(rows, cols, side, r, seed=seed, name=name, refresh=number, dtype=grad.dtype)
    methods: dict[str, Callable[[], Basis]] = {
        "exact": lambda: exact_svd(grad, side, r),
        "subspace": lambda: subspace_svd(grad, side, r, warm, seed=seed, name=name, refresh=number),
        "gram64": lambda: gram_svd(grad, side, r),
    }
    return methods[work.config.svd_method]()
