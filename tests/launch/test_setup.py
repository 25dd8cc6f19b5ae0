"""What launch/setup.sh decides: order, repetition, fallbacks, stale locks, interruption. Nothing real is installed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Timer

import pytest

from frugal_dist.integrations import build_locks

ROOT = Path(__file__).parents[2]
CPU_TORCH = "install --no-input torch==2.13.0+cpu"


class Checkout:
    """A copy of what the script needs, with a fake Python and no GPU unless a test puts one there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls_file = root / "calls"
        self.lock = root / ".cache/torch_extensions/deepspeed_shm_comm/lock"
        (root / "launch").mkdir(parents=True)
        (root / "bin").mkdir()
        shutil.copy(ROOT / "launch/setup.sh", root / "launch")
        shutil.copy(ROOT / "pyproject.toml", root)
        (root / "frugal_dist/integrations").mkdir(parents=True)
        shutil.copy(ROOT / "frugal_dist/integrations/build_locks.py", root / "frugal_dist/integrations")
        self.tool("nvidia-smi", "exit 9")
        self.tool("c++", "exit 0")
        self.started: list[subprocess.Popen[str]] = []
        self.env = {
            "PATH": f"{root / 'bin'}:{os.environ['PATH']}",
            "PYTHON": str(ROOT / "tests/launch/fake_python.sh"),
            "REAL_PYTHON": sys.executable,
            "CALLS": str(self.calls_file),
        }

    def tool(self, name: str, line: str) -> None:
        file = self.root / "bin" / name
        file.write_text(f"#!/bin/sh\n{line}\n")
        file.chmod(0o755)

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        command = ["bash", str(self.root / "launch/setup.sh"), *words]
        out = subprocess.PIPE
        process = subprocess.Popen(command, env=self.env | env, stdout=out, stderr=subprocess.STDOUT, text=True)
        self.started.append(process)
        return process

    def close(self) -> None:
        """End what a failed test left running; the script's own trap ends its children."""
        for process in self.started:
            if process.poll() is None:
                process.terminate()
            process.communicate(timeout=30)

    def setup(self, *words: str, rc: int = 0, **env: str) -> str:
        process = self.start(*words, **env)
        shown, _ = process.communicate(timeout=60)
        assert process.returncode == rc, shown
        return shown

    def calls(self) -> list[str]:
        """What was called since the last time."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Checkout]:
    made = Checkout(tmp_path)
    yield made
    made.close()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "waited 30 s in vain"
        time.sleep(0.05)


def project(root: Path, extras: str, torch: str = "2.13.0+cpu") -> str:
    return f"install --no-input torch=={torch} --editable {root}[{extras}]"


def test_the_first_run_installs_torch_for_cpu_before_the_project_and_compiles_last(checkout: Checkout) -> None:
    checkout.setup("train,deepspeed")
    assert checkout.calls() == ["venv", CPU_TORCH, project(checkout.root, "deepspeed,train"), "compile"]


def test_a_second_run_does_nothing(checkout: Checkout) -> None:
    checkout.setup("train,deepspeed")
    checkout.calls()
    assert "ready in" in checkout.setup("train,deepspeed")
    assert checkout.calls() == []


def test_later_extras_are_added_and_fewer_change_nothing(checkout: Checkout) -> None:
    checkout.setup("train")
    assert "compile" not in checkout.calls()
    checkout.setup("deepspeed")
    assert checkout.calls() == [project(checkout.root, "deepspeed,train"), "compile"]
    checkout.setup("train")
    assert checkout.calls() == []


def test_a_changed_project_file_installs_again_but_keeps_torch(checkout: Checkout) -> None:
    checkout.setup("train")
    checkout.calls()
    with (checkout.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    checkout.setup("train")
    assert checkout.calls() == [project(checkout.root, "train")]


def test_in_a_container_image_nothing_is_installed(checkout: Checkout) -> None:
    image = checkout.root / "image"
    checkout.setup("all")
    (checkout.root / ".venv").rename(image)
    checkout.calls()
    given = {"FRUGAL_DIST_IMAGE": "all", "VIRTUAL_ENV": str(image)}
    assert "the container image has what is needed: torch 2.13.0+cpu" in checkout.setup("train,deepspeed", **given)
    assert checkout.calls() == []
    checkout.setup("all", **given)
    assert 'built without the extra "dev"' in checkout.setup("all,dev", rc=2, **given)
    assert checkout.calls() == []
    assert not (checkout.root / ".venv").exists()


def test_an_unknown_extra_is_an_error_that_lists_the_known_ones(checkout: Checkout) -> None:
    shown = checkout.setup("trian", rc=2)
    known = "train finetune deepspeed mpi tracking completion demo bench examples docs all dev"
    assert "by commas: train,deepspeed" in checkout.setup("train", "deepspeed", rc=2)
    assert "would make or update" in checkout.setup("--dry-run", "train")
    assert f'unknown extra "trian"; pyproject.toml has: {known}' in shown
    assert checkout.calls() == []


def test_without_a_cpu_build_in_pip_s_indexes_the_given_index_is_tried(checkout: Checkout) -> None:
    checkout.setup("train", PIP_REFUSES="input torch==[^ ]*$", TORCH_CPU_INDEX="https://wheels.example/cpu")
    retry = "install --no-input --retries 1 --timeout 20 --extra-index-url https://wheels.example/cpu torch==2.13.0+cpu"
    assert checkout.calls()[:3] == ["venv", CPU_TORCH, retry]


def test_without_any_cpu_build_it_takes_the_default_one_and_says_so(checkout: Checkout) -> None:
    shown = checkout.setup("train", PIP_REFUSES="torch==2.13.0.cpu")
    assert "several GB of CUDA" in shown
    assert "set TORCH_CPU_INDEX" in shown
    assert checkout.calls()[3] == "install --no-input torch==2.13.0"


def test_without_any_torch_it_says_what_to_do_and_goes_on_later(checkout: Checkout) -> None:
    assert "could not install torch==2.13.0" in checkout.setup("train", rc=1, PIP_REFUSES="torch==2.13.0")
    checkout.calls()
    checkout.setup("train", TORCH_SPEC="torch==2.12.1")
    assert checkout.calls() == ["install --no-input torch==2.12.1", project(checkout.root, "train", "2.12.1")]


def test_with_a_gpu_plain_torch_is_installed_and_nothing_compiled(checkout: Checkout) -> None:
    checkout.tool("nvidia-smi", "echo GPU 0: Imaginary")
    checkout.setup("all")
    assert checkout.calls() == ["venv", "install --no-input torch>=2.11,<2.14", project(checkout.root, "all", "2.13.0")]


def test_torch_that_finds_no_gpu_where_there_is_one_is_told_of(checkout: Checkout) -> None:
    """Its CUDA is newer than what the driver knows."""
    checkout.tool("nvidia-smi", "echo GPU 0: Imaginary")
    assert "WARNING" not in checkout.setup("train", CUDA_VISIBLE_DEVICES="", FAKE_CUDA="13.0")
    (checkout.root / ".venv" / ".frugal_dist_setup").unlink()
    shown = checkout.setup("train", FAKE_CUDA="13.0")
    assert "WARNING: nvidia-smi lists GPUs, but torch finds none: its CUDA is 13.0" in shown and "TORCH_SPEC" in shown


def test_a_gpu_that_came_later_replaces_the_cpu_build(checkout: Checkout) -> None:
    checkout.setup("train")
    checkout.calls()
    checkout.tool("nvidia-smi", "echo GPU 0: Imaginary")
    checkout.setup("train")
    assert checkout.calls()[0] == "install --no-input torch>=2.11,<2.14"


def test_no_suitable_python_is_an_error(checkout: Checkout) -> None:
    assert "no Python 3.10 or newer found (tried: /nowhere/python)" in checkout.setup(rc=1, PYTHON="/nowhere/python")


def test_the_lock_of_a_killed_build_is_removed(checkout: Checkout) -> None:
    checkout.lock.parent.mkdir(parents=True)
    checkout.lock.touch()
    assert "removing the lock of a build that was killed" in checkout.setup("deepspeed")
    assert not checkout.lock.exists()


def test_the_lock_of_a_running_build_is_waited_for(checkout: Checkout) -> None:
    checkout.lock.parent.mkdir(parents=True)
    with checkout.lock.open("w"):
        process = checkout.start("deepspeed")
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        word = f"waiting for deepspeed_shm_comm, which process {os.getpid()} is building: 0 s"
        assert any(word in line for line in lines)
        assert checkout.lock.exists()
        checkout.lock.unlink()
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 0, shown


def test_what_cannot_be_seen_to_be_dead_is_left_until_it_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a build on another host, or another user's: only the age of its files tells."""
    lock = tmp_path / "fused_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    said: list[str] = []
    monkeypatch.setattr(build_locks, "_is_open", lambda lock: None)
    build_locks.clear_stale_locks(said.append)
    assert lock.exists() and not said
    assert "another machine or user" in str(build_locks._clear(lock, said.append))
    long_ago = time.time() - build_locks.SILENCE - 1
    for path in (lock, lock.parent):
        os.utime(path, (long_ago, long_ago))
    build_locks.wait_for_builds(said.append)
    assert not lock.exists() and said == [f"removing the lock of a build that was killed ({lock})"]


