"""What the tests of distributed runs share: the folder's own helpers, one thread per rank, and printed tables."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Tests are imported in importlib mode, which leaves their folder out of the path.
sys.path.insert(0, str(Path(__file__).parent))

import reporting
from processes import Fleet

torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for title, lines in reporting.tables():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def fleet() -> Iterator[Fleet]:
    """Real processes as ranks; started by the first test that uses them."""
    found = Fleet()
    yield found
    found.close()
    shutil.rmtree(found.folder)
