"""Optimizers compared fairly: the same model, data, order, seed and budget for each, one after the other."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import nan
from pathlib import Path
from statistics import mean
from time import monotonic
from typing import Any, Generic, TypeVar, get_args, get_type_hints

from frugal_dist.config import FrugalConfig, check_choice, config_from
from frugal_dist.presets import DEFINED, NAMED, preset
from frugal_dist.projection.registry import options_of_others
from frugal_dist.training.distributed.place import DistEnv, find_dist_env
from frugal_dist.training.distributed.process import DIVERGED
from frugal_dist.training.distributed.ranks import PeerFailed, is_mistake, process_group, together
from frugal_dist.training.metrics.record import end_of, of_kind, read_metrics
from frugal_dist.training.optimizers import PATTERNS, settled
from frugal_dist.training.recipe import Recipe, Run, check_recipe
from frugal_dist.training.recipe.spelling import value_of
from frugal_dist.training.resume import FREE, check_existing_run, has_checkpoint, records_of
from frugal_dist.training.run import environment

R = TypeVar("R", bound=Run)
Records = list[dict[str, Any]]
"""What one run has written."""


@dataclass(frozen=True)
class Comparison(Generic[R]):
    """What is compared.

    Args:
        check: ValueError for a recipe that cannot be trained.
        train: it; the exit code.
        free: patterns of keys in which a finished run may differ from what is asked for.
        rows: titles, and the cells of every optimizer, from the runs of its seeds.
        note: said below the table.
    """

    check: Callable[[R], None]
    train: Callable[[R], int]
    free: Collection[str]
    rows: Callable[[Mapping[str, list[Records]]], tuple[list[str], dict[str, list[str]]]]
    note: str = ""


_RATES = re.compile(r"@([\d.]+(?:[eE][+-]?\d+)?)(?:x([\d.]+(?:[eE][+-]?\d+)?))?(?=:|$)")


def contender(text: str, recipe: R) -> R:
    """The recipe with the optimizer "galore" or, with rates of its own, "galore@0.01" or "galore@0.01x0.25".

    The second number is ``projected_lr_scale``: what the projected matrices are updated with, relative to the others.
    Any hyperparameter may follow: "frugal-svd:density=0.5:update_gap=50". What the name does not fix is the recipe's.

    Raises ValueError for what is not known, or contradicts the name.
    """
    rates = _RATES.search(text)
    name, *words = _RATES.sub("", text, count=1).split(":")
    own_names = get_args(get_type_hints(type(recipe.optimizer))["name"])
    check_choice("optimizers", name, (*own_names, *NAMED))
    chosen, fixed = NAMED.get(name, (name, {}))
    asked = _settings(text, words)
    for key in asked:
        if key in fixed or key in DEFINED[chosen]:
            raise ValueError(f"--optimizers {text}: the name {name!r} decides about {key}; leave it out.")
    options = {key: value for key, value in recipe.optimizer.options.items() if key not in fixed}
    own = {one.name for one in fields(recipe.optimizer)} - {"name", "options", *PATTERNS, "stateful"}
    changes: dict[str, Any] = {key: value for key, value in asked.items() if key in own}
    projection = {**fixed, **asked}.get("projection", FrugalConfig.projection)
    for key, _ in options_of_others(projection):
        if key not in asked:
            options.pop(key, None)
    scales = {"lr_scale", "projected_lr_scale"}
    if (rates and rates.group(2)) or scales & set(asked):
        options = {key: value for key, value in options.items() if key not in scales}
    if rates:
        changes["lr"] = float(rates.group(1))
    if rates and rates.group(2):
        options["lr_scale"] = float(rates.group(2))  # as runs are recorded since the first
    if "rank" in own and "density" in asked:
        changes["rank"] = None
    if changes.get("rank") is not None:
        options.pop("density", None)
    more = {key: value for key, value in asked.items() if key not in own}
    changes |= {"name": chosen, "options": {**options, **fixed, **more}}
    return replace(recipe, optimizer=settled(replace(recipe.optimizer, **changes)))


def _settings(text: str, words: Sequence[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key or not value or key in settings:
            raise ValueError(f"--optimizers {text}: {word!r} is no KEY=VALUE such as density=0.5, or appears twice.")
        settings[key] = value_of(value)
    return settings


def compare(read: Callable[[], Recipe], optimizers: Sequence[str], seeds: Sequence[int]) -> int:
    """Pre-train with each optimizer and each seed, see ``compare_runs``."""
    from frugal_dist.training.pretrain import pretrain

    return compare_runs(Comparison(check_recipe, pretrain, (*FREE, "evaluate_every"), _rows), read, optimizers, seeds)


def compare_runs(kind: Comparison[R], read: Callable[[], R], optimizers: Sequence[str], seeds: Sequence[int]) -> int:
    """Train each optimizer with each seed in a folder of its own; then table and picture. The first bad exit code.

    Runs that are finished are not repeated, those that were interrupted resume: start the same command again. A run
    that diverges is finished, too: the others follow, and the code is 1.
    Raises ValueError, before anything is trained, for what is not known, named twice or refused by an optimizer, or a
    folder with runs of another recipe; on one rank, if several would say the same.
    """
    place = find_dist_env()
    try:
        with environment(place), process_group(place):
            root, runs = together(lambda: _all_runs(kind, read(), optimizers, seeds))
            ended = _agreed_ends(kind, runs, place)
    except PeerFailed as error:
        return 2 if is_mistake(error) else 1  # what is to be said, another rank says
    codes, started, trained = [], monotonic(), 0
    wanted = sum(one.folder not in ended for one in runs)
    for number, one in enumerate(runs, start=1):
        if one.folder in ended:
            codes.append(ended[one.folder])
            continue
        if place.rank == 0:
            print(f"Run {number} of {len(runs)}{_remaining(monotonic() - started, trained, wanted)}", flush=True)
        codes.append(kind.train(one))
        trained += 1
        if codes[-1] not in (0, DIVERGED):
            return codes[-1]
    if place.rank:
        return 0  # a launcher would end the first rank for another's bad end while it still draws
    _conclude(kind, root, optimizers, seeds)
    return 1 if any(codes) else 0


def _remaining(seconds: float, trained: int, wanted: int) -> str:
    """How many runs there are to train, then what those that are left will take, as those before did."""
    if not trained:
        return f", {wanted} to train" if wanted > 1 else ""
    minutes = seconds / trained * (wanted - trained) / 60
    return f", about {minutes:,.0f} min left" if minutes >= 1 else ", less than a minute left"


def _all_runs(kind: Comparison[R], recipe: R, optimizers: Sequence[str], seeds: Sequence[int]) -> tuple[Path, list[R]]:
    """The folder, and the recipe of every run."""
    if recipe.engine == "deepspeed" and len(optimizers) * len(seeds) > 1:
        raise ValueError(
            "engine deepspeed can start only once in a process: compare with engine single, ddp or fsdp2, or give "
            "--optimizers and --seeds one at a time."
        )
    for key, values in (("optimizers", list(optimizers)), ("seeds", list(seeds))):
        if len(set(values)) < len(values):  # the second run would find the first one's folder
            raise ValueError(f"--{key} {','.join(map(str, values))} names one of them twice; name each once.")
    recipes = {text: contender(text, recipe) for text in optimizers}
    for one in recipes.values():
        kind.check(one)
    root = Path(recipe.folder)
    runs: list[R] = []
    for text, one in recipes.items():
        runs += [replace(one, seed=seed, folder=str(run_folder(root, text, seed))) for seed in seeds]
    return root, runs


def _agreed_ends(kind: Comparison[R], runs: Sequence[R], place: DistEnv) -> dict[str, int]:
    """Folders of finished runs and their exit codes, as rank 0 sees them. ValueError if one holds another recipe's."""
    from frugal_dist.training.engines.collectives import gathered

    def look() -> dict[str, int]:
        ends = {one.folder: end_of(records_of(Path(one.folder))) for one in runs}
        for one in runs:
            if ends[one.folder] is not None or has_checkpoint(Path(one.folder)):
                check_existing_run(Path(one.folder), one.record(), kind.free)
        return {folder: 0 if end["kind"] == "summary" else DIVERGED for folder, end in ends.items() if end is not None}

    own_ends = together(lambda: look() if place.rank == 0 else {})
    ends: dict[str, int] = gathered(own_ends)[0]
    return ends


