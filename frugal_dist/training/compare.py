"""Optimizers compared fairly: the same model, data, order, seed and budget for each, one after the other."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from statistics import mean
from typing import Any, Generic, TypeVar

from frugal_dist.config import check_choice
from frugal_dist.training.begun import FREE, check_begun, records_of
from frugal_dist.training.finetune_recipe import FinetuneRecipe
from frugal_dist.training.metrics import end_of, of_kind, read_metrics
from frugal_dist.training.optimizers import check_optimizer, settled
from frugal_dist.training.place import Place, find_place
from frugal_dist.training.ranks import joined, together
from frugal_dist.training.recipe import Number, Recipe, check_recipe
from frugal_dist.training.rollcall import OthersFailed, is_mistake
from frugal_dist.training.run import environment, has_begun
from frugal_dist.training.signals import DIVERGED

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
"""By name: the optimizer, and what is fixed beside what that name means. The rest, such as update_gap, is the recipe's.
"""


@dataclass(frozen=True)
class Kind(Generic[R]):
    """What is compared: ``check`` and ``train`` a recipe, ``check_optimizer`` of it without a model.

    ``free``: patterns of keys in which a finished run may differ from what is asked for.
    """

    check: Callable[[R], None]
    check_optimizer: Callable[[R], None]
    train: Callable[[R], int]
    known: Contenders
    free: Collection[str]


def contender(text: str, recipe: R, known: Contenders = CONTENDERS) -> R:
    """The recipe with the optimizer "galore" or, with rates of its own, "galore@0.01" or "galore@0.01x0.25".

    The second number is ``projected_lr_scale``: what the projected matrices are updated with, relative to the others.
    """
    found = re.fullmatch(r"([\w-]+?)(?:@([\d.eE+-]+)(?:x([\d.eE+-]+))?)?", text)
    name = found.group(1) if found else text
    check_choice("optimizers", name, known)
    preset: str = known[name][0]
    fixed: dict[str, Number] = known[name][1]
    options = {key: value for key, value in recipe.optimizer.options.items() if key not in fixed}
    if fixed.get("projection", "svd") != "svd":
        options.pop("svd_method", None)
    rate = float(found.group(2)) if found and found.group(2) else recipe.optimizer.lr
    if found and found.group(3):
        options = {key: value for key, value in options.items() if key not in ("lr_scale", "projected_lr_scale")}
        options["lr_scale"] = float(found.group(3))  # as runs are recorded since the first
    changes: dict[str, Any] = {"name": preset, "lr": rate, "options": {**options, **fixed}}
    optimizer: Any = settled(replace(recipe.optimizer, **changes))
    return replace(recipe, optimizer=optimizer)


def compare(read: Callable[[], Recipe], optimizers: Sequence[str], seeds: Sequence[int]) -> int:
    """Train each optimizer with each seed, then write the table and the picture; the exit code of pretrain.

    Runs that are finished are not repeated, those that were interrupted go on: start the same command again.
    Raises ValueError for an optimizer that is not known, or a folder with runs of another recipe.
    """
    from frugal_dist.training.pretrain import pretrain

    kind = Kind(
        check_recipe, lambda one: check_optimizer(one.optimizer), pretrain, CONTENDERS, (*FREE, "evaluate_every")
    )
    return train_all(kind, read, optimizers, seeds, lambda root: _conclude(root, optimizers, seeds))


def train_all(
    kind: Kind[R],
    read: Callable[[], R],
    optimizers: Sequence[str],
    seeds: Sequence[int],
    conclude: Callable[[Path], None],
) -> int:
    """Train each optimizer with each seed in a folder of its own, unless it is finished; the first bad exit code.

    A run that diverges is finished, too: the others follow, and the code is 1. ``conclude(root)`` is last, on rank 0.
    Raises ValueError, before anything is trained, for what is not known, named twice or refused by an optimizer; on one
    rank, if several would say the same.
    """
    place = find_place()
    try:
        with environment(place), joined(place):
            root, runs = together(lambda: _all_runs(kind, read(), optimizers, seeds))
            ended = _agreed_ends(kind, runs, place)
    except OthersFailed as error:
        return 2 if is_mistake(error) else 1  # what is to be said, another rank says
    codes = []
    for one in runs:
        codes.append(ended[one.folder] if one.folder in ended else kind.train(one))
        if codes[-1] not in (0, DIVERGED):
            return codes[-1]
    if place.rank:
        return 0  # a launcher would end the first rank for another's bad end while it still draws
    conclude(root)
    return 1 if any(codes) else 0


def _all_runs(kind: Kind[R], recipe: R, optimizers: Sequence[str], seeds: Sequence[int]) -> tuple[Path, list[R]]:
    """The folder, and the recipe of every run."""
    kind.check(recipe)
    if recipe.engine == "deepspeed" and len(optimizers) * len(seeds) > 1:
        raise ValueError(
            "engine deepspeed can start only once in a process: compare with engine single, ddp or fsdp2, or give "
            "--optimizers and --seeds one at a time."
        )
    for key, values in (("optimizers", list(optimizers)), ("seeds", list(seeds))):
        if len(set(values)) < len(values):  # the second run would find the first one's folder
            raise ValueError(f"--{key} {','.join(map(str, values))} names one of them twice; name each once.")
    recipes = {text: contender(text, recipe, kind.known) for text in optimizers}
    for one in recipes.values():
        kind.check_optimizer(one)
    root = Path(recipe.folder)
    runs: list[R] = []
    for text, one in recipes.items():
        runs += [replace(one, seed=seed, folder=str(run_folder(root, text, seed))) for seed in seeds]
    return root, runs


def _agreed_ends(kind: Kind[R], runs: Sequence[R], place: Place) -> dict[str, int]:
    """Folders of finished runs and their exit codes, as rank 0 sees them. ValueError if one holds another recipe's."""
    from frugal_dist.training.engines.collectives import gathered

    def look() -> dict[str, int]:
        ends = {one.folder: end_of(records_of(Path(one.folder))) for one in runs}
        for one in runs:
            if ends[one.folder] is not None or has_begun(Path(one.folder)):
                check_begun(Path(one.folder), one.record(), kind.free)
        return {folder: 0 if end["kind"] == "summary" else DIVERGED for folder, end in ends.items() if end is not None}

    found = together(lambda: look() if place.rank == 0 else {})
    ends: dict[str, int] = gathered(found)[0]
    return ends


