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
    assert terminal.getvalue() == "step    75/100: loss 6.500, 1,234 tokens/s, 00:25 left\n"


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
    assert terminal.getvalue() == "step    15/100: loss 6.500, 1,234 tokens/s, 01:25 left\n"
