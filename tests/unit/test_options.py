"""Hyperparameters, parameter groups and names: what is accepted, what is refused, and how the error reads."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import pickle
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from building import PROJECTIONS, build, counters, parameters_of, set_grads, train, weight, weights
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import _stateful_to_state_dict

from frugal_dist import Frugal, FrugalConfig, checkpoint, preset, split_parameters
from frugal_dist.config import CHOICES, HYPERPARAMETERS, OLD_NAMES, TAKEN_UP
from frugal_dist.training.optimizers import AnyOptimizer

# refusals


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("projection", "svdd", "'svd'"),
        ("projection", "column", "'columns'"),
        ("projection", "block_wise", "'blockwise'"),
        ("side", "rigth", "'right'"),
        ("block_order", "ascend", "'ascending'"),
        ("state_full", "adam", "'adamw'"),
        ("state_free", "signsgd", "'sign'"),
        ("on_refresh", "projekt", "'project'"),
        ("refresh_schedule", "stagger", "'staggered'"),
        ("matmul", "bf16", "'bf16x3'"),
    ],
)
def test_a_misspelt_choice_is_told_what_was_meant(key: str, value: str, hint: str) -> None:
    with pytest.raises(ValueError, match=key) as error:
        build({"w": weight(8, 6)}, **{key: value})
    assert hint in str(error.value)
    assert value in str(error.value)


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("projection", ["svd", "dct", "random", "gaussian", "randperm", "columns", "rows", "randk", "blockwise"]),
        ("side", ["std", "reverse_std", "right", "left", "full"]),
        ("block_order", ["random", "ascending", "descending", "mirror"]),
        ("state_full", ["adamw", "lion", "sgdm", "muon", "normalized_momentum"]),
        (
            "state_free",
            ["sign", "sgd", "none", "softsign", "normalized", "normalized_columns", "sinkhorn", "scaled", "racs"],
        ),
        ("on_refresh", ["reset", "keep", "project"]),
    ],
)
def test_an_unknown_choice_is_told_all_that_are_allowed(key: str, allowed: list[str]) -> None:
    with pytest.raises(ValueError, match=key) as error:
        build({"w": weight(8, 6)}, **{key: "zzz"})
    assert all(choice in str(error.value) for choice in allowed)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", -1e-3),
        ("lr", float("nan")),
        ("lr", "0.001"),
        ("betas", (0.9,)),
        ("betas", (0.9, 1.0)),
        ("betas", (-0.1, 0.9)),
        ("eps", -1.0),
        ("weight_decay", -0.1),
        ("weight_decay", float("inf")),
        ("density", 1.5),
        ("density", -0.25),
        ("density", None),
        ("density", True),
        ("update_gap", 0),
        ("update_gap", 2.5),
        ("update_gap", "200"),
        ("momentum", -0.9),
        ("projected_lr_scale", -1.0),
        ("state_free_lr_scale", -1.0),
        ("seed", -1),
        ("seed", 0.5),
    ],
)
def test_a_bad_number_is_refused_and_named(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key):
        build({"w": weight(8, 6)}, **{key: value})
    with pytest.raises(ValueError, match=key):
        Frugal([{"params": [("w", weight(8, 6))], "projected": True, key: value}])


def test_an_unknown_key_of_a_group_is_refused_and_the_right_one_suggested() -> None:
    with pytest.raises(ValueError, match="densty") as error:
        Frugal([{"params": [("w", weight(8, 6))], "projected": True, "densty": 0.1}])
    assert "'density'" in str(error.value)


def test_maximize_is_not_offered() -> None:
    """Silently minimising would be the worst answer."""
    with pytest.raises((TypeError, ValueError), match="maximize"):
        build({"w": weight(8, 6)}, maximize=True)
    with pytest.raises(ValueError, match="maximize"):
        Frugal([{"params": [("w", weight(8, 6))], "projected": True, "maximize": True}])


FOREIGN_ARGUMENTS = {
    "fused": "kernels", "foreach": "kernels", "capturable": "CUDA graph", "differentiable": "differentiated",
    "maximize": "negate the loss", "amsgrad": "maximum", "nesterov": "Nesterov", "rank": "density", "scale": "lr_scale",
    "update_proj_gap": "update_gap", "proj_type": "side", "beta1": "betas",
    "wd": "weight_decay", "torch_adam": "which AdamW", "max_grad_norm": "gradient_clipping", "freeze_step": "1-bit",
}  # fmt: skip


@pytest.mark.parametrize(("key", "word"), FOREIGN_ARGUMENTS.items())
def test_arguments_of_other_optimizers_get_a_sentence(key: str, word: str) -> None:
    with pytest.raises(ValueError, match=rf"Frugal\({key}=8\): .*{word}"):
        build({"w": weight(8, 6)}, **{key: 8})


def test_all_that_is_wrong_is_named_at_once() -> None:
    with pytest.raises(ValueError, match="amsgrad") as error:
        build({"w": weight(8, 6)}, amsgrad=True, torch_adam=True, adam_w_mode=False, weight_decay=0.1, densty=1, quux=2)
    text = str(error.value)
    for told in ("(amsgrad=True): ", "(torch_adam=True): ", "adam_w_mode=False: ", "'densty'. Did you mean 'density'?"):
        assert told in text
    assert "unknown key 'quux'. Known keys: " in text
    assert text.count("Known keys") == 1


def test_arguments_of_torch_that_are_off_mean_nothing() -> None:
    off = {"fused": False, "foreach": None, "amsgrad": False, "maximize": False, "capturable": False, "nesterov": False}
    optimizer = build({"w": weight(8, 6)}, **off)
    assert not set(off) & set(optimizer.param_groups[0])


def test_arguments_of_others_that_say_what_is_done_here() -> None:
    """Whoever comes from AdamW may hand over all of its defaults, or the JSON of DeepSpeed's Adam."""
    defaults = torch.optim.AdamW([weight(2)], weight_decay=0.1).defaults
    assert build({"w": weight(8, 6)}, **defaults).param_groups[0]["weight_decay"] == 0.1
    build({"w": weight(8, 6)}, adam_w_mode=True, bias_correction=True, decoupled_weight_decay=False)
    with pytest.raises(ValueError, match="adam_w_mode=False: there is no L2 penalty"):
        build({"w": weight(8, 6)}, adam_w_mode=False, weight_decay=0.1)
    with pytest.raises(ValueError, match="bias_correction=False: moments are always corrected"):
        build({"w": weight(8, 6)}, bias_correction=False)


