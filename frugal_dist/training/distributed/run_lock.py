"""One run per folder: a lock that names its holder, outlives requeues, and is taken over from the dead.

The holder touches the file now and then. On the same machine its process is looked up; from another, and from another
container, only that the file is touched tells that it lives.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

from frugal_dist.training.distributed.process import beside

LOCK_FILE = "in_use.json"
TOUCHED_EVERY = 5.0
OBSERVED = 30.0
"""Seconds without a touch after which the holder on another machine counts as dead; network file systems are late."""
POLL = 0.5
JOBS = {"SLURM_JOB_ID": "Slurm", "PBS_JOBID": "PBS", "LSB_JOBID": "LSF"}


@dataclass(frozen=True)
class Holder:
    """A process that trains: where it is, since when, and of which job of a scheduler.

    ``machine``: where its number counts: this boot, this container. ``born``: in ticks since boot, as numbers recur.
    ``start``: how often the scheduler had started the job again.
    """

    pid: int
    host: str
    machine: str
    born: str
    since: str
    job: str = ""
    start: str = ""

    def named(self) -> str:
        """As people find it."""
        job = f" ({self.job})" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


def own_holder(environ: Mapping[str, str] | None = None) -> Holder:
    """This process."""
    environ = os.environ if environ is None else environ
    job = next((f"{name} job {environ[key]}" for key, name in JOBS.items() if environ.get(key)), "")
    pid, since = os.getpid(), datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return Holder(
        pid, socket.gethostname(), _machine(), _born(pid), since, job, environ.get("SLURM_RESTART_COUNT", "0")
    )


def _machine() -> str:
    boot, namespace = "", ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {boot} {namespace}"


def _born(pid: int) -> str:
    """When a process began; empty if there is none, or only what is left of one."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]


def check_free(run: Path, tell: Callable[[str], object]) -> None:
    """ValueError if another process trains in this folder. It may take half a minute to find out that one is dead."""
    _left_behind(run / LOCK_FILE, tell)


def seems_held(run: Path) -> bool:
    """Whether a process trains in this folder, at a glance: on another machine, if the lock was touched lately."""
    lock, holder = run / LOCK_FILE, _parsed(_text(run / LOCK_FILE))
    if holder is not None and holder.machine == _machine():
        return _born(holder.pid) == holder.born
    try:
        return time.time() - lock.stat().st_mtime < OBSERVED
    except OSError:
        return False


def _left_behind(lock: Path, tell: Callable[[str], object]) -> str:
    """The text of the lock, whose holder is dead; ValueError if it lives."""
    text = _text(lock)
    if not lock.exists() or _abandoned(lock, _parsed(text), tell):
        return text
    holder = _parsed(_text(lock))
    who = "another process" if holder is None else holder.named()
    raise ValueError(
        f"{lock.parent} is in use by {who}: stop that run, wait for its end, or choose another --folder "
        f"(the lock is {lock})."
    )


@contextmanager
def held(run: Path, tell: Callable[[str], object]) -> Iterator[None]:
    """Hold the folder. ValueError, naming the holder, if another process trains in it.

    Where no file can be written any more the run goes on without a lock: that is said where it saves.
    """
    own, lock = own_holder(), run / LOCK_FILE
    text = json.dumps(asdict(own), indent=1) + "\n"
    try:
        while not _create(lock, text):
            _remove(lock, _left_behind(lock, tell))
    except OSError as error:
        tell(f"{lock} cannot be written, so that a second start in this folder is not noticed: {error.strerror}")
        yield
        return
    try:
        with beside("run lock", partial(_touch, lock)):
            yield
    finally:
        _remove(lock, text)


def _create(lock: Path, text: str) -> bool:
    try:
        descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
    return True


def _remove(lock: Path, expected: str) -> None:
    """Remove the lock with this text; one that another process has put in its place meanwhile stays."""
    aside = lock.with_name(f"{lock.name}.{secrets.token_hex(4)}")
    with suppress(OSError):
        os.rename(lock, aside)
        if _text(aside) != expected:
            with suppress(FileExistsError):
                os.link(aside, lock)
        aside.unlink()


def _touch(lock: Path, done: threading.Event) -> None:
    while not done.wait(TOUCHED_EVERY):
        with suppress(OSError):
            os.utime(lock)


def _text(lock: Path) -> str:
    try:
        return lock.read_text(encoding="utf-8")
    except OSError:
        return ""


def _parsed(text: str) -> Holder | None:
    """Who holds the lock; None if its text names nobody: it is being written, or was cut off."""
    try:
        return Holder(**json.loads(text))
    except (ValueError, TypeError):
        return None


def _abandoned(lock: Path, holder: Holder | None, tell: Callable[[str], object]) -> bool:
    own = own_holder()
    if holder is not None:
        if holder.machine == own.machine:
            return holder.pid == own.pid or _born(holder.pid) != holder.born
        if holder.job and holder.job == own.job and holder.start != own.start:
            return True  # the scheduler has ended this job before it started it again
        tell(f"{lock.parent}: looking for up to {OBSERVED:.0f} s whether {holder.named()}, still trains there")
    return not _changes(lock)


def _changes(lock: Path) -> bool:
    """Whether the file is touched, or another, within the time of observation."""
    first, end = _state(lock), time.monotonic() + OBSERVED
    while time.monotonic() < end:
        if _state(lock) != first:
            return lock.exists()
        time.sleep(POLL)
    return False


def _state(lock: Path) -> tuple[int, int] | None:
    """Opened each time: only then network file systems ask their server."""
    try:
        with lock.open("rb") as file:
            status = os.fstat(file.fileno())
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino
