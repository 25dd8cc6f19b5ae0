"""What users start, on this machine's GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(1800)


def run(*command: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=1500)


def test_the_doctor(gpu: torch.device, tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse", reason="the doctor needs jsonargparse (frugal_dist[train])")
    done = run(sys.executable, "-m", "frugal_dist.cli", "doctor", "--json", "--folder", tmp_path)
    found = json.loads(done.stdout)
    assert found["failed"] == 0, done.stdout + done.stderr
    assert torch.cuda.get_device_name() in done.stdout


def test_the_quickstart(gpu: torch.device, tmp_path: Path) -> None:
    if not (ROOT / ".venv").exists():
        pytest.skip("would make .venv: start launch/quickstart.sh yourself")
    done = run("bash", ROOT / "launch" / "quickstart.sh", "--steps", "20", RUN_DIR=str(tmp_path / "run"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "loss_curve.png").exists()
    run_record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().partition("\n")[0])
    assert torch.cuda.get_device_name() in json.dumps(run_record["surroundings"])


def test_the_report(gpu: torch.device, tmp_path: Path) -> None:
    """In small sizes: what it measures in large ones it has then done before."""
    done = run(sys.executable, ROOT / "benchmarks" / "gpu_report.py", "--tiny", "--minutes", "3", "--out", tmp_path)
    assert done.returncode == 0 and "Failed" not in done.stdout, done.stdout + (tmp_path / "gpu.md").read_text()
