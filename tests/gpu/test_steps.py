"""Whole steps on a GPU: the numbers of one process on the CPU, no wait for the device, no growth, nothing lost."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import GAP, ON_REFRESH, PROJECTIONS, Case, gradients, label, reference, weights
from storages import replicas
from torch import nn

from frugal_dist import Frugal, step_in_backward
from frugal_dist.planner.layouts import engine_layout
from frugal_dist.planner.plan import make_plan

pytestmark = pytest.mark.timeout(600)
NAMES = ("tall", "broad", "experts")


def case(projection: str, on_refresh: str, side: str = "std", **more: Any) -> Case:
    """Smooth rules: a flipped sign would be a jump."""
    settings = {"process_group": None, "eps": 1e-3, **more}
    return Case(projection, side, on_refresh, free="sgd", names=NAMES, more=tuple(settings.items()))


CASES = [
    *(
        case(projection, mode, side)
        for projection, side in PROJECTIONS
        for mode in ON_REFRESH
        if (projection, mode) != ("svd", "keep")  # moments in a basis whose signs are each solver's own
    ),
    case("svd", "reset", svd_method="subspace"),
    case("svd", "reset", svd_method="gram64"),
    case("svd", "project", basis_dtype="bf16"),
    case("svd", "project", matmul="bf16x3"),
    case("svd", "reset", state_full="lion", refresh_schedule="staggered"),
    case("columns", "keep", state_full="sgdm"),
]
LOOSE = ("svd", "random")
TABLES = 4 << 20
"""Bytes that the kernels' last tables, 256 of 14 KiB, and what is small beside them may take."""


