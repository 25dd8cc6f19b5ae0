"""What a checkpoint holds beside weights and state: extra, random numbers, rates, buffers, frozen parameters."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case, gradients
from places import MODEL, PLACES, start
from storages import Replicate, Shard, cut_like
from threads import run_ranks
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from two_rank_runs import CASE, PLACE, trained

from frugal_dist import Frugal, checkpoint, split_parameters
from frugal_dist.checkpoint import MismatchError
from frugal_dist.checkpoint.parts import part_chunks
from frugal_dist.sharding.shard import Box

EXTRA = {
    "numbers": [1, 2.5, True, None],
    "text": "ü",
    "nested": {"tuple": (1, (2, 3)), 7: "int keys"},
    "tensors": {"long": torch.arange(5), "half": torch.ones(2, dtype=torch.bfloat16), "sizes": torch.Size([2, 3])},
}


def same(found: Any, want: Any) -> bool:
    if isinstance(want, torch.Tensor):
        return found.dtype == want.dtype and torch.equal(found, want)
    if isinstance(want, dict):
        return found.keys() == want.keys() and all(same(found[key], want[key]) for key in want)
    return type(found) is type(want) and found == want


def test_extra_comes_back_as_it_was(tmp_path: Path) -> None:
    held = start(PLACES["one process"], CASE, torch.float64)
    checkpoint.save(tmp_path / "saved", MODEL, held.optimizer, EXTRA)
    assert same(checkpoint.load(tmp_path / "saved", MODEL, held.optimizer), EXTRA)


@pytest.mark.parametrize("place", ["one process", "DDP, 2 ranks", "ZeRO-3, 3", "Shard(0), 4"])
def test_every_rank_gets_its_own_extra_and_further_ones_that_of_rank_0(place: str, tmp_path: Path) -> None:
    def save(rank: int) -> None:
        checkpoint.save(tmp_path / "saved", MODEL, trained(steps=1).optimizer, {"rank": rank})

    run_ranks(PLACE.ranks, save)
    target = PLACES[place]

    def load(rank: int) -> Any:
        held = start(target, CASE, torch.float64)
        return checkpoint.load(tmp_path / "saved", MODEL, held.optimizer)["rank"]

    assert run_ranks(target.ranks, load) == [0, 1, 2, 0][: target.ranks]


# --- random numbers ---------------------------------------------------------------------------------


def draws() -> tuple[float, float, float]:
    return float(torch.rand(())), random.random(), float(np.random.rand())  # noqa: NPY002


def test_random_numbers_continue(tmp_path: Path) -> None:
    held = start(PLACES["one process"], CASE, torch.float64)
    draws()
    checkpoint.save(tmp_path / "saved", MODEL, held.optimizer)
    want = [draws(), draws()]
    assert draws() not in want
    checkpoint.load(tmp_path / "saved", MODEL, held.optimizer)
    assert [draws(), draws()] == want
    checkpoint.load(tmp_path / "saved", MODEL, held.optimizer, rng=False)
    assert draws() not in want


def test_ranks_without_a_saved_state_draw_numbers_of_their_own(tmp_path: Path) -> None:
    """Equal dropout on several ranks would be worse than none of it continuing."""
    from frugal_dist.checkpoint import extra

    torch.manual_seed(0)  # threads as ranks, in the test before, leave their generators in any state
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    state = extra.rng_state()
    found = []
    for rank in (3, 4, 3):
        extra.reseed(state, rank)
        found.append(draws())
    assert found[0] == found[2], "the same whenever it is loaded"
    assert all(a != b for a, b in zip(found[0], found[1], strict=True))
    extra.set_rng_state(state)
    assert all(a != b for a, b in zip(found[0], draws(), strict=True))


# --- learning rates ---------------------------------------------------------------------------------


def model_and_optimizer(**options: Any) -> tuple[nn.Module, Frugal]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 12))
    return model, Frugal(
        split_parameters(model), **{"projection": "columns", "density": 0.25, "update_gap": 3, **options}
    )


def one_step(model: nn.Module, optimizer: Frugal, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    model(torch.randn(4, 12, generator=generator)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


SCHEDULES: dict[str, Any] = {
    "LambdaLR": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.7**step),
    "Cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    "OneCycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=10),
    "two after each other": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8),
        ],
        milestones=[3],
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_continues(schedule: str, tmp_path: Path) -> None:
    """The first step after the load already has the right rate; OneCycle moves the betas, too."""
    model, optimizer = model_and_optimizer()
    scheduler = SCHEDULES[schedule](optimizer)
    for number in range(8):
        if number == 4:
            checkpoint.save(tmp_path / "saved", model, optimizer, {"schedule": scheduler.state_dict()})
        one_step(model, optimizer, number)
        scheduler.step()
    other, theirs = model_and_optimizer()
    again = SCHEDULES[schedule](theirs)
    extra = checkpoint.load(tmp_path / "saved", other, theirs)
    checkpoint.load_schedule(again, extra["schedule"])
    for number in range(4, 8):
        one_step(other, theirs, number)
        again.step()
    for mine, their in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, their)
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in theirs.param_groups]


def test_a_schedule_of_another_number_of_groups(tmp_path: Path) -> None:
    """DeepSpeed's JSON makes one group of what split_parameters makes two."""
    model, optimizer = model_and_optimizer()
    scheduler = SCHEDULES["LambdaLR"](optimizer)
    assert len(optimizer.param_groups) == 2
    one_step(model, optimizer, 0)
    scheduler.step()
    checkpoint.save(tmp_path / "saved", model, optimizer, {"schedule": scheduler.state_dict()})
    single = Frugal(model.named_parameters(), projection="columns", density=0.25)
    again = SCHEDULES["LambdaLR"](single)
    with pytest.warns(UserWarning, match="update_gap 3 -> 200"):
        extra = checkpoint.load(tmp_path / "saved", model, single)
    checkpoint.load_schedule(again, extra["schedule"])
    assert single.param_groups[0]["lr"] == pytest.approx(0.7e-3)
    again.step()
    scheduler.step()
    assert single.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_groups_with_rates_of_their_own_do_not_become_one(tmp_path: Path) -> None:
    _, optimizer = model_and_optimizer()
    optimizer.param_groups[1]["lr"] = 0.5
    state = SCHEDULES["LambdaLR"](optimizer).state_dict()
    model, _ = model_and_optimizer()
    single = SCHEDULES["LambdaLR"](Frugal(model.named_parameters(), projection="columns"))
    with pytest.raises(MismatchError, match="2 parameter groups of different base_lrs"):
        checkpoint.load_schedule(single, state)


