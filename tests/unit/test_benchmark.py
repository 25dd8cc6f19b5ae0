"""The benchmark scripts run and report what they promise. Nothing here looks at a time."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
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


def read(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script as a module; scripts find each other beside them."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location(name, SCRIPT.with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_the_report_of_peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    peers = read("peers", monkeypatch)
    names = ["AdamW, fused", "Frugal columns", "Frugal svd", "FusedAdam (DeepSpeed)"]
    options = ["--size", "9M", "--layers", "1", "--device", "cpu", "--rounds", "1", "--refresh-rounds", "1"]
    peers.main(
        [*options, "--contenders", *names, "--json", str(tmp_path / "p.json"), "--plot", str(tmp_path / "p.png")]
    )
    report = json.loads((tmp_path / "p.json").read_text())
    adamw, columns, svd = report["rows"]
    assert [adamw["name"], columns["name"], svd["name"]] == names[:3]
    assert columns["state"] < svd["state"] < adamw["state"]
    assert svd["refresh"] is not None and columns["refresh"] is None
    assert report["missing"] == {"FusedAdam (DeepSpeed)": "needs a GPU"}
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_peers_that_would_not_fit_are_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = read("peers", monkeypatch)
    with pytest.raises(SystemExit, match=r"GiB and .* are free: try"):
        peers.check_memory(peers.shapes_of("7B", 1000), 10, peers.torch.device("cpu"), 4)


def test_tokens_per_second_are_put_together_from_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    script = read("end_to_end", monkeypatch)
    arguments = script.parse(["--batch", "16", "--micro", "2", "--length", "100", "--gap", "10"])
    parts = {"micro-batch": 50.0, "micro-batch, not exchanged": 40.0, "AdamW": 10.0, "columns": 30.0, "svd": 60.0,
             "svd, subspace": 60.0, "svd: refresh": 560.0, "svd, subspace: refresh": 160.0}  # fmt: skip
    found = script.composed(arguments, 2, parts)  # four micro-batches, the last of them with an exchange
    milliseconds = {"AdamW": 180.0, "columns": 200.0, "svd": 280.0, "svd, subspace": 240.0}
    assert found == pytest.approx({name: 1600 / (value / 1e3) for name, value in milliseconds.items()})


@pytest.mark.heavy
def test_the_report_of_a_whole_training(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = read("end_to_end", monkeypatch)
    size = ["--size", "quick", "--length", "4", "--micro", "1", "--batch", "2"]
    script.main([*size, "--rounds", "1", "--real-batch", "2", "--device", "cpu"])
    printed = capsys.readouterr().out
    for name in ("AdamW", *script.FRUGAL):
        assert printed.count(f"| {name} |") == 3


def test_the_memory_of_a_basis_is_measured_beside_its_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(SCRIPT.with_name("solver_bytes.py")))["main"]
    for method in ("exact", "subspace", "gram64", "random"):
        main([method, "48", "96"])
        assert re.fullmatch(rf"{method}, 48x96, r = 12: estimated 0.\d MiB, measured .* MiB\n", capsys.readouterr().out)


def test_split_arithmetic_rounds_as_tensor_cores_do(monkeypatch: pytest.MonkeyPatch) -> None:
    script = read("split_arithmetic", monkeypatch)
    torch = script.torch
    one = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-10, 1 + 2**-10 + 2**-12], dtype=torch.float32)
    assert script.to_tf32(one).tolist() == [1.0, 1 + 2**-9, -1 - 2**-10, 1 + 2**-10]  # ties to even
    a, b = (torch.randn(40, 40, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    parts = script.ARITHMETICS["bf16x9"]._split(a)
    assert torch.equal(parts[0] + parts[1] + parts[2], a), "three bf16 numbers hold an fp32 one"
    exact = a.double() @ b.double()
    error = {name: float((one.product(a, b) - exact).abs().max()) for name, one in script.ARITHMETICS.items()}
    assert error["bf16"] > 2 * error["TF32"] > 50 * error["bf16x3"] > 50 * 2 * error["3xTF32"] > error["bf16x9"]
    assert [len(one.pairs) for one in script.ARITHMETICS.values()] == [1, 3, 1, 3, 6, 9]


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


def test_the_report_of_what_the_host_takes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Also the bound on it that can be counted: a GPU waits for the host where a matrix takes many calls."""
    host_bound = read("host_bound", monkeypatch)
    host_bound.main(["--matrices", "40", "--rounds", "2"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    calls = {name: float(calls) for name, _, _, calls in rows}
    assert list(calls) == ["fused AdamW", *host_bound.CONTENDERS]
    assert calls["fused AdamW"] == 0.0
    most = {name: 30 if name == "svd" else 20 for name in host_bound.CONTENDERS}
    over = {name: calls[name] for name in most if calls[name] > most[name] + 2}  # and what a step takes once
    assert not over
