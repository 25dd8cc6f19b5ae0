"""Recipes with release_gradients: the same training, and what they are refused with."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("jsonargparse")

from transformers import AutoModelForCausalLM

from frugal_dist.training.distributed.place import find_dist_env
from frugal_dist.training.engines import build_engine
from frugal_dist.training.engines.plain import check_world
from frugal_dist.training.models import build_llama, llama_config
from frugal_dist.training.plan import plan_recipe
from frugal_dist.training.recipe import Model, Optimizer, Recipe, check_recipe, read_recipe

RECIPE = Recipe(
    model=Model(llama="quick", vocab_size=64),
    batch=2,
    length=8,
    precision="fp32",
    optimizer=Optimizer(options={"update_gap": 2}),
    release_gradients=True,
)


def test_training_is_the_same() -> None:
    def trained(recipe: Recipe) -> tuple[list[float], dict[str, Tensor]]:
        torch.manual_seed(0)
        model = build_llama("quick", 64, 8)
        engine = build_engine(model, recipe, lambda step: 1.0 / (1 + step), find_dist_env({}))
        rows = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
        losses = [float(engine.train_step(rows)) for _ in range(3)]
        assert all(param.grad is None for param in model.parameters()) is recipe.release_gradients
        return losses, model.state_dict()

    (losses, weights), (others, ordinary) = trained(RECIPE), trained(replace(RECIPE, release_gradients=False))
    assert losses == others
    assert [name for name in weights if not torch.equal(weights[name], ordinary[name])] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine": "ddp"}, "engine is 'ddp', and DDP keeps all gradients in its buckets. Use engine: fsdp2"),
        ({"engine": "deepspeed"}, "engine is 'deepspeed', and DeepSpeed owns the gradients. Use engine: fsdp2"),
        ({"clip": 1.0}, "clip is 1, and the norm of all gradients is known only when"),
        ({"spike": 3.0}, "spike is 3, and the norm of all gradients is known only when"),
        ({"micro_batch": 1}, "micro_batch is 1 and a rank's share of the batch 2"),
        ({"model": Model(llama="quick", compile=True)}, "model.compile"),
    ],
)
def test_what_needs_all_gradients_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    check_recipe(RECIPE)
    with pytest.raises(ValueError, match=f"^release_gradients: .*{re.escape(words)}"):
        check_recipe(replace(RECIPE, **changes))


def test_micro_batches_of_several_ranks_are_refused_where_a_rank_has_more_than_one() -> None:
    recipe = replace(RECIPE, engine="fsdp2", batch=8, micro_batch=2)
    check_recipe(recipe)
    check_world(recipe, 4)
    with pytest.raises(ValueError, match="a rank's share of the batch 4"):
        check_world(recipe, 2)


def test_the_command_line_and_the_plan_know_it() -> None:
    keys = ["--model.vocab_size", "64", "--batch", "4", "--micro_batch", "null"]
    recipe = read_recipe("llama_9m", [*keys, "--release_gradients", "true"])

    def gradients(recipe: Recipe, engine: str, ranks: int) -> float:
        told = plan_recipe(recipe, engine, ranks)
        return float(next(line for line in told.split("\n") if "gradients (estimate)" in line).split("|")[2])

    every = replace(recipe, release_gradients=False)
    assert gradients(recipe, "single", 1) < gradients(every, "single", 1) / 10
    assert gradients(recipe, "fsdp2", 2) < gradients(every, "fsdp2", 2) / 3
    with pytest.raises(ValueError, match="release_gradients is for engine single, fsdp2, hsdp or a mesh, not for ddp"):
        plan_recipe(recipe, "ddp", 2)


def test_seven_billion_parameters_fit_into_24_gb() -> None:
    assert "fits into rtx4090" in plan_recipe(read_recipe("llama_7b_24gb"), None, 1, "rtx4090")


@pytest.mark.heavy
def test_what_would_fit_fits() -> None:
    """The keys that a plan gives, given to the plan."""
    told = plan_recipe(read_recipe("llama_7b"), "single", 1, "rtx4090").replace("\n", " ")
    assert "does NOT fit into rtx4090" in told
    found = re.search(r"It fits with (.*?): ([\d.]+) GB", told)
    assert found is not None, told
    again = plan_recipe(read_recipe("llama_7b", found[1].split()), None, 1, "rtx4090")
    assert f"Together {found[2]} GB: fits into rtx4090" in again


@pytest.mark.timeout(1800)  # without bf16 instructions one core takes long
@pytest.mark.heavy
def test_first_steps_of_its_shape() -> None:
    """One layer of the 7B model, with all that the recipe for 24 GB has."""
    recipe = read_recipe("llama_7b_24gb", ["--batch", "1", "--length", "16"])
    config = llama_config("7B", 32000, 16)
    config.num_hidden_layers = 1
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    engine = build_engine(model, recipe, lambda step: 1.0, find_dist_env({}))
    rows = torch.randint(32000, (1, 17), generator=torch.Generator().manual_seed(1))
    losses = [float(engine.train_step(rows)) for _ in range(4)]
    assert losses[-1] < losses[0] - 0.5
    assert all(param.grad is None for param in model.parameters())
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    held = sum(engine.state_kinds().values())
    assert held < 0.6 * layer + 2.1 * 2 * 32000 * 4096  # a quarter of two moments of a byte; embedding and head
