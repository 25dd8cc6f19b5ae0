"""Random runs of the optimizer for the fuzzers: parameters of odd shapes, several groups, gradients that are missing,
zero or not finite, schedules, freezing. What is drawn is well defined: no step is made of the sign of rounding noise.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

Named = dict[str, Tensor]
Shape = tuple[int, ...]
BASES = ("svd", "random")
PROJECTIONS = ("svd", "random", "randperm", "columns", "rows", "randk", "blockwise")
REGULAR: tuple[Shape, ...] = ((5,), (1,), (7, 3), (0,), (2, 3, 4))


@dataclass(frozen=True)
class Group:
    """``params``: names and shapes. ``options`` go to the optimizer as they are."""

    params: tuple[tuple[str, Shape], ...]
    projected: bool
    options: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run on any layout.

    Attributes:
        groups: The parameter groups.
        steps: How many calls of step().
        seed: Of weights and gradients.
        odd: (step, name, kind) of gradients that are "none", "zero" or "nan".
        later: (step, group, key, value) set in ``param_groups`` before that step.
        frozen: (name, first step, step after the last, with gradient) of what does not require a gradient for a while.
            It has one in all of these steps or in none: ranks do not ask anew for what sleeps.
        no_decay: Patterns, for the optimizer.
        resume: Before which step it is saved, and loaded into a new optimizer.
    """

    groups: tuple[Group, ...]
    steps: int
    seed: int
    odd: tuple[tuple[int, str, str], ...]
    later: tuple[tuple[int, int, str, float], ...]
    frozen: tuple[tuple[str, int, int, bool], ...]
    no_decay: tuple[str, ...]
    resume: int

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: shape for group in self.groups for name, shape in group.params}

    def of_optimizer(self) -> list[dict[str, Any]]:
        """The groups, with names for parameters."""
        return [
            {**group.options, "params": [name for name, _ in group.params], "projected": group.projected}
            for group in self.groups
        ]

    @property
    def tolerance(self) -> float:
        """Right after a refresh "full" turns rounding noise off the diagonal into steps, Gram matrices have less exact
        vectors."""
        loose = any(group.options.get("side") == "full" for group in self.groups)
        return 1e-7 if loose else 1e-10


def weights(run: Run) -> Named:
    generator = torch.Generator().manual_seed(run.seed)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in run.shapes.items()}


def gradients(run: Run, step: int) -> Named:
    """Those of one step; a missing one is left out."""
    found: Named = {}
    odd = {name: kind for at, name, kind in run.odd if at == step}
    frozen = {name: with_gradient for name, start, stop, with_gradient in run.frozen if start <= step < stop}
    for number, (name, shape) in enumerate(run.shapes.items()):
        generator = torch.Generator().manual_seed(1 + 7919 * run.seed + 101 * step + 10007 * number)
        grad, kind = torch.randn(shape, generator=generator, dtype=torch.float64), odd.get(name, "")
        if not frozen.get(name, kind != "none"):
            continue
        if kind == "zero":
            grad.zero_()
        if kind == "nan" and grad.numel():
            grad.view(-1)[generator.initial_seed() % grad.numel()] = math.nan
        found[name] = grad
    return found


def prepare(run: Run, step: int, param_groups: Sequence[dict[str, Any]], named: dict[str, Any]) -> None:
    """What a program does before a step: schedules, freezing."""
    for at, group, key, value in run.later:
        if at == step:
            param_groups[group][key] = value
    for name, start, stop, _ in run.frozen:
        named[name].requires_grad_(not start <= step < stop)


# --- drawing ---------------------------------------------------------------------------------------


