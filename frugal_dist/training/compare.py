"""Optimizers compared fairly: the same model, data, order, seed and budget for each, one after the other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from frugal_dist.config import check_choice
from frugal_dist.training.place import find_place
from frugal_dist.training.recipe import Number, Optimizer, Recipe, check_recipe

CONTENDERS: dict[str, tuple[str, dict[str, Number]]] = {
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
OWN = {"adamw": ("density",), "signsgd": ("density",)}
"""Options of the recipe that a preset does not take over: they make it what it is."""


def contender(text: str, recipe: Recipe) -> tuple[str, Optimizer]:
    """(name, optimizer) of "galore" or, with a learning rate of its own, "galore@0.01"."""
    found = re.fullmatch(r"([\w-]+)(?:@([\d.eE+-]+))?", text)
    name = found.group(1) if found else text
    check_choice("optimizers", name, CONTENDERS)
    preset, fixed = CONTENDERS[name]
    fixing = {*fixed, *OWN.get(preset, ()), "projection"}
    options = {key: value for key, value in recipe.optimizer.options.items() if key not in fixing}
    rate = float(found.group(2)) if found and found.group(2) else recipe.optimizer.lr
    changes: dict[str, Any] = {"name": preset, "lr": rate, "options": {**options, **fixed}}
    return text, replace(recipe.optimizer, **changes)


def compare(recipe: Recipe, optimizers: Sequence[str], seeds: Sequence[int]) -> int:
    """Train each optimizer with each seed, then write the table and the picture; the exit code of pretrain.

    Runs that are finished are not repeated, those that were interrupted go on: start the same command again.
    Raises ValueError for an optimizer that is not known.
    """
    from frugal_dist.training.pretrain import pretrain

    check_recipe(recipe)
    if recipe.engine == "deepspeed" and len(optimizers) * len(seeds) > 1:
        raise ValueError(
            "engine deepspeed can start only once in a process: compare with engine single, ddp or fsdp2, or give "
            "--optimizers and --seeds one at a time."
        )
    for key, values in (("optimizers", list(optimizers)), ("seeds", list(seeds))):
        if len(set(values)) < len(values):  # the second run would find the first one's folder
            raise ValueError(f"--{key} {','.join(map(str, values))} names one of them twice; name each once.")
    contenders = [contender(text, recipe) for text in optimizers]
    root = Path(recipe.folder)
    for name, optimizer in contenders:
        for seed in seeds:
            one = replace(recipe, optimizer=optimizer, seed=seed, folder=str(root / f"{name}-seed{seed}"))
            if not _finished(Path(one.folder), recipe.steps) and (code := pretrain(one)):
                return code
    if find_place().rank == 0:
        _conclude(root, [name for name, _ in contenders], seeds)
    return 0


def _finished(run: Path, steps: int) -> bool:
    from frugal_dist.training.metrics import METRICS_FILE, of_kind, read_metrics

    records = read_metrics(run) if (run / METRICS_FILE).is_file() else []
    return any(record["steps"] == steps for record in of_kind(records, "summary"))


def _conclude(root: Path, names: Sequence[str], seeds: Sequence[int]) -> None:
    """The table on the terminal and in a file; the picture of the first seed."""
    from frugal_dist.training.plot import plot_runs

    text = "\n".join(table(root, names, seeds))
    (root / "comparison.md").write_text(text + "\n", encoding="utf-8")
    pictures = plot_runs([root / f"{name}-seed{seeds[0]}" for name in names], root / "comparison.png")
    print(text, *pictures, sep="\n")


def table(root: Path, names: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """One line per optimizer: mean and spread of the final perplexity, state, and speed."""
    from frugal_dist.training.metrics import of_kind, read_metrics

    lines = [
        "| optimizer | perplexity | spread over seeds | state on the rank with most, MB | tokens/s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in names:
        runs = [read_metrics(root / f"{name}-seed{seed}") for seed in seeds]
        ends = [of_kind(records, "summary")[-1] for records in runs]
        speeds = [record["tokens_per_second"] for records in runs for record in of_kind(records, "train")]
        found = [end["perplexity"] for end in ends]
        state = max(max(end["state_bytes"]) for end in ends) / 1e6
        spread = max(found) - min(found)
        lines.append(f"| {name} | {mean(found):,.2f} | {spread:,.2f} | {state:,.2f} | {mean(speeds):,.0f} |")
    return lines
