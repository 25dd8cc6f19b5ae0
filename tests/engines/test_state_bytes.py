"""What benchmarks/state_bytes.py counts is what AdamW's definition and the memory formula say."""

from __future__ import annotations

from collections.abc import Callable

import deepspeed_bytes as jobs
import deepspeed_cases as cases
import pytest
from fleet import Fleet

from frugal_dist import Frugal, split_parameters
from frugal_dist.planner import MOMENT_BYTES, Weight, adamw_bytes, frugal_bytes
from frugal_dist.planner.layouts import engine_layout
from frugal_dist.planner.plan import make_plan

Fleets = Callable[[int], Fleet]
CLOCKS = 0.02
"""Share of the bytes that counts and padding may take in so small a model."""


def formula(optimizer: str) -> int:
    weights = []
    for group in split_parameters(cases.small_llama()):
        for _, param in group["params"]:
            rows, cols = param.shape if param.dim() == 2 else (1, param.numel())
            weights.append(Weight(rows, cols, 1, group["projected"]))
    if optimizer == "AdamW":
        return adamw_bytes(weights)
    return frugal_bytes(weights, projection=optimizer, density=0.25)


@pytest.mark.parametrize("optimizer", ["AdamW", "columns"])
@pytest.mark.parametrize("stage", [2, 3])
def test_sharded_state_adds_up_to_the_formula(stage: int, optimizer: str, fleet: Fleets) -> None:
    counts, want = fleet(2).run(jobs.counted, stage, optimizer), formula(optimizer)
    assert want <= sum(counts) <= want * (1 + CLOCKS) + MOMENT_BYTES * 100
    assert max(counts) <= 0.52 * sum(counts), "a rank has more than its share"


@pytest.mark.parametrize("projection", ["svd", "columns"])
@pytest.mark.parametrize("stage", [1, 3])
def test_the_plan_knows_every_byte(stage: int, projection: str, fleet: Fleets) -> None:
    params = split_parameters(cases.small_llama())
    optimizer = Frugal(params, projection=projection, density=0.25, process_group=None)
    plan = make_plan(optimizer, engine_layout(f"zero{stage}"), 2)
    assert [rank.state for rank in plan.ranked] == fleet(2).run(jobs.counted, stage, projection)


@pytest.mark.parametrize("optimizer", ["AdamW", "svd"])
def test_stage_0_holds_everything_on_every_rank(optimizer: str, fleet: Fleets) -> None:
    for count in fleet(2).run(jobs.counted, 0, optimizer):
        assert formula(optimizer) <= count <= formula(optimizer) * (1 + CLOCKS) + MOMENT_BYTES * 100
