"""Tests on real engines: one fleet of processes per number of ranks."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Tests are imported in importlib mode, which leaves their folder out of the path.
sys.path.insert(0, str(Path(__file__).parent))

from fleet import Fleet


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left() -> Iterator[None]:
    """As long as one of Lightning's wrappers lives, every new optimizer looks for its own among all objects."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def fleet() -> Iterator[Callable[[int], Fleet]]:
    """``fleet(2)``: two ranks, started at first use."""
    living: dict[int, Fleet] = {}

    def get(size: int) -> Fleet:
        if size not in living:
            living[size] = Fleet(size)
        return living[size]

    yield get
    for one in living.values():
        one.stop()
