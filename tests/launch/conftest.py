"""Tests of the launch scripts: the folder's own helper modules, and what the tests share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# Tests are imported in importlib mode, which leaves their folder out of the path.
sys.path.append(str(Path(__file__).parent))

from runs import Run, Workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("launch"))


@pytest.fixture(scope="session")
def reference(workshop: Workshop) -> Run:
    """The short run on one process."""
    from frugal_dist.training.pretrain import pretrain
    from frugal_dist.training.recipe import read_recipe

    run = workshop.run("reference")
    recipe, *changes = run.arguments()
    assert pretrain(read_recipe(recipe, changes)) == 0
    return run
