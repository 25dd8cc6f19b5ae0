"""This process to the outside: what it says on the terminal, being told to stop, and its end.

Libraries write to a log file, the user sees what is meant for the user. Schedulers send SIGTERM or SIGUSR1 some time
before they kill, people press Ctrl-C.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

LOG_FILE = "output.txt"
STOPPED = 75
"""Exit code of a run that saved and stopped because it was told to (EX_TEMPFAIL): start it again to resume."""
DIVERGED = 65
"""Exit code of a run that has no finite loss or gradient any more (EX_DATAERR): to resume would end the same."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
IMPATIENT = (signal.SIGTERM, signal.SIGINT)
"""Sent a second time they end the process at once. SIGUSR1 is a warning only, which SIGTERM may follow."""
TOGETHER = 2.0
"""Seconds within which signals count as one: a launcher passes on what the terminal has sent to the ranks, too."""
REACTION = 2.0
"""Seconds in which the main thread must have taken a signal that ends it; it may sit in C++, and never look."""
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
def beside(name: str, action: Callable[[threading.Event], None]) -> Iterator[None]:
    """While this lasts, ``action`` runs in a thread of its own, until it is told that it is done."""
    done = threading.Event()
    thread = threading.Thread(target=action, args=(done,), daemon=True, name=name)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


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


# --- being told to stop -----------------------------------------------------------------------------------------------


class StoppedEarly(BaseException):
    """Told to stop before there was anything to save. Not an Exception: nothing is to be done about it."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(name)
        self.name = name
        self.code = code


class StopRequest:
    """Remembers the first signal; asking is free."""

    def __init__(self) -> None:
        self.name = ""
        self.obeyed = False
        """The work is saved and the process about to end."""
        self.at_once = True
        """There is nothing to save yet, and no rank that would wait for this one: a signal ends the process."""
        self.training = False
        """Steps are done; what goes wrong from here on is no mistake in what the user has asked for."""
        self.speaks = True
        """Whether this process says what a signal does; one of the ranks is enough."""
        self.taken = threading.Event()

    def __call__(self) -> bool:
        return bool(self.name)

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.name = self.name or signal.Signals(number).name
        self.taken.set()
        if self.at_once:
            raise StoppedEarly(self.name, _code(number))


def _code(number: int) -> int:
    return 130 if number == signal.SIGINT else STOPPED


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catch the signals while a training runs; the handlers before are put back.

    After a request was obeyed the signals are ignored instead: launchers send more of them to the other ranks once the
    first has ended, which must not turn their exit code into a death by signal. What is ignored from the start stays
    ignored: a shell's background job does not hear Ctrl-C.
    """
    request = StopRequest()
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    with _impatience(request):
        before = {number: signal.signal(number, request.note) for number in heard}
        try:
            yield request
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if request.obeyed else handler)


@contextmanager
def _impatience(request: StopRequest) -> Iterator[None]:
    """A thread that hears signals although the main thread sits in C++, where Python's handlers are not called."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_listen, args=(reader, request), daemon=True, name="signals")
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        thread.join()
        os.close(reader)


def _listen(reader: int, request: StopRequest) -> None:
    first = None
    while numbers := os.read(reader, 64):
        for number in numbers:
            if number not in IMPATIENT or request.obeyed:
                continue
            name = signal.Signals(number).name
            if first is not None and time.monotonic() - first >= TOGETHER:
                _end(f"{name} again: ended at once, without saving", 128 + number)
            if request.at_once:
                if not request.taken.wait(REACTION):
                    _end(f"stopped before training began ({name})", _code(number))
            elif first is None and request.speaks:
                tell(f"{name}: the run saves after this step and stops; {name} once more ends it at once")
            first = time.monotonic() if first is None else first


def _end(text: str, code: int) -> NoReturn:
    tell(text)
    _exit_flushed(code)


# --- the end ----------------------------------------------------------------------------------------------------------


def end_process(code: int) -> NoReturn:
    """End this process as the interpreter would, except that it does not take itself apart.

    A thread of gloo's process group may still be letting go of the last collective's tensors, for which it needs the
    interpreter's lock. Denied by an interpreter that is being taken apart, it aborts the process: exit code -6 for a
    rank whose work is done and saved, which makes launchers end or restart the others (torch 2.13, Python 3.11).
    """
    threading._shutdown()  # type: ignore[attr-defined]  # ends idle thread pools, then waits for threads
    atexit._run_exitfuncs()
    _exit_flushed(code)


def _exit_flushed(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or nobody reads it any more
            stream.flush()
    os._exit(code)