def run_folder(root: Path, name: str, seed: int) -> Path:
    """Where the run of an optimizer and a seed lies. Not every file system takes a colon."""
    return root / f"{name.replace(':', '+')}-seed{seed}"


def _conclude(kind: Comparison[R], root: Path, names: Sequence[str], seeds: Sequence[int]) -> None:
    """The table on the terminal and in a file; the picture of all seeds."""
    from frugal_dist.training.metrics.plot import plot_runs

    folders = {name: [run_folder(root, name, seed) for seed in seeds] for name in names}
    runs = {name: [read_metrics(run) for run in of_seeds] for name, of_seeds in folders.items()}
    head, cells = kind.rows(runs)
    lines = [f"| optimizer | {' | '.join(head)} |", "| --- |" + " ---: |" * len(head)]
    lines += [f"| {name} | {' | '.join(cells[name])} |" for name in names]
    text = "\n".join(lines)
    (root / "comparison.md").write_text(text + "\n", encoding="utf-8")
    drawn = [
        run for name in names for run, records in zip(folders[name], runs[name], strict=True)
        if of_kind(records, "train")  # one may have diverged before the first line
    ]  # fmt: skip
    pictures = plot_runs(drawn, root / "comparison.png") if drawn else []
    print(text, *filter(None, [kind.note]), *pictures, sep="\n")


def ends_of(runs: list[Records]) -> Records:
    """The record with which each run has ended."""
    return [end_of(records) or {} for records in runs]


MOST_STATE = "state on the rank with most, MB"


def most_state(ends: Records) -> str:
    """The cell of that title."""
    return f"{max(max(end['state_bytes']) for end in ends) / 1e6:,.2f}"


def _rows(runs: Mapping[str, list[Records]]) -> tuple[list[str], dict[str, list[str]]]:
    """Mean and spread of the final perplexity, state, speed, and what was asked for."""
    seeds = len(next(iter(runs.values())))
    head = ["perplexity", f"largest - smallest of {seeds} seed{'s' * (seeds > 1)}", MOST_STATE, "tokens/s"]
    cells = {}
    for name, of_seeds in runs.items():
        ends = ends_of(of_seeds)
        speeds = [record["tokens_per_second"] for records in of_seeds for record in of_kind(records, "train")]
        reached = [end.get("perplexity") or nan for end in ends]  # none, or null: it diverged
        spread = f"{max(reached) - min(reached):,.2f}" if seeds > 1 else "-"
        cells[name] = [f"{mean(reached):,.2f}", spread, most_state(ends), f"{mean(speeds or [nan]):,.0f}"]
        cells[name] += _asked(of_seeds[0])
    return [*head, "lr", "lr_scale", "steps", "validation tokens"], cells


def _asked(records: Records) -> list[str]:
    """What a run was told: rate, scale of the projected matrices' rate, steps, tokens of an evaluation."""
    record = of_kind(records, "run")[-1]
    optimizer = record["optimizer"]
    scale = config_from(preset(optimizer["name"], **optimizer["options"])).projected_lr_scale
    return [f"{optimizer['lr']:g}", f"{scale:g}", f"{record['steps']:,}", f"{record.get('validation_tokens', 0):,}"]
