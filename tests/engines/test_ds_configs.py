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


def test_the_readme_names_every_file() -> None:
    text = (ROOT / "ds_configs" / "README.md").read_text()
    assert len(FILES) > 10
    assert [file.name for file in FILES if f"`{file.name}`" not in text] == []
