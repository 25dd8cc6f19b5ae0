"""Real processes, a small odd LLaMA: a run that changes its engine and its number of ranks, and exact resumes.

Every leg of a run has processes of its own, which end by SIGKILL: those that load are never those that saved.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import legs
import printed
import pytest
import torch
from deepspeed_cases import Weights
from forks import Forks

DEADLINE = 600.0
"""Many processes on few cores, which may be busy with other things."""

pytestmark = pytest.mark.timeout(4 * DEADLINE)
STEPS = 8
ROUNDING = 2e-5
"""ZeRO computes in fp32 and adds gradients up in another order than one process does."""


def run(processes: Forks, engine: str, ranks: int, projection: str, steps: tuple[int, int],
        load: Path | None, save: Path | None) -> Weights:  # fmt: skip
    answers = processes.run(ranks, legs.leg_as_bytes, engine, projection, steps, load, save, deadline=DEADLINE)
    first, *others = (legs.weights_from(answer) for answer in answers)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in other), "the ranks hold different weights"
    return first


@cache
def uninterrupted(processes: Forks, engine: str, ranks: int, projection: str) -> Weights:
    return run(processes, engine, ranks, projection, (0, STEPS), None, None)


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
FIRST, SECOND, THIRD = ROUTES
PROJECTIONS = ("svd std", "svd left", "columns", "randk", "blockwise")
RANKS = {"DDP": 2, "FSDP2": 3, "ZeRO-1": 3, "ZeRO-2 bf16": 3, "ZeRO-3 bf16": 3}
"""DDP adds the gradients of its first step in another order than later ones, which two ranks do not notice."""


def cells(rows: Iterable[str], quick: set[tuple[str, str]]) -> list[Any]:
    """Every row with every projection; all but the quick ones are heavy."""
    return [
        pytest.param(row, projection, marks=[] if (row, projection) in quick else pytest.mark.heavy)
        for row in rows
        for projection in PROJECTIONS
    ]


@pytest.mark.parametrize(
    ("route", "projection"),
    cells(ROUTES, {(FIRST, "svd std"), (FIRST, "columns"), (SECOND, "randk"), (THIRD, "blockwise")}),
)
def test_a_run_that_changes_engines_on_its_way(route: str, projection: str, processes: Forks, tmp_path: Path) -> None:
    """The learning rate falls at every step: it must come along, too."""
    weights: Weights = {}
    for number, (engine, ranks) in enumerate(ROUTES[route]):
        load = tmp_path / str(number - 1) if number else None
        steps = (2 * number, 2 * number + 2)
        weights = run(processes, engine, ranks, projection, steps, load, tmp_path / str(number))
    apart = difference(weights, uninterrupted(processes, "one process", 1, projection))
    printed.note("two steps on each engine, fp32: difference to one process", route, projection, apart)
    assert apart < ROUNDING


@pytest.mark.parametrize(
    ("engine", "projection"),
    cells(RANKS, {("DDP", "svd std"), ("FSDP2", "svd std"), ("ZeRO-2 bf16", "columns"), ("ZeRO-3 bf16", "svd std")}),
)
def test_a_resume_is_exact(engine: str, projection: str, processes: Forks, tmp_path: Path) -> None:
    ranks = RANKS[engine]
    whole = uninterrupted(processes, engine, ranks, projection)
    run(processes, engine, ranks, projection, (0, 4), None, tmp_path / "saved")
    resumed = run(processes, engine, ranks, projection, (4, STEPS), tmp_path / "saved", None)
    printed.note(
        "resume on the same real engine: does every bit agree?", engine, projection, difference(resumed, whole)
    )
    assert difference(resumed, whole) == 0.0


@pytest.mark.parametrize("target", [("ZeRO-3 bf16", 3), ("ZeRO-1 bf16", 2), ("one process", 1)])
def test_fp32_master_weights_arrive_exactly(target: tuple[str, int], processes: Forks, tmp_path: Path) -> None:
    """Of a model that computes in bf16: not the rounded weights, but those that the optimizer keeps."""
    saved = run(processes, "ZeRO-2 bf16", 4, "svd std", (0, 4), None, tmp_path / "saved")
    found = run(processes, *target, "svd std", (4, 4), tmp_path / "saved", None)
    assert difference(found, saved) == 0.0
    assert any(not torch.equal(value, value.bfloat16().float()) for value in saved.values())
