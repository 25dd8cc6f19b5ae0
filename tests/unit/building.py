"""Small parts that the unit tests are put together from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from frugal_dist import Frugal
from frugal_dist.projection.coordinates import Columns, Everything, Flat, Rows, Selection

PROJECTIONS = ("svd", "dct", "random", "randperm", "columns", "rows", "randk", "blockwise")
# A density with which every projection selects something of the matrices used here.
DENSITY = 0.5


def weight(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
    """A random parameter. The same numbers for every dtype, up to rounding."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))


def build(
    matrices: Mapping[str, Tensor], regular: Mapping[str, Tensor] | None = None, **hyperparameters: Any
) -> Frugal:
    """Frugal on matrices that are projected and parameters that are not."""
    groups: list[dict[str, Any]] = [{"params": list(matrices.items()), "projected": True}]
    if regular:
        groups.append({"params": list(regular.items()), "projected": False})
    return Frugal(groups, **{"density": DENSITY, "update_gap": 3, "lr": 0.01, **hyperparameters})


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def set_grads(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Gradients that depend only on the step and on the place of the parameter in the optimizer."""
    for index, parameter in enumerate(parameters_of(optimizer)):
        generator = torch.Generator().manual_seed(7919 * step + index)
        grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = grad.to(parameter.dtype)


def train(optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Steps number `first` to `last`, both included, counted from 1."""
    for step in range(first, last + 1):
        set_grads(optimizer, step)
        optimizer.step()


def weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters_of(optimizer)]


def counters(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, int]:
    """The counters of one parameter that exist, as plain numbers."""
    state = optimizer.state[parameter]
    return {key: int(state[key]) for key in ("step", "updates", "refreshes", "refreshed_at") if key in state}


def drawn(length: int, share: float) -> Tensor:
    """A random sorted subset of the numbers below ``length``."""
    return torch.randperm(length)[: int(share * length)].sort().values


def tile_selections(rows: int, cols: int) -> list[Selection | None]:
    """What may be state-full in a tile: columns, rows, single entries, nothing here, nothing at all, everything."""
    return [
        Columns(drawn(cols, 0.3)),
        Rows(drawn(rows, 0.3), cols),
        Flat(drawn(rows * cols, 0.3).int(), cols),
        Columns(torch.empty(0, dtype=torch.int64)),
        None,
        Everything(cols),
    ]