def draw_run(dice: random.Random, *, ranks: bool = False, plain: bool = False) -> Run:
    """``ranks``: also what only a comparison of layouts can check. ``plain``: gradients of every parameter, always."""
    groups = [_projected(dice, number, ranks) for number in range(dice.choice((1, 1, 2, 3)))]
    if dice.random() < 0.7:
        shapes = [dice.choice(REGULAR) for _ in range(dice.randint(1, 3))]
        params = tuple((f"r{i}", shape) for i, shape in enumerate(shapes))
        options = {
            "lr": 1e-2,
            "weight_decay": dice.choice((0.0, 0.1)),
            "state_full": dice.choice(("adamw", "lion", "sgdm")),
        }
        groups.append(Group(params, False, options))
    steps = dice.randint(1, 9)
    names = [name for group in groups for name, _ in group.params]
    pairs = [(step, name) for name in names for step in range(steps)] if not plain else []
    drawn = [(step, name, dice.choices(("", "none", "zero", "nan"), (30, 2, 2, 0.7))[0]) for step, name in pairs]
    # The reference multiplies by one-hot matrices, which spreads what is not finite.
    clean = {name for group in groups if group.options.get("projection") == "randperm" for name, _ in group.params}
    odd = [one for one in drawn if one[2] and not (one[2] == "nan" and one[1] in clean)]
    sleepers = dice.sample(names, min(len(names), dice.choice((0, 0, 1, 3)))) if not plain else []
    frozen = [_interval(dice, name, steps) for name in sleepers]
    later: list[tuple[int, int, str, float]] = []
    for number, group in enumerate(groups):
        for step in range(1, steps):
            if dice.random() < 0.1:
                later.append((step, number, "lr", dice.choice((0.0, 3e-3, 2e-2))))
            if group.projected and dice.random() < 0.06:
                density = _density(dice, group.params, group.options, changing=True)
                if density is not None:
                    later.append((step, number, "density", density))
    no_decay = tuple(dice.sample(names, 1)) if dice.random() < 0.3 else ()
    return Run(tuple(groups), steps, dice.randrange(10**6), tuple(odd), tuple(later), tuple(frozen), no_decay,
               dice.randint(0, steps - 1))  # fmt: skip


def _interval(dice: random.Random, name: str, steps: int) -> tuple[str, int, int, bool]:
    start = dice.randint(0, steps - 1)
    return name, start, dice.randint(start + 1, steps), dice.random() < 0.4


def _projected(dice: random.Random, number: int, ranks: bool) -> Group:
    while True:
        shapes = [_shape(dice) for _ in range(dice.randint(1, 4))]
        params = tuple((f"g{number}w{i}", shape) for i, shape in enumerate(shapes))
        projection = dice.choice(PROJECTIONS)
        options: dict[str, Any] = {
            "projection": projection,
            "side": dice.choice(("std", "reverse_std", "right", "left", "full")),
            "update_gap": dice.choice((1, 2, 3, 3, 5, 100)),
            "on_refresh": dice.choice(("reset", "keep", "project")),
            "state_full": dice.choice(("adamw", "adamw", "lion", "sgdm")),
            "lr": dice.choice((1e-2, 3e-3)),
            "weight_decay": dice.choice((0.0, 0.0, 0.1)),
            "projected_lr_scale": dice.choice((1.0, 0.25)),
            "state_free_lr_scale": dice.choice((1.0, 0.1, 0.0)),
            "block_order": dice.choice(("random", "ascending", "descending", "mirror")),
            "refresh_schedule": dice.choice(("together", "together", "staggered")),
            "seed": dice.randrange(3),
        }
        if options["state_full"] == "adamw":
            options["betas"] = dice.choice(((0.9, 0.999), (0.8, 0.95), (0.0, 0.5)))
        if projection in BASES and dice.random() < 0.2:
            options["residual_threshold"] = dice.choice((0.3, 0.9))
        if ranks:
            options["compute_layout"] = dice.choice(("auto", "auto", "cut", "owner"))
            if projection in BASES:
                options["basis_dtype"] = dice.choice(("full", "full", "full", "bf16"))
            if projection == "svd":
                options["svd_method"] = dice.choice(("exact", "exact", "subspace", "gram64"))
        if options["side"] == "full":
            options["eps"] = 1e-3
        if options["state_full"] == "lion" and projection == "svd" and options["side"] == "full":
            continue  # the gradient is diagonal there: signs of rounding noise
        options["state_free"] = "sign"  # the densities that allow it are looked for first
        density = _density(dice, params, options)
        if density is None:
            continue
        options["density"] = density
        options["state_free"] = dice.choice(("sign", "sign", "sgd", "none"))
        if not _defined(params, options, density):
            options["state_free"] = dice.choice(("sgd", "none"))
        return Group(params, True, options)


