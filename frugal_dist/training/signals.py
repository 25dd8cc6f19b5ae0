"""Being told to stop: schedulers send SIGTERM or SIGUSR1 some time before they kill."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED = 75
"""Exit code of a run that saved and stopped because it was told to (EX_TEMPFAIL): start it again to go on."""
DIVERGED = 65
"""Exit code of a run that has no finite loss or gradient any more (EX_DATAERR): to go on would end the same."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers the first signal; asking is free."""

    def __init__(self) -> None:
        self.name = ""
        self.obeyed = False
        """The work is saved and the process about to end."""

    def __call__(self) -> bool:
        return bool(self.name)

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.name = self.name or signal.Signals(number).name


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catch the signals while a training runs; the handlers before are put back.

    After a request was obeyed the signals are ignored instead: launchers send more of them to the other ranks once the
    first has ended, which must not turn their exit code into a death by signal.
    """
    request = StopRequest()
    before = {number: signal.signal(number, request.note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if request.obeyed else handler)
