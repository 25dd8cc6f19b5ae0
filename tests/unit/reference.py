"""FRUGAL on one process, written as plainly as possible: dense, slow, float64, no tricks.

It shares nothing with the product but the source of randomness, `frugal_dist.projection.select_indices`. Every low-rank
gradient R is one dense tensor, every rule is the formula of the paper, every matrix is treated alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache

import torch
from torch import Tensor

import frugal_dist.projection

BASES = ("svd", "random", "dct", "randperm")
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
    refresh_schedule: str = "together"
    residual_threshold: float = 0.0
    seed: int = 0


@dataclass
class Parameter:
    """One matrix (or one regular parameter) with everything that is known about it."""

    name: str
    weight: Tensor
    decays: bool = True
    updates: int = 0
    refreshes: int = 0
    refreshed_at: int = -1
    size: int = 0
    step: int = 0
    exp_avg: Tensor | None = None
    exp_avg_sq: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    positions: list[int] = field(default_factory=list)  # coordinates: where each entry of R stands in the flat matrix
    scattered: bool = (
        False  # whether R is what stands at these places: coordinates, and density 0 whatever it is called
    )
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


@cache
def written(density: float) -> Fraction:
    """The number of a small denominator that this float stands for: counts are exact for what somebody wrote."""
    for denominator in range(1, 10_001):
        numerator = round(density * denominator)
        if numerator / denominator == density:
            return Fraction(numerator, denominator)
    return Fraction(density)


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
    density, left, right = written(settings.density), None, None
    left_rank = round(density * (min(rows, columns) if on_right else rows))
    right_rank = round(density * (min(rows, columns) if on_left else columns))
    if settings.projection == "svd":
        u, _, vt = torch.linalg.svd(grad, full_matrices=False)
        left = u[:, :left_rank] if on_left else None
        right = vt[:right_rank].T if on_right else None
        return left, right
    if settings.projection == "dct":
        left = most_energetic(cosines(rows), grad.T, left_rank) if on_left else None
        right = most_energetic(cosines(columns), grad, right_rank) if on_right else None
        return left, right
    assert settings.projection == "randperm"
    if on_left:
        left = one_hot(rows, left_rank, parameter.name, parameter.refreshes, settings)
    if on_right:
        name = parameter.name + (":columns" if on_left else "")
        right = one_hot(columns, right_rank, name, parameter.refreshes, settings)
    return left, right


def cosines(length: int) -> Tensor:
    """The orthonormal DCT-II, column by column."""
    place = torch.arange(length, dtype=torch.float64) + 0.5
    waves = [torch.cos(math.pi / length * place * k) for k in range(length)]
    return torch.stack([wave / wave.norm() for wave in waves], dim=1)


def most_energetic(dictionary: Tensor, grad: Tensor, count: int) -> Tensor:
    energy = (grad @ dictionary).square().sum(dim=0)
    return dictionary[:, sorted(energy.argsort(descending=True)[:count].tolist())]


def one_hot(length: int, count: int, name: str, refresh: int, settings: Settings) -> Tensor:
    chosen = frugal_dist.projection.select_indices(length, count, seed=settings.seed, name=name, refresh=refresh)
    basis = torch.zeros(length, count, dtype=torch.float64)
    for column, index in enumerate(chosen.tolist()):
        basis[index, column] = 1.0
    return basis


def draw_positions(parameter: Parameter, settings: Settings) -> list[int]:
    """The flat, row-major places of R's entries in the matrix, in R's order."""
    rows, columns = parameter.weight.shape
    if settings.density == 0:
        return []
    length = {"columns": columns, "rows": rows, "randk": rows * columns}[settings.projection]
    chosen = frugal_dist.projection.select_indices(
        length,
        math.floor(written(settings.density) * length),
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
    if parameter.scattered:
        return grad.flatten()[parameter.positions]
    low_rank = grad if parameter.left is None else parameter.left.T @ grad
    return low_rank if parameter.right is None else low_rank @ parameter.right


def up(parameter: Parameter, low_rank: Tensor, settings: Settings) -> Tensor:
    if parameter.scattered:
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


def residual_of(parameter: Parameter, grad: Tensor, low_rank: Tensor, settings: Settings) -> Tensor:
    """What the projection leaves out. Mathematically nothing where bases are square; rounding has no sign."""
    if parameter.scattered:
        residual = grad.clone().flatten()
        residual[parameter.positions] = 0.0
        return residual.reshape(grad.shape)
    bases = [basis for basis in (parameter.left, parameter.right) if basis is not None]
    if bases and all(basis.shape[0] == basis.shape[1] for basis in bases):
        return torch.zeros_like(grad)
    residual = grad - up(parameter, low_rank, settings)
    if settings.residual_threshold > 0 and settings.projection in ("svd", "random", "dct"):
        dim = 0 if parameter.right is None else 1
        noise = residual.norm(dim=dim) <= settings.residual_threshold * grad.norm(dim=dim)
        residual[(slice(None), noise) if dim == 0 else noise] = 0.0
    return residual


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
        """Parameters that have no gradient are left alone."""
        for index, parameter in enumerate(self.matrices):
            if parameter.name in grads and parameter.weight.numel():
                self._step_matrix(parameter, grads[parameter.name].detach().double(), index)
        for parameter in self.regular:
            if parameter.name in grads:
                self._decay(parameter)
                update = state_full_update(parameter, grads[parameter.name].detach().double(), self.settings)
                parameter.weight = parameter.weight - self.settings.lr * update

    def _decay(self, parameter: Parameter) -> None:
        if parameter.decays:
            parameter.weight = parameter.weight * (1 - self.settings.lr * self.settings.weight_decay)

    def _is_due(self, parameter: Parameter, index: int) -> bool:
        """In each period of update_gap updates once; a refresh that came late does not shift the next one."""
        gap, shift = self.settings.update_gap, 0
        if self.settings.refresh_schedule == "staggered" and self.settings.projection != "blockwise":
            shift = index * gap // len(self.matrices)
        period, last = (parameter.updates - shift) // gap, (parameter.refreshed_at - shift) // gap
        return parameter.refreshed_at < 0 or period > last

    def _refresh(self, parameter: Parameter, grad: Tensor, index: int) -> None:
        settings, mode = self.settings, self.settings.on_refresh
        old_bases, old_positions, old_size = (parameter.left, parameter.right), parameter.positions, parameter.size
        was_scattered, parameter.left, parameter.right, parameter.size = parameter.scattered, None, None, 0
        parameter.scattered = settings.projection in COORDINATES or settings.density == 0
        if settings.projection == "blockwise":
            active = round(written(settings.density) * len(self.matrices))
            parameter.active = index in active_blocks(len(self.matrices), active, parameter.refreshes, settings)
            mode = "reset"
        elif parameter.scattered:
            parameter.positions = draw_positions(parameter, settings)
            parameter.size = len(parameter.positions)
        elif settings.projection == "random":
            assert self.random_bases is not None
            parameter.left, parameter.right = self.random_bases(parameter.name)
        else:
            parameter.left, parameter.right = draw_bases(parameter, grad, settings)
        for basis in (parameter.left, parameter.right):
            parameter.size = parameter.size if basis is None else basis.shape[1]
        if mode == "keep" and parameter.size != old_size:
            mode = "project"  # with another density the places are not the same ones
        if mode == "reset" or parameter.refreshes == 0:
            clear_state(parameter)
        elif mode == "project" and parameter.scattered != was_scattered:
            parameter.exp_avg, parameter.exp_avg_sq = None, None
        elif mode == "project" and parameter.scattered:
            carry_positions(parameter, old_positions)
        elif mode == "project":
            carry_bases(parameter, old_bases)
        parameter.refreshes += 1
        parameter.refreshed_at = parameter.updates

    def _step_matrix(self, parameter: Parameter, grad: Tensor, index: int) -> None:
        settings = self.settings
        from_gradient = settings.projection in ("svd", "random", "dct") and settings.density > 0
        if self._is_due(parameter, index):
            if from_gradient and not bool(torch.isfinite(grad).all()):
                return  # the whole step is left out, and tried again
            if not from_gradient or bool(grad.any()):
                self._refresh(parameter, grad, index)
        if parameter.refreshes == 0:
            return
        self._decay(parameter)
        if settings.projection == "blockwise":
            low_rank = state_full_update(parameter, grad, settings) if parameter.active else None
            update = torch.zeros_like(grad) if low_rank is None else low_rank
            residual = grad if low_rank is None else torch.zeros_like(grad)
        else:
            low_rank = down(parameter, grad, settings)
            residual = residual_of(parameter, grad, low_rank, settings)
            update = up(parameter, state_full_update(parameter, low_rank, settings), settings)
        rate = settings.lr * settings.lr_scale
        parameter.weight = parameter.weight - rate * update
        parameter.weight = parameter.weight - rate * settings.state_free_lr_scale * state_free_update(
            residual, settings
        )
        parameter.updates += 1
