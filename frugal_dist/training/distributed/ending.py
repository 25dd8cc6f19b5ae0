"""The end of a rank's process."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from contextlib import suppress
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """End this process as the interpreter would, except that it does not take itself apart.

    A thread of gloo's process group may still be letting go of the last collective's tensors, for which it needs the
    interpreter's lock. Denied by an interpreter that is being taken apart, it aborts the process: exit code -6 for a
    rank whose work is done and saved, which makes launchers end or restart the others (torch 2.13, Python 3.11).
    """
    threading._shutdown()  # type: ignore[attr-defined]  # ends idle thread pools, then waits for threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or nobody reads it any more
            stream.flush()
    os._exit(code)
