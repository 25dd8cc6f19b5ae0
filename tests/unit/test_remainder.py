"""``rounding="remainder"``: bf16 weights whose steps are, bit for bit, those of fp32 masters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from building import PROJECTIONS
from torch import Tensor, nn

from frugal_dist import Frugal
from frugal_dist.planner.layouts import engine_layout
from frugal_dist.planner.plan import make_plan
from frugal_dist.step import inputs
from frugal_dist.update.remainder import joined, split_

SHAPES = {"tall": (24, 16), "wide": (10, 33), "experts": (3, 8, 12), "embedding": (23, 7), "norm": (50,), "scale": ()}
PROJECTED = ("tall", "wide", "experts")
SETTINGS: list[dict[str, Any]] = [
    *({"projection": projection, "on_refresh": "project"} for projection in PROJECTIONS),
    {"projection": "svd", "side": "full", "state_free": "sgd", "on_refresh": "keep", "state_full": "lion"},
    {"projection": "randk", "state_full": "sgdm", "state_free": "none"},
    {"projection": "columns", "density": 1.0},
    {"projection": "rows", "density": 0.0, "state_free": "sgd"},
    {"projection": "dct", "state_free": "scaled", "growth_limit": 1.01},
    {"projection": "gaussian", "combine": "scale"},
    {"projection": "svd", "state_full": "muon", "refresh_schedule": "staggered"},
    {"projection": "svd", "residual_threshold": 0.3, "basis_dtype": "bf16"},
]


def parts(exact: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 weight and the remainder."""
    weight, rest = torch.empty_like(exact, dtype=torch.bfloat16), torch.empty_like(exact, dtype=torch.int16)
    split_(weight, rest, exact)
    return weight, rest


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def start() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}


def built(weights: dict[str, Tensor], **options: Any) -> tuple[dict[str, nn.Parameter], Frugal]:
    named = {name: nn.Parameter(weight.clone()) for name, weight in weights.items()}
    groups = [
        {"params": [(n, p) for n, p in named.items() if (n in PROJECTED) is projected], "projected": projected}
        for projected in (True, False)
    ]
    given = {"density": 0.5, "update_gap": 3, "lr": 1e-2, "weight_decay": 0.1, "process_group": None, **options}
    return named, Frugal(groups, **given)


def step(named: dict[str, nn.Parameter], optimizer: Frugal, number: int) -> None:
    """With gradients that depend on what bf16 shows of the weights, as a model's do."""
    for place, parameter in enumerate(named.values()):
        generator = torch.Generator().manual_seed(100 * number + place)
        shown = parts(parameter.detach().float())[0] if parameter.dtype == torch.float32 else parameter.detach()
        grad = (0.3 * shown.float() + torch.randn(parameter.shape, generator=generator)).bfloat16()
        parameter.grad = grad.to(parameter.dtype)
    optimizer.step()


def exact(named: dict[str, nn.Parameter], optimizer: Frugal) -> dict[str, Tensor]:
    """The weights with their remainders."""
    _, inputs = optimizer.everything()
    found = {
        mat.matrix.name: joined(mat.weights[0], mat.state.store[mat.state.prefix + "remainder"]) for mat in inputs.mats
    }
    stacked = {
        name: torch.stack([found[f"{name}[{k}]"] for k in range(shape[0])])
        for name, shape in SHAPES.items()
        if name in PROJECTED and len(shape) == 3
    }
    regular = {one.name: joined(one.weight, one.state.store["remainder"]) for one in inputs.regular}
    return {**found, **stacked, **regular}


def test_every_number_comes_back_and_its_weight_is_the_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (1 << 18,), generator=generator).to(torch.int32)
    edges = [0.0, -0.0, float("inf"), -float("inf"), 3.4e38, -3.4e38, 1e-45, -1e-45, 1.0, 2.0**-126]
    numbers = torch.cat([bits.view(torch.float32), torch.tensor([*edges, float("nan")])])
    weight, rest = parts(numbers)
    known = ~numbers.isnan()
    assert same_bits(joined(weight, rest)[known], numbers[known])
    assert bool(weight[~known].isnan().all()) and bool(joined(weight, rest)[~known].isnan().all())
    cast = numbers.bfloat16()
    other = known & (weight != cast)
    ties = (numbers.view(torch.int32) & 0xFFFF) == 0x8000
    assert bool(ties[other].all())  # casts round ties to even, the split away from zero
    assert bool((weight.float().abs() >= cast.float().abs())[other].all())


def test_a_weight_from_outside_is_what_its_remainder_rounds_to() -> None:
    rest = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for value in (1.0, -3.5, 0.0, -0.0, 1e-39, 2.0**100):
        weight = torch.full(rest.shape, value).bfloat16()
        assert torch.equal(parts(joined(weight, rest))[0], weight), value


@pytest.mark.parametrize("options", SETTINGS, ids=lambda options: ", ".join(map(str, options.values())))
def test_steps_are_those_of_fp32_masters(options: dict[str, Any]) -> None:
    masters, reference = built({name: weight.float() for name, weight in start().items()}, **options)
    named, optimizer = built(start(), rounding="remainder", **options)
    for number in range(7):
        step(masters, reference, number)
        step(named, optimizer, number)
        found = exact(named, optimizer)
        for name, master in masters.items():
            assert same_bits(found[name], master.detach()), (name, number)
            assert torch.equal(named[name].detach(), parts(master.detach())[0]), (name, number)


