"""What an exported model says of itself: a model card, and the recipe that it was trained by."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frugal_dist.training.exported_model import Restored
from frugal_dist.training.finetune.recipe import FinetuneRecipe
from frugal_dist.training.folders import run_of
from frugal_dist.training.metrics.record import of_kind
from frugal_dist.training.optimizers import described
from frugal_dist.training.recipe import Recipe, Run, as_yaml, recipe_of
from frugal_dist.training.resume import records_of

CARD, RECIPE = "README.md", "recipe.yaml"
METHOD = "https://arxiv.org/abs/2411.07837"
Records = list[dict[str, Any]]


def told(restored: Restored, name: str) -> dict[str, str]:
    """Texts of files beside a model, by their names; no recipe if no run lies around the checkpoint."""
    records = _records(restored.source)
    recipe = recipe_in(records)
    card = _card(restored, name, recipe, records)
    return {CARD: card} if recipe is None else {CARD: card, RECIPE: as_yaml(recipe)}


def recipe_in(records: Records, changes: Sequence[str] = ()) -> Run | None:
    """The recipe that a run's metrics name last; None if they name none."""
    runs = of_kind(records, "run")
    if not runs or not isinstance(runs[-1].get("data"), dict):
        return None
    kind: type[Run] = Recipe if "kind" in runs[-1]["data"] else FinetuneRecipe
    return recipe_of(runs[-1], changes, kind)


def _records(checkpoint: Path) -> Records:
    """Of the run around a checkpoint; none where they cannot be read: the model can."""
    run = run_of(checkpoint)
    try:
        return [] if run is None else records_of(run)
    except (OSError, ValueError):
        return []


def _card(restored: Restored, name: str, recipe: Run | None, records: Records) -> str:
    kind = type(restored.model).__name__
    causal = kind.endswith("ForCausalLM")
    task = "text-generation" if causal else "text-classification"
    lines = ["---", "library_name: transformers", f"pipeline_tag: {task}", "tags: [frugal_dist]", "---", ""]
    lines += [f"# {name}", ""]
    lines += [f"{kind}, {restored.parameters:,} parameters, {restored.dtype}, trained with frugal_dist", ""]
    if recipe is not None:
        rows = [f"| {key} | {value} |" for key, value in _facts(restored, recipe, records)]
        lines += ["| | |", "| --- | --- |", *rows]
        lines += ["", f"All settings: `{RECIPE}`. The optimizer's method is [FRUGAL]({METHOD}).", ""]
    lines += ["```python", "from transformers import pipeline", "", f'run = pipeline("{task}", "PATH OF THIS FOLDER")']
    lines += ['print(run("Once upon a time"))', "```", ""]
    lines += [
        "Written by `frugal-dist export`, from what the training noted. What the model is good for, its limits, the",
        "licence of model and data: to be added by whoever shares it.",
    ]
    return "\n".join(lines) + "\n"


def _facts(restored: Restored, recipe: Run, records: Records) -> list[tuple[str, str]]:
    """What was trained on what, for how long, and how good it became."""
    named = re.fullmatch(r"step_(\d+)", restored.source.name)
    step = int(named.group(1)) if named else recipe.steps
    run, data = of_kind(records, "run")[-1], vars(recipe)["data"]
    model, validations = vars(recipe)["model"], of_kind(records, "validation")
    origin = model.path if getattr(model, "pretrained", True) else "fresh weights"
    source = next((getattr(data, key) for key in ("path", "task", "train") if getattr(data, key, None)), "")
    facts = [("began with", origin), ("data", source), ("steps", f"{step:,} of {run.get('steps', recipe.steps):,}")]
    facts += [("sequences a step", f"{recipe.batch:,} of {recipe.length:,} tokens at most")]
    facts += [("optimizer", f"{described(recipe.optimizer)}, lr {recipe.optimizer.lr:g}")]
    facts += [("precision of training", recipe.precision)]
    last = [record for record in validations if record.get("step", 0) <= step][-1:]
    for key in ("perplexity", "score"):
        facts += [(f"validation {key}", f"{record[key]:,.4g}") for record in last if record.get(key) is not None]
    return facts
