"""The quickstart itself, as a user starts it: the real script, the real deepspeed launcher, two ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

psutil = pytest.importorskip("psutil", reason="the quickstart needs DeepSpeed, which brings psutil")
pytest.importorskip("deepspeed", reason="the quickstart needs DeepSpeed")

from frugal_dist import checkpoint  # noqa: E402
from frugal_dist.training.metrics.record import of_kind, read_metrics  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "quickstart.sh"

pytestmark = [pytest.mark.timeout(900), pytest.mark.shows_gpus]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Prepared by the first run and found by the others; the user's own folder is left alone."""
    return tmp_path_factory.mktemp("quickstart_data")


def _environment(run: Path, data: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "RUN_DIR": str(run), "DATA_DIR": str(data), **more}


def _processes(run: Path) -> list[int]:
    """Everything that was started for this run: launchers and ranks carry its folder in their command line."""
    everyone = psutil.process_iter(["cmdline"])
    return [process.pid for process in everyone if str(run) in (process.info["cmdline"] or [])]


@pytest.mark.heavy  # .ci/run starts it before the tests
def test_quickstart_trains_and_reports(tmp_path, data):
    run = tmp_path / "run"
    done = subprocess.run(
        ["bash", SCRIPT, "--steps", "20"], env=_environment(run, data), capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = read_metrics(run)
    first, last = of_kind(records, "validation")
    assert (first["step"], last["step"]) == (0, 20)
    assert last["perplexity"] < 0.5 * first["perplexity"]
    assert of_kind(records, "train")[-1]["loss"] < of_kind(records, "train")[0]["loss"] < first["loss"]

    (setup,), (summary,) = of_kind(records, "run"), of_kind(records, "summary")
    assert (setup["ranks"], setup["engine"], setup["optimizer"]["name"]) == (2, "deepspeed", "frugal")
    # Embedding and head keep full moments, the Linear layers a quarter: clearly less than AdamW, far more than nothing.
    assert 0.4 < sum(summary["state_bytes"]) / (2 * summary["adamw_state_bytes_per_rank"]) < 0.7

    assert (run / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (saved := checkpoint.latest(run / "checkpoints")) is not None
    assert saved.name.endswith("20")
    assert "guessing by frequency" in done.stdout + done.stderr
    assert str(run / "loss_curve.png") in done.stdout
    # What libraries print is in the log, not on the terminal.
    assert "Warning" not in done.stdout + done.stderr
    assert not _processes(run)


@pytest.mark.heavy
def test_what_a_json_and_keys_ask_for_and_what_is_wrong_with_them(tmp_path, data):
    run, config = tmp_path / "run", tmp_path / "zero1.json"
    config.write_text('{"zero_optimization": {"stage": 1}}')
    words = ["--steps=2", "--optimizer.name", "adamw", "--evaluation_tokens", "4096"]
    environment = _environment(run, data, CONFIG=str(config))
    done = subprocess.run(["bash", SCRIPT, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (setup,) = of_kind(read_metrics(run), "run")
    assert (setup["deepspeed"], setup["optimizer"]["name"], setup["steps"]) == (str(config), "adamw", 2)

    words = ["--optimizer.options.density", "7"]
    done = subprocess.run(["bash", SCRIPT, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "density=7 must be" in done.stderr
    done = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "holds a run with optimizer.name 'adamw' (now 'frugal')" in done.stderr


@pytest.fixture(params=["loading", "training"])
def interrupted(request, tmp_path, data) -> Iterator[tuple[subprocess.Popen[str], Path, str]]:
    """A quickstart that got Ctrl-C while it did so."""
    run = tmp_path / "run"
    process = subprocess.Popen(
        ["bash", SCRIPT],
        env=_environment(run, data),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that was started in the background ignores SIGINT, and so would all that it starts.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        file, words = {"loading": ("output.txt", ""), "training": ("metrics.jsonl", '"kind": "validation"')}[
            request.param
        ]
        while process.poll() is None and not ((run / file).exists() and words in (run / file).read_text()):
            time.sleep(0.2)
        assert process.poll() is None, process.communicate()
        assert _processes(run)
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does to the foreground process group
        yield process, run, request.param
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.communicate(timeout=60)


@pytest.mark.heavy
def test_ctrl_c_saves_and_stops_everything(interrupted):
    process, run, what = interrupted
    _, errors = process.communicate(timeout=400)
    assert process.returncode in ((75,) if what == "training" else (75, 130))
    assert (checkpoint.latest(run / "checkpoints") is not None) == (what == "training")
    assert f"stopped; to resume: RUN_DIR={run} bash launch/quickstart.sh" in errors
    assert "Traceback" not in errors
    assert not _processes(run)


def test_mistakes_on_the_command_line():
    for arguments, message in (
        (["--steps", "no"], '--steps needs a number above 0, found "no"'),
        (["-x"], '"-x"'),
        (["--folder"], "--folder needs"),
    ):
        done = subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True)
        assert done.returncode == 2
        assert message in done.stderr
    shown = subprocess.run(["bash", SCRIPT, "--help"], capture_output=True, text=True, check=True).stdout
    assert "RUN_DIR" in shown
    assert "#" not in shown
