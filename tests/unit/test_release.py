"""step_in_backward on one process: the bits of ordinary steps, no gradient that stays, and what is refused."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from released import OPTIONS, STEPS, Model, loss_of, settings
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker

from frugal_dist import Frugal, checkpoint, split_parameters, step_in_backward
from frugal_dist.engines import accelerate


def built(released: bool, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Model, Frugal]:
    model = Model().to(dtype)
    optimizer = Frugal(split_parameters(model), **options)
    if released:
        step_in_backward(model, optimizer)
    return model, optimizer


def train(model: Model, optimizer: Frugal, first: int = 0, last: int = STEPS, late: bool = False) -> None:
    """``late``: some parameters are frozen on some steps, and the last block is not used on others."""
    for step in range(first, last):
        if late:
            model.skipped = step in (1, 3)
            model.blocks[0].up.requires_grad_(step not in (0, 2))
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def tensors_of(optimizer: Frugal) -> dict[str, Tensor]:
    """Weights, and all that a checkpoint has of the state."""
    saved = optimizer.state_dict()["state"]
    found = {f"{place} {key}": value for place, store in saved.items() for key, value in store.items()}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return {**found, **{f"weight {place}": param.detach() for place, param in enumerate(params)}}


def assert_same_bits(one: Frugal, other: Frugal) -> None:
    left, right = tensors_of(one), tensors_of(other)
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


def test_backward_waits_for_steps_on_another_stream_where_they_replace_the_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FSDP2 calls hooks on the stream of its reduce-scatter: the first step and refreshes free memory there."""

    class Stream:
        def wait_stream(self, other: Stream) -> None:
            waits.append((self, other))

    waits: list[tuple[Stream, Stream]] = []
    main, side = Stream(), Stream()
    current = main
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    model, optimizer = built(True, {"projection": "columns", "update_gap": 2})
    found = []
    for step in range(4):
        current = side
        loss_of(model, step).backward()
        current = main
        optimizer.step()
        found.append(len(waits))
        assert set(waits) <= {(main, side)}
        waits.clear()
    assert found[0] > found[2] > 0 and found[1] == found[3] == 0


@pytest.mark.parametrize("name", settings())
def test_released_steps_have_the_bits_of_ordinary_ones(name: str) -> None:
    runs = [built(released, settings()[name]) for released in (False, True)]
    for model, optimizer in runs:
        train(model, optimizer, late=True)
    assert_same_bits(runs[0][1], runs[1][1])


@pytest.mark.parametrize("rounding", ["stochastic", "remainder"])
@pytest.mark.parametrize("projection", ["columns", "svd"])
def test_bf16_weights_have_the_same_bits(projection: str, rounding: str) -> None:
    options = {**OPTIONS, "projection": projection, "rounding": rounding}
    runs = [built(released, options, torch.bfloat16) for released in (False, True)]
    for model, optimizer in runs:
        train(model, optimizer)
    assert_same_bits(runs[0][1], runs[1][1])


def test_gradients_are_gone_after_backward_and_weights_have_moved() -> None:
    model, optimizer = built(True, OPTIONS)
    before = model.embedding.weight.detach().clone()
    loss_of(model, 0).backward()
    assert [name for name, param in model.named_parameters() if param.grad is not None] == []
    assert not torch.equal(model.embedding.weight, before)
    optimizer.step()
    assert optimizer.summary().endswith("Gradients are released in backward.")
    counts = [int(store["step"]) for store in optimizer.state.values()]
    assert sorted(set(counts)) == [0, 1]  # unused ones


