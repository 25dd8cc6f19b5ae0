"""What the launch scripts share, and what they say without launching anything."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path

import hosts
import pytest
import torch
from devices import GPUS
from hosts import ROOT, environment
from runs import Workshop

from frugal_dist.cli import main
from frugal_dist.training.distributed.place import settle_accelerator

SCRIPTS = sorted(file.name for file in (ROOT / "launch").iterdir() if file.suffix in (".sh", ".sbatch"))
HIDDEN = "hides this machine's GPUs" if GPUS else "--num_gpus 2 / unset"
SOURCED = {"common.sh", "gpus.sh", "environment.sh"}


def bash(script: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a script that has sourced what the launch scripts share."""
    text = f"set -euo pipefail; source {ROOT}/launch/common.sh; NAME=test; {script}"
    return subprocess.run(
        ["bash", "-c", text, "bash", *words], capture_output=True, text=True, env=environment(more), timeout=120
    )


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name not in SOURCED])
def test_help(script: str) -> None:
    """Everywhere: without Slurm, and without what the script starts."""
    done = subprocess.run(
        ["bash", ROOT / "launch" / script, "--help"], capture_output=True, text=True, env=environment(), cwd="/"
    )
    assert done.returncode == 0 and not done.stderr
    assert f"launch/{script}" in done.stdout
    assert "#" not in done.stdout.replace("# on both", "")


def test_the_recipe_is_checked_before_anything_is_started(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    """--dry-run ends there, and shows the command."""
    run = workshop.run("checked")

    given = {"RANKS": "2", "CUDA_VISIBLE_DEVICES": "0,1"}  # nothing is started on them

    def launch(script: str, *words: str) -> tuple[int, str, str]:
        command = ["bash", str(ROOT / "launch" / script), *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(given), timeout=120)
        return done.returncode, done.stdout, done.stderr

    recipe, *changes = run.arguments()
    for script in ("deepspeed.sh", "pretrain.sbatch"):
        code, shown, _ = launch(script, "--dry-run", recipe, *changes)
        assert (code, "would start: " in shown, str(run.folder) in shown) == (0, True, True)
    code, shown, errors = launch("torchrun.sh", recipe, *changes, "--optimizer.options.density", "2")
    assert (code, shown) == (2, "") and "ERROR: density" in errors.splitlines()[-1]
    code, _, errors = launch("torchrun.sh", "--engine", "ddp", recipe)
    assert (code, "the recipe comes first" in errors) == (2, True)
    assert main(["pretrain", "--engine", "ddp", recipe]) == 2
    assert "the recipe comes first, then its keys: frugal-dist pretrain RECIPE" in capsys.readouterr().err
    assert not run.folder.exists()


@pytest.mark.heavy
def test_what_an_earlier_start_recorded_says_nothing_about_this_one(workshop: Workshop) -> None:
    run = workshop.run("recorded")
    run.folder.mkdir(parents=True)
    metrics = run.folder / "metrics.jsonl"
    stopped = ({"kind": "run", "start": 0}, {"kind": "stopped", "step": 3, "signal": "SIGTERM"})
    text = "".join(json.dumps(record) + "\n" for record in stopped)
    metrics.write_text(text)
    script = f"""
    remember "$@"
    FAILURE={run.folder}/failed.txt
    code=0; verdict 137 "$@" || code=$?; echo "killed before it wrote: $code"
    cat <<<'{text.strip()}' >>{metrics}
    code=0; verdict 137 "$@" || code=$?; echo "stopped: $code"
    BEFORE=$(record "$@"); printf '2\\nRank 1 failed: why\\n' >"$FAILURE"
    code=0; verdict 1 "$@" || code=$?; echo "a mistake on a rank: $code"
    """
    done = bash(script, *run.arguments())
    told = ["killed before it wrote: 137", "stopped: 75", "a mistake on a rank: 2"]
    assert done.stdout.splitlines() == told
    assert done.stderr.endswith("test: ERROR: Rank 1 failed: why\n")


def test_the_exit_code_by_how_the_record_ends_and_what_the_launcher_says() -> None:
    """The record itself is read by a Python of its own, which the test above starts."""
    cases = {
        "summary 0": 0, "summary 1": 1, "stopped 0": 75, "stopped 137": 75, "diverged 1": 65, "diverged 137": 65,
        "train 0": 1, "train 137": 137, "nothing 0": 1, "nothing 2": 2,
    }  # fmt: skip
    script = """
    record() { echo "$1"; }
    BEFORE=nothing
    for words; do code=0; verdict "${words#* }" "${words% *}" 2>/dev/null || code=$?; echo "$words: $code"; done
    """
    assert bash(script, *cases).stdout.splitlines() == [f"{words}: {code}" for words, code in cases.items()]


def test_a_lost_terminal_becomes_sigterm_and_does_not_end_the_script_alone() -> None:
    launcher = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done"
    script = """
    stop() { echo "$1"; kill "-$1" "$LAUNCHER"; }
    code=0; attend bash -c "$1" || code=$?; echo "$code"
    """
    text = f"set -euo pipefail; source {ROOT}/launch/common.sh; {script}"
    words = ["bash", "-c", text, "bash", launcher]
    heard = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # nohup around the tests ignores it
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment(), preexec_fn=heard) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        assert process.communicate(timeout=60)[0].splitlines() == ["TERM", "7"]


