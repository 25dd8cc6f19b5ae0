"""Same engine, same number of ranks: a loaded run repeats the uninterrupted one bit for bit, weights and state."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
import tables
import torch
from cases import ON_REFRESH, PROJECTIONS, Case, label
from places import PLACES, identical, load_and_train, train_and_save
from selection import taking_turns

NAMES = list(PLACES)
RULES = ("adamw", "lion", "sgdm")
PRECISIONS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
SAVED_AFTER = (3, 4)
"""Exactly before a refresh, and in the middle of a projector's life."""

Setting = tuple[str, str, str]
"""State-full rule, precision, what becomes of the state at a refresh."""


def settings(turn: int) -> list[Setting]:
    """Every rule in every precision; the first is another one for every ``turn``, and so is what a refresh does."""
    every = list(product(RULES, PRECISIONS))
    turned = every[turn % len(every) :] + every[: turn % len(every)]
    return [(rule, precision, ON_REFRESH[(turn + i) // 3 % 3]) for i, (rule, precision) in enumerate(turned)]


def turn_of(place: str, projection: tuple[str, str]) -> int:
    return NAMES.index(place) * (len(PROJECTIONS) + 1) + PROJECTIONS.index(projection)


def check(place: str, projection: tuple[str, str], setting: Setting, steps: Sequence[int], folder: Path) -> None:
    rule, precision, on_refresh = setting
    case = Case(*projection, on_refresh=on_refresh, more=(("state_full", rule),))
    dtype = PRECISIONS[precision]
    uninterrupted = train_and_save(PLACES[place], case, dtype, {step: folder / str(step) for step in steps})
    for step in steps:
        continued = load_and_train(PLACES[place], case, dtype, folder / str(step), step)
        assert identical(continued, uninterrupted), f"{setting}, saved after step {step}"
        tables.note("resume on the same engine: does every bit agree?", label(*projection), place, 0.0)


@pytest.mark.parametrize(
    ("projection", "place"), taking_turns(PROJECTIONS, NAMES, every=4, name=lambda one: label(*one))
)
def test_resume_is_exact(projection: tuple[str, str], place: str, tmp_path: Path) -> None:
    """Rules, precisions, refreshes and moments take turns."""
    turn = turn_of(place, projection)
    check(place, projection, settings(turn)[0], [SAVED_AFTER[turn % 2]], tmp_path)


@pytest.mark.heavy
@pytest.mark.parametrize("place", NAMES)
@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda projection: label(*projection))
def test_resume_is_exact_in_every_precision_under_every_rule(
    projection: tuple[str, str], place: str, tmp_path: Path
) -> None:
    """Of the nine pairs three here, in every precision, and the others on the next two places."""
    for number, setting in enumerate(settings(turn_of(place, projection))[::4]):
        check(place, projection, setting, SAVED_AFTER, tmp_path / str(number))
