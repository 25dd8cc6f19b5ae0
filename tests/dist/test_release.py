"""step_in_backward under FSDP2, ranks as threads: the bits of ordinary steps, unit by unit, on all ranks alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from released import OPTIONS, STEPS, WIDTH, Model, loss_of, settings
from test_collectives import Meter, metered
from threads import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_module
from torch.nn.parallel import DistributedDataParallel

from frugal_dist import Frugal, checkpoint, split_parameters, step_in_backward
from frugal_dist.planner.layouts import engine_layout
from frugal_dist.planner.plan import make_plan

QUICK = ("frugal", "apollo_mini", "svd left")
"""Bases that stay where they are, sums over ranks, updates that travel."""


def only_used(model: Model) -> Model:
    """Without the layers that never have a gradient."""
    for block in model.blocks:
        block.unused = nn.Identity()
    return model


def sharded(shape: tuple[int, ...] = (), used: bool = False, **policies: Any) -> Model:
    model = only_used(Model()) if used else Model()
    shape = shape or (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **policies)
    fully_shard(model, mesh=mesh, **policies)
    return model


def built(released: bool, options: dict[str, Any], **how: Any) -> tuple[Model, Frugal]:
    model = sharded(**how)
    optimizer = Frugal(split_parameters(model), **options)
    if released:
        step_in_backward(model, optimizer)
    return model, optimizer


def train(model: Model, optimizer: Frugal, first: int = 0, last: int = STEPS, micro_steps: int = 1) -> None:
    """On some steps the second block is not used, on others a part of the first is frozen."""
    for step in range(first, last):
        model.skipped = step in (1, 3)
        model.blocks[0].up.requires_grad_(step not in (0, 2))
        for micro in range(micro_steps):
            model.set_requires_gradient_sync(micro == micro_steps - 1)
            loss_of(model, micro_steps * step + micro, dist.get_rank()).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.reshard()


def bits(model: Model, optimizer: Frugal) -> dict[str, Tensor]:
    """This rank's part of all weights and state."""
    found = {name: local(param) for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        found |= {f"{name} {key}": value.clone() for key, value in optimizer.state.get(param, {}).items()}
    return found


def local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach().clone()


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [key for key in one if not torch.equal(one[key], other[key])]


def compare(options: dict[str, Any], micro_steps: int = 1, **how: Any) -> list[str]:
    """What differs after a run with and one without release."""
    runs = []
    for released in (False, True):
        model, optimizer = built(released, options, **how)
        train(model, optimizer, micro_steps=micro_steps)
        runs.append(bits(model, optimizer))
    return apart(*runs)


def check(ranks: int, cases: dict[str, Callable[[], list[str]]]) -> None:
    for found in run_ranks(ranks, lambda _: {name: case() for name, case in cases.items()}):
        assert {name: keys for name, keys in found.items() if keys} == {}


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.heavy)])
def test_released_steps_have_the_bits_of_ordinary_ones(ranks: int) -> None:
    check(ranks, {name: lambda name=name: compare(settings()[name]) for name in QUICK})  # type: ignore[misc]


@pytest.mark.heavy
@pytest.mark.parametrize("name", sorted(settings().keys() - QUICK))
def test_all_settings_have_the_bits_of_ordinary_steps(name: str) -> None:
    check(2, {name: lambda: compare(settings()[name])})


@pytest.mark.heavy
def test_hsdp_mixed_precision_offload_and_accumulation() -> None:
    """Of micro-batches the last one reduces, and releases."""
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    columns = {**OPTIONS, "projection": "columns"}
    check(
        4,
        {
            "HSDP": lambda: compare(OPTIONS, shape=(2, 2)),
            "HSDP, columns": lambda: compare(columns, shape=(2, 2)),
            "mixed precision": lambda: compare(OPTIONS, mp_policy=mixed),
            "CPU offload": lambda: compare(columns, offload_policy=CPUOffloadPolicy(pin_memory=False)),
            "accumulation": lambda: compare(OPTIONS, micro_steps=2),
        },
    )


