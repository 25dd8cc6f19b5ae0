"""Being told to stop: schedulers send SIGTERM or SIGUSR1 some time before they kill, people press Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from frugal_dist.training.distributed.console import tell

STOPPED = 75
"""Exit code of a run that saved and stopped because it was told to (EX_TEMPFAIL): start it again to go on."""
DIVERGED = 65
"""Exit code of a run that has no finite loss or gradient any more (EX_DATAERR): to go on would end the same."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
IMPATIENT = (signal.SIGTERM, signal.SIGINT)
"""Sent a second time they end the process at once. SIGUSR1 is a warning only, which SIGTERM may follow."""
TOGETHER = 2.0
"""Seconds within which signals count as one: a launcher passes on what the terminal has sent to the ranks, too."""
REACTION = 2.0
"""Seconds in which the main thread must have taken a signal that ends it; it may sit in C++, and never look."""


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
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
