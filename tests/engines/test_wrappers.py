"""Optimizers around Frugal, other people's and one's own: what they set arrives, what they hold is found, copies go on.

One process; with several, see test_lightning.py and test_accelerate.py.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_cases import apart, loss_of, optimizer_for, rows, small
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import SWALR, AveragedModel

from frugal_dist import Frugal, checkpoint, preset, split_parameters

LIMIT = 1e-10
BATCHES = rows().split(4)
MIDDLE = 4

pytestmark = pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")  # Lightning's use of torch


def train(model: Any, optimizer: Any, batches: Iterable[Tensor] = BATCHES) -> None:
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def plain(**options: Any) -> nn.Module:
    model = small()
    train(model, optimizer_for(model, **options))
    return model


# --- wrappers that take on the class of what they wrap ----------------------------------------------------------------


class Copied:
    """With the optimizer's attributes as they are now, as Lightning's wrappers were at first."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.__dict__ = {key: value for key, value in optimizer.__dict__.items() if key != "step"}
        self.__class__ = type("Copied" + type(optimizer).__name__, (Copied, type(optimizer)), {})
        self.inner = optimizer

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self.inner.step(closure)


def fabric(optimizer: Frugal) -> Any:
    import lightning

    return lightning.Fabric(accelerator="cpu", devices=1).setup_optimizers(optimizer)


def trainers(optimizer: Frugal) -> Any:
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from lightning.pytorch.strategies import SingleDeviceStrategy

    wrapper = LightningOptimizer(optimizer)
    wrapper._strategy = SingleDeviceStrategy(device="cpu")
    wrapper._strategy.optimizer_step = lambda inner, closure: inner.step(closure)
    return wrapper


DISGUISED = {"Fabric": fabric, "Trainer": trainers, "copied attributes": Copied}
disguised = pytest.mark.parametrize("wrap", DISGUISED.values(), ids=DISGUISED)


