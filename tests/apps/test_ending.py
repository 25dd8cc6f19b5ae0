"""How a rank's process ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LATE = """
import atexit, sys, threading, time
from torch import distributed
import torch
from frugal_dist.training.ending import end_process

rank, meeting = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", store=distributed.FileStore(meeting, 2), rank=rank, world_size=2)
work = [distributed.all_reduce(torch.ones(300_000), async_op=True) for _ in range(300)]
work.clear()  # the last of them is now let go of by a thread of gloo
"""
ORDERLY = """
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.3), print("a thread"))).start()
print("done")
end_process(rank + 3)
"""


def end(folder: Path, program: str) -> list[tuple[int, str]]:
    """Exit code and output of each of two ranks."""
    arguments = [sys.executable, "-c", program]
    ranks = [
        subprocess.Popen(
            [*arguments, str(rank), str(folder / "store")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    return [(rank.returncode, output) for rank, output in zip(ranks, outputs, strict=True)]


def test_a_rank_ends_while_gloo_is_still_letting_go(tmp_path: Path) -> None:
    """With the interpreter's own end instead, about every second such rank dies by SIGABRT."""
    expected = "done\na thread\nat exit\n"
    assert end(tmp_path, LATE + ORDERLY) == [(3, expected), (4, expected)]
