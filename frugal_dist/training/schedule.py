"""Learning-rate schedules: a recipe's section, and the factor on the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate over time, as a factor.

    Args:
        name: cosine, linear, wsd (warm-up, stable, decay) or constant.
        warmup: steps of warm-up; below 1 a share of all steps (of a cycle).
        floor: where cosine and linear end.
        cycle: steps after which cosine starts again, warm-up included; null never does. The papers train 200,000 steps
            in cycles: stopping between the ends of two cycles stops at a high learning rate.
        decay: share of all steps in which wsd falls to the floor.
    """

    name: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup: float = 0.1
    floor: float = 0.1
    cycle: int | None = None
    decay: float = 0.2


def warmup_cosine(step: int, *, total: int, warmup: int, floor: float) -> float:
    """The factor at `step` (from 0): up in a line, then down a cosine to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def cosine_cycles(step: int, *, total: int, warmup: int, floor: float) -> float:
    """`warmup_cosine` over `total` steps, again and again: what the papers' code does beyond its cycle length."""
    return warmup_cosine(step % total, total=total, warmup=warmup, floor=floor)


def warmup_linear(step: int, *, total: int, warmup: int, floor: float) -> float:
    """Up in a line, then down in a line to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1 - (1 - floor) * progress


def warmup_stable_decay(step: int, *, total: int, warmup: int, floor: float, decay: int) -> float:
    """Up in a line, level, and over the last `decay` steps down in a line to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, max(0.0, (step - (total - decay)) / max(1, decay)))
    return 1 - (1 - floor) * progress


def warmup_constant(step: int, *, warmup: int) -> float:
    """Up in a line, then level."""
    return min(1.0, (step + 1) / max(1, warmup))


def build_schedule(recipe: Schedule, steps: int) -> Callable[[int], float]:
    """The factor at every step of a run of `steps`. Raises ValueError that names the key."""
    if recipe.cycle is not None and (recipe.name != "cosine" or recipe.cycle < 1):
        raise ValueError(f"schedule.cycle is {recipe.cycle}: it is a number of steps, and for schedule.name cosine.")
    if not 0 <= recipe.floor <= 1 or not 0 <= recipe.decay <= 1 or recipe.warmup < 0:
        raise ValueError("schedule: floor and decay must be between 0 and 1, warmup at least 0.")
    total = recipe.cycle or steps
    warmup = round(recipe.warmup * total) if recipe.warmup < 1 else int(recipe.warmup)
    if warmup >= total:
        raise ValueError(f"schedule.warmup is {warmup} steps, as long as the run or cycle of {total}.")
    decay = round(recipe.decay * total)
    if recipe.name == "wsd" and warmup + decay > total:  # the rate would jump where both meet
        raise ValueError(
            f"schedule.warmup takes {warmup} steps and schedule.decay {decay}, together more than the run's {total}."
        )
    cosine, floor = cosine_cycles if recipe.cycle else warmup_cosine, recipe.floor
    known: dict[str, Callable[[int], float]] = {
        "cosine": partial(cosine, total=total, warmup=warmup, floor=floor),
        "linear": partial(warmup_linear, total=total, warmup=warmup, floor=floor),
        "wsd": partial(warmup_stable_decay, total=total, warmup=warmup, floor=floor, decay=decay),
        "constant": partial(warmup_constant, warmup=warmup),
    }
    return known[recipe.name]


def jump(scheduler: Any, step: int) -> None:
    """Set a LambdaLR to the rates of `step`: they are a pure function of it, whatever engine did the steps before."""
    scheduler.last_epoch = step
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
