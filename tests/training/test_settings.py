"""An optimizer is what its name says, whatever a recipe has for FRUGAL; a folder holds runs of one setting."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

pytest.importorskip("jsonargparse")

from frugal_dist.config import FrugalConfig, config_from
from frugal_dist.presets import BEHIND, DEFINED, NAMED, PRESETS, preset
from frugal_dist.training.compare import contender
from frugal_dist.training.finetune.recipe import FinetuneRecipe, Tuning
from frugal_dist.training.optimizers import check_optimizer, described, frugal_options, settled
from frugal_dist.training.recipe import Optimizer, Recipe, read_recipe, shipped
from frugal_dist.training.resume import FREE, FREE_ON_RESUME, check_existing_run

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


# --- a folder's run


def begun(folder: Path, recipe: Recipe | FinetuneRecipe, **more: Any) -> Path:
    lines = [{"kind": "run", **recipe.record(), **more}, {"kind": "train", "step": 1, "loss": 3.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def asked(name: str, changes: list[str], kind: type[Any] = Recipe) -> dict[str, Any]:
    """The record of a recipe as a run has it."""
    recipe = read_recipe(name, changes, kind)
    record: dict[str, Any] = replace(recipe, optimizer=settled(recipe.optimizer)).record()
    return record


DIFFERENT = {
    "--steps": ["7", "steps 750 (now 7)"],
    "--batch": ["16", "batch 32 (now 16)"],
    "--seed": ["3", "seed 0 (now 3)"],
    "--length": ["64", "length 128 (now 64)"],
    "--precision": ["fp32", "precision 'bf16' (now 'fp32')"],
    "--data.path": ["elsewhere", "data.path '.cache/quickstart' (now 'elsewhere')"],
    "--model.llama": ["9M", "model.llama 'quick' (now '9M')"],
    "--schedule.warmup": ["0.2", "schedule.warmup 0.1 (now 0.2)"],
    "--optimizer.lr": ["2e-3", "optimizer.lr 0.001 (now 0.002)"],
    "--optimizer.options.density": ["0.5", "optimizer.options.density 0.25 (now 0.5)"],
    "--optimizer.options.lr_scale": ["0.1", "optimizer.options.projected_lr_scale 1.0 (now 0.1)"],
    "--optimizer.name": ["adamw", "optimizer.name 'frugal' (now 'adamw')"],
}
FREELY = {
    "--engine": "ddp", "--folder": "moved", "--micro_batch": "4", "--saving.every": "7", "--log_every": "3",
    "--trackers": "[tensorboard]", "--model.compile": "true", "--data.epochs": "3", "--peak_tflops": "10",
    "--optimizer.options.compute_layout": "cut", "--optimizer.options.shard_state": "false",
    "--optimizer.options.state_free": "sign",  # which it was
}  # fmt: skip


@pytest.mark.parametrize("key", DIFFERENT)
def test_another_setting_is_refused_by_name(key: str, tmp_path: Path) -> None:
    begun(tmp_path, read_recipe("reviews_5m", (), Recipe), start=0, ranks=1)
    value, words = DIFFERENT[key]
    record = asked("reviews_5m", [key, value])
    with pytest.raises(ValueError) as error:
        check_existing_run(tmp_path, record, FREE)
    assert words in str(error.value)
    assert "another --folder" in str(error.value)
    if key == "--steps":
        check_existing_run(tmp_path, record, FREE_ON_RESUME)
    else:
        with pytest.raises(ValueError, match=words.split()[0]):
            check_existing_run(tmp_path, record, FREE_ON_RESUME)


def test_what_does_not_matter_may_change(tmp_path: Path) -> None:
    begun(tmp_path, read_recipe("reviews_5m", (), Recipe), start=0, ranks=2)
    changes = [word for pair in FREELY.items() for word in pair]
    check_existing_run(tmp_path, asked("reviews_5m", changes), FREE)


def test_what_was_recorded_with_useless_options_is_taken_over(tmp_path: Path) -> None:
    """As it was trained: before, a comparison left the options of FRUGAL in AdamW's record, where they did nothing."""
    recipe = contender("adamw@1e-2x0.1", read_recipe("reviews_5m", (), Recipe))
    more = {**recipe.optimizer.options, "svd_method": "exact", "projection": "columns"}
    begun(tmp_path, replace(recipe, optimizer=replace(recipe.optimizer, options=more)))
    check_existing_run(tmp_path, recipe.record(), FREE)
    frugal = {**recipe.optimizer.options, "density": 0.25, "projection": "svd"}  # what was called AdamW and was not
    begun(tmp_path, replace(recipe, optimizer=replace(recipe.optimizer, options=frugal)))
    with pytest.raises(ValueError, match=r"optimizer\.options\.density 0\.25 \(now 1\.0\)"):
        check_existing_run(tmp_path, recipe.record(), FREE)


def test_a_fine_tuning_has_its_own_keys(tmp_path: Path) -> None:
    recipe = read_recipe("roberta_glue", (), FinetuneRecipe)
    begun(tmp_path, recipe, examples=2490)
    check_existing_run(tmp_path, {**recipe.record(), "examples": 2490}, FREE)
    for changes, words in (
        (["--epochs", "3"], "epochs 80.0 (now 3.0)"),
        (["--optimizer.rank", "4"], "optimizer.rank 8 (now 4)"),
        (["--model.dropout", "0.1"], "model.dropout None (now 0.1)"),
        (["--optimizer.name", "lora"], "optimizer.name 'frugal' (now 'lora')"),
    ):
        with pytest.raises(ValueError) as error:
            check_existing_run(tmp_path, asked("roberta_glue", changes, FinetuneRecipe), FREE)
        assert words in str(error.value)
    with pytest.raises(ValueError, match="examples 2490"):
        check_existing_run(tmp_path, {**recipe.record(), "examples": 249}, FREE_ON_RESUME)
    check_existing_run(tmp_path, asked("roberta_glue", ["--lora.rank", "4"], FinetuneRecipe), FREE)
    begun(tmp_path, read_recipe("roberta_glue", ["--optimizer.name", "adamw"], FinetuneRecipe))
    with pytest.raises(ValueError, match=r"optimizer\.name 'adamw' \(now 'lora'\)"):
        check_existing_run(tmp_path, asked("roberta_glue", ["--optimizer.name", "lora"], FinetuneRecipe), FREE)
