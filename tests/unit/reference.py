"""FRUGAL on one process, written as plainly as possible: dense, slow, float64, no tricks.

It shares nothing with the product but the source of randomness, `frugal_dist.projection.select_indices`. Every low-rank
gradient R is one dense tensor, every rule is the formula of the paper, every matrix is treated alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import frugal_dist.projection

BASES = ("svd", "random", "randperm")
COORDINATES = ("columns", "rows", "randk")
# (left basis or None, right basis or None): what a refresh of a basis projection draws.
Bases = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Settings:
    """The hyperparameters, by the names of the public API."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    density: float = 0.25
    update_gap: int = 200
    projection: str = "svd"
    side: str = "std"
    block_order: str = "random"
    state_full: str = "adamw"
    state_free: str = "sign"
    momentum: float = 0.9
    lr_scale: float = 1.0
    state_free_lr_scale: float = 1.0
    on_refresh: str = "reset"
    seed: int = 0


@dataclass
class Parameter:
    """One matrix (or one regular parameter) with everything that is known about it."""

    name: str
    weight: Tensor
    updates: int = 0
    refreshes: int = 0
    step: int = 0
    exp_avg: Tensor | None = None
    exp_avg_sq: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    positions: list[int] = field(default_factory=list)  # coordinates: where each entry of R stands in the flat matrix
    active: bool = False  # blocks: whether this matrix is state-full


def state_full_update(parameter: Parameter, grad: Tensor, settings: Settings) -> Tensor:
    """One step of AdamW, Lion or SGDM on R (or on a whole regular gradient); lr is applied by the caller."""
    if parameter.exp_avg is None:
        parameter.exp_avg = torch.zeros_like(grad)
    if parameter.exp_avg_sq is None:
        parameter.exp_avg_sq = torch.zeros_like(grad)
    beta1, beta2 = settings.betas
    parameter.step += 1
    if settings.state_full == "adamw":
        parameter.exp_avg = beta1 * parameter.exp_avg + (1 - beta1) * grad
        parameter.exp_avg_sq = beta2 * parameter.exp_avg_sq + (1 - beta2) * grad**2
        mean = parameter.exp_avg / (1 - beta1**parameter.step)
        variance = parameter.exp_avg_sq / (1 - beta2**parameter.step)
        return mean / (variance.sqrt() + settings.eps)
    if settings.state_full == "lion":
        update = torch.sign(beta1 * parameter.exp_avg + (1 - beta1) * grad)
        parameter.exp_avg = beta2 * parameter.exp_avg + (1 - beta2) * grad
        return update
    assert settings.state_full == "sgdm"
    parameter.exp_avg = grad.clone() if parameter.step == 1 else settings.momentum * parameter.exp_avg + grad
    return parameter.exp_avg


def state_free_update(residual: Tensor, settings: Settings) -> Tensor:
    return {"sign": torch.sign(residual), "sgd": residual, "none": torch.zeros_like(residual)}[settings.state_free]


def clear_state(parameter: Parameter) -> None:
    parameter.exp_avg, parameter.exp_avg_sq, parameter.step = None, None, 0


def sides(settings: Settings, rows: int, columns: int) -> tuple[bool, bool]:
    """Whether the gradient is projected on the left and on the right."""
    if settings.side == "full":
        return True, True
    right = {"std": rows >= columns, "reverse_std": rows < columns, "right": True, "left": False}[settings.side]
    return not right, right


def draw_bases(parameter: Parameter, grad: Tensor, settings: Settings) -> Bases:
    """svd and randperm. A random basis comes from the product: see `Reference.random_bases`."""
    rows, columns = grad.shape
    on_left, on_right = sides(settings, rows, columns)
    density, left, right = settings.density, None, None
    left_rank = round(density * (min(rows, columns) if on_right else rows))
    right_rank = round(density * (min(rows, columns) if on_left else columns))
    if settings.projection == "svd":
        u, _, vt = torch.linalg.svd(grad, full_matrices=False)
        left = u[:, :left_rank] if on_left else None
        right = vt[:right_rank].T if on_right else None
        return left, right
    assert settings.projection == "randperm"
    if on_left:
        left = one_hot(rows, left_rank, parameter.name, parameter.refreshes, settings)
    if on_right:
        name = parameter.name + (":columns" if on_left else "")
        right = one_hot(columns, right_rank, name, parameter.refreshes, settings)
    return left, right


def one_hot(length: int, count: int, name: str, refresh: int, settings: Settings) -> Tensor:
    chosen = frugal_dist.projection.select_indices(length, count, seed=settings.seed, name=name, refresh=refresh)
    basis = torch.zeros(length, count, dtype=torch.float64)
    for column, index in enumerate(chosen.tolist()):
        basis[index, column] = 1.0
    return basis


def draw_positions(parameter: Parameter, settings: Settings) -> list[int]:
    """The flat, row-major places of R's entries in the matrix, in R's order."""
    rows, columns = parameter.weight.shape
    length = {"columns": columns, "rows": rows, "randk": rows * columns}[settings.projection]
    chosen = frugal_dist.projection.select_indices(
        length,
        math.floor(settings.density * length),
        seed=settings.seed,
        name=parameter.name,
        refresh=parameter.refreshes,
    ).tolist()
    if settings.projection == "columns":
        return [row * columns + column for row in range(rows) for column in chosen]
    if settings.projection == "rows":
        return [row * columns + column for row in chosen for column in range(columns)]
    return chosen


def down(parameter: Parameter, grad: Tensor, settings: Settings) -> Tensor:
    if settings.projection in COORDINATES:
        return grad.flatten()[parameter.positions]
    low_rank = grad if parameter.left is None else parameter.left.T @ grad
    return low_rank if parameter.right is None else low_rank @ parameter.right


