"""The day a GPU is at hand its minutes are few: whatever benchmarks/gpu_report.py does there, it has done here."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from selection import mostly_heavy

ROOT = Path(__file__).parents[2]
SECTIONS = ("card", "step", "products", "memory", "refresh", "tokens", "peers", "learning")
ON_A_PRETENDED_GPU = ("card", "step", "products", "memory", "refresh")
"""Not trainings: autograd asks the driver for streams."""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu_report")


def parsed(script: ModuleType, out: Path, *more: str) -> argparse.Namespace:
    found: argparse.Namespace = script.parse(["--device", "cpu", "--tiny", "--out", str(out), *more])
    return found


def found_in(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "gpu.json").read_text())
    return found


def complete(out: Path, names: tuple[str, ...]) -> None:
    """Every section is done, has tables of numbers, and is in the text."""
    found, text = found_in(out), (out / "gpu.md").read_text()
    assert list(found["sections"]) == list(names)
    for name, section in found["sections"].items():
        assert section["state"] == "done", section.get("error")
        assert section["tables"] and all(table["rows"] for table in section["tables"]), name
        for table in section["tables"]:
            assert all(len(row) == len(table["columns"]) for row in table["rows"])
            numbers = [cell for row in table["rows"] for cell in row if isinstance(cell, float)]
            assert numbers and all(math.isfinite(number) for number in numbers)
            assert table["title"] in text and all(str(row[0]) in text for row in table["rows"])


def test_the_sections_are_those_that_share_the_time(script: ModuleType) -> None:
    assert tuple(script.SHARES) == SECTIONS == tuple(importlib.import_module("gpu_sections").SECTIONS)


@pytest.mark.parametrize(
    "name", mostly_heavy(SECTIONS, [one for one in SECTIONS if one not in ("peers", "memory", "learning")])
)
def test_a_section(script: ModuleType, tmp_path: Path, name: str) -> None:
    assert script.measure(parsed(script, tmp_path), [name], time.time() + 300) == 0
    complete(tmp_path, (name,))


def test_what_fails_is_told_and_the_next_begins(script: ModuleType, tmp_path: Path) -> None:
    arguments = parsed(script, tmp_path, "--data", str(tmp_path / "nowhere"))
    assert script.measure(arguments, ["learning", "card"], time.time() + 300) == 0
    sections = found_in(tmp_path)["sections"]
    assert sections["learning"]["state"] == "failed" and "FileNotFoundError" in sections["learning"]["error"]
    assert sections["card"]["state"] == "done" and "FileNotFoundError" in (tmp_path / "gpu.md").read_text()


@pytest.mark.heavy
def test_without_time_the_sections_end_at_once_and_say_so(script: ModuleType, tmp_path: Path) -> None:
    names = ["step", "products", "refresh", "tokens", "memory"]
    assert script.measure(parsed(script, tmp_path), names, time.time() - 1) == 0
    for name, section in found_in(tmp_path)["sections"].items():
        assert section["state"] == "done" and "No time was left" in " ".join(section["notes"]), name


@pytest.mark.heavy
def test_it_learns_from_a_token_pack(script: ModuleType, tmp_path: Path) -> None:
    pack = tmp_path / "pack"
    pack.mkdir()
    for name, count in (("train", 3000), ("val", 500)):
        tokens = torch.arange(count).remainder(50).to(torch.uint16)
        (pack / f"{name}.bin").write_bytes(bytes(tokens.view(torch.uint8).tolist()))
    script.measure(parsed(script, tmp_path, "--data", str(pack)), ["learning"], time.time() + 300)
    complete(tmp_path, ("learning",))
    [table] = found_in(tmp_path)["sections"]["learning"]["tables"]
    assert "the tokens in pack" in table["title"]
    assert all(row[4] < row[1] for row in table["rows"]), "the loss falls"


class Stream:
    """A device on which everything takes its time, beside a host on which it does; both in seconds."""

    ROOM = 1024
    """Launches that wait for the device; the next one makes the host wait."""

    def __init__(self) -> None:
        self.host = 0.0
        self.ends = [0.0]

    def launch(self, takes: float) -> None:
        self.host += 1e-6
        if len(self.ends) > self.ROOM:
            self.host = max(self.host, self.ends[-self.ROOM])
        self.ends.append(max(self.host, self.ends[-1]) + takes)

    def wait(self, device: object = None) -> None:
        self.host = max(self.host, self.ends[-1])

    def event(self, enable_timing: bool) -> SimpleNamespace:
        one = SimpleNamespace()
        one.record = lambda: (self.launch(0.0), setattr(one, "at", self.ends[-1]))
        one.elapsed_time = lambda end: 1e3 * (end.at - one.at)
        return one


@pytest.mark.parametrize(
    ("launches", "each", "host"),
    [(100, 1e-5, 0.1), (100, 1e-7, 0.1), (5000, 1e-7, 5.0), (5000, 1e-5, 10 * (5000 - Stream.ROOM) / 1000)],
)
def test_the_hosts_time_has_no_sleep_of_the_device_in_it(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launches: int, each: float, host: float
) -> None:
    """Neither where more is launched than a stream takes: there the host waits for the device's own work."""
    sections, stream = importlib.import_module("gpu_sections"), Stream()
    monkeypatch.setattr(sections.time, "perf_counter", lambda: stream.host)
    calls = {"_sleep": lambda cycles: stream.launch(cycles / 2e9), "synchronize": stream.wait, "Event": stream.event}
    for name, call in calls.items():
        monkeypatch.setattr(torch.cuda, name, call)
    bench = sections.Bench(torch.device("cpu"), True, None, tmp_path)
    bench.events = True
    sample = bench.timed(lambda: [stream.launch(each) for _ in range(launches)])
    assert sample.host == pytest.approx(host, rel=0.02)
    assert sample.device == pytest.approx(1e3 * launches * max(each, 1e-6 if launches > Stream.ROOM else 0), rel=0.3)


