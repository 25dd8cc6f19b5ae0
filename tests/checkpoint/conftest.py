"""Tests of portable checkpoints. They run on the simulated layouts of tests/dist and the engines of tests/engines."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Tests are imported in importlib mode, which leaves their folder out of the path.
sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "dist"))
sys.path.append(str(Path(__file__).parents[1] / "engines"))

from forks import Forks

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def processes() -> Iterator[Forks]:
    """Fresh ranks for every job, which need not import DeepSpeed and transformers again."""
    found = Forks("preloaded", "run_legs")
    yield found
    found.stop()
