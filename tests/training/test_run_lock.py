"""One run per folder: who holds it, and who may take it over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from frugal_dist.training.distributed import run_lock
from frugal_dist.training.distributed.run_lock import LOCK_FILE, Holder, check_free, held, own_holder


def put(run: Path, holder: Holder) -> Path:
    lock = run / LOCK_FILE
    lock.write_text(json.dumps(asdict(holder)))
    return lock


@pytest.fixture
def other() -> Holder:
    """Of this machine, alive: the process that started this one."""
    return replace(own_holder(), pid=os.getppid(), born=run_lock._born(os.getppid()))


def test_a_living_process_of_this_machine_keeps_its_folder(tmp_path: Path, other: Holder) -> None:
    put(tmp_path, replace(other, job="Slurm job 7"))
    words = rf"in use by process {other.pid} on {other.host} \(Slurm job 7\), since 2.*choose another --folder"
    with pytest.raises(ValueError, match=words), held(tmp_path, print):
        pass
    assert (tmp_path / LOCK_FILE).exists()


def test_the_dead_of_this_machine_lose_it_at_once(tmp_path: Path, other: Holder) -> None:
    """Also if their number was given to somebody else since, or their parent has not looked after their end."""
    ended = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert ended.stdout is not None
    ended.stdout.read()
    zombie = replace(other, pid=ended.pid, born="1")
    for dead in (replace(other, born="1"), zombie, replace(other, pid=2**22 + 1)):
        put(tmp_path, dead)
        with held(tmp_path, print):
            assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
            check_free(tmp_path, print)  # this process itself is not in its own way
        assert not list(tmp_path.iterdir())
    ended.communicate()


def test_a_requeued_job_takes_over_from_another_host(
    tmp_path: Path, other: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    put(tmp_path, replace(other, machine="elsewhere", job="Slurm job 7"))
    with held(tmp_path, print):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["start"] == "1"


@pytest.mark.parametrize("text", [None, "", '{"pid": 1}'], ids=["named", "empty", "of another version"])
def test_from_elsewhere_only_touching_the_file_tells(
    tmp_path: Path, other: Holder, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    monkeypatch.setattr(run_lock, "OBSERVED", 0.3)
    monkeypatch.setattr(run_lock, "POLL", 0.01)
    lock = put(tmp_path, replace(other, machine="elsewhere", host="node2"))
    if text is not None:
        lock.write_text(text)
    done = threading.Event()
    monkeypatch.setattr(run_lock, "TOUCHED_EVERY", 0.05)
    alive = threading.Thread(target=run_lock._touch, args=(lock, done))
    alive.start()
    said: list[str] = []
    with pytest.raises(ValueError, match="in use by process .* on node2" if text is None else "in use by another"):
        check_free(tmp_path, said.append)
    done.set()
    alive.join()
    with held(tmp_path, said.append):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert all("whether process" in line for line in said)


def test_a_lock_that_was_replaced_meanwhile_is_not_removed(tmp_path: Path, other: Holder) -> None:
    lock = put(tmp_path, other)
    run_lock._remove(lock, "what was judged")
    assert json.loads(lock.read_text())["pid"] == other.pid
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


def test_where_no_lock_can_be_written_the_run_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    with held(tmp_path / "missing", said.append):
        pass
    assert "is not noticed: No such file or directory" in said[0]