def test_slices_of_regular_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    masters, reference = built({name: weight.float() for name, weight in start().items()}, projection="columns")
    monkeypatch.setattr(inputs, "SLICE", 30)
    named, optimizer = built(start(), rounding="remainder", projection="columns")
    for number in range(3):
        step(masters, reference, number)
        step(named, optimizer, number)
    found = exact(named, optimizer)
    assert all(same_bits(found[name], masters[name].detach()) for name in SHAPES)


@pytest.mark.parametrize("projection", ["svd", "columns"])
def test_resumes_exactly(projection: str) -> None:
    """In ``state_dict``, a copy, and a step later."""
    named, optimizer = built(start(), rounding="remainder", projection=projection)
    for number in range(4):
        step(named, optimizer, number)
    again, resumed = built({name: parameter.detach() for name, parameter in named.items()}, rounding="remainder",
                           projection=projection)  # fmt: skip
    resumed.load_state_dict(optimizer.state_dict())
    for number in range(4, 7):
        step(named, optimizer, number)
        step(again, resumed, number)
    one, other = exact(named, optimizer), exact(again, resumed)
    assert all(same_bits(one[name], other[name]) for name in one)
    rests = [value for store in resumed.state.values() for key, value in store.items() if key.endswith("remainder")]
    assert len(rests) == len(SHAPES) + 2 and all(rest.dtype == torch.int16 for rest in rests)
    assert any(bool(rest.any()) for rest in rests)


@pytest.mark.parametrize("change", ["gone", "cast"])
def test_a_loaded_state_without_it_is_refused(change: str) -> None:
    named, optimizer = built(start(), rounding="remainder", projection="columns")
    step(named, optimizer, 0)
    saved = optimizer.state_dict()
    store = saved["state"][0]
    rest = store.pop("remainder")
    if change == "cast":
        store["remainder"] = rest.bfloat16()
    _, other = built(start(), rounding="remainder", projection="columns")
    with pytest.raises(ValueError, match=r"tall: the loaded state has .* rounding='remainder' needs int16"):
        other.load_state_dict(saved)


def test_rounding_may_change_between_steps() -> None:
    """It begins with what bf16 has: as masters that are made of the weights of that moment."""
    named, optimizer = built(start(), projection="columns", on_refresh="keep", weight_decay=0.0)
    for number, rounding in enumerate(("nearest", "remainder", "stochastic", "remainder", "remainder")):
        if number == 3:
            copy = {name: parameter.detach().float() for name, parameter in named.items()}
            masters, reference = built(copy, projection="columns", on_refresh="keep", weight_decay=0.0)
            reference.load_state_dict(optimizer.state_dict())
        for group in optimizer.param_groups:
            group["rounding"] = rounding
        step(named, optimizer, number)
        if number >= 3:
            step(masters, reference, number)
        kept = [key for store in optimizer.state.values() for key in store if key.endswith("remainder")]
        assert len(kept) == (len(SHAPES) + 2 if rounding == "remainder" else 0)
    found = exact(named, optimizer)
    assert all(same_bits(found[name], master.detach()) for name, master in masters.items())


def test_frozen_parameters_have_none_until_they_are_trained() -> None:
    named, optimizer = built(start(), rounding="remainder", projection="svd")
    named["tall"].requires_grad_(False)
    named["norm"].requires_grad_(False)

    def kept() -> set[str]:
        return {n for n, p in named.items() if any(key.endswith("remainder") for key in optimizer.state.get(p, {}))}

    for number in range(5):
        if number == 3:
            named["tall"].requires_grad_(True)
            named["norm"].requires_grad_(True)
        for place, parameter in enumerate(named.values()):
            grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place)).bfloat16()
            parameter.grad = grad if parameter.requires_grad else None
        optimizer.step()
        assert kept() == (set(SHAPES) if number >= 3 else set(SHAPES) - {"tall", "norm"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("name", ["tall", "norm"])
def test_other_dtypes_are_refused_by_name(dtype: torch.dtype, name: str) -> None:
    weights = start()
    weights[name] = weights[name].to(dtype)
    named, optimizer = built(weights, rounding="remainder", projection="columns")
    word = str(dtype).removeprefix("torch.")
    with pytest.raises(
        ValueError, match=f"{name} is {word}, but rounding='remainder' is made for bfloat16 .*DeepSpeed"
    ):
        step(named, optimizer, 0)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_the_planner_counts_it(projection: str) -> None:
    named, optimizer = built(start(), rounding="remainder", projection=projection)
    step(named, optimizer, 0)
    empty = {name: weight.to("meta") for name, weight in start().items()}
    plan = make_plan(built(empty, rounding="remainder", projection=projection)[1], engine_layout("single"), 1)
    rests = sum(weight.numel() for weight in named.values()) * 2
    assert plan.worst.remainders == rests
    based = projection in ("svd", "dct", "random")
    assert plan.working == (16 if based else 8) * 24 * 16  # of the largest matrix: fp32 copies, and what a basis leaves
    assert plan.states == [plan.worst.state] == [optimizer.state_bytes().held]
