"""Every preset on every layout: the weights of one process, the bytes and the traffic of the plan, an exact resume."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import LAYOUTS
from selection import taking_turns
from small_matrices import MORE, WITH_EXPERTS, check_layout, check_resume
from test_plan_agrees import ENGINES, check

from frugal_dist import PRESETS


@pytest.mark.parametrize(("name", "layout"), taking_turns(list(PRESETS), list(LAYOUTS)))
def test_every_layout_gives_the_weights_of_one_process(layout: str, name: str) -> None:
    check_layout(layout, PRESETS[name], WITH_EXPERTS)


@pytest.mark.parametrize(("name", "layout"), taking_turns(list(PRESETS), list(ENGINES)))
def test_planned_equals_measured(layout: str, name: str) -> None:
    check(layout, {**MORE, **PRESETS[name]})


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("portable", [False, True])
def test_a_run_goes_on_where_it_was(name: str, portable: bool, tmp_path: Path) -> None:
    check_resume(PRESETS[name], portable, tmp_path)
