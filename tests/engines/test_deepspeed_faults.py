"""Trouble on one rank: all ranks agree on what to do, nobody hangs, and training goes on."""

from __future__ import annotations

import math
from collections.abc import Callable

import deepspeed_faults as faults
import pytest
from fleet import Fleet
from selection import mostly_heavy, taking_turns

Fleets = Callable[[int], Fleet]


REFRESH = 3
"""Refreshes happen at 0, 3 and 6."""


HANDED_OVER = {"svd std": (math.inf, REFRESH), "columns": (math.nan, 4)}
CHECKED = [*faults.FP16, *faults.CHECKED]


@pytest.mark.parametrize(("setting", "projection"), taking_turns(CHECKED, list(HANDED_OVER)))
def test_deepspeed_skips_the_step_on_all_ranks(setting: str, projection: str, fleet: Fleets) -> None:
    value, step = HANDED_OVER[projection]
    first, second = fleet(2).run(faults.bad_gradient, setting, projection, value, step)
    assert first.digest == second.digest
    for outcome in (first, second):
        assert outcome.skipped == 1
        assert not outcome.moved
        assert not outcome.others
        assert {count for _, count in outcome.counts} == {step}, "a skipped step moved a clock"
        assert outcome.finite
        assert outcome.learns


@pytest.mark.parametrize(("setting", "value"), taking_turns(list(faults.UNCHECKED), [math.inf, math.nan]))
def test_a_refresh_with_a_bad_gradient_skips_that_matrix(setting: str, value: float, fleet: Fleets) -> None:
    """Where DeepSpeed hands NaN over to the optimizer, a refresh must not make a projector of it."""
    first, second = fleet(2).run(faults.bad_gradient, setting, "svd std", value, REFRESH)
    assert first.digest == second.digest
    for outcome in (first, second):
        assert outcome.skipped == 0
        assert not outcome.moved, "a matrix without a finite gradient was updated"
        assert outcome.others, "the other matrices were not updated"
        assert outcome.finite
        assert outcome.learns


BUILT = ("0", "0, bf16", "1", "1, offload", "2, bf16", "3", "3, offload", "BF16_Optimizer")


@pytest.mark.parametrize("setting", mostly_heavy(BUILT, ("1", "3", "BF16_Optimizer")))
def test_building_the_engine_moves_nothing(setting: str, fleet: Fleets) -> None:
    """Some wrappers call step() with zero gradients when they are built."""
    for moved, at_first, after_one_step in fleet(2).run(faults.after_building, setting):
        assert moved == []
        assert at_first <= {0}
        assert after_one_step == {1}


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.heavy), 3])
def test_a_loss_scale_that_overflows_moves_nothing(stage: int, fleet: Fleets) -> None:
    first, second = fleet(2).run(faults.overflowing_scale, stage)
    assert first == second
    skipped, counts, _, untouched = first
    assert untouched
    assert 0 < skipped < 16
    assert counts == (16 - skipped,)


def test_fp16_at_stage_0_is_refused(fleet: Fleets) -> None:
    for text in fleet(2).run(faults.fp16_at_stage0):
        assert '"stage": 1' in text
        assert "loss scale" in text


def test_masters_have_no_remainders(fleet: Fleets) -> None:
    for texts in fleet(2).run(faults.remainders):
        assert all("is float32, but rounding='remainder'" in text for text in texts), texts
        assert all("DeepSpeed keeps fp32 masters itself" in text for text in texts)


@pytest.mark.parametrize("stage", mostly_heavy([0, 1, 3], [3]))
def test_a_failing_svd_is_a_notice_to_all_ranks(stage: int, fleet: Fleets) -> None:
    (error, _, first), (_, warned, second) = fleet(2).run(faults.failing_svd, stage, 1)
    assert error == ""
    assert first == second
    assert any("made to fail" in text for text in warned)


@pytest.mark.parametrize("stage", mostly_heavy([2, 3], [2]))
def test_an_svd_that_keeps_failing_raises_on_all_ranks(stage: int, fleet: Fleets) -> None:
    for error, _, _ in fleet(2).run(faults.failing_svd, stage, 99):
        assert "failed 3 times in a row" in error
        assert "mlp" in error