@contextmanager
def careless(device: torch.device) -> Iterator[None]:
    """What users set for their models: TF32, and autocast around everything."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with torch.autocast(device.type, torch.bfloat16):
            yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("chosen", CASES, ids=lambda one: f"{label(one.projection, one.side)}-{one.on_refresh}")
def test_the_weights_are_those_of_the_cpu(device: torch.device, chosen: Case) -> None:
    """fp32 on the device against fp64 on the CPU."""
    want = reference(chosen)
    start = {name: weights()[name].float().to(device) for name in want}
    with careless(device):
        held = replicas(start, chosen.groups(), chosen.options)
        for grads in gradients():
            held.step({name: grads[name].to(device, torch.float32) for name in start})
    bound = 3e-3 if ("basis_dtype", "bf16") in chosen.more else 3e-4 if chosen.projection in LOOSE else 2e-5
    far = {name: float((one.cpu().double() - want[name]).abs().max()) for name, one in held.full().items()}
    assert all(value <= bound for value in far.values()), far


def dtype_of(name: str) -> torch.dtype:
    """Rounding is about bf16 weights."""
    return torch.bfloat16 if "rounding" in SETTINGS[name] else torch.float32


def model_on(device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 160), nn.Tanh(), nn.Linear(160, 96)).to(device, dtype)


def optimizer_of(model: nn.Module, **options: Any) -> Frugal:
    settings = {"lr": 1e-3, "density": 0.25, "update_gap": GAP, "process_group": None, "project": ["*"], **options}
    return Frugal(model.named_parameters(), **{**settings, "project": ["*weight"]})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[torch.Tensor]:
    first = next(model.parameters())
    generator = torch.Generator().manual_seed(steps)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(torch.randn(8, 96, generator=generator).to(first.device, first.dtype)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


SETTINGS: dict[str, dict[str, Any]] = {
    "svd": {"projection": "svd"},
    "svd, bf16x3": {"projection": "svd", "matmul": "bf16x3"},
    "svd, threshold": {"projection": "svd", "residual_threshold": 0.5},
    "random": {"projection": "random"},
    "dct": {"projection": "dct"},
    "columns": {"projection": "columns"},
    "columns, 8bit": {"projection": "columns", "moments": "8bit"},
    "rows": {"projection": "rows"},
    "randk": {"projection": "randk"},
    "blockwise": {"projection": "blockwise", "density": 0.5},
    "density 0": {"projection": "columns", "density": 0.0},
    "stochastic": {"projection": "columns", "rounding": "stochastic"},
    "remainder": {"projection": "columns", "rounding": "remainder"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_no_step_between_refreshes_waits_for_the_device(device: torch.device, name: str) -> None:
    model = model_on(device, dtype_of(name))
    optimizer = optimizer_of(model, **{"update_gap": 100, **SETTINGS[name]})
    train(model, optimizer, 3)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(5):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 / (number + 1)
            optimizer.step()
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_grows_and_the_state_is_what_was_planned(gpu: torch.device, name: str) -> None:
    model = model_on(gpu, dtype_of(name))
    train(model, optimizer_of(model, **SETTINGS[name]), 1)  # libraries' own buffers
    before = torch.cuda.memory_allocated(gpu)
    optimizer = optimizer_of(model, **{"update_gap": 7, **SETTINGS[name]})
    train(model, optimizer, 30)
    plan = make_plan(optimizer, engine_layout("single"), 1).worst
    held = torch.cuda.memory_allocated(gpu) - before
    assert held <= 1.1 * (plan.state + plan.selected) + TABLES
    train(model, optimizer, 200)
    assert torch.cuda.memory_allocated(gpu) - before - held <= TABLES


@pytest.mark.parametrize("name", ["svd", "columns", "randk", "density 0"])
def test_a_step_needs_no_more_than_was_planned(gpu: torch.device, name: str) -> None:
    """Beside weights, gradients and state: a few matrices, and at a refresh what the largest basis takes."""
    matrix = 4 * 1024 * 2816
    model = nn.Sequential(*(nn.Linear(1024, 2816, bias=False) for _ in range(4))).to(gpu)
    optimizer = optimizer_of(model, **{"update_gap": 2, **SETTINGS[name]})
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()  # libraries' own buffers, and the state
    plan = make_plan(optimizer, engine_layout("single"), 1)
    for solver in (0, plan.solver):  # between two refreshes, and at one
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(gpu)
        torch.cuda.reset_peak_memory_stats(gpu)
        optimizer.step()
        extra = torch.cuda.max_memory_allocated(gpu) - before
        assert extra <= 1.1 * solver + 4 * matrix


@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_has_the_same_bits(device: torch.device, name: str) -> None:
    model = model_on(device, dtype_of(name))
    optimizer = optimizer_of(model, **SETTINGS[name])
    train(model, optimizer, 4)
    other = copy.deepcopy(model)
    resumed = optimizer_of(other, **SETTINGS[name])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 5)
    train(other, resumed, 5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", ["svd", "columns"])
def test_a_nan_at_a_refresh_is_skipped_and_the_run_goes_on(device: torch.device, name: str) -> None:
    model = model_on(device)
    optimizer = optimizer_of(model, **{**SETTINGS[name], "update_gap": 1})
    train(model, optimizer, 1)
    if name == "svd":
        weight = next(model.parameters())
        assert weight.grad is not None
        before = weight.detach().clone()
        weight.grad[3, 5] = float("nan")
        optimizer.step()
        assert torch.equal(weight, before)
    assert all(bool(torch.isfinite(loss)) for loss in train(model, optimizer, 3))


def test_state_on_the_cpu_of_weights_that_were_moved_there(device: torch.device) -> None:
    """A model that is offloaded between two phases, and comes back."""
    model = model_on(device)
    optimizer = optimizer_of(model, projection="svd")
    train(model, optimizer, 2)
    for store in optimizer.state.values():
        store.update({key: value.to("cpu") for key, value in store.items()})
    train(model, optimizer, 2)
    assert all(
        value.device.type == device.type for s in optimizer.state.values() for k, value in s.items() if "exp" in k
    )


def test_a_compiled_model(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("the engines' tests compile on the CPU")
    model = model_on(device)
    losses = train(torch.compile(model), optimizer_of(model, projection="svd"), 20)
    assert losses[-1] < losses[0]


def test_a_compiled_training_step(device: torch.device) -> None:
    """Frugal's step stays what it is: a graph around it breaks there, and computes the same."""
    if device.type == "cpu":
        pytest.skip("the engines' tests compile on the CPU")
    models = [model_on(device) for _ in range(2)]
    rows = torch.randn(8, 96, device=device)
    for number, model in enumerate(models):
        optimizer = optimizer_of(model, projection="columns")

        def step(model: nn.Module = model, optimizer: Frugal = optimizer) -> None:
            (model(rows) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        run = torch.compile(step) if number else step
        for _ in range(2 * GAP):
            run()
    for plain, compiled in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_in_backward_has_the_same_bits_and_frees_every_gradient(device: torch.device, name: str) -> None:
    models = [model_on(device, dtype_of(name)) for _ in range(2)]
    plain, released = (optimizer_of(model, **SETTINGS[name]) for model in models)
    step_in_backward(models[1], released)
    for number in range(2 * GAP):
        rows = torch.randn(8, 96, generator=torch.Generator().manual_seed(number)).to(device, dtype_of(name))
        for model, optimizer in zip(models, (plain, released), strict=True):
            (model(rows) - 1).square().mean().backward()
            assert optimizer is plain or all(one.grad is None for one in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