@pytest.mark.parametrize("key", ["lr", "update_gap", "seed"])
@pytest.mark.parametrize(
    "value", [(1e-30, 1e-3), {}, [1], math.nan, math.inf, True, torch.ones(2), np.array([1.0, 2.0])]
)
def test_what_is_no_number_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{key}=.* must be"):
        FrugalConfig(**{key: value})


def test_numbers_of_torch_and_numpy_are_numbers(tmp_path: Path) -> None:
    """Schedules written with NumPy leave its numbers in the groups; a checkpoint keeps Python's."""
    model = nn.Linear(6, 8)
    optimizer = Frugal(model.named_parameters(), projection="columns", update_gap=np.int64(3), process_group=None)
    for group in optimizer.param_groups:
        group.update(lr=np.float32(0.25), betas=(torch.tensor(0.5), np.float64(0.75)), mine=np.int32(7))
    checkpoint.save(tmp_path / "saved", model, optimizer)
    for group in optimizer.param_groups:
        group.update(lr=0.0, mine=0)
    checkpoint.load(tmp_path / "saved", model, optimizer)
    assert [(group["lr"], group["mine"]) for group in optimizer.param_groups] == [(0.25, 7)]


@pytest.mark.parametrize(
    "key",
    ["initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr", "lr_scale", "lr_mult", "rho", "name",
     "no_weight_decay", "use_muon", "scale", "layer", "fused", "foreach"],
)  # fmt: skip
def test_keys_of_schedulers_and_programs_in_a_group_are_theirs(key: str) -> None:
    plain, marked = (build({"w": weight(8, 6)}) for _ in range(2))
    marked = Frugal([{**marked.param_groups[0], key: 0.5}])
    train(plain, 1, 4)
    train(marked, 1, 4)
    assert marked.param_groups[0][key] == 0.5
    assert torch.equal(weights(plain)[0], weights(marked)[0])


@pytest.mark.parametrize(
    "key", ["amsgrad", "maximize", "capturable", "differentiable", "nesterov", "dampening", "rank"]
)
def test_keys_in_a_group_that_would_change_the_step_are_refused(key: str) -> None:
    group = {"params": [("w", weight(8, 6))], "projected": True}
    with pytest.raises(ValueError, match=f"Parameter group: {key}=1"):
        Frugal([{**group, key: 1}])
    with pytest.raises(ValueError, match="L2"):
        Frugal([{**group, "decoupled_weight_decay": False, "weight_decay": 0.1}])