def test_a_build_in_another_container_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which shares the folder, but not the numbers of processes."""
    lock = tmp_path / "fused_adam" / "lock"
    lock.parent.mkdir()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build_locks, "_process", lambda status: None)
    said: list[str] = []
    with lock.open("w"):
        build_locks.clear_stale_locks(said.append)
        assert lock.exists() and not said


def test_a_lock_that_is_being_released_is_left_to_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch closes it first, and then removes it; a busy machine may do other things between."""
    lock = tmp_path / "fused_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    owner = Timer(0.2, lock.unlink)
    owner.start()
    said: list[str] = []
    build_locks.clear_stale_locks(said.append)
    owner.join()
    assert not lock.exists() and not said


def test_the_default_folder_of_extensions_is_looked_into_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    locks = [tmp_path / "torch_extensions" / kind / "cpu_adam" / "lock" for kind in ("py311_cpu", "py312_cu130")]
    for lock in locks:
        lock.parent.mkdir(parents=True)
        lock.touch()
    with locks[0].open():
        build_locks.clear_stale_locks(lambda text: None)
        assert [lock.exists() for lock in locks] == [True, False]


def test_a_build_that_fails_shows_its_log_and_is_tried_again(checkout: Checkout) -> None:
    shown = checkout.setup("deepspeed", rc=1, FAKE_OP="fail")
    assert "shm.cpp: error: no such thing" in shown
    assert "ERROR: DeepSpeed's deepspeed_shm_comm does not compile" in shown
    checkout.calls()
    checkout.setup("deepspeed")
    assert checkout.calls() == ["compile"]