@pytest.mark.heavy
def test_randk_is_left_out_where_the_host_would_draw_too_long(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("gpu_sections"), "DRAWN", 1000)
    assert script.measure(parsed(script, tmp_path), ["step", "memory"], time.time() + 300) == 0
    for name, section in found_in(tmp_path)["sections"].items():
        assert section["state"] == "done", section.get("error")
        assert "randk" not in {row[0] for table in section["tables"] for row in table["rows"]}
        assert any(note.startswith("randk") for note in section["notes"]), name


@pytest.mark.heavy
def test_the_roundings_are_measured_where_weights_are_bf16(script: ModuleType, tmp_path: Path) -> None:
    script.measure(parsed(script, tmp_path), ["step"], time.time() + 300)
    for table in found_in(tmp_path)["sections"]["step"]["tables"]:
        names = {row[0] for row in table["rows"]}
        low = {"columns, 8bit", "columns, stochastic", "columns, remainder"}
        assert names & low == (low if "bfloat16" in table["title"] else set()) and "dct" in names


@pytest.mark.heavy
def test_a_peer_that_takes_the_process_along_costs_its_own_row(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = importlib.import_module("peers")
    asked: list[str] = []

    def measure(arguments: argparse.Namespace, device: torch.device) -> Any:
        base, name = arguments.contenders
        asked.append(name)
        if name == "AdamW 8-bit (torchao)":
            raise SystemExit("killed")
        return peers.Report([peers.Row(one, 1.0, 1.0, 1.0, 1.0, 1000) for one in (base, name)])

    monkeypatch.setattr(peers, "measure", measure)
    script.measure(parsed(script, tmp_path), ["peers"], time.time() + 300)
    section = found_in(tmp_path)["sections"]["peers"]
    assert section["state"] == "failed"
    assert [row[0] for row in section["tables"][0]["rows"]] == [peers.BASE, *asked[:-1]]
    assert "AdamW 8-bit (bitsandbytes)" in asked and not {"FlashAdamW (flashoptim)", "FusedAdam (DeepSpeed)"} & {*asked}


def checkout(folder: Path) -> Path:
    """What is in a packed checkout, without .git, read-only."""
    for name in ("benchmarks", "frugal_dist", "docs", "tests/dist"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in sorted(folder.rglob("*"), reverse=True):
        path.chmod(0o555 if path.is_dir() else 0o444)
    folder.chmod(0o555)
    return folder


def files_of(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


def environment(home: Path) -> dict[str, str]:
    """No GPU: the report would take its eight minutes on it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "FRUGAL", "TRITON"))}
    return {**kept, "HOME": str(home), "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(*command: object, home: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, capture_output=True, text=True, cwd=home, env=environment(home), timeout=600)


@pytest.mark.heavy
def test_a_packed_read_only_checkout_on_the_cpu(tmp_path: Path) -> None:
    """All of it, as it is typed, from another folder; nothing is written but into --out."""
    folder, out = checkout(tmp_path / "packed"), tmp_path / "out"
    before = files_of(folder)
    done = run(
        folder / "benchmarks" / "gpu_report.py",
        "--device",
        "cpu",
        "--tiny",
        "--minutes",
        "4",
        "--out",
        out,
        home=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    complete(out, SECTIONS)
    assert found_in(out)["about"]["commit"] == ""
    assert files_of(folder) == before and str(out / "gpu.md") in done.stdout
    took = sum(section["took"] for section in found_in(out)["sections"].values())
    assert took <= 240


@pytest.mark.heavy
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build device_guard.cpp")
def test_a_packed_read_only_checkout_on_a_pretended_gpu(tmp_path: Path) -> None:
    folder, out = checkout(tmp_path / "packed"), tmp_path / "out"
    done = run(folder / "tests" / "dist" / "pretend_report.py", folder, out, *ON_A_PRETENDED_GPU, home=tmp_path)
    assert done.returncode == 0, done.stderr
    complete(out, ON_A_PRETENDED_GPU)
    assert found_in(out)["about"]["device"] == "Pretended"


DIES = "lambda bench, report: __import__('os').abort()"
HANGS = "lambda bench, report: __import__('time').sleep(1000)"


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (DIES, "The process ended with status -6"),
        pytest.param(HANGS, "It took much longer than its share", marks=pytest.mark.heavy),
    ],
)
def test_a_section_that_dies_or_hangs_costs_itself_only(tmp_path: Path, break_it: str, told: str) -> None:
    """As an illegal memory access does, and a compiler that waits for a lock."""
    folder, out = tmp_path / "broken", tmp_path / "out"
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks")
    (folder / "frugal_dist").symlink_to(ROOT / "frugal_dist")
    with (folder / "benchmarks" / "gpu_sections.py").open("a") as file:
        file.write(f"SECTIONS['memory'] = {break_it}\n")
    report = folder / "benchmarks" / "gpu_report.py"
    options = ["--device", "cpu", "--tiny", "--minutes", "0.5", "--out", out, "--sections", "card", "memory", "refresh"]
    done = run(report, *options, home=tmp_path)
    assert done.returncode == 0, done.stderr
    sections = found_in(out)["sections"]
    assert sections["memory"]["error"].startswith(told)
    assert [one["state"] for one in sections.values()] == ["done", "failed", "done"]
    assert "Failed: memory." in done.stdout


def test_without_a_gpu_it_says_so_at_once(tmp_path: Path) -> None:
    done = run(ROOT / "benchmarks" / "gpu_report.py", "--out", tmp_path / "out", home=tmp_path)
    assert done.returncode == 1 and "torch finds no GPU here" in done.stderr