def layer_decay(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """What the schedules of BEiT, MAE, Swin and timm do."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def test_lr_scale_in_a_group_is_timm_s_and_counts_once() -> None:
    """microsoft/Swin-Transformer#248: it is in "lr" already."""

    def groups() -> list[dict[str, Any]]:
        return [
            {"params": [("a.weight", weight(8, 6))], "lr_scale": 0.25, "weight_decay": 0.05},
            {"params": [("b.weight", weight(6, 8, seed=1)), ("b.bias", weight(5))], "lr_scale": 0.5},
        ]

    ours = Frugal(groups(), **preset("adamw"))
    theirs = torch.optim.AdamW(groups(), weight_decay=0.0)
    for step in range(1, 6):
        for optimizer in (ours, theirs):
            layer_decay(optimizer, 0.01 / step)
            train(optimizer, step, step)
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert [group["lr_scale"] for group in ours.state_dict()["param_groups"]] == [0.25, 0.5]


def test_the_old_name_of_projected_lr_scale() -> None:
    """As an argument, in a preset and in what an earlier version saved."""
    want = build({"w": weight(8, 6)}, projected_lr_scale=0.25)
    for optimizer in (build({"w": weight(8, 6)}, lr_scale=0.25), build({"w": weight(8, 6)}, **preset("galore"))):
        assert optimizer.param_groups[0]["projected_lr_scale"] == 0.25
    assert preset("galore", lr_scale=0.5)["projected_lr_scale"] == 0.5
    assert FrugalConfig(lr_scale=0.5) == FrugalConfig(projected_lr_scale=0.5)
    assert dataclasses.replace(FrugalConfig(lr_scale=0.5), lr=1.0).projected_lr_scale == 0.5
    with pytest.raises(ValueError, match="one of them"):
        build({"w": weight(8, 6)}, lr_scale=0.5, projected_lr_scale=0.25)
    train(want, 1, 2)
    saved = copy.deepcopy(want.state_dict())
    (group,) = saved["param_groups"]
    group["lr_scale"] = group.pop("projected_lr_scale")
    loaded = build({"w": weight(8, 6)})
    loaded.load_state_dict(saved)
    assert loaded.param_groups[0]["projected_lr_scale"] == 0.25
    assert "lr_scale" not in loaded.param_groups[0]


# names in groups


def named_model() -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"q_proj": torch.nn.Linear(6, 8), "norm": torch.nn.LayerNorm(8)}).double()


def test_names_in_torch_s_param_names_are_names() -> None:
    """As SAM and others hand on the groups that torch made of named_parameters()."""
    want = Frugal(named_model().named_parameters(), density=0.5)
    torch_s = torch.optim.AdamW(named_model().named_parameters())
    found = Frugal(torch_s.param_groups, density=0.5, lr=1e-3)
    assert found.parameter_report() == want.parameter_report()
    later = Frugal(want.param_groups, density=0.5)  # a second stage, made of the first one's groups
    assert later.parameter_report() == want.parameter_report()
    later.add_param_group({"params": [weight(3)], "projected": False})
    assert later.originals[-1].name == "group1.0"
    assert want.state_dict()["param_groups"][0]["param_names"] == [original.name for original in want.originals]
    asked: Any = _stateful_to_state_dict({"optimizer": want})["optimizer"]  # by torch.distributed.checkpoint
    assert asked["param_groups"][0]["param_names"] == [original.name for original in want.originals]
    with pytest.raises(ValueError, match="param_names has 1 names for 2"):
        Frugal([{"params": [weight(2, 2), weight(2)], "param_names": ["a"]}])


def test_a_group_whose_projected_is_misspelled_is_refused() -> None:
    with pytest.raises(ValueError, match="Did you mean 'projected'"):
        Frugal([{"params": [("w", weight(8, 6))], "project": True}])


def test_parameters_without_names_need_to_be_told_whether_they_are_projected() -> None:
    with pytest.raises(ValueError, match="named_parameters"):
        Frugal([weight(8, 6)])
    with pytest.raises(ValueError, match="projected"):
        Frugal([{"params": [weight(8, 6)]}])


def test_parameters_without_names_but_with_projected_work() -> None:
    w, b = weight(8, 6), weight(5)
    optimizer = Frugal(
        [{"params": [w], "projected": True}, {"params": [b], "projected": False}], density=0.5, update_gap=3
    )
    train(optimizer, 1, 4)
    assert counters(optimizer, w)["refreshes"] == 2


def test_two_parameters_of_one_name_are_refused() -> None:
    """Selections and checkpoints go by name."""
    with pytest.raises(ValueError, match=r"layer\.w"):
        Frugal([{"params": [("layer.w", weight(8, 6)), ("layer.w", weight(8, 6))], "projected": True}])
    with pytest.raises(ValueError, match=r"layer\.w"):
        Frugal(
            [
                {"params": [("layer.w", weight(8, 6))], "projected": True},
                {"params": [("layer.w", weight(5))], "projected": False},
            ]
        )


