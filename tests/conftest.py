"""What all tests share: chance under control, which tests run where, printed tables, and what was not run and why.

Tests may be spread over processes with pytest-xdist (`-n 2 --dist loadgroup`). Tests that share a fleet of ranks stay
together: starting one costs more than most of them.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

# `bash tests/run.sh --gpu` runs the tests in tests/gpu on this machine's GPUs, all others hide them: both must be said
# before torch looks for them.
# Kernels are checked by Triton's interpreter otherwise; it must be chosen before anything imports triton, as torch may.
os.environ.setdefault("TRITON_INTERPRET", "0" if "--gpu" in sys.argv else "1")

import pytest
import torch

# Tests are imported in importlib mode, which leaves their folder out of the path.
sys.path.insert(0, str(Path(__file__).parent))

import tables
from devices import GPUS
from fuzzing import Fuzz

# The other tests are about numbers and processes, more of these than most machines have GPUs: they run on the CPU.
# CUDA_VISIBLE_DEVICES=0 in the environment overrides it.
ON_GPU = "--gpu" in sys.argv
if GPUS and not ON_GPU:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

FLEETS = ("fleet", "processes")
"""Fixtures that hold living ranks."""
NUMBER = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--heavy", action="store_true", help="also run tests marked heavy")
    parser.addoption("--gpu", action="store_true", help="run the tests marked gpu, and no others")
    parser.addoption("--fuzz-seed", type=int, default=0, metavar="N", help="the first seed of each fuzzer (default 0)")
    parser.addoption(
        "--fuzz-runs",
        type=int,
        metavar="N",
        help="how many seeds each fuzzer tries (default: seconds, --heavy: minutes)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Nothing disappears from the count: what is not run is skipped, with the reason."""
    for number, item in enumerate(items):
        item.stash[NUMBER] = number
        for fixture in set(FLEETS).intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(f"{item.path.parent.name} {fixture}"))
        if item.get_closest_marker("heavy") and not config.getoption("--heavy"):
            item.add_marker(pytest.mark.skip(reason="heavy: run by `bash tests/run.sh --all`"))
        if why := _not_on_this_device(item):
            item.add_marker(pytest.mark.skip(reason=why))
        if item.get_closest_marker("shows_gpus") and GPUS:
            item.add_marker(pytest.mark.skip(reason="its launcher would show this machine's GPUs to the ranks"))


def _not_on_this_device(item: pytest.Item) -> str:
    if item.get_closest_marker("gpu") is None:
        return "with --gpu only the tests marked gpu run" if ON_GPU else ""
    if not ON_GPU:
        return "gpu: run by `bash tests/run.sh --gpu`" if GPUS else "gpu: this machine has none"
    return "" if torch.cuda.is_available() else "gpu: torch finds none here"


def pytest_runtest_setup(item: pytest.Item) -> None:
    tables.begin(item.stash[NUMBER])


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["tables"] = tables.packed()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    tables.receive(getattr(node, "workeroutput", {}).get("tables", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for title, lines in tables.tables():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)
    skipped = Counter(_reason(report) for report in terminalreporter.stats.get("skipped", []))
    terminalreporter.section("what was not run, and why")
    for reason, number in skipped.most_common():
        terminalreporter.write_line(f"{number} skipped: {reason}")
    if not skipped:
        terminalreporter.write_line("nothing: every selected test ran")
    if deselected := len(terminalreporter.stats.get("deselected", [])):
        terminalreporter.write_line(f"{deselected} deselected on the command line")


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test draws the same numbers whether it runs alone or among others."""
    torch.manual_seed(0)


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> Fuzz:
    """Random configurations, seeds from the command line."""
    option = request.config.getoption
    return Fuzz(option("--fuzz-seed"), option("--fuzz-runs"), option("--heavy"), request.node.nodeid)