def run_folder(root: Path, name: str, seed: int) -> Path:
    """Where the run of an optimizer and a seed lies."""
    return root / f"{name}-seed{seed}"


def _conclude(root: Path, names: Sequence[str], seeds: Sequence[int]) -> None:
    """The table on the terminal and in a file; the picture of the first seed."""
    from frugal_dist.training.plot import plot_runs

    text = "\n".join(table(root, names, seeds))
    (root / "comparison.md").write_text(text + "\n", encoding="utf-8")
    runs = [run_folder(root, name, seeds[0]) for name in names]
    drawn = [run for run in runs if of_kind(read_metrics(run), "train")]  # one may have diverged before the first line
    pictures = plot_runs(drawn, root / "comparison.png") if drawn else []
    print(text, *pictures, sep="\n")


def table(root: Path, names: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """One line per optimizer: mean and spread of the final perplexity, state, and speed."""
    lines = [
        "| optimizer | perplexity | spread over seeds | state on the rank with most, MB | tokens/s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in names:
        runs = [read_metrics(run_folder(root, name, seed)) for seed in seeds]
        ends = [end_of(records) or {} for records in runs]
        speeds = [record["tokens_per_second"] for records in runs for record in of_kind(records, "train")]
        found = [end.get("perplexity") or nan for end in ends]  # none, or null: it diverged
        state = max(max(end["state_bytes"]) for end in ends) / 1e6
        spread = max(found) - min(found)
        lines.append(f"| {name} | {mean(found):,.2f} | {spread:,.2f} | {state:,.2f} | {mean(speeds or [nan]):,.0f} |")
    return lines
