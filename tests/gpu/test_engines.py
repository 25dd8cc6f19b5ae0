"""Every engine on this machine's GPUs, through NCCL: a rank for each of them, at most four. Rehearsed through gloo."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
NAMES = ("DDP", "FSDP2", "FSDP2 released", "ZeRO-1 bf16", "ZeRO-1 fp16", "ZeRO-2 bf16", "ZeRO-2 fp16", "ZeRO-2 fp32",
         "ZeRO-2 offload", "ZeRO-3 bf16", "ZeRO-3 fp16", "Accelerate", "Trainer")  # fmt: skip
REHEARSED = ("DDP", "FSDP2", "FSDP2 released", "ZeRO-2 bf16", "Accelerate", "Trainer")
NEEDS = {"ZeRO": "deepspeed", "Acce": "accelerate", "Trai": "transformers"}

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of results by device; each device runs all its jobs when the first of them is asked for."""
    return {}


def installed(name: str) -> bool:
    return importlib.util.find_spec(NEEDS.get(name[:4], "torch")) is not None


def results(
    ran: dict[str, Path], device: torch.device, name: str, factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    if device.type not in ran:
        folder = ran[device.type] = factory.mktemp("engines")
        on_gpu = device.type == "cuda"
        ranks = min(4, torch.cuda.device_count()) if on_gpu else 1
        jobs = [
            job for job in (NAMES if on_gpu else REHEARSED) if importlib.util.find_spec(NEEDS.get(job[:4], "torch"))
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
        environment |= {} if on_gpu else {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "true"}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [*launcher, str(HERE / "engine_jobs.py"), device.type, str(folder), *jobs]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=800)
        (folder / "log").write_text(done.stdout + done.stderr)
    found = [json.loads(file.read_text()) for file in sorted(ran[device.type].glob(f"{name}.*.json"))]
    assert found, (ran[device.type] / "log").read_text()[-3000:]
    return found


@pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.heavy)], indirect=True
)
@pytest.mark.parametrize("name", NAMES)
def test_an_engine(
    device: torch.device, name: str, ran: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    if device.type == "cpu" and name not in REHEARSED:
        pytest.skip("rehearsed on the CPU by others of its kind, and by tests/engines")
    if not installed(name):
        pytest.skip(f"{NEEDS[name[:4]]} is not installed here")
    for found in results(ran, device, name, tmp_path_factory):
        assert "error" not in found, found["error"]
        assert all(value <= 2e-5 for value in found.get("difference", {}).values()), found
        losses = [loss for loss in found.get("losses", []) if math.isfinite(loss)]
        assert not found.get("losses") or losses[-1] < losses[0], losses
        if "places" in found:
            assert found["places"] == ["cpu" if name.endswith("offload") else device.type]
