"""C++ builds of torch's extensions: which ninja builds, and the locks.

torch waits for a lock without a word and without end, also when the build behind it was killed. A killed job leaves
``TORCH_EXTENSIONS_DIR/NAME/lock`` behind (pytorch/pytorch#189245), and every start that loads the operation hangs.
torch keeps the file open while it builds, so a lock that no process has open is left over. Linux tells: nobody gets a
write lease on a file that others have open, in whatever container or under whatever user. Where there are no leases,
as on network file systems, only the age of a build's files tells.

Only the standard library: launch/setup.sh runs this file before anything is installed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SILENCE = 900.0
"""Seconds without a change in a build's folder after which a build that cannot be seen counts as dead."""
RELEASED = 1.0
"""Seconds for which a lock is watched that nobody has open: torch closes it before it removes it."""
POLL, FIRST_WORD, LATER_WORDS = 0.5, 10.0, 60.0

Tell = Callable[[str], object]


def on_stderr(text: str) -> None:
    """Say it where warnings go."""
    print(f"frugal_dist: {text}", file=sys.stderr, flush=True)


def clear_stale_locks(tell: Tell = on_stderr) -> None:
    """Remove the locks that killed builds left behind, and say so. Others' trouble is never an error here."""
    with suppress(OSError):
        for lock in _locks():
            _clear(lock, tell)


def wait_for_builds(tell: Tell = on_stderr, first_word: float = FIRST_WORD) -> None:
    """Before operations are built or loaded: clear what is stale, and wait for builds that run, saying so.

    ``first_word``: after so many seconds.
    """
    for lock in _locks():
        start, word = time.monotonic(), first_word
        while (holder := _clear(lock, tell)) is not None:
            waited = time.monotonic() - start
            if waited >= word:
                tell(f"waiting for {lock.parent.name}, which {holder} is building: {waited:.0f} s ({lock})")
                word += LATER_WORDS
            time.sleep(POLL)


def prefer_own_ninja() -> None:
    """Put this environment's programs first on PATH if it has ninja. Another version takes what this one built for
    outdated, and builds it again: launchers and hosts that set PATH otherwise would take turns at every start.
    """
    own, path = Path(sys.executable).parent, os.environ.get("PATH", "")
    if (own / "ninja").exists() and path.split(os.pathsep)[0] != str(own):
        os.environ["PATH"] = os.pathsep.join(filter(None, [str(own), path]))


def _locks() -> list[Path]:
    """As torch.utils.cpp_extension places them."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    if named:
        return sorted(Path(named).glob("*/lock"))
    # Not Path.home(), which raises where a container's user has no home: importing this package must not.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return sorted((cache / "torch_extensions").glob("*/*/lock"))


def _clear(lock: Path, tell: Tell) -> str | None:
    """Remove a lock without a holder; return the holder, None if there is no such lock any more.

    One process at a time looks and removes: else the second would remove the lock of the build that the first began.
    """
    try:
        with _alone(lock.parent):
            before = lock.stat()
            if _is_open(lock) is False:
                time.sleep(RELEASED)
            if _is_open(lock) is not False or lock.stat().st_ino != before.st_ino:
                holder = _process(before)
                if holder is not None:
                    return holder
                silent = time.time() - max(path.stat().st_mtime for path in (lock, lock.parent, *lock.parent.glob("*")))
                if silent < SILENCE:
                    return f"a process of another machine or user, which was at it {silent:.0f} s ago,"
            lock.unlink()
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"a process (its lock cannot be looked at or removed: {error.strerror})"
    tell(f"removing the lock of a build that was killed ({lock})")
    return None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without such locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_open(lock: Path) -> bool | None:
    """Whether any process of this kernel has the lock open, also in other containers; None: it cannot be told."""
    descriptor = os.open(lock, os.O_RDONLY)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)  # who opens it meanwhile waits, and we hear nothing
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except (AttributeError, OSError) as error:  # not Linux; not our file, or a file system without leases
        return True if getattr(error, "errno", None) == errno.EAGAIN else None
    else:
        return False
    finally:
        os.close(descriptor)


def _process(lock: os.stat_result) -> str | None:
    """The process that has the lock open, if we can see it."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended, or is another user's
            for descriptor in (process / "fd").iterdir():
                with suppress(OSError):  # closed meanwhile, or on a mount that is broken: not this lock
                    opened = descriptor.stat()
                    if (opened.st_dev, opened.st_ino) == (lock.st_dev, lock.st_ino):
                        return f"process {process.name}"
    return None


if __name__ == "__main__":
    wait_for_builds(lambda text: print(f"setup: {text}", flush=True), 0.0)