@pytest.mark.parametrize("released", [False, True])
def test_the_peak_has_the_gradient_of_one_parameter(released: bool) -> None:
    """By torch's own tracker. Without release it has them all: the test would notice if they stayed."""
    side, layers = 64, 12
    model = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(layers)))
    optimizer = Frugal(split_parameters(model), projection="columns")
    if released:
        step_in_backward(model, optimizer)
    tracker = MemTracker()
    for step in range(2):  # the first one makes the state
        if step:
            tracker.track_external(model, optimizer)
            tracker.__enter__()
        model(torch.ones(1, side)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    tracker.__exit__(None, None, None)
    peak, resting = (tracker.get_tracker_snapshot(when)[torch.device("cpu")]["Total"] for when in ("peak", "current"))
    one = 4 * side * side
    assert peak - resting < 2 * one if released else peak - resting >= layers * one


def test_first_gradients_that_are_all_zero_wait_for_one_that_is_not() -> None:
    """An ordinary first step steps everybody as soon as any gradient is not zero: weight decay and counts show it."""

    def run(released: bool) -> tuple[Frugal, list[bool]]:
        model = nn.ModuleDict({"used": nn.Linear(8, 6), "silent": nn.Linear(8, 6)})
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(0.5)
        optimizer = Frugal(split_parameters(model), **{**OPTIONS, "projection": "columns"})
        if released:
            step_in_backward(model, optimizer)
        there: list[bool] = []
        for weight in (0.0, 1.0, 1.0):  # at the first step nobody has anything
            x = torch.ones(2, 8)
            (weight * model["used"](x).square().sum() + 0.0 * model["silent"](x).sum()).backward()
            there.append(any(param.grad is not None for param in model.parameters()))
            optimizer.step()
            optimizer.zero_grad()
        return optimizer, there

    (ordinary, _), (released, there) = run(False), run(True)
    assert there == [True, False, False]
    assert_same_bits(ordinary, released)
    assert {int(store["step"]) for store in released.state.values()} == {2}


def test_resuming_has_the_bits_of_a_run_that_went_on(tmp_path: Path) -> None:
    """From either kind of run to either."""
    model, optimizer = built(True, OPTIONS)
    train(model, optimizer, 0, 3)
    checkpoint.save(tmp_path / "saved", model, optimizer, {})
    state = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(model.state_dict())
    train(model, optimizer, 3)
    for released in (False, True):
        again, theirs = built(released, OPTIONS)
        again.load_state_dict(weights)
        theirs.load_state_dict(state)
        train(again, theirs, 3)
        assert ("released" in theirs.summary()) == released
        assert_same_bits(optimizer, theirs)
        again, theirs = built(released, OPTIONS)
        checkpoint.load(tmp_path / "saved", again, theirs)
        train(again, theirs, 3)
        assert_same_bits(optimizer, theirs)


def test_a_closure_and_a_group_that_comes_later() -> None:
    runs = []
    for released in (False, True):
        model, late = Model(), nn.Linear(5, 12)
        with torch.no_grad():
            late.weight.fill_(0.1).add_(torch.eye(12, 5))
            late.bias.zero_()
        optimizer = Frugal(split_parameters(model), **OPTIONS)
        if released:
            step_in_backward(model, optimizer)
        for step in range(4):
            if step == 2:
                optimizer.add_param_group({"params": [("late", late.weight)], "projected": True})

            def closure(step: int = step, model: Model = model, late: nn.Linear = late) -> Tensor:
                loss = loss_of(model, step) + late(torch.ones(1, 5)).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
            optimizer.zero_grad()
        runs.append(optimizer)
    assert_same_bits(*runs)


def test_a_second_gradient_is_refused_and_so_is_saving_half_a_step(tmp_path: Path) -> None:
    model, optimizer = built(True, OPTIONS)
    loss_of(model, 0).backward()
    for saving in (
        optimizer.state_dict,
        lambda: optimizer.load_state_dict({}),
        lambda: checkpoint.save(tmp_path / "half", model, optimizer, {}),
    ):
        with pytest.raises(ValueError, match=r"Half of a step is taken.*Call optimizer\.step\(\)"):
            saving()
    with pytest.raises(ValueError, match=r"norm\.weight had a second gradient.*micro-batches"):
        loss_of(model, 1).backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.state_dict()
    train(model, optimizer, 1, 3)


def test_it_can_be_ended() -> None:
    model, optimizer = built(False, OPTIONS)
    end = step_in_backward(model, optimizer)
    step_in_backward(model, optimizer)  # takes its place
    end = step_in_backward(model, optimizer)
    loss_of(model, 0).backward()
    with pytest.raises(ValueError, match="Half of a step is taken"):
        end()
    optimizer.step()
    end()
    assert "released" not in optimizer.summary()
    loss_of(model, 1).backward()
    assert model.embedding.weight.grad is not None
    optimizer.step()
    optimizer.zero_grad()


def test_hooks_go_with_the_optimizer_and_not_into_copies() -> None:
    def trained() -> tuple[Model, Frugal, weakref.ref[Frugal]]:
        model, optimizer = built(True, OPTIONS)
        train(model, optimizer, 0, 1)
        return model, copy.deepcopy(optimizer), weakref.ref(optimizer)

    model, twin, gone = trained()
    gc.collect()
    assert gone() is None
    loss_of(model, 1).backward()
    assert model.embedding.weight.grad is not None
    train(model, Frugal(split_parameters(model), **OPTIONS), 2, 3)
    assert int(next(iter(twin.state.values()))["step"]) == 1


def test_parameters_that_were_replaced_are_named_as_the_reason() -> None:
    _, optimizer = built(True, OPTIONS)
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(21, 12))
    with pytest.raises(ValueError, match=r"are others than at .*fully_shard\(model\)"):
        optimizer.step()


# --- who is refused ---------------------------------------------------------------------------------------------------


class Trainer:
    """Clips as those of transformers and of Lightning are told to."""

    def __init__(self, **told: Any) -> None:
        self.args = SimpleNamespace(max_grad_norm=told.get("max_grad_norm", 0.0))
        self.gradient_clip_val = told.get("gradient_clip_val")

    def train(self, model: Model, optimizer: Frugal) -> None:
        train(model, optimizer, 0, 2)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"max_grad_norm": 1.0}, "TrainingArguments(max_grad_norm=1) clips by the norm"),
        ({"gradient_clip_val": 0.5}, "Trainer(gradient_clip_val=0.5) clips by the norm"),
    ],
)
def test_a_trainer_that_clips_by_the_norm_of_all_gradients_is_refused(told: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        Trainer(**told).train(*built(True, OPTIONS))
    Trainer().train(*built(True, OPTIONS))


def test_loss_scales_of_accelerate_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    state = SimpleNamespace(mixed_precision="fp16", distributed_type=SimpleNamespace(value="NO"))
    monkeypatch.setattr(accelerate, "_state", lambda: state)
    with pytest.raises(ValueError, match=r"Accelerate scales the loss.*Use bf16"):
        built(True, OPTIONS)


def test_deepspeed_is_refused_and_fsdp2_named() -> None:
    model, optimizer = built(False, OPTIONS)
    wrapped: Any = nn.ModuleDict({"module": model})
    wrapped.global_steps = wrapped.global_samples = wrapped.skipped_steps = 0
    with pytest.raises(ValueError, match=r"under DeepSpeed the engine owns the gradients.*FSDP2"):
        step_in_backward(wrapped, optimizer)
    optimizer = Frugal(split_parameters(model))
    for param in model.parameters():
        param.ds_shape = param.shape  # type: ignore[attr-defined]  # zero.Init's
    with pytest.raises(ValueError, match="DeepSpeed"):
        step_in_backward(model, optimizer)