def up(parameter: Parameter, low_rank: Tensor, settings: Settings) -> Tensor:
    if settings.projection in COORDINATES:
        full = torch.zeros(parameter.weight.numel(), dtype=torch.float64)
        full[parameter.positions] = low_rank
        return full.reshape(parameter.weight.shape)
    full = low_rank if parameter.left is None else parameter.left @ low_rank
    return full if parameter.right is None else full @ parameter.right.T


def carry_bases(parameter: Parameter, old: Bases) -> None:
    """`on_refresh="project"` of a basis projection: m turns with the basis, v with the squares of that turn."""
    mean, variance = parameter.exp_avg, parameter.exp_avg_sq
    assert mean is not None
    assert variance is not None
    if old[1] is not None and parameter.right is not None:
        turn = old[1].T @ parameter.right
        mean, variance = mean @ turn, variance @ turn**2
    if old[0] is not None and parameter.left is not None:
        turn = parameter.left.T @ old[0]
        mean, variance = turn @ mean, turn**2 @ variance
    parameter.exp_avg, parameter.exp_avg_sq = mean, variance


def carry_positions(parameter: Parameter, old: list[int]) -> None:
    """`on_refresh="project"` of coordinates: an entry that stays selected keeps its state, a new one starts at zero."""
    for key in ("exp_avg", "exp_avg_sq"):
        before = dict(zip(old, getattr(parameter, key).tolist(), strict=True))
        after = [before.get(position, 0.0) for position in parameter.positions]
        setattr(parameter, key, torch.tensor(after, dtype=torch.float64))


def active_blocks(count: int, active: int, refresh: int, settings: Settings) -> set[int]:
    """Which of `count` matrices are state-full after refresh number `refresh`."""
    if settings.block_order == "random":
        drawn = frugal_dist.projection.select_indices(count, active, seed=settings.seed, name="blocks", refresh=refresh)
        return set(drawn.tolist())
    if settings.block_order == "ascending":
        return {(refresh * active + a) % count for a in range(active)}
    if settings.block_order == "descending":
        return {(count - 1 - refresh * active - a) % count for a in range(active)}
    assert settings.block_order == "mirror"
    assert active % 2 == 0
    first = [(refresh * (active // 2) + a) % (count // 2) for a in range(active // 2)]
    return {*first, *(count - 1 - i for i in first)}


class Reference:
    """One parameter group: matrices that are projected, and parameters that are not."""

    def __init__(
        self,
        matrices: dict[str, Tensor],
        regular: dict[str, Tensor],
        settings: Settings,
        random_bases: Callable[[str], Bases] | None = None,
    ) -> None:
        self.settings = settings
        self.random_bases = random_bases
        self.matrices = [Parameter(name, weight.detach().clone().double()) for name, weight in matrices.items()]
        self.regular = [Parameter(name, weight.detach().clone().double()) for name, weight in regular.items()]

    def weights(self) -> dict[str, Tensor]:
        return {parameter.name: parameter.weight for parameter in [*self.matrices, *self.regular]}

    def step(self, grads: dict[str, Tensor]) -> None:
        if self.settings.projection == "blockwise" and self.matrices[0].updates % self.settings.update_gap == 0:
            self._refresh_blocks()
        for parameter in self.matrices:
            self._step_matrix(parameter, grads[parameter.name].detach().double())
        for parameter in self.regular:
            self._decay(parameter)
            update = state_full_update(parameter, grads[parameter.name].detach().double(), self.settings)
            parameter.weight = parameter.weight - self.settings.lr * update

    def _decay(self, parameter: Parameter) -> None:
        parameter.weight = parameter.weight * (1 - self.settings.lr * self.settings.weight_decay)

    def _refresh_blocks(self) -> None:
        count = len(self.matrices)
        active = round(self.settings.density * count)
        chosen = active_blocks(count, active, self.matrices[0].refreshes, self.settings)
        for index, parameter in enumerate(self.matrices):
            clear_state(parameter)
            parameter.active = index in chosen
            parameter.refreshes += 1

    def _refresh(self, parameter: Parameter, grad: Tensor) -> None:
        settings = self.settings
        old_bases, old_positions = (parameter.left, parameter.right), parameter.positions
        if settings.projection in COORDINATES:
            parameter.positions = draw_positions(parameter, settings)
        elif settings.projection == "random":
            assert self.random_bases is not None
            parameter.left, parameter.right = self.random_bases(parameter.name)
        else:
            parameter.left, parameter.right = draw_bases(parameter, grad, settings)
        if settings.on_refresh == "reset" or parameter.refreshes == 0:
            clear_state(parameter)
        elif settings.on_refresh == "project" and settings.projection in COORDINATES:
            carry_positions(parameter, old_positions)
        elif settings.on_refresh == "project":
            carry_bases(parameter, old_bases)
        parameter.refreshes += 1

    def _step_matrix(self, parameter: Parameter, grad: Tensor) -> None:
        settings = self.settings
        if settings.projection != "blockwise" and parameter.updates % settings.update_gap == 0:
            self._refresh(parameter, grad)
        self._decay(parameter)
        if settings.projection == "blockwise":
            low_rank = state_full_update(parameter, grad, settings) if parameter.active else None
            update = torch.zeros_like(grad) if low_rank is None else low_rank
            residual = grad if low_rank is None else torch.zeros_like(grad)
        else:
            low_rank = down(parameter, grad, settings)
            residual = grad - up(parameter, low_rank, settings)
            update = up(parameter, state_full_update(parameter, low_rank, settings), settings)
        rate = settings.lr * settings.lr_scale
        parameter.weight = parameter.weight - rate * update
        parameter.weight = parameter.weight - rate * settings.state_free_lr_scale * state_free_update(
            residual, settings
        )
        parameter.updates += 1
