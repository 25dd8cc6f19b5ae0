"""Real processes, a small odd LLaMA: a run that changes its engine and its number of ranks, and exact resumes.

Every leg of a run has processes of its own, which end by SIGKILL: those that load are never those that saved.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import run_legs as legs
import tables
import torch
from deepspeed_cases import Weights
from forks import Forks
from save_and_load_ways import PORTABLE, WAYS
from selection import cells

DEADLINE = 600.0
"""Many processes on few cores, which may be busy with other things."""

pytestmark = pytest.mark.timeout(4 * DEADLINE)
STEPS = 8
ROUNDING = 2e-5
"""ZeRO computes in fp32 and adds gradients up in another order than one process does."""


def on_ranks(processes: Forks, ranks: int, *job: Any) -> Any:
    """The first rank's answer; all must give the same."""
    answers = [legs.from_bytes(answer) for answer in processes.run(ranks, legs.as_bytes, *job, deadline=DEADLINE)]
    for other in answers[1:]:
        assert agree(other, answers[0]), "the ranks hold different weights"
    return answers[0]


def agree(found: Any, want: Any) -> bool:
    """Bit for bit."""
    if isinstance(want, torch.Tensor):
        return torch.equal(found, want)
    return found.keys() == want.keys() and all(agree(found[key], want[key]) for key in want)


def run(processes: Forks, ranks: int, spot: legs.Spot, steps: tuple[int, int], load: Path | None = None,
        save: Path | None = None) -> Weights:  # fmt: skip
    saves = {} if save is None else {(PORTABLE, steps[1]): save}
    found: Weights = on_ranks(processes, ranks, "leg", spot, steps, load, saves)
    return found


@cache
def uninterrupted(processes: Forks, projection: str) -> Weights:
    return run(processes, 1, ("one process", projection, "adamw"), (0, STEPS))


def difference(found: Weights, want: Weights) -> float:
    assert found.keys() == want.keys()
    return max(float((found[name] - want[name]).abs().max()) for name in want)


ROUTES = {
    "ZeRO-2 on 4, FSDP2 on 2, ZeRO-3 on 3, one process": [
        ("ZeRO-2", 4), ("FSDP2", 2), ("ZeRO-3", 3), ("one process", 1)
    ],
    "one process, ZeRO-3 on 3, DDP on 2, HSDP on 4": [("one process", 1), ("ZeRO-3", 3), ("DDP", 2), ("HSDP", 4)],
    "HSDP on 4, ZeRO-0 on 3, ZeRO-1 on 2, FSDP2 on 3": [("HSDP", 4), ("ZeRO-0", 3), ("ZeRO-1", 2), ("FSDP2", 3)],
}  # fmt: skip
FIRST, SECOND, _ = ROUTES
PROJECTIONS = ("svd std", "svd left", "columns", "randk", "blockwise")


QUICK = {(FIRST, "svd std"), (SECOND, "columns")}


@pytest.mark.parametrize(
    ("route", "projection"), cells(ROUTES, PROJECTIONS, lambda route, projection: (route, projection) in QUICK)
)
def test_a_run_that_changes_engines_on_its_way(route: str, projection: str, processes: Forks, tmp_path: Path) -> None:
    """The learning rate falls at every step: it must come along, too."""
    weights: Weights = {}
    for number, (engine, ranks) in enumerate(ROUTES[route]):
        load = tmp_path / str(number - 1) if number else None
        steps, save = (2 * number, 2 * number + 2), tmp_path / str(number)
        weights = run(processes, ranks, (engine, projection, "adamw"), steps, load, save)
    apart = difference(weights, uninterrupted(processes, projection))
    tables.note("two steps on each engine, fp32: difference to one process", route, projection, apart)
    assert apart < ROUNDING


# --- the same engine again ----------------------------------------------------------------------------

RANKS = {
    "DDP": 2, "FSDP2": 3, "HSDP": 4, "ZeRO-0": 2, "ZeRO-1": 3, "ZeRO-2": 2, "ZeRO-3": 3, "ZeRO-2 offload": 2,
    "ZeRO-3 offload": 2, "ZeRO-0 bf16": 2, "ZeRO-1 bf16": 2, "ZeRO-2 bf16": 3, "ZeRO-3 bf16": 2, "BF16_Optimizer": 2,
}  # fmt: skip
"""DDP adds the gradients of its first step in another order than later ones, which two ranks do not notice."""
RULES = ("adamw", "lion", "sgdm")
SAVED_AFTER = (3, 4)
"""Exactly before a refresh, and in the middle of a projector's life."""
EVERY = [(projection, rule) for projection in PROJECTIONS for rule in RULES]


OFTEN = ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3")
"""The engines that most people use; the others in the default run are threads, in test_resume_exactly.py."""


@pytest.mark.parametrize(("engine", "turn"), cells(RANKS, range(3), lambda engine, turn: turn == 0 and engine in OFTEN))
def test_a_resume_is_exact(engine: str, turn: int, processes: Forks, tmp_path: Path) -> None:
    """Train, save, SIGKILL, load, train on, through every way of saving. Engines and settings take turns: every
    setting on every layout is for threads, in test_resume_exactly.py.
    """
    position = list(RANKS).index(engine)
    projection, rule = EVERY[(5 * turn + 4 * position) % len(EVERY)]
    spot, ways = (engine, projection, rule), [PORTABLE] if engine in legs.SETTINGS else list(WAYS)
    saves = {(way, step): tmp_path / f"{way} {step}" for way in ways for step in SAVED_AFTER}
    whole = on_ranks(processes, RANKS[engine], "leg", spot, (0, STEPS), None, saves)
    found = on_ranks(processes, RANKS[engine], "resumes", spot, STEPS, saves)
    assert found.keys() == saves.keys()
    for (way, step), weights in found.items():
        apart = difference(weights, whole)
        tables.note("resume on the same real engine: does every bit agree?", engine, way, apart)
        assert apart == 0.0, f"{spot}: {way}, saved after step {step}"


# --- master weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        ("ZeRO-3 bf16", 3),
        pytest.param(("ZeRO-1 bf16", 2), marks=pytest.mark.heavy),
        pytest.param(("one process", 1), marks=pytest.mark.heavy),
    ],
)
def test_fp32_master_weights_arrive_exactly(target: tuple[str, int], processes: Forks, tmp_path: Path) -> None:
    """Of a model that computes in bf16: not the rounded weights, but those that the optimizer keeps."""
    engine, ranks = target
    saved = run(processes, 4, ("ZeRO-2 bf16", "svd std", "adamw"), (0, 4), save=tmp_path / "saved")
    found = run(processes, ranks, (engine, "svd std", "adamw"), (4, 4), load=tmp_path / "saved")
    assert difference(found, saved) == 0.0
    assert any(not torch.equal(value, value.bfloat16().float()) for value in saved.values())
