"""How a rank's process speaks and ends: its console, signals, its exit."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from frugal_dist.training.distributed.process import TOGETHER

LATE = """
import atexit, sys, threading, time
from torch import distributed
import torch
from frugal_dist.training.distributed.process import end_process

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


SIGNALLED = """
import ctypes, sys, time
from frugal_dist.training.distributed.process import StoppedEarly, stop_requests

with stop_requests() as request:
    request.at_once = sys.argv[1] == "preparing"
    try:
        print("ready", flush=True)
        while sys.argv[2] == "Python":
            time.sleep(0.01)
        mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
        lock(mutex)
        lock(mutex)  # as in a collective, no handler of Python's is called any more
    except StoppedEarly as stop:
        sys.exit(stop.code)
"""


HEARS = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
"""In a child: a shell that was started in the background ignores SIGINT, and so would all that it starts."""


@pytest.mark.parametrize(
    ("phase", "where", "number", "code"),
    [
        ("preparing", "Python", signal.SIGTERM, 75),
        ("training", "C", signal.SIGTERM, 143),
        pytest.param("preparing", "C", signal.SIGINT, 130, marks=pytest.mark.heavy),
        pytest.param("training", "Python", signal.SIGINT, 130, marks=pytest.mark.heavy),
    ],
)
def test_the_first_signal_ends_what_has_nothing_to_save_and_the_second_ends_all(
    phase: str, where: str, number: signal.Signals, code: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SIGNALLED, phase, where],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=HEARS,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    if phase == "training":
        assert f"{number.name} once more ends it at once" in process.stderr.readline()
        time.sleep(TOGETHER)
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert ("ended at once, without saving" in errors) == (phase == "training")


def test_ctrl_c_while_torch_is_loaded_ends_in_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "frugal_dist.cli", "pretrain", "reviews_5m", "--folder", str(tmp_path / "run")]
    for _ in range(5):  # on a busy machine all may be loaded before the signal is sent
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=HEARS) as process:
            assert process.stderr is not None
            assert "loading PyTorch" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            said = process.stderr.read()
        if "before it began" in said:
            break
    assert (process.returncode, said.strip()) == (130, "Stopped before it began (SIGINT); the same command starts it.")


def test_console_keeps_noise_out_of_the_terminal(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from frugal_dist.training.distributed.process import quiet_console\n"
        "with quiet_console(Path(sys.argv[1])) as terminal:\n"
        "    print('noise'); os.write(1, b'from C\\n'); print('warning', file=sys.stderr)\n"
        "    print('shown', file=terminal)\n"
        "print('after')\n"
    )
    log = tmp_path / "output.txt"
    done = subprocess.run([sys.executable, "-c", script, log], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("after\n", "shown\n")
    assert sorted(log.read_text().split("\n")) == ["", "from C", "noise", "warning"]
