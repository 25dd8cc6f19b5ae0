"""Real processes as ranks, started once and used by many tests: importing DeepSpeed costs more than most of them.

    fleet = Fleet(2)
    results = fleet.run(deepspeed_cases.difference, case)     # one result per rank

A job is a function of a module in this folder, called on every rank. A job that fails or hangs ends its fleet; the next
job gets a fresh one. What hung is shown with the Python stacks of every rank.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DEADLINE = 240.0
GRACE = 20.0
"""Seconds that the other ranks get once one has failed: they may be stuck in a collective."""
TAIL = 6000


class JobFailed(AssertionError):
    """At least one rank raised or did not come back; the message has every rank's traceback or stack."""


class Fleet:
    """``size`` processes with an initialised gloo group. ``extra`` goes into their environment."""

    def __init__(self, size: int, **extra: str) -> None:
        self.size = size
        self._extra = extra
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._port = 0

    def run(self, job: Callable[..., Any], *args: Any, deadline: float = DEADLINE) -> list[Any]:
        """``job(*args)`` on every rank; their results in order. Raises JobFailed."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((job.__module__, job.__qualname__, args))
        answers = self._collect(deadline)
        troubles = [f"rank {r}: {text}" for r, (good, text) in sorted(answers.items()) if not good]
        silent = [rank for rank in range(self.size) if rank not in answers]
        if not troubles and not silent:
            return [answers[rank][1] for rank in range(self.size)]
        troubles += [f"rank {rank} did not come back:\n{self._stack(rank)}" for rank in silent]
        self.stop()
        raise JobFailed("\n".join(troubles))

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            self._folder.cleanup()
        for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{self._port}_*"):
            left.unlink(missing_ok=True)  # 66 MiB a rank, which a killed process does not take away
        self._processes, self._pipes, self._folder = [], [], None

    def _start(self) -> None:
        port = self._port = free_port()
        self._folder = tempfile.TemporaryDirectory(prefix="fleet")
        for rank in range(self.size):
            ours, theirs = socket.socketpair()
            with open(self._log(rank), "wb") as log:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, str(HERE / "worker.py"), str(theirs.fileno())],
                        env={**environment(), **self._extra, **_coordinates(rank, self.size, port)},
                        pass_fds=[theirs.fileno()],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd=self._folder.name,
                    )
                )
            theirs.close()
            self._pipes.append(Connection(ours.detach()))

    def _collect(self, deadline: float) -> dict[int, tuple[bool, Any]]:
        answers: dict[int, tuple[bool, Any]] = {}
        waiting = dict(zip(self._pipes, range(self.size), strict=True))
        end = time.monotonic() + deadline
        while waiting and (left := end - time.monotonic()) > 0:
            for pipe in wait(list(waiting), timeout=left):
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    answers[rank] = pipe.recv()
                except (EOFError, ConnectionError):
                    answers[rank] = (False, f"the process ended\n{self._tail(rank)}")
                if not answers[rank][0]:
                    end = min(end, time.monotonic() + GRACE)
        return answers

    def _stack(self, rank: int) -> str:
        self._processes[rank].send_signal(signal.SIGUSR1)  # the worker has faulthandler write to its log
        time.sleep(0.5)
        return self._tail(rank)

    def _tail(self, rank: int) -> str:
        return self._log(rank).read_text(errors="replace")[-TAIL:]

    def _log(self, rank: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"rank{rank}.log"


def environment() -> dict[str, str]:
    """Small tensors, several processes on few cores: threads only get in each other's way."""
    known = {
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache/torch_extensions")),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }
    return {**os.environ, **known}


def _coordinates(rank: int, size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
