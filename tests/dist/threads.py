"""Threads as ranks: 2 to 8 ranks in one process, on torch's own threaded process group. Quick, and no copies."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)


def run_ranks(size: int, body: Callable[[int], Any], deadline: float = 120.0) -> list[Any]:
    """``body(rank)`` on ``size`` threads with an initialised default group; their results in order.

    Raises the first rank's error; after ``deadline`` seconds raises with the stack of every rank.
    """
    results: list[Any] = [None] * size
    errors: list[BaseException | None] = [None] * size
    world, hook = _install_threaded_pg(), sys.excepthook
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    store = dist.HashStore()

    def main(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=size, store=store)
            results[rank] = body(rank)
        except BaseException as error:
            errors[rank] = error
            ProcessLocalGroup.exception_handle(error)
        finally:
            if errors[rank] is None:
                dist.destroy_process_group()

    threads = [threading.Thread(target=main, args=(rank,), name=f"rank{rank}", daemon=True) for rank in range(size)]
    try:
        for thread in threads:
            thread.start()
        end = time.monotonic() + deadline
        for thread in threads:
            thread.join(max(end - time.monotonic(), 0.0))
        stuck = [thread for thread in threads if thread.is_alive()]
        if stuck:
            frames = sys._current_frames()
            stacks = [
                f"{t.name}:\n{''.join(traceback.format_stack(frames[t.ident]))}" for t in stuck if t.ident in frames
            ]
            raise AssertionError("ranks hang:\n" + "\n".join(stacks))
    finally:
        ProcessLocalGroup.reset()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        _uninstall_threaded_pg()
        sys.excepthook = hook  # torch puts a rank into it at every init, and never takes it out
        del world
    failed = [(rank, error) for rank, error in enumerate(errors) if error is not None]
    if failed:
        first = next((entry for entry in failed if not isinstance(entry[1], (RuntimeError, SystemExit))), failed[0])
        first[1].args = (f"rank {first[0]}: {first[1]}",)
        raise first[1]
    return results