def _shape(dice: random.Random) -> Shape:
    kind = dice.random()
    rows, cols = dice.randint(1, 13), dice.randint(1, 13)
    if kind < 0.1:
        return dice.choice(((1, cols), (rows, 1), (1, 1)))
    if kind < 0.17:
        return dice.choice(((0, cols), (rows, 0), (0, 0), (0, rows, cols), (2, 0, cols), (2, rows, 0)))
    if kind < 0.3:
        return (dice.randint(1, 3), rows, cols)
    if kind < 0.35:
        return (dice.choice((40, 100)), cols)
    return (rows, cols)


def matrices(params: Sequence[tuple[str, Shape]]) -> list[tuple[int, int]]:
    """The matrices of a group: of a stack each member."""
    return [shape[-2:] for _, shape in params for _ in range(shape[0] if len(shape) == 3 else 1)]  # type: ignore[misc]


def _density(
    dice: random.Random, params: Sequence[tuple[str, Shape]], options: dict[str, Any], changing: bool = False
) -> float | None:
    """One that leaves no matrix without a state-full part; sometimes 0 or 1. None if none is found."""
    candidates = [0.25, 0.5, 0.29, 1 / 3, 0.57, 0.75, 0.9, dice.randint(1, 12) / 12, dice.randint(1, 100) / 100]
    dice.shuffle(candidates)
    ends = [1.0, 0.0]
    dice.shuffle(ends)
    order = [*ends, *candidates] if dice.random() < 0.2 else [*candidates, *ends]
    for density in order:
        if changing and options["projection"] in BASES and 0.0 in (density, options["density"]):
            continue
        if _allowed(params, options, density) and (not changing or _defined(params, options, density)):
            return density
    return None


def _count(options: dict[str, Any], density: float, rows: int, cols: int) -> int:
    share = Fraction(str(density)) if len(str(density)) < 8 else Fraction(density).limit_denominator(1000)
    projection = options["projection"]
    if projection in ("columns", "rows", "randk"):
        return math.floor(share * {"columns": cols, "rows": rows, "randk": rows * cols}[projection])
    return round(share * _length(options["side"], rows, cols))


def _length(side: str, rows: int, cols: int) -> int:
    sides = {"right": cols, "left": rows, "full": min(rows, cols)}
    tall = {"std": rows >= cols, "reverse_std": rows < cols}
    return sides[side] if side in sides else (cols if tall[side] else rows)


def _allowed(params: Sequence[tuple[str, Shape]], options: dict[str, Any], density: float) -> bool:
    everything = matrices(params)
    if options["projection"] == "blockwise":
        share = Fraction(density).limit_denominator(1000)
        active = round(share * len(everything))
        odd = options["block_order"] == "mirror" and active % 2 == 1
        return not everything or not (odd or (active == 0 and density > 0))
    if density == 0:
        return True
    counts = [(_count(options, density, m, n), min(m, n)) for m, n in everything if m * n]
    most = all(count <= small for count, small in counts) or options["projection"] != "svd"
    return most and all(count for count, _ in counts)


def _defined(params: Sequence[tuple[str, Shape]], options: dict[str, Any], density: float) -> bool:
    """Whether svd leaves a residual that is more than rounding noise, or exactly nothing."""
    if options["projection"] != "svd" or options["state_free"] != "sign" or density == 0:
        return True
    for rows, cols in matrices(params):
        if rows * cols == 0:
            continue
        r, side = _count(options, density, rows, cols), options["side"]
        square = r == rows == cols if side == "full" else r == _length(side, rows, cols)
        if r == min(rows, cols) and not square:
            return False
    return True