@pytest.mark.parametrize(
    ("shown", "ranks", "expected"),
    [
        (None, 2, "--num_gpus 2 / unset"),
        ("4,5,6", 2, " / 4,5"),
        ("3", 1, " / 3"),
        ("", 2, HIDDEN),
        ("-1", 2, HIDDEN),
        ("1,-1,2", 2, "2 ranks need as many GPUs, but CUDA_VISIBLE_DEVICES=1,-1,2 shows 1"),
        ("4,5", 3, "3 ranks need as many GPUs, but CUDA_VISIBLE_DEVICES=4,5 shows 2"),
        (
            "GPU-8f3a,GPU-77c1",
            2,
            'is "GPU-8f3a,GPU-77c1"; DeepSpeed\'s launcher knows GPUs by number',
        ),
        ("MIG-5", 1, "give numbers (nvidia-smi -L)"),
    ],
)
def test_deepspeed_gets_the_gpus_that_are_shown_to_us(shown: str | None, ranks: int, expected: str) -> None:
    script = 'pick_gpus "$1"; echo "${PICKED[*]} / ${CUDA_VISIBLE_DEVICES-unset}"'
    if shown is None:
        done = bash(f"unset CUDA_VISIBLE_DEVICES; {script}", str(ranks))
    else:
        done = bash(script, str(ranks), CUDA_VISIBLE_DEVICES=shown)
    assert expected in done.stdout + done.stderr


QUICKSTART = ("quickstart.sh", "common.sh", "gpus.sh")


def with_gpus(folder: Path, number: int, **more: str) -> dict[str, str]:
    """The environment on a machine of which nvidia-smi lists so many GPUs, all shown."""
    folder.mkdir(exist_ok=True)
    lines = "".join(f"GPU {gpu}: NVIDIA H100 (UUID: GPU-{gpu})\n" for gpu in range(number))
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{lines}END\n")
    (folder / "nvidia-smi").chmod(0o755)
    own = {key: value for key, value in environment().items() if key != "CUDA_VISIBLE_DEVICES"}
    return {**own, "PATH": f"{folder}:{own['PATH']}", **more}


