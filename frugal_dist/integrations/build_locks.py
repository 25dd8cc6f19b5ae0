"""Locks of C++ builds: torch waits for one without a word and without end, also when the build behind it was killed.

A killed job leaves ``TORCH_EXTENSIONS_DIR/NAME/lock`` behind (pytorch/pytorch#189245), and every later start that loads
the operation hangs. torch keeps the file open while it builds, so a lock that no process has open is left over.

Only the standard library: launch/setup.sh runs this file before anything is installed.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "tmpfs", "ramfs", "overlay"}
"""File systems of one machine. What is open on another's can be seen on the machine that has it open only."""
SILENCE = 900.0
"""Seconds without a change in a build's folder after which a build that cannot be seen counts as dead."""
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
            status = lock.stat()
            holder, certain = _holder(status)
            if holder is not None:
                return holder
            silent = time.time() - max(path.stat().st_mtime for path in (lock, lock.parent, *lock.parent.glob("*")))
            if not (certain and _is_local(lock)) and silent < SILENCE:
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


def _holder(lock: os.stat_result) -> tuple[str | None, bool]:
    """The process of this machine that has the lock open, if any; whether all that might have could be asked."""
    certain = Path("/proc/self/fd").is_dir()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            for descriptor in (process / "fd").iterdir():
                with suppress(OSError):  # closed meanwhile, or on a mount that is broken: not this lock
                    opened = descriptor.stat()
                    if (opened.st_dev, opened.st_ino) == (lock.st_dev, lock.st_ino):
                        return f"process {process.name}", True
        except FileNotFoundError:
            continue  # it has just ended
        except OSError:
            with suppress(OSError):
                certain = certain and process.stat().st_uid != lock.st_uid
    return None, certain


def _is_local(path: Path) -> bool:
    """Whether the file system that holds the path is one of this machine."""
    where, kind = "", ""
    resolved = str(path.resolve())
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        before, _, after = line.partition(" - ")
        mount = before.split()[4].encode().decode("unicode_escape")
        if (resolved + "/").startswith(mount.rstrip("/") + "/") and len(mount) >= len(where):
            where, kind = mount, after.split()[0]
    return kind in LOCAL


if __name__ == "__main__":
    wait_for_builds(lambda text: print(f"setup: {text}", flush=True), 0.0)
