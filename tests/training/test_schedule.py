"""Schedules of the learning rate: their shapes, and what makes no sense."""

from __future__ import annotations

import pytest

from frugal_dist.training.recipe import Schedule
from frugal_dist.training.schedule import build_schedule, warmup_cosine


def test_schedule_warms_up_and_ends_at_its_floor():
    rates = [warmup_cosine(step, total=100, warmup=10, floor=0.1) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(rates) == rates[10] == 1
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_schedules() -> None:
    cosine = build_schedule(Schedule(), 100)
    assert [cosine(0), cosine(9), cosine(55), cosine(100)] == pytest.approx([0.1, 1.0, 0.55, 0.1], abs=2e-2)
    linear = build_schedule(Schedule(name="linear", floor=0.0), 100)
    assert [linear(10), linear(55), linear(100)] == pytest.approx([1.0, 0.5, 0.0])
    stable = build_schedule(Schedule(name="wsd", floor=0.0, decay=0.2), 100)
    assert [stable(10), stable(79), stable(90), stable(100)] == pytest.approx([1.0, 1.0, 0.5, 0.0])
    constant = build_schedule(Schedule(name="constant", warmup=4), 100)
    assert [constant(0), constant(3), constant(99)] == pytest.approx([0.25, 1.0, 1.0])


def test_cosine_cycles_start_again_and_a_run_may_end_high() -> None:
    """The papers' trap: 200,000 steps in cycles of 10,000; after 15,000 steps the rate is far from its floor."""
    rate = build_schedule(Schedule(cycle=10_000), 200_000)
    assert rate(9_999) == pytest.approx(0.1, abs=1e-3)
    assert rate(10_999) == 1.0
    assert rate(15_000) > 0.5


WSD = {"name": "wsd", "warmup": 0.5, "decay": 0.8}
"""It would jump from 1.0 to 0.62 at the end of the warm-up."""


@pytest.mark.parametrize("bad", [{"cycle": 10, "name": "linear"}, {"floor": 2.0}, {"warmup": 200}, WSD])
def test_schedules_that_make_no_sense(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="schedule"):
        build_schedule(Schedule(**bad), 100)  # type: ignore[arg-type]
