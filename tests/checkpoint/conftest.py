"""Tests of portable checkpoints. They run on the simulated layouts of tests/dist and the engines of tests/engines."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# Tests are imported in importlib mode, which leaves their folder out of the path.
sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "dist"))
sys.path.append(str(Path(__file__).parents[1] / "engines"))

from fleet import Fleet

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def processes() -> Iterator[Callable[[int], Fleet]]:
    """``processes(3)``: real ranks with DeepSpeed, started at first use."""
    here = Path(__file__).parent
    path = os.pathsep.join(str(folder) for folder in (here.parents[1], here, here.parent / "engines"))
    living: dict[int, Fleet] = {}

    def get(size: int) -> Fleet:
        if size not in living:
            living[size] = Fleet(size, PYTHONPATH=path)
        return living[size]

    yield get
    for one in living.values():
        one.stop()
