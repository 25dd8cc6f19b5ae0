"""What all tests share: chance under control, which tests run where, and a summary of what was not run and why."""

from __future__ import annotations

from collections import Counter

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--heavy", action="store_true", help="also run tests marked heavy")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Nothing disappears from the count: what is not run is skipped, with the reason."""
    for item in items:
        if item.get_closest_marker("heavy") and not config.getoption("--heavy"):
            item.add_marker(pytest.mark.skip(reason="heavy: run by `bash tests/run.sh --all`"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and this machine has none"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
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
