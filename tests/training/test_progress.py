"""The line of progress in a terminal and in a log file."""

from __future__ import annotations

import io

from frugal_dist.training.metrics.progress import Progress


def test_progress_of_a_run_that_goes_on(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("frugal_dist.training.metrics.progress.time.monotonic", lambda: now[0])
    terminal = io.StringIO()
    with Progress(100, terminal, shown=True, before=60) as progress:
        progress.start()
        for _ in range(20):
            now[0] += 1.0
            progress.step()
            progress.figures(6.5, 1234.5)
    assert [line.split(":")[0] for line in terminal.getvalue().splitlines()] == ["step    61/100", "step    76/100"]
    assert terminal.getvalue().endswith(": loss 6.500, 1,234 tokens/s, 00:24 left\n")


def test_progress_in_a_log_file_is_a_line_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("frugal_dist.training.metrics.progress.time.monotonic", lambda: now[0])
    terminal = io.StringIO()
    with Progress(100, terminal, shown=True) as progress:
        now[0] = 50.0
        progress.start()
        for _ in range(20):
            now[0] += 1.0
            progress.step()
            progress.figures(6.5, 1234.5)
    assert [line.split(":")[0] for line in terminal.getvalue().splitlines()] == ["step     1/100", "step    16/100"]
    assert terminal.getvalue().endswith(": loss 6.500, 1,234 tokens/s, 01:24 left\n")


def test_a_quick_run_has_its_first_and_its_last_line_in_a_log_file():
    terminal = io.StringIO()
    with Progress(100, terminal, shown=True, before=80) as progress:
        progress.start()
        for _ in range(20):
            progress.step()
            progress.figures(6.5, 1234.5)
    assert [line.split(":")[0] for line in terminal.getvalue().splitlines()] == ["step    81/100", "step   100/100"]
