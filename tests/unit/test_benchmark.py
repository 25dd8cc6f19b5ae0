"""The benchmark scripts run and report what they promise. Nothing here looks at a time."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step_time.py"


@pytest.fixture
def step_time(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("step_time", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "step_time", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LAYER", [(16, 16), (24, 16), (16, 24)])
    return module


def test_the_report_has_every_contender_once(
    step_time: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "times.json"
    step_time.main(["--device", "cpu", "--layers", "2", "--rounds", "3", "--warmup", "1", "--json", str(file)])
    printed = capsys.readouterr().out
    report = json.loads(file.read_text())
    names = [row["name"] for row in report["rows"]]
    assert names == ["fused AdamW", *step_time.PROJECTIONS]
    assert all(f"| {name} |" in printed for name in names)
    assert report["rows"][0]["ratio"] == 1.0
    assert report["machine"]["device"] in printed
    goals = {row["name"]: row["goal"] for row in report["rows"] if row["goal"] is not None}
    assert goals == step_time.GOALS


def test_timed_steps_do_not_refresh(step_time: ModuleType) -> None:
    """Else the step times of svd would be SVD times."""
    weights = step_time.make_weights(1, step_time.torch.device("cpu"), step_time.torch.float32)
    for gap, expected in ((10**9, 1), (1, 4)):
        optimizer = step_time.make_frugal(weights, "svd", gap, 0.25)
        for _ in range(4):
            optimizer.step()
        assert int(optimizer.state[weights[0]]["refreshes"]) == expected


def apart(script: Path, *options: str) -> str:
    """Run in a process of its own, which can start others; what it printed."""
    return subprocess.run([sys.executable, script, *options], capture_output=True, text=True, check=True).stdout


def here(script: Path, *options: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        runpy.run_path(str(script), run_name="checkpoint_time")["main"](options)
    return output.getvalue()


@pytest.mark.parametrize(("ranks", "run"), [((1,), here), pytest.param((1, 2), apart, marks=pytest.mark.heavy)])
def test_the_report_of_checkpoints_has_every_contender_on_every_number_of_ranks(
    ranks: tuple[int, ...], run: Callable[..., str], tmp_path: Path
) -> None:
    file = tmp_path / "times.json"
    options = ["--layers", "1", "--vocabulary", "20", "--rounds", "1", "--folder", str(tmp_path), "--json", str(file)]
    printed = run(SCRIPT.with_name("checkpoint_time.py"), *options, "--ranks", *map(str, ranks))
    report = json.loads(file.read_text())
    frugal = [(f"Frugal, {projection}", size) for size in ranks for projection in ("columns", "svd")]
    assert [(row["name"], row["ranks"]) for row in report["rows"]] == [("AdamW, torch.save", 1), *frugal]
    assert all(f"| {row['name']} | {row['ranks']} | {row['size']:.0f} |" in printed for row in report["rows"])
    adamw, columns, svd, *shared = (row["size"] for row in report["rows"])
    assert columns < svd < adamw, "less state, fewer bytes"
    assert shared == pytest.approx([columns, svd][: len(shared)], rel=0.02), "ranks share the writing"
    assert report["machine"] in printed