def test_another_deepspeed_is_compiled_anew(checkout: Checkout) -> None:
    checkout.setup("deepspeed")
    checkout.calls()
    (checkout.root / ".venv/versions/deepspeed").write_text("0.19.9\n")
    assert "building deepspeed_shm_comm anew" in checkout.setup("deepspeed")
    assert checkout.calls() == ["compile"]


def test_an_interrupted_build_leaves_no_process_and_no_lock_in_the_way(checkout: Checkout) -> None:
    process = checkout.start("deepspeed", FAKE_OP="hang")
    wait_for(checkout.lock.exists)
    os.kill(process.pid, signal.SIGTERM)
    shown, _ = process.communicate(timeout=30)  # ends only when no child holds the output any more
    assert process.returncode == 130
    assert "run the same command again" in shown
    assert "removing the lock" in checkout.setup("deepspeed")


def test_hosts_and_launchers_with_another_path_build_with_the_same_ninja(tmp_path, monkeypatch):
    """A second version takes the first one's build for outdated: hosts would build again at every start, in turns."""
    for folder in ("own", "system"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "ninja").write_text("#!/bin/sh\n")
        (tmp_path / folder / "ninja").chmod(0o755)
    own, system = str(tmp_path / "own"), str(tmp_path / "system")
    monkeypatch.setenv("PATH", system)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    build_locks.prefer_own_ninja()
    assert os.environ["PATH"] == system, "this environment has none"
    monkeypatch.setattr(sys, "executable", f"{own}/python")
    for _ in range(2):
        build_locks.prefer_own_ninja()
        assert os.environ["PATH"] == f"{own}:{system}"
    assert shutil.which("ninja") == f"{own}/ninja"
