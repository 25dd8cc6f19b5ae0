"""SIGKILL at random moments and at every step that a save makes on the disk: nothing that was complete is lost."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import forks
import killing
import pytest
import tables

NAMES = {"same": "one checkpoint, replaced", "steps": "a folder of checkpoints"}
KILLS = 12
"""For each of the two."""

pytestmark = pytest.mark.timeout(900)


def carry_out(folder: Path, *drills: str) -> list[dict[str, int]]:
    """Run drills in a process that has no threads; their reports go into a printed table."""
    command = [sys.executable, killing.__file__, str(folder), *drills]
    done = subprocess.run(command, env=forks.environment(), capture_output=True, text=True, check=False, timeout=800.0)
    assert done.returncode == 0, f"{drills}\n{done.stderr[-6000:]}"
    reports: list[dict[str, int]] = [json.loads(line) for line in done.stdout.splitlines()]
    for drill, found in zip(drills, reports, strict=True):
        kind, mode, *_, choice, ranks = drill.split(",")
        title = {"random": "at random moments", "every": "at every touch of the disk"}[kind]
        row = NAMES[mode] if kind == "random" else f"{NAMES[mode]}: rank {choice} of {ranks}"
        for column, number in found.items():
            tables.count(f"SIGKILL {title}: what was found afterwards", row, column, number)
    return reports


@pytest.mark.heavy
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """Other moments at every run; a failure shows the seed."""
    seed = time.time_ns() % 1_000_000
    for found in carry_out(tmp_path, *(f"random,{mode},{KILLS},{seed}" for mode in NAMES)):
        assert found["kills"] == KILLS
        assert found["while saving"] > KILLS // 4, "most moments should fall into a save"


def every(mode: str, stride: int, rank: int, ranks: int) -> str:
    return f"every,{mode},{stride},{rank},{ranks}"


@pytest.mark.parametrize(
    "drills",
    [
        pytest.param([every("same", 5, 0, 1)], id="one process"),
        pytest.param(
            [every("same", 1, 0, 1), every("steps", 3, 0, 1)], id="one process, each", marks=pytest.mark.heavy
        ),
        pytest.param([every("steps", 1, 0, 1)], id="one process, a folder", marks=pytest.mark.heavy),
        pytest.param([every("same", 9, 0, 2), every("steps", 9, 1, 2)], id="two ranks", marks=pytest.mark.heavy),
        *(
            pytest.param([every(mode, 1, rank, 2)], id=f"two ranks-{mode}-{rank}", marks=pytest.mark.heavy)
            for mode in NAMES
            for rank in range(2)
        ),
    ],
)
def test_killed_at_every_touch_of_the_disk(drills: list[str], tmp_path: Path) -> None:
    for drill, found in zip(drills, carry_out(tmp_path, *drills), strict=True):
        _, _, stride, rank, _ = drill.split(",")
        assert found["kills"] * int(stride) > 20, "a save touches the disk more often than that"
        if (stride, rank) == ("1", "0"):
            assert found["the new one was loaded"] > 0, "there are things to do after a checkpoint is complete"