def test_one_parameter_in_two_groups_is_refused_as_in_torch() -> None:
    w = weight(8, 6)
    with pytest.raises(ValueError, match="more than one parameter group"):
        Frugal([{"params": [("a", w)], "projected": True}, {"params": [("b", w)], "projected": False}])


@pytest.mark.parametrize("shape", [(5,), (), (2, 3, 4, 5)])
def test_only_matrices_and_stacks_of_matrices_can_be_projected(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="norm"):
        train(build({"norm": weight(*shape)}), 1, 1)


def test_an_odd_number_of_blocks_in_mirror_order_is_refused() -> None:
    matrices = {f"w{i}": weight(4, 3, seed=i) for i in range(4)}
    with pytest.raises(ValueError, match="mirror"):
        train(build(matrices, projection="blockwise", block_order="mirror", density=0.25), 1, 1)


# groups


def test_model_parameters_by_name_alone() -> None:
    """named_parameters() is enough: Linear weights by their names, the rest regular."""
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(6, 8), "norm": torch.nn.LayerNorm(8)}).double()
    optimizer = Frugal(model.named_parameters(), density=0.5, update_gap=3)
    train(optimizer, 1, 4)
    named = dict(model.named_parameters())
    assert "basis" in optimizer.state[named["q_proj.weight"]]
    for name in ("q_proj.bias", "norm.weight", "norm.bias"):
        assert "basis" not in optimizer.state[named[name]]
        assert optimizer.state[named[name]]["exp_avg"].shape == named[name].shape


@pytest.mark.parametrize("other", ["svd", "rows", "blockwise"])
def test_a_group_has_its_own_hyperparameters(other: str) -> None:
    """Two groups in one optimizer are two optimizers."""
    first: dict[str, Any] = {
        "projection": "columns",
        "lr": 0.02,
        "density": 0.25,
        "update_gap": 2,
        "on_refresh": "keep",
    }
    second: dict[str, Any] = {
        "projection": other, "state_full": "lion", "state_free": "sgd", "betas": (0.8, 0.9), "weight_decay": 0.1,
        "density": 1.0, "projected_lr_scale": 0.5, "state_free_lr_scale": 0.1,
    }  # fmt: skip
    together = Frugal(
        [
            {"params": [("a", weight(8, 6))], "projected": True, **first},
            {"params": [("b", weight(6, 8, seed=1))], "projected": True, **second},
        ],
        lr=0.01,
        update_gap=3,
        seed=3,
    )
    apart = [
        Frugal([{"params": [("a", weight(8, 6))], "projected": True}], seed=3, **first),
        Frugal(
            [{"params": [("b", weight(6, 8, seed=1))], "projected": True}],
            **{"lr": 0.01, "update_gap": 3, "seed": 3, **second},
        ),
    ]
    for step in range(1, 8):
        set_grads(together, step)
        for optimizer, source in zip(apart, parameters_of(together), strict=True):
            parameters_of(optimizer)[0].grad = source.grad
        together.step()
        for optimizer, source in zip(apart, parameters_of(together), strict=True):
            optimizer.step()
            assert torch.equal(parameters_of(optimizer)[0], source)


def test_blocks_count_per_group() -> None:
    """Half of each group's matrices is active, not half of all."""
    groups = [{"params": [(f"{g}{i}", weight(4, 3, seed=i)) for i in range(2)], "projected": True} for g in ("a", "b")]
    optimizer = Frugal(groups, projection="blockwise", block_order="ascending", density=0.5, update_gap=1)
    train(optimizer, 1, 1)
    active = [stateful_numel(optimizer, p) > 0 for p in parameters_of(optimizer)]
    assert active == [True, False, True, False]
    train(optimizer, 2, 2)
    active = [stateful_numel(optimizer, p) > 0 for p in parameters_of(optimizer)]
    assert active == [False, True, False, True]


