"""Processes as ranks, on gloo: up to 4 of them, started once and used by many tests.

A job that takes too long ends with the stacks of all ranks instead of hanging.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

GRACE = 20.0
"""Seconds that the other ranks get to finish after one has failed."""


class Fleet:
    """``run(size, function, *args)`` calls ``function(*args)`` on ``size`` ranks of a fresh default group."""

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []
        self.folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self.jobs = 0

    def run(self, size: int, function: Callable[..., Any], *args: Any, deadline: float = 240.0) -> list[Any]:
        """The results in order of rank. AssertionError with every rank's traceback or stack if any of them fails."""
        if not self.processes:
            self._start()
        self.jobs += 1
        job = pickle.dumps((size, f"{self.folder}/store{self.jobs}", function, args))
        for pipe in self.pipes[:size]:
            pipe.send_bytes(job)
        answers = self._collect(size, deadline)
        problems = {rank: self._problem(rank, answers) for rank in range(size)}
        if any(problems.values()):
            self.close()
            told = [f"--- rank {rank} ---\n{problem or 'finished'}" for rank, problem in problems.items()]
            raise AssertionError("a job on several processes failed\n" + "\n".join(told))
        return [answers[rank][1] for rank in range(size)]

    def _collect(self, size: int, deadline: float) -> dict[int, tuple[str, Any]]:
        """What the ranks answer in time; (error, result) of each."""
        answers: dict[int, tuple[str, Any]] = {}
        end = time.monotonic() + deadline
        while len(answers) < size and time.monotonic() < end:
            waiting = {self.pipes[rank]: rank for rank in range(size) if rank not in answers}
            for pipe in wait(list(waiting), timeout=1.0):
                assert isinstance(pipe, Connection)
                rank = waiting[pipe]
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    answers[rank] = (f"exit code {self.processes[rank].exitcode}", None)
                if answers[rank][0]:
                    end = min(end, time.monotonic() + GRACE)
        return answers

    def _problem(self, rank: int, answers: dict[int, tuple[str, Any]]) -> str:
        """The error of a rank, or where it hangs."""
        if rank in answers:
            return answers[rank][0]
        os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(1.0)  # faulthandler writes from a signal handler: nothing to wait for
        return f"still running:\n{self._log(rank).read_text()}"

    def close(self) -> None:
        """End the processes; the next ``run`` starts new ones."""
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []

    def _start(self) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"
        context = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs, str(self._log(rank))), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def _log(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.log"


def _serve(rank: int, pipe: Connection, log: str) -> None:
    """A rank: takes jobs until the parent goes away."""
    torch.set_num_threads(1)
    with open(log, "w") as file:
        faulthandler.enable(file)
        faulthandler.register(signal.SIGUSR1, file)
        while True:
            try:
                size, store, function, args = pickle.loads(pipe.recv_bytes())
            except EOFError:
                return
            try:
                dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
                answer = ("", function(*args))
                dist.destroy_process_group()
            except BaseException:
                answer = (traceback.format_exc(), None)
            pipe.send_bytes(pickle.dumps(answer))