@disguised
def test_a_loop_with_schedule_and_clipping(wrap: Callable[[Frugal], Any]) -> None:
    def loop(optimizer: Any, model: nn.Module) -> nn.Module:
        schedule, scaler = OneCycleLR(optimizer, 2e-2, total_steps=20), torch.amp.GradScaler("cpu", init_scale=4.0)
        for batch in BATCHES:
            optimizer.zero_grad()
            scaler.scale(loss_of(model, batch)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
        return model

    assert apart(loop(wrap(optimizer_for(model := small())), model), loop(optimizer_for(model := small()), model)) == 0


@disguised
def test_what_is_done_to_the_wrapper_is_done_to_the_optimizer(wrap: Callable[[Frugal], Any]) -> None:
    model = small()
    optimizer = optimizer_for(model)
    wrapper = wrap(optimizer)
    added = nn.Parameter(torch.ones(8, 8, dtype=torch.float64))
    train(model, wrapper, BATCHES[:MIDDLE])
    wrapper.saved_elsewhere = True
    wrapper.load_state_dict(copy.deepcopy(wrapper.state_dict()))
    wrapper.everything()
    wrapper.add_param_group({"params": [("added.weight", added)], "projected": True})
    assert optimizer.saved_elsewhere
    assert wrapper.shard_state == "auto"
    assert [one.name for one in wrapper.originals] == [one.name for one in optimizer.originals]
    assert "added.weight" in wrapper.parameter_report()
    if not isinstance(wrapper, Copied):  # which holds what torch replaces, too
        assert not {"param_groups", "state", "defaults", "_runtime", "_originals"} & set(vars(wrapper))
    train(model, optimizer, BATCHES[MIDDLE:])
    assert apart(model, plain()) == 0
    assert optimizer.state_dict()["param_groups"][-1]["params"] == [6]


@disguised
def test_hooks_run_once_whichever_they_were_given_to(wrap: Callable[[Frugal], Any]) -> None:
    model, told = small(), []
    optimizer = optimizer_for(model)
    wrapper = wrap(optimizer)
    wrapper.register_step_pre_hook(lambda *_: told.append("before"))
    optimizer.register_step_post_hook(lambda *_: told.append("after"))
    train(model, wrapper, BATCHES[:1])
    assert told == ["before", "after"]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_copies_of_fabrics_wrapper_go_on(duplicate: Callable[[Any], Any]) -> None:
    model = small()
    optimizer = fabric(optimizer_for(model))
    train(model, optimizer, BATCHES[:MIDDLE])
    again, wrapper = duplicate((model, optimizer))
    train(again, wrapper, BATCHES[MIDDLE:])
    assert type(wrapper).__name__ == "FabricFrugal"
    assert apart(again, plain()) == 0


def test_fabric_and_plain_pytorch_read_each_others_checkpoints(tmp_path: Path) -> None:
    """Columns are drawn by name: Fabric's names below its own module are those of the model."""
    import lightning

    lone = lightning.Fabric(accelerator="cpu", devices=1)
    inner = small()
    model = lone.setup_module(inner)
    optimizer = lone.setup_optimizers(optimizer_for(model, projection="columns"))
    train(model, optimizer, BATCHES[:MIDDLE])
    checkpoint.save(tmp_path / "middle", model, optimizer)
    other = small()
    found = optimizer_for(other, projection="columns")
    checkpoint.load(tmp_path / "middle", other, found)
    train(other, found, BATCHES[MIDDLE:])
    train(model, optimizer, BATCHES[MIDDLE:])
    assert apart(other, inner) == 0
    assert apart(other, plain(projection="columns")) == 0


# --- wrappers that hold one -------------------------------------------------------------------------------------------


class Sam(Optimizer):
    """Two closures a step; groups and defaults are those of the optimizer inside."""

    def __init__(self, params: Any, base: Callable[..., Optimizer], rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        with torch.enable_grad():
            closure()
        params = [p for group in self.param_groups for p in group["params"]]
        moves = [0.05 * p.grad / torch.stack([q.grad.norm() for q in params]).norm() for p in params]
        for param, move in zip(params, moves, strict=True):
            param.add_(move)
        self.zero_grad()
        with torch.enable_grad():
            closure()
        for param, move in zip(params, moves, strict=True):
            param.sub_(move)
        self.base_optimizer.step()
        self.zero_grad()


class Lookahead(Optimizer):
    """Shares everything, without ``super().__init__``."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner, self.count = inner, 0
        self.param_groups, self.state, self.defaults = inner.param_groups, inner.state, inner.defaults
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        self.inner.step(closure)
        self.count += 1
        for group, slow in zip(self.param_groups, self.slow, strict=True) if self.count % 2 == 0 else ():
            for param, kept in zip(group["params"], slow, strict=True):
                kept.lerp_(param.detach(), 0.5)
                param.data.copy_(kept)


class Container(Optimizer):
    """One optimizer for each part of the model, as torchtitan's."""

    def __init__(self, optimizers: list[Optimizer]) -> None:
        self.optimizers = optimizers
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        super().__init__([param for group in groups for param in group["params"]], {"lr": 1e-2})

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()


def adamw(groups: Any, **options: Any) -> torch.optim.AdamW:
    kept = {key: value for key, value in options.items() if key in ("lr", "weight_decay")}
    return torch.optim.AdamW(groups, **kept)


@pytest.mark.parametrize("params", [split_parameters, nn.Module.named_parameters], ids=["groups", "named"])
def test_sam_around_it_is_sam_around_adamw(params: Callable[[nn.Module], Any]) -> None:
    def run(base: Callable[..., Optimizer], **options: Any) -> tuple[nn.Module, Sam]:
        model = small()
        optimizer = Sam(params(model), base, lr=1e-2, weight_decay=0.1, **options)
        schedule = CosineAnnealingLR(optimizer, 10)
        for batch in BATCHES:
            optimizer.step(lambda batch=batch: loss_of(model, batch).backward())
            schedule.step()
        return model, optimizer

    model, optimizer = run(Frugal, **preset("adamw"))
    assert apart(model, run(adamw)[0]) <= LIMIT
    assert checkpoint.unwrap(optimizer) is optimizer.base_optimizer


def test_lookahead_around_it_is_lookahead_around_adamw() -> None:
    def run(make: Callable[[nn.Module], Optimizer]) -> nn.Module:
        model = small()
        optimizer = Lookahead(make(model))
        train(model, optimizer)
        return model

    own = run(lambda model: Frugal(split_parameters(model), lr=1e-2, weight_decay=0.1, **preset("adamw")))
    assert apart(own, run(lambda model: adamw(model.parameters(), lr=1e-2, weight_decay=0.1))) <= LIMIT


def test_a_container_of_one(tmp_path: Path) -> None:
    model = small()
    optimizer = Container([optimizer_for(model)])
    train(model, optimizer, BATCHES[:MIDDLE])
    checkpoint.save(tmp_path / "middle", model, optimizer)
    model = small()
    optimizer = Container([optimizer_for(model)])
    checkpoint.load(tmp_path / "middle", model, optimizer)
    train(model, optimizer, BATCHES[MIDDLE:])
    assert apart(model, plain()) == 0


@pytest.mark.parametrize("projection", ["svd", "randk"])
def test_a_container_saves_as_torchtitans(projection: str) -> None:
    """Flattened by torch.distributed.checkpoint, as in torchtitan 0.2; as in 0.3: tests/dist/test_dcp.py."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model = small()
    optimizer = Container([optimizer_for(model, projection=projection)])
    train(model, optimizer, BATCHES[:MIDDLE])
    saved = [get_optimizer_state_dict(model, one, options=options) for one in optimizer.optimizers]
    again = copy.deepcopy(model)
    loaded = Container([optimizer_for(again, projection=projection)])
    for one, state in zip(loaded.optimizers, copy.deepcopy(saved), strict=True):
        set_optimizer_state_dict(again, one, state, options=options)
    train(again, loaded, BATCHES[MIDDLE:])
    assert apart(again, plain(projection=projection)) == 0


def holders(optimizer: Frugal) -> Iterator[Any]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from torch.distributed.optim import PostLocalSGDOptimizer

    yield Accelerator(cpu=True).prepare(optimizer)
    AcceleratorState._reset_state(True)
    yield PostLocalSGDOptimizer(optimizer, None)
    for wrap in DISGUISED.values():
        yield wrap(optimizer)
        yield Lookahead(wrap(optimizer))
    yield Container([Lookahead(optimizer)])
    yield [optimizer]
    yield {"model": optimizer}


def test_unwrap_sees_through_all_of_them() -> None:
    optimizer = optimizer_for(small())
    for holder in holders(optimizer):
        assert checkpoint.unwrap(holder) is optimizer, type(holder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Container([optimizer_for(small()), optimizer_for(small())]),
            r"contains 2 optimizers \(Frugal, Frugal\)",
        ),
        (lambda: Container([optimizer_for(small()), adamw(small().parameters())]), r"\(Frugal, AdamW\)"),
        (lambda: Container([adamw(small().parameters())]), "does not contain a Frugal"),
        (lambda: adamw(small().parameters()), "AdamW does not contain a Frugal"),
        (lambda: None, "does not contain a Frugal"),
    ],
)
def test_unwrap_refuses_what_it_would_save_in_part(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint.unwrap(make())


def test_copies_of_accelerates_wrapper_go_on() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    model, optimizer = Accelerator(cpu=True).prepare(inner := small(), optimizer_for(inner))
    train(model, optimizer, BATCHES[:MIDDLE])
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    for again, wrapper in copies:
        train(again, wrapper, BATCHES[MIDDLE:])
        assert apart(again, plain()) == 0
    AcceleratorState._reset_state(True)


# --- hooks of state_dict and load_state_dict --------------------------------------------------------------------------


def test_hooks_see_what_is_saved_and_loaded_and_what_they_change_counts() -> None:
    """State by name, as torch's documentation of these hooks does it."""

    def by_name(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        names = [one.name for one in optimizer.originals]
        return {**state_dict, "state": {names[number]: store for number, store in state_dict["state"].items()}}

    def by_number(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        names = [one.name for one in optimizer.originals]
        return {**state_dict, "state": {names.index(name): store for name, store in state_dict["state"].items()}}

    model, states = small(), []
    optimizer = optimizer_for(model)
    train(model, optimizer, BATCHES[:MIDDLE])
    handle = optimizer.register_state_dict_post_hook(by_name)
    saved = optimizer.state_dict()
    handle.remove()
    assert set(saved["state"]) == {one.name for one in optimizer.originals}
    assert set(optimizer.state_dict()["state"]) == set(range(6))
    again = copy.deepcopy(model)
    loaded = optimizer_for(again)
    loaded.register_load_state_dict_pre_hook(by_number)
    loaded.register_load_state_dict_post_hook(lambda optimizer: states.append(len(optimizer.state)))
    loaded.load_state_dict(saved)
    train(again, loaded, BATCHES[MIDDLE:])
    assert states == [6]
    assert apart(again, plain()) == 0


def test_a_hook_that_raises_leaves_nothing_behind() -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no")

    model = small()
    optimizer = optimizer_for(model)
    train(model, optimizer, BATCHES[:MIDDLE])
    saved = optimizer.state_dict()
    for register, call in (
        (optimizer.register_state_dict_post_hook, optimizer.state_dict),
        (optimizer.register_load_state_dict_pre_hook, lambda: optimizer.load_state_dict(saved)),
    ):
        handle = register(refuse)
        with pytest.raises(RuntimeError, match="no"):
            call()
        handle.remove()
    train(model, optimizer, BATCHES[MIDDLE:])
    assert apart(model, plain()) == 0


# --- averages of weights ----------------------------------------------------------------------------------------------


def test_averaged_weights_and_their_schedule() -> None:
    def run(make: Callable[[nn.Module], Optimizer]) -> AveragedModel:
        model = small()
        optimizer = make(model)
        average, schedule = AveragedModel(model), SWALR(optimizer, 1e-3, anneal_epochs=2)
        assert isinstance(schedule, LRScheduler)
        for batch in BATCHES:
            train(model, optimizer, [batch])
            average.update_parameters(model)
            schedule.step()
        return average

    own = run(lambda model: Frugal(split_parameters(model), lr=1e-2, weight_decay=0.1, **preset("adamw")))
    assert apart(own, run(lambda model: adamw(model.parameters(), lr=1e-2, weight_decay=0.1))) <= LIMIT
    assert [one.name for one in optimizer_for(own).originals] == [one.name for one in optimizer_for(small()).originals]


# --- groups that others put in the place of ours ----------------------------------------------------------------------


def test_sam_loads_its_groups_into_the_optimizer_inside() -> None:
    """``base_optimizer.param_groups = self.param_groups``, as SAM's ``load_state_dict`` does: its schedule counts."""

    def run(*, resumed: bool) -> nn.Module:
        model = small()
        optimizer = Sam(split_parameters(model), Frugal, lr=1e-2, update_gap=3, density=0.5)
        schedule = CosineAnnealingLR(optimizer, len(BATCHES))
        for number, batch in enumerate(BATCHES):
            if resumed and number == MIDDLE:
                inner = copy.deepcopy(optimizer.base_optimizer.state_dict())
                optimizer.load_state_dict(optimizer.state_dict())
                optimizer.base_optimizer.param_groups = optimizer.param_groups
                optimizer.base_optimizer.load_state_dict(inner)
                optimizer.param_groups = [dict(group) for group in optimizer.base_optimizer.param_groups]
                optimizer.base_optimizer.param_groups = optimizer.param_groups
            optimizer.step(lambda batch=batch: loss_of(model, batch).backward())
            schedule.step()
        return model

    assert apart(run(resumed=True), run(resumed=False)) == 0