@pytest.mark.parametrize(
    ("gpus", "more", "ranks"),
    [
        (0, {}, 2),
        (1, {}, 1),
        (3, {}, 2),
        (8, {}, 8),
        (10, {}, 8),
        (8, {"CUDA_VISIBLE_DEVICES": "2,5,7"}, 2),
        (8, {"CUDA_VISIBLE_DEVICES": ""}, 2),
        (8, {"RANKS": "5"}, 5),
    ],
)
def test_the_quickstart_has_a_rank_for_each_gpu(gpus: int, more: dict[str, str], ranks: int, tmp_path: Path) -> None:
    """Or as many as divide its batch. Without a GPU, or where none is shown, two."""
    launch, program = tmp_path / "launch", tmp_path / ".venv/bin/frugal-dist"
    launch.mkdir()
    for name in QUICKSTART:
        shutil.copy(ROOT / "launch" / name, launch)
    (launch / "setup.sh").write_text("")
    (launch / "deepspeed.sh").write_text('echo "$RANKS ranks: $*"\n')
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    (tmp_path / "prepared.json").touch()
    given = with_gpus(tmp_path / "smi", gpus, DATA_DIR=str(tmp_path), **more)
    command = ["bash", str(launch / "quickstart.sh"), "--dry-run", "--folder", "mine"]
    done = subprocess.run(command, capture_output=True, text=True, env=given, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"then train into {tmp_path}/mine\n" in done.stdout and done.stdout.count("--folder") == 1
    assert done.stdout.splitlines()[-1].startswith(f"{ranks} ranks: reviews_5m ")
    assert done.stdout.endswith(" --dry-run\n")


def test_the_quickstart_on_eight_gpus(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe passes its check for eight ranks, DeepSpeed's launcher gets the GPUs, and the plan is for eight."""
    pytest.importorskip("deepspeed")
    if not (ROOT / ".venv/bin/frugal-dist").exists():
        pytest.skip("the quickstart has not made .venv yet")
    given = with_gpus(tmp_path / "smi", 8, DATA_DIR=str(workshop.folder / "data"), RUN_DIR=str(tmp_path / "run"))
    command = ["bash", str(ROOT / "launch/quickstart.sh"), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, env=given, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "steps of 8 sequences; deepspeed on 8 ranks" in done.stdout
    assert "would start: deepspeed --num_gpus 8 " in done.stdout.splitlines()[-1]
    assert not (tmp_path / "run").exists()
    assert main(["plan", "reviews_5m", "--engine", "zero2", "--ranks", "8"]) == 0
    shown = capsys.readouterr().out
    assert "zero2 on 8 ranks" in shown and "Refreshes are owned by 8 of 8 ranks" in shown


def test_what_runs_on_a_host_is_shown_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "GPUS", True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert environment()["CUDA_VISIBLE_DEVICES"] == ""
    assert environment({"CUDA_VISIBLE_DEVICES": "4,5"})["CUDA_VISIBLE_DEVICES"] == "4,5"


def test_what_is_sent_to_other_hosts() -> None:
    more = {"FRUGAL_KERNELS": "torch", "PYTORCH_CUDA_ALLOC_CONF": "x", "TRITON_CACHE_DIR": "/t", "https_proxy": "p"}
    own = {"CUDA_VISIBLE_DEVICES": "0", "HOSTNAME": "login"}
    sent = bash("sent", SEND="MINE OTHER", MINE="1", OTHER="2", **more, **own).stdout.split()
    assert {*more, "PATH", "PYTHONPATH", "MINE", "OTHER"} <= set(sent)
    assert not {*own, "DS_ACCELERATOR"} & set(sent)


def test_a_variable_with_several_lines_is_refused() -> None:
    script = f"scratch=/nowhere; source {ROOT}/launch/environment.sh; variables pdsh"
    done = bash(script, SEND="MINE", MINE="a\nb")
    assert "MINE has several lines" in done.stderr and done.returncode == 2


def test_the_users_own_variables_for_deepspeed(tmp_path: Path) -> None:
    """As DeepSpeed reads them: those of the home folder, then those from here."""
    for folder, text in (("home", "A=1\nB = x  y \n\n# C=3\nD=last"), ("here", 'A=2=3\nE="q r"\n')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / ".deepspeed_env").write_text(text)
    script = f'source {ROOT}/launch/environment.sh; cd "$1"; read_own_variables; printf "%s\\n" "${{OWN[@]}}"'
    home, here, file = str(tmp_path / "home"), str(tmp_path / "here"), str(tmp_path / "home" / ".deepspeed_env")
    first, second = ["A=1", "B=x  y", "D=last"], ["A=2=3", 'E="q r"']
    assert bash(script, here, HOME=home).stdout.splitlines() == first + second
    assert bash(script, here, HOME="/", DS_ENV_FILE=file).stdout.splitlines() == first
    assert 'DS_ENV_FILE is "none", but there' in bash(script, here, HOME=home, DS_ENV_FILE="none").stderr
    (tmp_path / "here" / ".deepspeed_env").write_text("A=1\nexport B=1\n")
    assert '.deepspeed_env, line 2:export B=1: "NAME=VALUE" is needed' in bash(script, here, HOME=home).stderr


def test_slurm_scripts_name_what_they_need(tmp_path: Path) -> None:
    copy = tmp_path / "a folder" / "pretrain.sbatch"
    copy.parent.mkdir()
    copy.write_text((ROOT / "launch/pretrain.sbatch").read_text())
    done = subprocess.run(["bash", copy, "recipe"], capture_output=True, text=True, env=environment())
    assert "export FRUGAL_ROOT=" in done.stderr and done.returncode == 2
    more = {"FRUGAL_ROOT": str(ROOT)}
    done = subprocess.run(["bash", copy, "recipe"], capture_output=True, text=True, env=environment(more))
    assert "start this with sbatch" in done.stderr and done.returncode == 2


def test_deepspeed_trains_on_what_each_host_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank decides, or DS_ACCELERATOR does."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    settle_accelerator()
    assert os.environ.get("DS_ACCELERATOR") == (None if torch.cuda.is_available() else "cpu")
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    settle_accelerator()
    assert os.environ["DS_ACCELERATOR"] == "xpu"
