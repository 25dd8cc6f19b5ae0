"""The doctor on this machine, and on ones where something is wrong."""

from __future__ import annotations

import json
import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("jsonargparse")

from frugal_dist.cli import main
from frugal_dist.training.doctor import machine, trials

pytestmark = pytest.mark.timeout(600)


def test_quick_starts_nothing_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--quick", "--folder", str(tmp_path / "not" / "yet" / "there")]) == 0
    said = capsys.readouterr().out
    assert f"ok    torch                      {metadata.version('torch')}" in said
    assert "not tried with --quick" in said
    assert "FAIL" not in said
    assert not (tmp_path / "not").exists()


def test_findings_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--quick", "--json", "--folder", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["quick"], found["failed"]) == (True, 0)
    versions = {one["what"]: one["found"] for one in found["findings"]}
    assert versions["frugal_dist"].startswith(metadata.version("frugal_dist"))
    assert versions["torch"] == metadata.version("torch")


@pytest.mark.heavy
def test_trials_on_one_process_and_on_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "ENGINES", ("single", "fsdp2"))
    assert main(["doctor", "--folder", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "2 ranks exchange through gloo" in said
    assert "steps on 1 rank" in said  # seconds follow where it took long
    assert "steps on 2 ranks" in said


@pytest.mark.heavy
def test_trials_on_every_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--folder", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert all(f"ok    training, {engine}" in said for engine in trials.ENGINES)


def test_a_wrong_version_of_the_core_fails_and_one_of_an_application_is_noted() -> None:
    never = lambda version, prereleases: False  # noqa: E731
    assert machine._version("torch", "<1", "", never).verdict == machine.FAIL
    assert machine._version("numpy", "<1", "train", never).verdict == machine.NOTE
    missing = machine._version("no-such-package", ">1", "train", never)
    assert missing.verdict == machine.NOTE
    assert "pip install 'frugal_dist[train]'" in missing.found


def test_a_folder_that_cannot_be_written_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # /proc refuses new files even to root.
    assert main(["doctor", "--quick", "--folder", "/proc/runs"]) == 1
    assert "FAIL  disk" in capsys.readouterr().out


def test_little_shared_memory_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(64 << 20, 0, 64 << 20))
    found = {one.what: one for one in machine.disk(tmp_path)}
    assert found["shared memory"].verdict == machine.NOTE
    assert "--shm-size" in found["shared memory"].found


def test_a_trial_that_fails_or_hangs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = trials._run([sys.executable, "-c", "raise OSError('no such network')"], tmp_path)
    assert failing == "exit 1: OSError: no such network"
    monkeypatch.setattr(trials, "PATIENCE", 1)
    hanging = trials._run([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path)
    assert hanging == "no end after 1 s"


def test_inside_a_job_a_trial_is_a_process_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a task of srun, a rank of mpirun or of torchrun, with what they all say at once."""
    slurm = {"PROCID": "1", "NTASKS": "2", "STEP_NUM_TASKS": "2", "LOCALID": "1", "STEP_ID": "0", "JOB_ID": "7"}
    said = {f"SLURM_{name}": value for name, value in slurm.items()} | {"SLURM_STEP_NODELIST": "node[1-2]"}
    said |= {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "PMIX_RANK": "1", "WORLD_SIZE": "2"}
    said |= {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    asks = (
        "from frugal_dist.training.distributed.place import find_dist_env as f; assert f().launcher == 'none', str(f())"
    )
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    assert trials._run([sys.executable, "-c", asks], tmp_path) == ""
    left = trials.without_place({**said, "SLURM_CONF": "/etc", "PATH": "/bin", "NCCL_SOCKET_IFNAME": "eth0"})
    assert left == {"PATH": "/bin", "NCCL_SOCKET_IFNAME": "eth0"}


def test_a_training_that_does_not_learn_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from frugal_dist.training.metrics.record import MetricsLog

    monkeypatch.setattr(trials, "_run", lambda command, scratch: "")
    for name, last in (("flat", 5.4), ("other", 3.0)):
        (tmp_path / name).mkdir()
        with MetricsLog(tmp_path / name / "metrics.jsonl") as log:
            log.write("validation", step=0, loss=5.5)
            log.write("validation", step=20, loss=last)
    assert "does not learn" in trials._train("flat", 1, tmp_path / "recipe.yaml", None)[0].line()
    found, loss = trials._train("other", 2, tmp_path / "recipe.yaml", 2.0)
    assert (found.verdict, loss) == (machine.FAIL, 3.0)
    assert "2.00 on one process" in found.found


def test_a_health_check_takes_no_memory_on_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This torch has no CUDA: whatever would touch a GPU fails, as it does on one that is full."""
    if machine.shutil.which("nvidia-smi"):
        pytest.skip("this machine has real GPUs")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("PATH", str(tmp_path))
    (unknown,) = machine.untouched_devices(tmp_path)
    assert (unknown.verdict, "torch sees 2" in unknown.found) == (machine.NOTE, True)
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho '0, NVIDIA H100, 71680, 81920'\necho '1, NVIDIA A30, [N/A], 1'\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    full, parts = machine.untouched_devices(tmp_path)
    assert full.line() == "note  GPU 0                      NVIDIA H100, 10.0 of 80.0 GiB free"
    assert parts.line() == "ok    GPU 1                      NVIDIA A30"
    broken = [one.found for one in machine.devices(tmp_path) if one.verdict == machine.FAIL]
    assert len(broken) == 2
    assert all(text.startswith("cannot be used: ") for text in broken)


@pytest.mark.parametrize(
    ("listed", "shown", "verdict", "text"),
    [
        ("GPU 0: NVIDIA H100\nGPU 1: NVIDIA H100\n", None, machine.FAIL, "nvidia-smi lists 2, but torch"),
        ("GPU 0: NVIDIA H100\n", "0", machine.FAIL, "nvidia-smi lists 1, but torch"),
        ("GPU 0: NVIDIA H100\n", "", machine.NOTE, 'CUDA_VISIBLE_DEVICES="" shows none of this machine\'s 1'),
        ("GPU 0: NVIDIA H100\n", "-1", machine.NOTE, "shows none"),
        ("GPU 0: NVIDIA H100\n", "4,0", machine.NOTE, "shows none"),
        ("GPU 0: NVIDIA H100\n", "NoDevFiles", machine.NOTE, "shows none"),
        ("No devices found.\n", None, machine.NOTE, "lists no GPU: No devices found."),
    ],
)
def test_gpus_that_are_not_for_us_are_no_failure(
    listed: str, shown: str | None, verdict: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '%s' '{listed}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    first, second = machine._no_gpu()
    assert (first.verdict, second.verdict) == (verdict, machine.OK)
    assert text in first.found


def test_cuda_operations_need_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert machine._nvcc() == str(tmp_path / "bin" / "nvcc")
    monkeypatch.delenv("CUDA_HOME")
    assert machine._nvcc() != str(tmp_path / "bin" / "nvcc")


def test_it_says_what_steps_the_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRUGAL_KERNELS", "torch")
    assert [one.verdict for one in machine.kernels(tmp_path)] == [machine.NOTE]
    monkeypatch.setenv("FRUGAL_KERNELS", "tritn")
    assert [one.verdict for one in machine.kernels(tmp_path)] == [machine.FAIL]
    monkeypatch.setenv("FRUGAL_KERNELS", "auto")
    assert [(one.verdict, one.found) for one in machine.kernels(tmp_path)] in (
        [(machine.OK, "C++")],
        [(machine.NOTE, "none: torch's own operations, several passes over the weights each")],
    )
