"""Save on any engine, load on any other: the run goes on as on one process that was never interrupted."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import tables
import torch
from cases import PROJECTIONS, Case, label
from places import LARGE, PLACES, STEPS, THREE, Place, apart, load_and_train, train_and_save
from selection import mostly_heavy, taking_turns
from storages import Named

NAMES = list(PLACES)
SAVED_AFTER = (3, 4, 5)
"""Steps 3 and 6 begin with a refresh: exactly before one, right after one, and in the middle of a projector's life."""


def case_of(projection: tuple[str, str]) -> Case:
    return Case(*projection, on_refresh="keep")


@cache
def uninterrupted(case: Case, dtype: torch.dtype) -> Named:
    (run,) = train_and_save(PLACES["one process"], case, dtype, {})
    return run.weights


def check(projection: tuple[str, str], source: str, targets: list[str], step: int, folder: Path) -> None:
    case, dtype = case_of(projection), torch.float64
    want = uninterrupted(case, dtype)
    train_and_save(PLACES[source], case, dtype, {step: folder})
    for target in targets:
        difference = apart(load_and_train(PLACES[target], case, dtype, folder, step), want)
        tables.note("from any engine to any other, float64: largest difference of a weight", source, target, difference)
        assert difference <= case.tolerance, f"{label(*projection)}: {source} -> {target} after step {step}"


@pytest.mark.parametrize(("projection", "source"), taking_turns(PROJECTIONS, NAMES, name=lambda one: label(*one)))
def test_each_engine_to_another(projection: tuple[str, str], source: str, tmp_path: Path) -> None:
    """By default one pair for each projection; with --heavy every engine is loaded on nearly every other here."""
    turn, position = PROJECTIONS.index(projection), NAMES.index(source)
    target = NAMES[(position + turn) % len(NAMES)]
    check(projection, source, [target], SAVED_AFTER[(turn + position) % 3], tmp_path / "saved")


LIMIT = ("growth_limit", 1.01)
KEEPING = {
    "a growth limit": Case("dct", "std", "keep", free="scaled", more=(("state_free", "scaled"), LIMIT)),
    "racs": Case(
        *("columns", "std", "keep"),
        free="racs",
        more=(("state_free", "racs"), ("density", 0.0), LIMIT),
        densities=(0.0,),
    ),
    "muon": Case(
        *("columns", "std", "keep"),
        free="sign",
        more=(("state_full", "muon"), ("density", 1.0)),
        densities=(1.0,),
    ),
}
TRIPS = [("one process", "ZeRO-3, 3"), ("ZeRO-2, 4", "Shard(1), 2"), ("HSDP 2x2", "one process")]


@pytest.mark.parametrize(("source", "target"), TRIPS)
@pytest.mark.parametrize("rule", KEEPING)
def test_what_rules_keep_goes_along(rule: str, source: str, target: str, tmp_path: Path) -> None:
    case, dtype = KEEPING[rule], torch.float64
    train_and_save(PLACES[source], case, dtype, {4: tmp_path / "saved"})
    found = load_and_train(PLACES[target], case, dtype, tmp_path / "saved", 4)
    assert apart(found, uninterrupted(case, dtype)) <= case.tolerance


@pytest.mark.parametrize(("source", "target"), [(LARGE, PLACES["Shard(0), 4"]), (PLACES["ZeRO-3, 3"], LARGE)])
@pytest.mark.parametrize("projection", [("svd", "std"), ("columns", "std")])
def test_to_and_from_three_axes(projection: tuple[str, str], source: Place, target: Place, tmp_path: Path) -> None:
    case, dtype = case_of(projection), torch.float64
    train_and_save(source, case, dtype, {4: tmp_path})
    found = load_and_train(target, case, dtype, tmp_path, 4)
    assert apart(found, uninterrupted(case, dtype)) <= case.tolerance


STAGES = PLACES["two stages x FSDP2 2"]


@pytest.mark.parametrize(("source", "target"), [(STAGES, THREE), (THREE, STAGES), (THREE, PLACES["one process"])])
@pytest.mark.parametrize("projection", [("svd", "std"), ("randk", "std"), ("blockwise", "std")])
def test_to_another_number_of_stages(projection: tuple[str, str], source: Place, target: Place, tmp_path: Path) -> None:
    case, dtype = case_of(projection), torch.float64
    train_and_save(source, case, dtype, {4: tmp_path})
    found = load_and_train(target, case, dtype, tmp_path, 4)
    assert apart(found, uninterrupted(case, dtype)) <= case.tolerance


@pytest.mark.heavy
@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda projection: label(*projection))
def test_every_engine_to_every_engine(projection: tuple[str, str], source: str, tmp_path: Path) -> None:
    turn = PROJECTIONS.index(projection) + NAMES.index(source) + 1
    check(projection, source, NAMES, SAVED_AFTER[turn % 3], tmp_path / "saved")


@pytest.mark.parametrize("place", mostly_heavy(NAMES, ["DDP, shared state, 3", "HSDP 2x2", "ZeRO-3, 3"]))
def test_saving_does_not_disturb_the_run(place: str, tmp_path: Path) -> None:
    case = case_of(("svd", "std"))
    plain = train_and_save(PLACES[place], case, torch.float64, {})
    saving = train_and_save(PLACES[place], case, torch.float64, {k: tmp_path / str(k) for k in range(1, STEPS)})
    assert all(
        torch.equal(a.weights[name], b.weights[name]) for a, b in zip(plain, saving, strict=True) for name in a.weights
    )
