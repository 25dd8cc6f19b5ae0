"""A folder holds runs of one setting: what may differ when a run goes on, and what is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jsonargparse")

from frugal_dist.training.compare import contender
from frugal_dist.training.finetune.recipe import FinetuneRecipe
from frugal_dist.training.optimizers import settled
from frugal_dist.training.recipe import Recipe, read_recipe
from frugal_dist.training.resume import FREE, FREE_ON_RESUME, check_existing_run


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


def test_a_run_goes_on_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its recipe found beside itself has another path there; other data have another content."""
    for folder in ("home/data", "home/other", "run"):
        (tmp_path / folder).mkdir(parents=True)
    record = read_recipe("reviews_5m").record()

    def begun(before: str, now: str) -> None:
        line = {"kind": "run", **record, "data": {**record["data"], "path": before}}
        (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        check_existing_run(tmp_path / "run", {**record, "data": {**record["data"], "path": now}}, FREE_ON_RESUME)

    monkeypatch.chdir(tmp_path)
    begun("data", "home/data")
    begun("home/data", str(tmp_path / "home" / "data"))
    with pytest.raises(ValueError, match=r"data\.path 'home/data' \(now 'home/other'\)"):
        begun("home/data", "home/other")
    monkeypatch.chdir(tmp_path / "home")
    begun("home/data", "data")
    with pytest.raises(ValueError, match=r"data\.path"):
        begun("home/data", "other")
