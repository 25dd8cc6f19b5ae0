"""Tests for a GPU. Most of them take "cpu" as well, so that their bodies have run before there is one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

# Tests are imported in importlib mode, which leaves these folders out of the path.
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "dist")]

ON = [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"]


@pytest.fixture(params=ON)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The GPU, and the CPU as its rehearsal."""
    return torch.device(request.param)


@pytest.fixture(params=ON[:1])
def gpu(request: pytest.FixtureRequest) -> torch.device:
    """The GPU alone: where a CPU has nothing of the kind."""
    return torch.device(request.param)


@pytest.fixture
def kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels on the GPU, and those of the interpreter on the CPU."""
    pytest.importorskip("triton", reason="triton is not installed here")
    if device.type == "cpu":
        assert os.environ["TRITON_INTERPRET"] == "1"
    monkeypatch.setenv("FRUGAL_KERNELS", "triton")
