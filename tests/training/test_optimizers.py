"""The optimizer of a recipe: FRUGAL's options and patterns, or what its name says whatever stands beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args, get_type_hints

import pytest

pytest.importorskip("jsonargparse")

import torch

from frugal_dist.config import FrugalConfig, config_from
from frugal_dist.presets import BEHIND, DEFINED, NAMED, PRESETS, preset
from frugal_dist.training.compare import contender
from frugal_dist.training.finetune.recipe import FinetuneRecipe, Tuning
from frugal_dist.training.optimizers import build_optimizer, check_optimizer, described, frugal_options, settled
from frugal_dist.training.recipe import Optimizer, Recipe, read_recipe, shipped

MEANING = {
    "galore": {"projection": "svd", "on_refresh": "keep", "state_free": "none", "density": 0.25},
    "badam": {"projection": "blockwise", "state_free": "none", "state_full": "adamw"},
    "signsgd": {"density": 0.0, "state_free": "sign"},
    "adamw": {"density": 1.0, "projection": "columns", "state_full": "adamw"},
    "fira": {"projection": "svd", "state_free": "scaled", "combine": "add", "growth_limit": 1.01, "on_refresh": "keep"},
    "apollo": {"projection": "gaussian", "combine": "scale", "growth_limit": 1.01, "on_refresh": "keep"},
    "apollo_mini": {"projection": "gaussian", "combine": "scale_matrix", "density": 1e-6},
    "scale": {"density": 0.0, "state_free": "normalized"},
    "sinkgd": {"density": 0.0, "state_free": "sinkhorn"},
    "racs": {"density": 0.0, "state_free": "racs", "growth_limit": 1.01},
    "muon": {"density": 1.0, "state_full": "muon", "momentum": 0.95},
    "frugal_dct": {"projection": "dct"},
}
"""What the names mean, and that the density of a recipe is taken over where it means something."""


def fits(config: FrugalConfig, name: str) -> bool:
    return all(getattr(config, key) == value for key, value in MEANING[name].items())


@pytest.mark.parametrize("name", MEANING)
def test_a_name_wins_over_the_options_of_every_shipped_recipe(name: str) -> None:
    for recipe in shipped():
        optimizer = read_recipe(recipe, ["--optimizer.name", name], Recipe).optimizer
        config = config_from(frugal_options(optimizer))
        assert fits(config, name), recipe
        assert config.update_gap == optimizer.options["update_gap"], "what the name leaves open is the recipe's"
    for recipe in shipped(FinetuneRecipe):
        changes = ["--optimizer.name", name, "--optimizer.rank", "null", "--optimizer.options.density", "0.25"]
        tuning = read_recipe(recipe, changes, FinetuneRecipe).optimizer
        assert fits(config_from(frugal_options(tuning.plain(768))), name), recipe
    tuning = read_recipe("minilm_reviews", ["--optimizer.name", "lora"], FinetuneRecipe).optimizer
    assert fits(config_from(frugal_options(tuning.plain(384))), "adamw")


def test_what_a_name_leaves_out_is_said() -> None:
    given = Optimizer(name="adamw", options={"projection": "svd", "density": 0.25, "update_gap": 200})
    assert described(given) == "adamw (without optimizer.options projection, density)"
    assert settled(given).options == {"update_gap": 200}
    assert described(settled(given)) == "adamw"
    same = Optimizer(name="galore", options={"projection": "svd", "density": 0.5})
    assert described(same) == "galore"
    assert described(replace(given, name="frugal")) == "frugal"
    with pytest.raises(ValueError, match=r"optimizer\.options: unknown key 'densty'"):
        frugal_options(Optimizer(name="adamw", options={"densty": 0.5}))


def test_every_preset_is_in_the_table() -> None:
    """Each option that a preset sets is one that makes it what it is, but for GaLore's rate."""
    names = {kind: set(get_args(get_type_hints(kind)["name"])) for kind in (Optimizer, Tuning)}
    assert names[Tuning] == set(DEFINED)
    assert names[Optimizer] == set(PRESETS) == set(DEFINED) - set(BEHIND)
    for name in MEANING:
        assert set(preset(name)) - {"projected_lr_scale"} <= set(DEFINED[name])


HARD = {"svd_method": "subspace", "state_free": "sgd", "state_full": "lion", "on_refresh": "project", "density": 0.5}


@pytest.mark.parametrize("name", [*MEANING, "lora", *NAMED])
def test_contenders_are_what_they_are_called(name: str) -> None:
    """With options in the recipe that would make them something else, or nothing."""
    preset_name, fixed = NAMED.get(name, (name, {}))
    given = read_recipe("reviews_5m", (), Recipe)
    options = {**given.optimizer.options, **HARD, "projection": "randperm"}
    if name != "lora":
        optimizer = contender(name, replace(given, optimizer=replace(given.optimizer, options=options))).optimizer
    else:
        tuned = read_recipe("minilm_reviews", (), FinetuneRecipe)
        tuned = replace(tuned, optimizer=replace(tuned.optimizer, options=options))
        optimizer = contender(name, tuned).optimizer.plain(384)
    check_optimizer(optimizer)
    config = config_from(frugal_options(optimizer))
    if preset_name == "frugal":
        assert (config.projection, config.state_free, config.density) == (fixed["projection"], "sgd", 0.5)
    else:
        meaning = dict(MEANING["adamw" if name == "lora" else preset_name])
        meaning |= {"density": 0.5} if name == "galore" else {}
        assert {key: getattr(config, key) for key in meaning} == meaning
    assert (config.svd_method == "subspace") == (config.projection == "svd")


def test_optimizer_options_are_frugals() -> None:
    assert frugal_options(Optimizer(name="galore"))["state_free"] == "none"
    assert frugal_options(Optimizer(name="adamw"))["density"] == 1.0
    with pytest.raises(ValueError, match=r"optimizer\.options\(rank=8\): .*density=0\.25"):
        frugal_options(Optimizer(options={"rank": 8}))
    with pytest.raises(ValueError, match=r"optimizer\.options: unknown key 'densty'.*Did you mean 'density'"):
        frugal_options(Optimizer(options={"densty": 0.1}))
    with pytest.raises(ValueError, match=r"set optimizer\.lr instead"):
        frugal_options(Optimizer(options={"lr": 0.1}))


def test_patterns_of_a_recipe_choose_what_is_projected() -> None:
    recipe = Optimizer(project=["*.weight"], skip=["norm.*", "head.*"], no_decay=["head.*"], weight_decay=0.1)
    linear = {name: torch.nn.Linear(8, 8) for name in ("body", "head")}
    model = torch.nn.ModuleDict({**linear, "norm": torch.nn.LayerNorm(8)})
    optimizer = build_optimizer(recipe, model)
    assert [row.name for row in optimizer.parameter_report_rows() if row.projected] == ["body.weight"]
    decays = {group["param_names"][0]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {"body.weight": 0.1, "body.bias": 0.1, "head.weight": 0.0}
    assert frugal_options(recipe)["project"] == ["*.weight"], "DeepSpeed's JSON gets them"
    for key in ("project", "skip"):
        with pytest.raises(ValueError, match=f"set optimizer.{key} instead"):
            frugal_options(Optimizer(options={key: ["*"]}))