def stateful_numel(optimizer: Frugal, parameter: torch.Tensor) -> int:
    state = optimizer.state[parameter]
    return state["exp_avg"].numel() if "exp_avg" in state else 0


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_group_added_later(projection: str) -> None:
    """As when layers are unfrozen one by one: the new group starts at its own first step."""
    late = weight(6, 8, seed=1)
    alone = torch.nn.Parameter(late.detach().clone())
    optimizer = build({"w": weight(8, 6)}, projection=projection, density=1.0 if projection != "svd" else 0.5)
    train(optimizer, 1, 2)
    saved = optimizer.state_dict()
    optimizer.add_param_group({"params": [("late", late)], "projected": True, "lr": 0.02})
    assert same_state(optimizer.state_dict(), saved), "it is saved as before, also ahead of the next step"
    reference = build({"late": alone}, projection=projection, density=1.0 if projection != "svd" else 0.5, lr=0.02)
    for step in range(3, 9):
        set_grads(optimizer, step)
        alone.grad = late.grad
        optimizer.step()
        reference.step()
        assert torch.equal(late, alone)


def test_a_group_added_later_is_checked_like_the_first() -> None:
    optimizer = build({"w": weight(8, 6)})
    with pytest.raises(ValueError, match="densty"):
        optimizer.add_param_group({"params": [("v", weight(8, 6))], "projected": True, "densty": 0.1})
    with pytest.raises(ValueError, match="'w'"):
        optimizer.add_param_group({"params": [("w", weight(8, 6))], "projected": True})
    with pytest.raises(ValueError, match="density"):
        optimizer.add_param_group({"params": [("v", weight(8, 6))], "projected": True, "density": 7})
    assert len(optimizer.param_groups) == 1
    train(optimizer, 1, 2)  # as if nothing had been tried
    optimizer.add_param_group({"params": [("v", weight(8, 6))], "projected": True})
    train(optimizer, 3, 4)


def test_a_tied_parameter_is_updated_once() -> None:
    first, second = torch.nn.Linear(6, 6).double(), torch.nn.Linear(6, 6).double()
    second.weight = first.weight
    model = torch.nn.ModuleDict({"up_proj": first, "down_proj": second})
    alone = torch.nn.Parameter(first.weight.detach().clone())
    optimizer = Frugal(model.named_parameters(), density=0.5, update_gap=3)
    reference = build({"up_proj.weight": alone}, lr=1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        x = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(3, 6)
        model["down_proj"](model["up_proj"](x).tanh()).square().sum().backward()
        assert first.weight.grad is not None
        alone.grad = first.weight.grad.clone()
        optimizer.step()
        reference.step()
        assert torch.equal(first.weight, alone)


# things that change between steps


def test_a_learning_rate_schedule() -> None:
    optimizer = build({"w": weight(8, 6)}, {"b": weight(5)}, projection="columns", lr=0.1)
    manual = build({"w": weight(8, 6)}, {"b": weight(5)}, projection="columns", lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6, eta_min=0.0)
    for step in range(1, 7):
        for group, source in zip(manual.param_groups, optimizer.param_groups, strict=True):
            group["lr"] = float(source["lr"])
        train(optimizer, step, step)
        train(manual, step, step)
        schedule.step()
        for a, b in zip(weights(optimizer), weights(manual), strict=True):
            assert torch.equal(a, b)
    assert optimizer.param_groups[0]["lr"] < 0.01
    before = weights(optimizer)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.0
    train(optimizer, 7, 7)
    for a, b in zip(before, weights(optimizer), strict=True):
        assert torch.equal(a, b), "lr = 0 moves nothing"


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=8)


