"""Optimizers compared fairly: the same model, data, order, seed and budget for each, one after the other."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import nan
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

from frugal_dist.config import check_choice
from frugal_dist.training.finetune_recipe import FinetuneRecipe
from frugal_dist.training.place import find_place
from frugal_dist.training.recipe import Number, Recipe, check_recipe

R = TypeVar("R", Recipe, FinetuneRecipe)

Contenders = Mapping[str, tuple[str, dict[str, Number]]]
CONTENDERS: Contenders = {
    "adamw": ("adamw", {}),
    "frugal-svd": ("frugal", {"projection": "svd"}),
    "frugal-random": ("frugal", {"projection": "random"}),
    "frugal-columns": ("frugal", {"projection": "columns"}),
    "frugal-randk": ("frugal", {"projection": "randk"}),
    "frugal-blockwise": ("frugal", {"projection": "blockwise"}),
    "frugal-rho0": ("signsgd", {}),
    "galore": ("galore", {}),
    "badam": ("badam", {}),
}
"""By name: the preset, and what it fixes. The rest, such as density and update_gap, is the recipe's."""
OWN: dict[str, list[str]] = {"adamw": ["density"], "signsgd": ["density"], "lora": ["density"]}
"""Options of the recipe that a preset does not take over: they make it what it is."""


def contender(text: str, recipe: R, known: Contenders = CONTENDERS) -> R:
    """The recipe with the optimizer "galore" or, with rates of its own, "galore@0.01" or "galore@0.01x0.25".

    The second number is ``lr_scale``: what the projected matrices are updated with, relative to the others.
    """
    found = re.fullmatch(r"([\w-]+?)(?:@([\d.eE+-]+)(?:x([\d.eE+-]+))?)?", text)
    name = found.group(1) if found else text
    check_choice("optimizers", name, known)
    preset: str = known[name][0]
    fixed: dict[str, Number] = known[name][1]
    fixing = {*fixed, "projection", *OWN.get(preset, [])}
    options = {key: value for key, value in recipe.optimizer.options.items() if key not in fixing}
    rate = float(found.group(2)) if found and found.group(2) else recipe.optimizer.lr
    if found and found.group(3):
        options["lr_scale"] = float(found.group(3))
    changes: dict[str, Any] = {"name": preset, "lr": rate, "options": {**options, **fixed}}
    optimizer: Any = replace(recipe.optimizer, **changes)
    return replace(recipe, optimizer=optimizer)


def compare(recipe: Recipe, optimizers: Sequence[str], seeds: Sequence[int]) -> int:
    """Train each optimizer with each seed, then write the table and the picture; the exit code of pretrain.

    Runs that are finished are not repeated, those that were interrupted go on: start the same command again.
    Raises ValueError for an optimizer that is not known.
    """
    from frugal_dist.training.pretrain import pretrain

    check_recipe(recipe)
    code = train_all(recipe, optimizers, seeds, pretrain, lambda run: _finished(run, recipe.steps))
    if code == 0 and find_place().rank == 0:
        _conclude(Path(recipe.folder), optimizers, seeds)
    return code


def train_all(
    recipe: R,
    optimizers: Sequence[str],
    seeds: Sequence[int],
    train: Callable[[R], int],
    finished: Callable[[Path], bool],
    known: Contenders = CONTENDERS,
) -> int:
    """``train`` each optimizer with each seed in a folder of its own, unless it is finished; the first bad exit code.

    Raises ValueError, before anything is trained, for what is not known or named twice.
    """
    if recipe.engine == "deepspeed" and len(optimizers) * len(seeds) > 1:
        raise ValueError(
            "engine deepspeed can start only once in a process: compare with engine single, ddp or fsdp2, or give "
            "--optimizers and --seeds one at a time."
        )
    for key, values in (("optimizers", list(optimizers)), ("seeds", list(seeds))):
        if len(set(values)) < len(values):  # the second run would find the first one's folder
            raise ValueError(f"--{key} {','.join(map(str, values))} names one of them twice; name each once.")
    recipes = {text: contender(text, recipe, known) for text in optimizers}
    for text, one in recipes.items():
        for seed in seeds:
            folder = run_folder(Path(recipe.folder), text, seed)
            if not finished(folder) and (code := train(replace(one, seed=seed, folder=str(folder)))):
                return code
    return 0


def run_folder(root: Path, name: str, seed: int) -> Path:
    """Where the run of an optimizer and a seed lies."""
    return root / f"{name}-seed{seed}"


def _finished(run: Path, steps: int) -> bool:
    from frugal_dist.training.metrics import METRICS_FILE, of_kind, read_metrics

    records = read_metrics(run) if (run / METRICS_FILE).is_file() else []
    return any(record["steps"] == steps for record in of_kind(records, "summary"))


def _conclude(root: Path, names: Sequence[str], seeds: Sequence[int]) -> None:
    """The table on the terminal and in a file; the picture of the first seed."""
    from frugal_dist.training.plot import plot_runs

    text = "\n".join(table(root, names, seeds))
    (root / "comparison.md").write_text(text + "\n", encoding="utf-8")
    pictures = plot_runs([run_folder(root, name, seeds[0]) for name in names], root / "comparison.png")
    print(text, *pictures, sep="\n")


def table(root: Path, names: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """One line per optimizer: mean and spread of the final perplexity, state, and speed."""
    from frugal_dist.training.metrics import of_kind, read_metrics

    lines = [
        "| optimizer | perplexity | spread over seeds | state on the rank with most, MB | tokens/s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in names:
        runs = [read_metrics(run_folder(root, name, seed)) for seed in seeds]
        ends = [of_kind(records, "summary")[-1] for records in runs]
        speeds = [record["tokens_per_second"] for records in runs for record in of_kind(records, "train")]
        found = [end["perplexity"] or nan for end in ends]  # null: it diverged
        state = max(max(end["state_bytes"]) for end in ends) / 1e6
        spread = max(found) - min(found)
        lines.append(f"| {name} | {mean(found):,.2f} | {spread:,.2f} | {state:,.2f} | {mean(speeds):,.0f} |")
    return lines
