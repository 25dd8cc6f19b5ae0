"""Steps that are not taken because their gradient is far larger than those before."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("jsonargparse")

from frugal_dist.training.distributed.place import find_dist_env
from frugal_dist.training.engines import build_engine
from frugal_dist.training.engines.plain import FIRST_NORMS, SpikeGuard
from frugal_dist.training.recipe import Model, Recipe, check_recipe


def test_a_norm_far_above_the_mean_does_not_pass_nor_count() -> None:
    guard = SpikeGuard(3.0)
    assert all(guard.passes(1.0) for _ in range(FIRST_NORMS))
    assert guard.passes(2.9)
    before = guard.state_dict()
    assert not guard.passes(10.0)
    assert not guard.passes(float("nan"))
    assert not guard.passes(float("inf"))
    assert guard.state_dict() == before
    again = SpikeGuard(3.0)
    again.load_state_dict(before)
    assert not again.passes(10.0)


def test_the_first_norms_and_a_factor_of_zero_pass() -> None:
    early = SpikeGuard(3.0)
    assert all(early.passes(10.0**power) for power in range(FIRST_NORMS))
    never = SpikeGuard(0.0)
    assert all(never.passes(norm) for norm in [1.0] * 20 + [1e9])
    assert not never.passes(float("nan"))


def test_the_engine_leaves_weights_alone_and_remembers_the_mean(tmp_path: Path) -> None:
    recipe = Recipe(model=Model(llama="quick"), spike=5.0, batch=2, precision="fp32", folder=str(tmp_path))
    torch.manual_seed(0)
    from frugal_dist.training.models import build_llama

    model = build_llama("quick", 64, 8)
    start = copy.deepcopy(model.state_dict())
    engine = build_engine(model, recipe, lambda step: 1.0, find_dist_env({}))
    rows = torch.randint(64, (2, 9))
    for _ in range(FIRST_NORMS):
        engine.train_step(rows)
    assert engine.save(tmp_path, FIRST_NORMS, {})
    before = copy.deepcopy(model.state_dict())
    assert any(not torch.equal(start[name], before[name]) for name in start)
    engine.train_step(rows, targets=1e-3)  # the same rows count 16,000-fold
    assert engine.skipped_steps() == 1
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in before.items())

    fresh = build_llama("quick", 64, 8)
    again = build_engine(fresh, recipe, lambda step: 1.0, find_dist_env({}))
    assert again.resume(tmp_path) is not None
    again.train_step(rows)
    again.train_step(rows, targets=1e-3)
    assert again.skipped_steps() == 1


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"spike is 0\.5"):
        check_recipe(Recipe(model=Model(llama="quick"), spike=0.5))
    with pytest.raises(ValueError, match="spike: DeepSpeed"):
        check_recipe(Recipe(model=Model(llama="quick"), spike=3.0, engine="deepspeed"))