def test_gradients_of_one_unit_are_there_at_a_time() -> None:
    """Looked at as each one comes, before it is stepped with."""

    def most(released: bool) -> tuple[int, int]:
        model, optimizer = built(False, OPTIONS, used=True)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        seen: list[int] = []

        def look(_: Tensor) -> None:
            seen.append(sum(local(param.grad).numel() for param in params if param.grad is not None))

        for param in params:
            param.register_post_accumulate_grad_hook(look)
        if released:
            step_in_backward(model, optimizer)
        train(model, optimizer, 4, STEPS)
        trained = {name: local(param).numel() for name, param in model.named_parameters() if param.requires_grad}
        blocks = [sum(size for name, size in trained.items() if f"blocks.{number}." in name) for number in (0, 1)]
        root = sum(trained.values()) - sum(blocks)
        return max(seen), max(*blocks, root) if released else sum(trained.values())

    for found in run_ranks(2, lambda _: [most(True), most(False)]):
        for seen, expected in found:
            assert seen == expected


def spelled(calls: Counter[str]) -> Counter[str]:
    """As torch spells them."""
    return Counter("all_to_all_single" if call == "all_to_all" else call for call in calls.elements())


@pytest.mark.parametrize("name", ["svd left", "apollo_mini"])
def test_collectives_and_gradients_are_those_that_are_planned(name: str) -> None:
    """Packed by unit. FSDP2 itself calls others."""
    options, mine = settings()[name], ("all_reduce", "all_to_all_single", "broadcast")

    def body(rank: int, meter: Meter) -> tuple[Counter[str], Counter[str]]:
        model, optimizer = built(True, options, used=True)
        calls = []
        for step in range(4):  # set-up with the first refresh; a step; a refresh; a step
            meter.start()
            loss_of(model, step, rank).backward()
            optimizer.step()
            calls.append(Counter(call for call in meter.stop().calls if call in mine))
        return calls[3], calls[2] - calls[3]

    with metered() as meter:
        found = run_ranks(2, lambda rank: body(rank, meter))
    model = only_used(Model())
    names = [name for name, _ in model.named_parameters()]
    blocks = [{name for name in names if name.startswith(f"blocks.{i}.")} for i in (0, 1)]
    units = [*blocks, set(names) - blocks[0] - blocks[1]]
    optimizer = Frugal(split_parameters(model), process_group=None, **options)
    plan = make_plan(optimizer, engine_layout("fsdp2"), 2, units=units)
    assert plan.released
    for planned, (step, refresh) in zip(plan.ranked, found, strict=True):
        assert spelled(planned.step_calls) == step
        assert spelled(planned.refresh.calls) == refresh
        assert sum(step.values()) >= 2  # each block's by itself
        most = max(sum(param.numel() for name, param in model.named_parameters() if name in unit) for unit in units)
        assert abs(planned.gradients - most / 2) < WIDTH, "21 rows do not divide"


def test_a_resumed_run_has_the_bits_of_one_that_went_on(tmp_path: Path) -> None:
    def body(_: int) -> list[list[str]]:
        model, optimizer = built(True, OPTIONS)
        train(model, optimizer, 0, 3)
        checkpoint.save(tmp_path / "saved", model, optimizer, {})
        train(model, optimizer, 3)
        found = []
        for released in (False, True):
            again, theirs = built(released, OPTIONS)
            checkpoint.load(tmp_path / "saved", again, theirs)
            train(again, theirs, 3)
            found.append(apart(bits(model, optimizer), bits(again, theirs)))
        return found

    assert run_ranks(2, body) == [[[], []]] * 2


def error_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return ""


def test_a_second_reduction_is_refused_on_all_ranks() -> None:
    def body(rank: int) -> str:
        model, _ = built(True, OPTIONS)
        loss_of(model, 0, rank).backward()
        return error_of(lambda: loss_of(model, 1, rank).backward())

    for message in run_ranks(2, body):
        assert "had a second gradient before optimizer.step()" in message
        assert "set_requires_gradient_sync(False)" in message


def test_replicas_and_dtensors_without_units_are_refused() -> None:
    def body(_: int) -> list[str]:
        model = Model()
        found = [error_of(lambda: step_in_backward(model, Frugal(split_parameters(model))))]
        wrapped = DistributedDataParallel(model)
        alone = Frugal(split_parameters(model), process_group=None)
        found.append(error_of(lambda: step_in_backward(model, alone)))
        del wrapped
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        divided = distribute_module(nn.ModuleDict({"layer": nn.Linear(8, 6)}), mesh)
        return [*found, error_of(lambda: step_in_backward(divided, Frugal(split_parameters(divided))))]

    for whole, wrapped, units in run_ranks(2, body):
        assert "every rank holds whole parameters, as under DDP" in whole
        assert "the model is wrapped in DistributedDataParallel" in wrapped
        assert "Use FSDP2" in whole
        assert "has no unit of FSDP2" in units