def test_every_group_keeps_its_rate_by_the_names_of_its_parameters(tmp_path: Path) -> None:
    """The groups may come in another order."""
    model, optimizer = model_and_optimizer()
    optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 0.25, torch.tensor(0.5)
    checkpoint.save(tmp_path / "saved", model, optimizer)
    turned = Frugal(list(reversed(split_parameters(model))), projection="columns", density=0.25, update_gap=3)
    checkpoint.load(tmp_path / "saved", model, turned)
    assert [float(group["lr"]) for group in turned.param_groups] == [0.5, 0.25]


# --- the rest of the model --------------------------------------------------------------------------


class Odd(nn.Module):
    """Everything that is easily forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 40)
        self.frozen = nn.Linear(40, 12)
        self.frozen.requires_grad_(False)
        self.left_out = nn.Parameter(torch.randn(7, 3))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("mask", torch.rand(3, 4) > 0.5)
        self.register_buffer("spread", torch.arange(5.0).expand(1, -1))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("scratch", torch.rand(3), persistent=False)
        self.tied = nn.Linear(12, 40, bias=False)
        self.tied.weight = self.linear.weight


def odd(seed: int, frozen_in_groups: bool) -> tuple[Odd, Frugal]:
    torch.manual_seed(seed)
    model = Odd()
    with torch.no_grad():
        model.norm.running_mean.uniform_()  # type: ignore[union-attr]
        model.norm.num_batches_tracked.fill_(seed)  # type: ignore[union-attr]
    given = [(name, param) for name, param in model.named_parameters() if name != "left_out"]
    if not frozen_in_groups:
        given = [(name, param) for name, param in given if param.requires_grad]
    return model, Frugal(given, density=0.5)


def odd_step(model: Odd, optimizer: Frugal) -> None:
    inputs = torch.linspace(-1, 1, 48).view(4, 12)
    hidden = model.linear(inputs) * model.scale + model.tied(inputs)
    image = model.conv(torch.linspace(0, 1, 4 * 25).view(1, 4, 5, 5).to(memory_format=torch.channels_last))
    (model.frozen(hidden).square().mean() + image.square().mean() + model.norm(inputs[:, :6]).mean()).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("then", [True, False])
@pytest.mark.parametrize("now", [True, False])
def test_everything_in_a_model_comes_back(then: bool, now: bool, tmp_path: Path) -> None:
    """Whether the optimizer knows the frozen parameters, as in plain torch, or not, as under ZeRO."""
    model, optimizer = odd(1, then)
    odd_step(model, optimizer)
    checkpoint.save(tmp_path / "saved", model, optimizer)
    other, theirs = odd(2, now)
    checkpoint.load(tmp_path / "saved", other, theirs)
    for _ in range(2):
        want, found = model.state_dict(), other.state_dict()
        assert want.keys() == found.keys()
        assert [name for name in want if not torch.equal(want[name], found[name])] == []
        assert other.tied.weight is other.linear.weight
        assert other.conv.weight.is_contiguous(memory_format=torch.channels_last)
        odd_step(model, optimizer)
        odd_step(other, theirs)


def test_frozen_parameters_come_back_with_the_moments_they_have(tmp_path: Path) -> None:
    """None while they were never trained; those of then where they were trained before."""
    (model, optimizer), (other, theirs) = odd(1, True), odd(2, True)
    for moving in (False, True, False):
        for each in (model, other):
            each.frozen.requires_grad_(moving)
        odd_step(model, optimizer)
        folder = tmp_path / str(optimizer.state[model.frozen.bias]["step"].item())
        checkpoint.save(folder, model, optimizer)
        other, theirs = odd(2, True)
        other.frozen.requires_grad_(moving)
        checkpoint.load(folder, other, theirs)
        for mine, its in zip(model.frozen.parameters(), other.frozen.parameters(), strict=True):
            live, loaded = optimizer.state[mine], theirs.state[its]
            assert live.keys() == loaded.keys()
            assert all(torch.equal(value, loaded[key]) for key, value in live.items())
            assert ("exp_avg" in loaded) == bool(theirs.state[other.frozen.bias]["step"])
        odd_step(model, optimizer)
        odd_step(other, theirs)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("then", ["full", "bf16"])
@pytest.mark.parametrize("side", ["std", "full"])
def test_projectors_of_another_precision_count_from_the_next_refresh(then: str, side: str, tmp_path: Path) -> None:
    """As in the run that goes on, in which the setting was changed."""

    def built(dtype: str) -> tuple[torch.nn.Linear, Frugal]:
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 8, bias=False, dtype=torch.float64)
        options = {"density": 0.5, "update_gap": 4, "on_refresh": "project", "side": side}
        return model, Frugal([{"params": [("w", model.weight)], "projected": True}], basis_dtype=dtype, **options)

    def train(model: torch.nn.Linear, optimizer: Frugal, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            model.weight.grad = torch.randn(8, 6, generator=generator, dtype=torch.float64)
            optimizer.step()

    now = {"full": "bf16", "bf16": "full"}[then]
    model, optimizer = built(then)
    train(model, optimizer, range(2))
    optimizer.param_groups[0]["basis_dtype"] = now
    checkpoint.save(tmp_path / "saved", model, optimizer)
    other, resumed = built(now)
    checkpoint.load(tmp_path / "saved", other, resumed)
    for one, own in ((model, optimizer), (other, resumed)):
        train(one, own, range(2, 7))
    assert torch.equal(model.weight, other.weight)


def test_a_frozen_parameter_that_is_to_be_trained_now(tmp_path: Path) -> None:
    """There is no state for it: that must be wanted."""
    model, optimizer = odd(1, frozen_in_groups=False)
    odd_step(model, optimizer)
    checkpoint.save(tmp_path / "saved", model, optimizer)
    other, _ = odd(2, frozen_in_groups=False)
    other.requires_grad_(True)
    given = [(name, param) for name, param in other.named_parameters() if name != "left_out"]
    theirs = Frugal(given, density=0.5)
    with pytest.raises(MismatchError, match=r"not projected -> projected \(frozen\.weight\)"):
        checkpoint.load(tmp_path / "saved", other, theirs)
    with pytest.warns(UserWarning, match=r"start with fresh state: .*frozen\.weight"):
        checkpoint.load(tmp_path / "saved", other, theirs, on_mismatch="refresh")
    assert torch.equal(other.frozen.weight, model.frozen.weight)
    odd_step(other, theirs)


def test_a_buffer_that_was_not_there(tmp_path: Path) -> None:
    model, optimizer = odd(1, frozen_in_groups=True)
    checkpoint.save(tmp_path / "saved", model, optimizer)
    other, theirs = odd(2, frozen_in_groups=True)
    other.register_buffer("added", torch.ones(2))
    with pytest.raises(MismatchError, match="there is no buffer/added"):
        checkpoint.load(tmp_path / "saved", other, theirs)


class Expanded(nn.Module):
    """Buffers and a frozen parameter of which one element of memory stands for several."""

    def __init__(self, value: float, own_memory: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        mask, grid = torch.full((1, 3), value).expand(2, 3), torch.arange(3.0).add(value).view(3, 1, 1).expand(3, 2, 2)
        self.register_buffer("mask", mask.clone() if own_memory else mask)
        self.register_buffer("grid", grid.clone() if own_memory else grid)
        self.bias = nn.Parameter(torch.full((1,), value).expand(5), requires_grad=False)

    def optimizer(self) -> Frugal:
        return Frugal(self.linear.named_parameters(prefix="linear"), density=0.5, projection="columns")


@pytest.mark.parametrize("then", [True, False])
@pytest.mark.parametrize("now", [True, False])
def test_expanded_buffers(then: bool, now: bool, tmp_path: Path) -> None:
    """They stay what they are, and take no values that they have no memory for."""
    model, other = Expanded(1.0, then), Expanded(2.0, now)
    checkpoint.save(tmp_path / "saved", model, model.optimizer())
    checkpoint.load(tmp_path / "saved", other, other.optimizer())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())
    assert 0 in other.bias.stride() and (0 in other.mask.stride()) is not now
    if then and not now:
        model.mask[0, 0] = 7.0  # type: ignore[operator]
        checkpoint.save(tmp_path / "saved", model, model.optimizer())
        other = Expanded(2.0)
        before = {key: value.clone() for key, value in other.state_dict().items()}
        with pytest.raises(MismatchError, match=r"buffer/mask was saved with different values"):
            checkpoint.load(tmp_path / "saved", other, other.optimizer())
        assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


ODD_BUFFERS: dict[str, Callable[[float], torch.Tensor]] = {
    "conjugated": lambda value: (torch.ones(3, dtype=torch.complex64) * value * 1j).conj(),
    "negated": lambda value: (torch.ones(2, 2, dtype=torch.complex64) * value * 1j).conj().imag,
    "made for inference": lambda value: torch.inference_mode()(torch.full)((3,), value),
    "transposed": lambda value: torch.arange(6.0).view(2, 3).mul(value).t(),
    "overlapping": lambda value: torch.arange(6.0).mul(value).as_strided((3, 3), (1, 1)),
    "channels last": lambda value: torch.full((1, 3, 4, 4), value).to(memory_format=torch.channels_last),
    "a number": torch.tensor,
    "one number everywhere": lambda value: torch.tensor(value).expand(2, 3, 4),
    "uint16": lambda value: torch.full((3,), int(value), dtype=torch.uint16),
    "uint64": lambda value: torch.full((3,), 2**63 + int(value), dtype=torch.uint64),
}
WITHOUT_BYTES: dict[str, Callable[[], torch.Tensor]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "meta": lambda: torch.ones(3, device="meta"),
}


def with_buffer(buffer: torch.Tensor, weight: float) -> tuple[nn.Module, Frugal]:
    model = nn.Linear(4, 4)
    nn.init.constant_(model.weight, weight)
    model.register_buffer("odd", buffer)
    return model, Frugal(split_parameters(model), density=0.5, projection="columns")


@pytest.mark.parametrize("kind", ODD_BUFFERS)
def test_buffers_of_all_kinds_come_back(kind: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "saved", *with_buffer(ODD_BUFFERS[kind](1.0), 1.0))
    model, optimizer = with_buffer(ODD_BUFFERS[kind](2.0), 2.0)
    checkpoint.load(tmp_path / "saved", model, optimizer)
    assert torch.equal(model.odd, ODD_BUFFERS[kind](1.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", WITHOUT_BYTES)
def test_buffers_without_plain_bytes_are_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match="buffer odd is"):
        checkpoint.save(tmp_path / "saved", *with_buffer(WITHOUT_BYTES[kind](), 1.0))
    checkpoint.save(tmp_path / "saved", *with_buffer(torch.ones(3), 1.0))
    model, optimizer = with_buffer(WITHOUT_BYTES[kind](), 2.0)
    with pytest.raises(checkpoint.CheckpointError, match="buffer odd is"):
        checkpoint.load(tmp_path / "saved", model, optimizer)
    assert model.weight[0, 0] == 2.0


@pytest.mark.parametrize("wrap", [nn.parallel.DistributedDataParallel, torch.compile, lambda model: model])
@pytest.mark.parametrize("again", [nn.parallel.DistributedDataParallel, torch.compile, lambda model: model])
def test_wrappers_come_and_go(wrap: Any, again: Any, tmp_path: Path) -> None:
    """They put components into names; a checkpoint knows parameters by their own."""

    def body(rank: int) -> None:
        for number, wrapper in enumerate((wrap, again)):
            model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 12))
            generator = torch.Generator().manual_seed(number)  # the threads share torch's own
            for param in model.parameters():
                nn.init.normal_(param, generator=generator)
            model[0].requires_grad_(False)
            wrapped = wrapper(model)
            given = [(name, param) for name, param in wrapped.named_parameters() if param.requires_grad]
            optimizer = Frugal(given, projection="columns", density=0.5)
            if number == 0:
                checkpoint.save(tmp_path / "saved", wrapped, optimizer)
                first = model
            else:
                checkpoint.load(tmp_path / "saved", wrapped, optimizer)
                assert all(torch.equal(a, b) for a, b in zip(first.parameters(), model.parameters(), strict=True))

    run_ranks(2, body)


@pytest.mark.parametrize("shards", [[Shard(0)], [Replicate(), Shard(0)], [Shard(1)]], ids=str)
def test_frozen_parameters_on_shards(shards: list[Any], tmp_path: Path) -> None:
    """FSDP2 shards what nobody trains as well: each rank has a part of it."""
    shape = (2, 2) if len(shards) == 2 else (4,)
    torch.manual_seed(0)
    whole = {"trained": torch.randn(8, 12), "frozen": torch.randn(10, 8), "stack": torch.randn(4, 6, 2)}

    def build(values: dict[str, torch.Tensor]) -> tuple[nn.Module, Frugal]:
        mesh, model = init_device_mesh("cpu", shape), nn.Module()
        for name, value in values.items():
            placed = distribute_tensor(value, mesh, shards if value.dim() == 2 else [Replicate()] * len(shape))
            model.register_parameter(name, nn.Parameter(placed, requires_grad=name == "trained"))
        return model, Frugal([{"params": [("trained", model.trained)], "projected": True}], projection="columns")

    def save(rank: int) -> None:
        model, optimizer = build(whole)
        checkpoint.save(tmp_path / "saved", model, optimizer)

    def load(rank: int) -> None:
        model, optimizer = build({name: torch.zeros_like(value) for name, value in whole.items()})
        checkpoint.load(tmp_path / "saved", model, optimizer)
        for name, param in model.named_parameters():
            assert isinstance(param, DTensor)
            want = cut_like(whole[name], param)  # type: ignore[arg-type]
            assert torch.equal(param.to_local(), want.to_local()), name

    run_ranks(4, save)
    run_ranks(4, load)
    alone = nn.ParameterDict({name: torch.zeros_like(value) for name, value in whole.items()})
    for name in ("frozen", "stack"):
        alone[name].requires_grad_(False)
    given = [{"params": [("trained", alone["trained"])], "projected": True}]
    optimizer = Frugal(given, projection="columns", process_group=None)
    checkpoint.load(tmp_path / "saved", alone, optimizer)
    assert all(torch.equal(alone[name], whole[name]) for name in whole)


# --- what it looks like -----------------------------------------------------------------------------


def test_replicas_share_the_writing(tmp_path: Path) -> None:
    """Four ranks hold everything; none writes more than half as much again as its share."""

    def body(rank: int) -> None:
        held = PLACES["DDP, 2 ranks"].build(
            {f"w{i}": torch.randn(16, 16) for i in range(16)}, {f"w{i}" for i in range(16)}, {"density": 0.25}
        )
        checkpoint.save(tmp_path / "saved", MODEL, held.optimizer)

    run_ranks(4, body)
    sizes = [(tmp_path / "saved" / f"rank{rank:05d}.safetensors").stat().st_size for rank in range(4)]
    assert max(sizes) < 1.5 * sum(sizes) / 4


def test_only_what_is_needed_is_on_disk(tmp_path: Path) -> None:
    """Each element once, whoever holds copies; partitions without their padding; moments of the selected entries."""
    case = Case("columns", "std", on_refresh="keep")
    sizes = {}
    for name in ("one process", "DDP, shared state, 3", "HSDP 2x2", "ZeRO-2, 4", "ZeRO-3, 3"):
        place = PLACES[name]
        folder = tmp_path / name

        def body(rank: int, folder: Path = folder, place: Any = place) -> None:
            held = start(place, case, torch.float64)
            held.step(gradients(torch.float64, 8)[0])
            checkpoint.save(folder, MODEL, held.optimizer)
            distributed.barrier()

        run_ranks(place.ranks, body)
        pieces = json.loads((folder / "index.json").read_text())["pieces"]
        sizes[name] = sum((r1 - r0) * (c1 - c0) for file in pieces.values() for _, r0, r1, c0, c1 in file)
    assert len(set(sizes.values())) == 1


@pytest.mark.parametrize("spans", [((1, 3), (0, 4), (0, 5), (0, 2)), ((0, 3), (1, 3), (0, 5), (0, 2)),
                                   ((2, 3), (0, 4), (2, 4), (0, 2)), ((0, 2), (1, 4), (0, 3), (1, 2))])  # fmt: skip
def test_a_part_of_many_dims_falls_into_rectangles(spans: tuple[tuple[int, int], ...]) -> None:
    """Experts' weights that nobody optimizes, and convolutions, may be cut on any dim."""
    whole = torch.arange(3 * 4 * 5 * 2).view(3, 4, 5, 2)
    at = tuple(slice(*span) for span in spans)
    local, found = whole[at].clone(), torch.zeros(3, 40, dtype=torch.int64)
    for chunk in part_chunks("w", whole.shape, Box(spans), local):
        assert chunk.shape == (3, 40)
        found[slice(*chunk.area.rows), slice(*chunk.area.cols)] += chunk.data
    expected = torch.zeros_like(whole)
    expected[at] = whole[at]
    assert torch.equal(found, expected.view(3, 40))
