"""Ranks as forks of a process that has imported everything already: fresh processes in no time, to be killed at will.

    ranks = Ranks(3, body, scratch)       # in a program that has no threads
    forks = Forks(); forks.run(3, job)    # in a test: a server does the forking, each job gets processes of its own

A rank never ends by itself: when all have answered they are killed with SIGKILL. So whatever the next job finds on disk
was written by processes that were killed, and is read by others.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import fleet
import torch.distributed as dist

HOST = "127.0.0.1"
GRACE = 20.0
"""Seconds that the other ranks get once one has failed."""
END_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of <sys/prctl.h>."""

Report = Callable[[Any], None]
Body = Callable[[int, Report], None]


class Ranks:
    """``body(rank, report)`` on forked processes with a gloo group (a single one has none), and what they report."""

    def __init__(self, size: int, body: Body, scratch: Path) -> None:
        self.size = size
        self.reports: list[list[Any]] = [[] for _ in range(size)]
        self.pids: list[int] = []
        self._open: dict[Connection, int] = {}
        self._scratch = scratch
        scratch.mkdir(parents=True, exist_ok=True)
        store = scratch / f"store{time.monotonic_ns()}"
        for rank in range(size):
            ours, theirs = Pipe(duplex=False)
            pid = os.fork()
            if pid == 0:
                _be_rank(rank, size, store, theirs, self._log(rank), body)
            theirs.close()
            self.pids.append(pid)
            self._open[ours] = rank

    def read(self, timeout: float) -> list[int]:
        """Take in what was reported, waiting for the first of it; the ranks that said something or ended."""
        heard = []
        for pipe in wait(list(self._open), timeout):
            assert isinstance(pipe, Connection)
            rank = self._open[pipe]
            try:
                self.reports[rank].append(pipe.recv())
            except (EOFError, ConnectionError):
                pipe.close()
                del self._open[pipe]
            heard.append(rank)
        return heard

    @property
    def running(self) -> set[int]:
        """The ranks that have not ended."""
        return set(self._open.values())

    def kill(self, *ranks: int) -> None:
        """SIGKILL."""
        for rank in ranks:
            os.kill(self.pids[rank], signal.SIGKILL)

    def reap(self, patience: float) -> list[int]:
        """Wait until all have ended; their exit statuses, negative for a signal. AssertionError if some hang."""
        deadline = time.monotonic() + patience
        while self.running and time.monotonic() < deadline:
            self.read(1.0)
        stuck = {rank: self.stack(rank) for rank in sorted(self.running)}
        self.kill(*stuck)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]
        assert not stuck, f"ranks hang:\n{stuck}"
        return statuses

    def stack(self, rank: int) -> str:
        """Where a rank is, and what it has printed."""
        os.kill(self.pids[rank], signal.SIGUSR1)
        time.sleep(0.5)  # faulthandler writes from a signal handler: nothing to wait for
        return self.printed(rank)

    def printed(self, rank: int) -> str:
        """The end of what a rank has printed, its traceback if it failed."""
        return self._log(rank).read_text(errors="replace")[-6000:]

    def _log(self, rank: int) -> Path:
        return self._scratch / f"rank{rank}.log"


def end_with_parent() -> None:
    """A test that is killed leaves no processes behind."""
    ctypes.CDLL(None).prctl(END_WITH_PARENT, signal.SIGKILL)


def _be_rank(rank: int, size: int, store: Path, pipe: Connection, log: Path, body: Body) -> None:
    status = 1
    try:
        end_with_parent()
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        if size > 1:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        body(rank, pipe.send)
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def environment() -> dict[str, str]:
    """Of programs beside this file."""
    here = Path(__file__).resolve().parent
    folders = (here.parents[1], here, here.parent / "engines")
    return {**fleet.environment(), "PYTHONPATH": os.pathsep.join(str(folder) for folder in folders)}


# --- jobs of tests ------------------------------------------------------------------------------------


class JobFailed(AssertionError):
    """At least one rank raised or did not come back; the message has every rank's traceback or stack."""


class Forks:
    """A server process, started at the first job, that has imported ``modules``."""

    def __init__(self, *modules: str) -> None:
        self._modules = modules
        self._server: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def run(self, size: int, job: Callable[..., Any], *args: Any, deadline: float = fleet.DEADLINE) -> list[Any]:
        """``job(*args)`` on ``size`` fresh ranks; their results in order. Raises JobFailed. Tensors go as bytes."""
        if self._pipe is None:
            self._start()
        assert self._pipe is not None
        self._pipe.send((size, job.__module__, job.__qualname__, args, deadline))
        troubles, results = self._pipe.recv()
        if troubles:
            raise JobFailed("\n".join(troubles))
        found: list[Any] = results
        return found

    def stop(self) -> None:
        """End the server."""
        if self._server is not None and self._pipe is not None:
            self._pipe.close()
            self._server.wait(60.0)

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno()), *self._modules],
            env=environment(),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._pipe = Connection(ours.detach())


def serve(pipe: Connection, modules: list[str]) -> None:
    """Fork ranks for every job that arrives, until the pipe closes."""
    end_with_parent()
    for module in modules:
        importlib.import_module(module)
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # nobody needs to look through all that was imported, which would copy it for every rank
    with tempfile.TemporaryDirectory(prefix="forks") as folder:
        while True:
            try:
                size, module, name, args, deadline = pipe.recv()
            except EOFError:
                return
            job = getattr(importlib.import_module(module), name)
            pipe.send(_answers(size, job, args, deadline, Path(folder)))


def _answers(
    size: int, job: Callable[..., Any], args: tuple[Any, ...], deadline: float, scratch: Path
) -> tuple[list[str], list[Any]]:
    """(what went wrong, the results)."""

    def body(rank: int, report: Report) -> None:
        os.environ.update(_coordinates(rank, size))
        report(job(*args))
        signal.pause()  # until it is killed

    ranks = Ranks(size, body, scratch)
    end = time.monotonic() + deadline
    while (left := end - time.monotonic()) > 0 and not all(ranks.reports):
        ranks.read(left)
        if len(ranks.running) < size:
            end = min(end, time.monotonic() + GRACE)
    troubles = []
    if not all(ranks.reports):
        troubles = [f"rank {rank}:\n{_trouble(ranks, rank)}" for rank in range(size)]
    ranks.kill(*ranks.running)
    ranks.reap(GRACE)
    _clear_shared_memory()
    return troubles, [] if troubles else [reports[0] for reports in ranks.reports]


def _trouble(ranks: Ranks, rank: int) -> str:
    if ranks.reports[rank]:
        return "finished"
    return ranks.stack(rank) if rank in ranks.running else ranks.printed(rank)


def _coordinates(rank: int, size: int) -> dict[str, str]:
    """What DeepSpeed asks for. The group exists already, so the port only has to be no other test's."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return {**{key: str(value) for key, value in places.items()}, "MASTER_ADDR": HOST, "MASTER_PORT": str(os.getppid())}


def _clear_shared_memory() -> None:
    """DeepSpeed's buffers, 66 MiB for each rank, that killed processes cannot remove."""
    for file in Path("/dev/shm").glob(f"deepspeed_*_{HOST}_{os.getpid()}_*"):
        file.unlink(missing_ok=True)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), sys.argv[2:])