def cyclic(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CyclicLR(optimizer, base_lr=0.01, max_lr=0.1, step_size_up=2)


@pytest.mark.parametrize("schedule", [one_cycle, cyclic])
def test_schedules_that_cycle_momentum_cycle_what_the_rule_has(schedule: Any) -> None:
    """pytorch#73910: betas for AdamW, momentum for SGD, also where groups have different rules."""
    rules = {
        "sgdm": torch.optim.SGD([weight(8, 6)], momentum=0.9),
        "adamw": torch.optim.AdamW([weight(8, 6)], eps=1e-8),
    }
    for theirs in rules.values():
        theirs.param_groups[0]["weight_decay"] = 0.0
    plain = {"projection": "columns", "density": 1.0, "on_refresh": "keep"}
    ours = {rule: build({"w": weight(8, 6)}, state_full=rule, **plain) for rule in rules}
    mixed = [
        Frugal(
            [{"params": [(rule, weight(8, 6))], "projected": True, "state_full": rule} for rule in rules],
            state_full=first,
            **plain,
        )
        for first in rules
    ]
    optimizers = [*rules.values(), *ours.values(), *mixed]
    schedules = [schedule(optimizer) for optimizer in optimizers]
    for step in range(1, 8):
        set_grads(ours["sgdm"], step)
        for optimizer in optimizers:
            for parameter in parameters_of(optimizer):
                parameter.grad = parameters_of(ours["sgdm"])[0].grad
            optimizer.step()
        for one in schedules:
            one.step()
    want = [weights(optimizer)[0] for optimizer in rules.values()]
    for found in (weights(ours["sgdm"]) + weights(ours["adamw"]), *map(weights, mixed)):
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_learning_rate_that_is_a_tensor() -> None:
    """torch allows it (compiled schedules do it)."""
    number, tensor = (build({"w": weight(8, 6)}, {"b": weight(5)}) for _ in range(2))
    for group in tensor.param_groups:
        group["lr"] = torch.tensor(0.01, dtype=torch.float64)
    train(number, 1, 4)
    train(tensor, 1, 4)
    for a, b in zip(weights(number), weights(tensor), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("on_refresh", ["reset", "keep", "project"])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_density_that_changes_takes_effect_at_the_next_refresh(projection: str, on_refresh: str) -> None:
    matrices = {f"w{i}": weight(8, 6, seed=i) for i in range(4)}
    optimizer = build(matrices, projection=projection, on_refresh=on_refresh, density=0.5)
    changed = build(
        {name: torch.nn.Parameter(w.detach().clone()) for name, w in matrices.items()},
        projection=projection, on_refresh=on_refresh, density=0.5,
    )  # fmt: skip
    train(optimizer, 1, 3)
    train(changed, 1, 2)
    changed.param_groups[0]["density"] = 0.75
    train(changed, 3, 3)
    for a, b in zip(weights(optimizer), weights(changed), strict=True):
        assert torch.equal(a, b), "not before the refresh"
    before = sum(stateful_numel(changed, p) for p in parameters_of(changed))
    train(changed, 4, 9)
    after = sum(stateful_numel(changed, p) for p in parameters_of(changed))
    assert after > before
    assert all(torch.isfinite(w).all() for w in weights(changed))


def test_a_bad_value_set_between_steps_is_noticed() -> None:
    optimizer = build({"w": weight(8, 6)})
    train(optimizer, 1, 1)
    optimizer.param_groups[0]["density"] = 2.0
    with pytest.raises(ValueError, match="density"):
        train(optimizer, 2, 4)


# hyperparameters that change while training

CHANGED: dict[str, Any] = {
    "lr": 0.02, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.3, "density": 0.75, "update_gap": 2,
    "projection": "columns", "side": "left", "block_order": "descending", "state_full": "lion", "state_free": "sgd",
    "combine": "scale", "growth_limit": 1.01,
    "momentum": 0.5, "moments": "8bit", "projected_lr_scale": 0.5, "state_free_lr_scale": 0.5, "on_refresh": "project",
    "svd_method": "gram64",
    "basis_dtype": "bf16", "matmul": "bf16x3", "rounding": "stochastic", "refresh_schedule": "staggered",
    "compute_layout": "owner",
    "residual_threshold": 0.4, "seed": 7,
}  # fmt: skip


def fixed_keys(projection: str) -> set[str]:
    """What the state of a matrix depends on."""
    fixed = {"projection", "state_full", "moments", "compute_layout"}
    fixed |= {"side"} if projection in ("svd", "dct", "random", "randperm") else set()
    fixed |= {"seed"} if projection not in ("svd", "dct", "random") else set()
    return fixed | ({"block_order"} if projection == "blockwise" else set())


def eight(**options: Any) -> Frugal:
    return build({f"w{i}": weight(12, 8, seed=i) for i in range(4)}, {"norm": weight(5, seed=9)}, **options)


def test_for_every_hyperparameter_it_is_said_when_a_change_is_taken_up() -> None:
    assert list(TAKEN_UP) == list(HYPERPARAMETERS) == list(CHANGED)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_what_state_depends_on_cannot_change_under_it(projection: str) -> None:
    """Refused by name before anything moves; saved and copied as it was made; set back, the run goes on as if nothing
    had been.
    """
    optimizer, straight = (eight(projection=projection, density=0.5) for _ in range(2))
    train(optimizer, 1, 2)
    train(straight, 1, 4)
    for key in sorted(fixed_keys(projection)):
        then, value = optimizer.param_groups[0][key], CHANGED[key]
        value = "rows" if value == projection else value
        before, state = weights(optimizer), copy.deepcopy(optimizer.state_dict())
        optimizer.param_groups[0][key] = value
        for other in (optimizer, copy.deepcopy(optimizer)):
            with pytest.raises(ValueError, match=rf"param_groups\[0\]: {key} was changed from {then!r} to {value!r}"):
                train(other, 3, 3)
        saved = optimizer.state_dict()
        assert same_state(saved, state)
        assert saved["param_groups"] == state["param_groups"]
        assert all(torch.equal(a, b) for a, b in zip(weights(optimizer), before, strict=True))
        optimizer.param_groups[0][key] = then
    train(optimizer, 3, 4)
    assert all(torch.equal(a, b) for a, b in zip(weights(optimizer), weights(straight), strict=True))


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_what_changes_between_steps_is_the_same_in_the_live_and_in_the_resumed_run(projection: str) -> None:
    fixed = fixed_keys(projection) | {"combine", "growth_limit"}  # refused with most other settings
    fixed |= {"svd_method"} if projection != "svd" else set()
    for key in CHANGED:
        if key in fixed or (key == "refresh_schedule" and projection == "blockwise"):
            continue
        live, unchanged, resumed = (eight(projection=projection, update_gap=4) for _ in range(3))
        train(live, 1, 2)
        train(unchanged, 1, 3)
        for group in live.param_groups:
            group[key] = CHANGED[key]
        with torch.no_grad():
            for a, b in zip(parameters_of(live), parameters_of(resumed), strict=True):
                b.copy_(a)
        resumed.load_state_dict(copy.deepcopy(live.state_dict()))
        train(live, 3, 3)
        train(resumed, 3, 3)
        if TAKEN_UP[key] == "refresh":
            assert all(torch.equal(a, b) for a, b in zip(weights(live), weights(unchanged), strict=True)), key
        train(live, 4, 10)
        train(resumed, 4, 10)
        assert all(torch.equal(a, b) for a, b in zip(weights(live), weights(resumed), strict=True)), key


def test_settings_may_change_until_there_is_state() -> None:
    optimizer = eight(projection="svd")
    optimizer.param_groups[0].update(projection="columns", seed=3)
    straight = eight(projection="columns")
    straight.param_groups[0]["seed"] = 3
    train(optimizer, 1, 5)
    train(straight, 1, 5)
    assert all(torch.equal(a, b) for a, b in zip(weights(optimizer), weights(straight), strict=True))


def test_a_density_that_leaves_nothing_is_refused_before_anything_moves() -> None:
    optimizer = build({"large": weight(40, 30), "small": weight(3, 2)}, projection="columns", density=0.5)
    train(optimizer, 1, 3)
    before = weights(optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[0]["density"] = 0.3
    with pytest.raises(ValueError, match="small is 3x2"):
        train(optimizer, 4, 4)
    assert all(torch.equal(a, b) for a, b in zip(weights(optimizer), before, strict=True))
    assert same_state(optimizer.state_dict(), state)


def test_regular_parameters_depend_on_their_rule_alone() -> None:
    optimizer = eight(projection="svd")
    train(optimizer, 1, 2)
    optimizer.param_groups[1].update(projection="columns", side="left", seed=5)
    train(optimizer, 3, 4)
    optimizer.param_groups[1]["state_full"] = "sgdm"
    with pytest.raises(ValueError, match=r"param_groups\[1\]: state_full"):
        train(optimizer, 5, 5)


# the interface of torch.optim.Optimizer


def test_a_closure_is_called_once_with_gradients_on_and_its_loss_returned() -> None:
    w = weight(8, 6)
    optimizer = build({"w": w})
    calls = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        calls.append(1)
        return loss

    expected = float(w.detach().square().sum())
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert len(calls) == 1
    assert loss is not None
    assert float(loss.detach()) == expected
    assert float(w.detach().square().sum()) < expected


def test_step_hooks_are_called() -> None:
    optimizer = build({"w": weight(8, 6)})
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(optimizer, 1, 1)
    assert seen == ["before", "after"]


def same_state(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    flat = [{(n, k): v for n, store in each["state"].items() for k, v in store.items()} for each in (found, wanted)]
    return flat[0].keys() == flat[1].keys() and all(torch.equal(v, flat[1][key]) for key, v in flat[0].items())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_copy_of_the_optimizer_goes_on_alike(projection: str, how: str) -> None:
    optimizer = build({"a": weight(8, 6), "b": weight(6, 8, seed=1)}, {"c": weight(5)}, projection=projection)
    train(optimizer, 1, 5)
    copied = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert same_state(copied.state_dict(), optimizer.state_dict()), "a copy can be saved before its first step"
    train(optimizer, 6, 9)
    train(copied, 6, 9)
    for a, b in zip(weights(optimizer), weights(copied), strict=True):
        assert a.data_ptr() != b.data_ptr()
        assert torch.equal(a, b)


def test_the_printed_form_shows_the_hyperparameters() -> None:
    text = repr(build({"w": weight(8, 6)}, projection="columns", density=0.5))
    assert "Frugal" in text
    assert "columns" in text
    assert "0.5" in text


def test_wrappers_do_not_change_names() -> None:
    """DDP and torch.compile put components into names; seeds and saved state must not depend on them."""
    named = [(f"module._orig_mod.layers.{i}.q_proj.weight", torch.nn.Parameter(torch.ones(8, 8))) for i in range(2)]
    rows = Frugal(named).parameter_report_rows()
    assert [row.name for row in rows] == ["layers.0.q_proj.weight", "layers.1.q_proj.weight"]


def listed_in_the_reference() -> dict[str, Callable[..., Any]]:
    """What can be called among all that docs/api.md shows, by name: entries, their members and the methods of these."""
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    found: dict[str, Any] = {}
    for path, options in re.findall(r"^::: (\S+)\n((?: {4}.*\n)*)", text, flags=re.M):
        members = re.findall(r"[\w.]+", options.partition("members:")[2])
        entry = pkgutil.resolve_name(path)
        names = [f"{path}.{member}" for member in members] if inspect.ismodule(entry) else [path]
        for name in names:
            found[name] = pkgutil.resolve_name(name)
            if inspect.isclass(found[name]) and name != path:
                own = inspect.getmembers(found[name], inspect.isfunction)
                inherited = {key for base in found[name].__mro__[1:] for key in vars(base)}
                found |= {f"{name}.{key}": it for key, it in own if key[0] != "_" and key not in inherited}
        if inspect.isclass(entry):
            found |= {f"{path}.{member}": getattr(entry, member) for member in members}
    errors = [name for name, one in found.items() if inspect.isclass(one) and issubclass(one, Exception)]
    return {name: one for name, one in found.items() if name not in errors and callable(one)}


REFERENCE = listed_in_the_reference()


def test_the_reference_is_read() -> None:
    wanted = {
        Frugal,
        Frugal.step,
        FrugalConfig,
        split_parameters,
        preset,
        checkpoint.load,
        checkpoint.SavedWeights.buffer,
    }
    # torch wraps step() of a class when the first optimizer of it is made
    assert set(map(inspect.unwrap, wanted)) <= set(map(inspect.unwrap, REFERENCE.values()))


def arguments_in(docstring: str | None) -> list[str]:
    """What a docstring of Google's style lists under Args."""
    sections = re.split(r"^(\w+):$", inspect.cleandoc(docstring or ""), flags=re.M)
    return re.findall(r"^ {4}\**(\w+): ", dict(zip(sections[1::2], sections[2::2], strict=True)).get("Args", ""), re.M)


@pytest.mark.parametrize("name", REFERENCE)
def test_every_argument_is_documented(name: str) -> None:
    """Who hovers over a public name sees what each argument means."""
    given = inspect.signature(REFERENCE[name]).parameters
    documented = arguments_in(REFERENCE[name].__doc__)
    assert sorted(documented) == sorted(key for key in given if key != "self")


@pytest.mark.parametrize("documented", [Frugal, FrugalConfig])
@pytest.mark.parametrize("key", CHOICES)
def test_every_choice_is_named_where_its_argument_is_described(key: str, documented: type) -> None:
    """Projections, rules and forms of moments come from registries; what is new there is named here, too."""
    entry = re.search(rf"^    {key}: (.*?)^    \w+: ", inspect.cleandoc(documented.__doc__ or ""), flags=re.M | re.S)
    assert entry is not None
    assert set(CHOICES[key]) <= set(re.findall(r'"(\w+)"', entry[1]))


@pytest.mark.parametrize("key", ["projection", "state_full", "state_free", "combine", "moments", "on_refresh"])
def test_every_choice_is_named_in_the_help_of_recipes(key: str) -> None:
    listed = re.search(rf"\b{key}\s+\(([^)]*)\)", AnyOptimizer.__doc__ or "")
    assert listed is not None
    assert re.split(r",\s+", listed[1]) == list(CHOICES[key])


def test_the_signature_is_the_configuration_field_by_field() -> None:
    parameters = inspect.signature(Frugal).parameters
    for field in dataclasses.fields(FrugalConfig):
        ours = parameters[field.name]
        assert (ours.default, ours.annotation) == (field.default, field.type), field.name
    assert arguments_in(FrugalConfig.__doc__) == [*HYPERPARAMETERS, *OLD_NAMES]


def test_a_wrong_switch_is_told_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"shard_state='flase' is not known. Use one of auto, true, false"):
        Frugal([torch.nn.Parameter(torch.ones(2, 2))], shard_state="flase")
