"""A wait that takes longer than a minute says what it waits for: nobody can tell it from a hang otherwise."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from frugal_dist.training.distributed.console import tell

PATIENCE, LATER = 60.0, 300.0
"""Seconds until the first word, and between later ones."""


@contextmanager
def waiting(what: str, speaks: bool = True) -> Iterator[None]:
    """While this lasts: after a minute, and then every five, "waiting for WHAT".

    Args:
        what: What is waited for, with the names of what could be wrong about it.
        speaks: Whether on the terminal; otherwise in this rank's log.
    """
    done = threading.Event()
    thread = threading.Thread(target=_speak, args=(what, speaks, done), daemon=True, name="waiting")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _speak(what: str, speaks: bool, done: threading.Event) -> None:
    begin, next_word = time.monotonic(), PATIENCE
    while not done.wait(next_word):
        text = f"waiting for {what}, for {(time.monotonic() - begin) / 60:.0f} min"
        next_word = LATER
        if speaks:
            tell(text)
        else:
            print(text, file=sys.stderr, flush=True)
