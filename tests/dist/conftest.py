"""What the tests of distributed runs share: the folder's own helpers, and one thread per rank."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Tests are imported in importlib mode, which leaves their folder out of the path.
sys.path.insert(0, str(Path(__file__).parent))

from processes import Fleet

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def fleet() -> Iterator[Fleet]:
    """Real processes as ranks; started by the first test that uses them."""
    found = Fleet()
    yield found
    found.close()
    shutil.rmtree(found.folder)
