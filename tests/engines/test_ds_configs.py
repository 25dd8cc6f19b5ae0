"""Every configuration in ds_configs trains, and the README there explains it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import deepspeed_json as json_jobs
import pytest
from fleet import ROOT, Fleet

Fleets = Callable[[int], Fleet]
FILES = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_trains(file: Path, fleet: Fleets) -> None:
    config = json.loads(file.read_text())
    for steps, finite, unmoved in fleet(2).run(json_jobs.trains, config):
        assert steps == 3
        assert finite
        assert unmoved == []


@pytest.mark.parametrize(
    "file", [file for file in FILES if '"scheduler"' in file.read_text()], ids=lambda file: file.stem
)
def test_a_schedule_is_that_of_the_recipe_of_its_name(file: Path, fleet: Fleets) -> None:
    from frugal_dist.training.recipe import read_recipe
    from frugal_dist.training.schedule import build_schedule

    pytest.importorskip("jsonargparse")
    recipe = read_recipe(file.stem)
    factor = build_schedule(recipe.schedule, recipe.steps)
    steps = [2, 100, 1_000, 5_000, 9_999, 10_001, 20_000, 55_000, 99_999]
    found = fleet(2).run(json_jobs.factors, json.loads(file.read_text())["scheduler"], steps)[0]
    # DeepSpeed is two steps late while it warms up.
    assert found == pytest.approx([factor(step) for step in steps], abs=2.1 / 10_000)


def test_the_readme_names_every_file() -> None:
    text = (ROOT / "ds_configs" / "README.md").read_text()
    assert len(FILES) > 10
    assert [file.name for file in FILES if f"`{file.name}`" not in text] == []
