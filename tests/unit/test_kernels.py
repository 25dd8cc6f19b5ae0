"""The Triton kernels do what the pure functions do: run by Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from frugal_dist import Frugal, kernels
from frugal_dist.config import FrugalConfig
from frugal_dist.projection.coordinates import Columns, Everything, Flat, Rows, Selection
from frugal_dist.update import state_free_, update_coordinates

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed here (it has wheels for Linux on x86-64)",
)
CONFIG = FrugalConfig(lr=1e-2, lr_scale=0.5, state_free_lr_scale=0.3, projection="columns")
SHAPE = (37, 61)  # three blocks, the last one not full


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are interpreted if that is said before they are read, for the rest of the process."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    kernels._load.cache_clear()
    yield
    kernels._load.cache_clear()


def drawn(length: int, share: float) -> Tensor:
    return torch.randperm(length)[: int(share * length)].sort().values


def selections() -> dict[str, Selection]:
    torch.manual_seed(1)
    rows, cols = SHAPE
    return {
        "columns": Columns(drawn(cols, 0.3)),
        "rows": Rows(drawn(rows, 0.3), cols),
        "randk": Flat(drawn(rows * cols, 0.3).int(), cols),
        "one entry": Flat(torch.tensor([1024], dtype=torch.int32), cols),
        "no column": Columns(torch.empty(0, dtype=torch.int64)),
        "everything": Everything(cols),
    }


def steps(selection: Selection, dtype: torch.dtype, decay: float, config: FrugalConfig) -> list[Tensor]:
    """Weights and moments after some steps; some gradients are zero.

    One step in bf16: the interpreter cuts numbers off where a GPU, and torch, round them.
    """
    torch.manual_seed(0)
    weight = torch.randn(SHAPE).to(dtype)
    shape = selection.shape(*SHAPE)
    moments = (torch.zeros(shape), torch.zeros(shape))[: 1 if config.state_full == "lion" else 2]
    for step in range(1, 2 if dtype == torch.bfloat16 else 4):
        grad = torch.randn(SHAPE) * (torch.rand(SHAPE) > 0.1)
        update_coordinates([weight], [grad.to(dtype)], [selection], [moments], step, decay, config)
    return [weight, *moments]


@needs_triton
@pytest.mark.parametrize(("dtype", "decay"), [(torch.float32, 0.0), (torch.float32, 0.5), (torch.bfloat16, 0.0)])
@pytest.mark.parametrize("kind", selections())
def test_coordinates(
    kind: str, dtype: torch.dtype, decay: float, interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection = selections()[kind]
    found = steps(selection, dtype, decay, CONFIG)
    assert isinstance(selection, Everything) or selection.memo, "the kernel ran"
    monkeypatch.setenv(kernels.VARIABLE, "torch")
    want = steps(selections()[kind], dtype, decay, CONFIG)
    for one, other in zip(found, want, strict=True):
        rounding = {"rtol": 8e-3, "atol": 0.0} if one.dtype == torch.bfloat16 else {"rtol": 2e-6, "atol": 1e-7}
        torch.testing.assert_close(one, other, **rounding)


@needs_triton
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_signed_step_alone_gives_the_same_bits(
    decay: float, interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    grad = torch.randn(SHAPE) * (torch.rand(SHAPE) > 0.1)
    grad[0, 0] = float("nan")
    config = replace(CONFIG, lr=2.0**-7, lr_scale=1.0, state_free_lr_scale=1.0)  # all products are exact
    results = []
    for choice in ("triton", "torch"):
        monkeypatch.setenv(kernels.VARIABLE, choice)
        results.append(torch.linspace(-1, 1, grad.numel()).view(SHAPE).contiguous())
        state_free_(results[-1], grad, config, decay)
    torch.testing.assert_close(*results, rtol=2e-7, atol=0.0)
    assert not torch.isnan(results[0]).any(), "as torch's sign, which is 0 for NaN"


@needs_triton
@pytest.mark.parametrize(
    ("options", "weight"),
    [
        ({"state_full": "lion"}, torch.randn(SHAPE)),
        ({"state_free": "none"}, torch.randn(SHAPE)),
        ({}, torch.randn(SHAPE, dtype=torch.float64)),
        ({}, torch.randn(SHAPE[::-1]).T),
    ],
)
def test_what_they_are_not_made_for_is_left_to_torch(
    options: dict[str, Any], weight: Tensor, interpreter: None
) -> None:
    fused = kernels.fused_for(weight)
    assert fused is not None
    selection = selections()["columns"]
    before, shape = weight.clone(), selection.shape(*SHAPE)
    moments = (torch.zeros(shape), torch.zeros(shape))
    assert not fused.coordinate_step_(weight, weight, selection, moments, 1, 0.0, replace(CONFIG, **options))
    assert torch.equal(weight, before)


@needs_triton
@pytest.mark.parametrize(("projection", "density"), [("columns", 0.0), ("rows", 0.25), ("randk", 0.25), ("svd", 0.25)])
def test_an_optimizer_with_them(
    projection: str, density: float, interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for choice in ("triton", "torch"):
        monkeypatch.setenv(kernels.VARIABLE, choice)
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(24, 40))
        groups = [{"params": [("w", weight)], "projected": True}]
        optimizer = Frugal(
            groups, projection=projection, density=density, update_gap=2, weight_decay=0.1, process_group=None
        )
        for _ in range(4):
            weight.grad = torch.randn(24, 40)
            optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(2, 2)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for choice in ("auto", "torch"):
        monkeypatch.setenv(kernels.VARIABLE, choice)
        assert kernels.fused_for(weight) is None
    monkeypatch.setenv(kernels.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="FRUGAL_KERNELS='cuda' is not known"):
        kernels.fused_for(weight)


def test_without_triton_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import that fails, as on a machine without the package."""
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    monkeypatch.setitem(__import__("sys").modules, "frugal_dist.kernels.fused", None)
    kernels._load.cache_clear()
    wanted = pytest.raises(ValueError, match="FRUGAL_KERNELS=triton, but triton cannot be imported")
    with pytest.warns(UserWarning, match="triton cannot be imported"), wanted:
        kernels.fused_for(torch.zeros(2, 2))
    kernels._load.cache_clear()
