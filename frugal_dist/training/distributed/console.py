"""Keep the terminal readable: libraries write to a log file, the user sees what is meant for the user."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

LOG_FILE = "output.txt"
_terminals: list[TextIO] = []
"""Of the quiet consoles that are open, the last is the one to speak on."""


def log_file(rank: int) -> str:
    """The name of a rank's own log; that of rank 0 is LOG_FILE."""
    return LOG_FILE if rank == 0 else f"output.rank{rank}.txt"


@contextmanager
def quiet_console(log: Path) -> Iterator[TextIO]:
    """Send stdout and stderr of this process, C++ code included, to `log`; yield the terminal.

    It works on file descriptors, so it must be entered before noisy libraries are imported. The log is
    appended to.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    terminal = os.fdopen(os.dup(saved[1]), "w", buffering=1, encoding="utf-8", errors="replace")
    _terminals.append(terminal)
    try:
        yield terminal
    finally:
        _terminals.remove(terminal)
        with suppress(OSError):  # a full disk
            sys.stdout.flush()
            sys.stderr.flush()
        for number, descriptor in enumerate(saved, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        with suppress(OSError):
            terminal.close()


def tell(text: str) -> None:
    """A line for the user from wherever it comes, also from other threads: past the log, if there is one."""
    say(_terminals[-1] if _terminals else sys.stderr, text)


def say(terminal: TextIO, text: str) -> None:
    """A line for the user, if there still is one: a terminal that is gone must not change how a run ends."""
    with suppress(OSError):
        print(text, file=terminal)


@contextmanager
def information_to(say_it: Callable[[str], None]) -> Iterator[None]:
    """While it is open, what the package logs as information is said to the user."""
    logger = logging.getLogger("frugal_dist")
    before, handler = logger.level, logging.Handler()
    handler.emit = lambda record: say_it(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
