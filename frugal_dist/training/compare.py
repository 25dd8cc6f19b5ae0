"""Optimizers compared fairly: the same model, data, order, seed and budget for each, one after the other."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from math import nan
from pathlib import Path
from statistics import mean
from time import monotonic
from typing import Any, Generic, TypeVar

from frugal_dist.config import FrugalConfig, check_choice, config_from
from frugal_dist.presets import CONTENDERS, DEFINED, RECIPES_NAMES, Contenders, preset
from frugal_dist.projection.registry import options_of_others
from frugal_dist.training.distributed.place import DistEnv, find_dist_env
from frugal_dist.training.distributed.process import DIVERGED
from frugal_dist.training.distributed.ranks import PeerFailed, is_mistake, process_group, together
from frugal_dist.training.finetune.recipe import FinetuneRecipe
from frugal_dist.training.metrics.record import end_of, of_kind, read_metrics
from frugal_dist.training.optimizers import PATTERNS, check_optimizer, settled
from frugal_dist.training.recipe import Recipe, check_recipe
from frugal_dist.training.resume import FREE, check_begun, records_of
from frugal_dist.training.run import environment, has_begun
from frugal_dist.training.spelling import value_of

R = TypeVar("R", Recipe, FinetuneRecipe)


@dataclass(frozen=True)
class Contender(Generic[R]):
    """What is compared: ``check`` and ``train`` a recipe, ``check_optimizer`` of it without a model.

    ``free``: patterns of keys in which a finished run may differ from what is asked for.
    """

    check: Callable[[R], None]
    check_optimizer: Callable[[R], None]
    train: Callable[[R], int]
    known: Contenders
    free: Collection[str]


_RATES = re.compile(r"@([\d.]+(?:[eE][+-]?\d+)?)(?:x([\d.]+(?:[eE][+-]?\d+)?))?(?=:|$)")


def contender(text: str, recipe: R, known: Contenders = CONTENDERS) -> R:
    """The recipe with the optimizer "galore" or, with rates of its own, "galore@0.01" or "galore@0.01x0.25".

    The second number is ``projected_lr_scale``: what the projected matrices are updated with, relative to the others.
    Any hyperparameter may follow: "frugal-svd:density=0.5:update_gap=50".

    Raises ValueError for what is not known, or contradicts the name.
    """
    rates = _RATES.search(text)
    name, *words = _RATES.sub("", text, count=1).split(":")
    known = {**known, **RECIPES_NAMES}
    check_choice("optimizers", name, known)
    chosen, fixed = known[name]
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
    optimizer: Any = settled(replace(recipe.optimizer, **changes))
    return replace(recipe, optimizer=optimizer)


def _settings(text: str, words: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key or not value or key in found:
            raise ValueError(f"--optimizers {text}: {word!r} is no KEY=VALUE such as density=0.5, or stands twice.")
        found[key] = value_of(value)
    return found


def compare(read: Callable[[], Recipe], optimizers: Sequence[str], seeds: Sequence[int]) -> int:
    """Train each optimizer with each seed, then write the table and the picture; the exit code of pretrain.

    Runs that are finished are not repeated, those that were interrupted go on: start the same command again.
    Raises ValueError for an optimizer that is not known, or a folder with runs of another recipe.
    """
    from frugal_dist.training.pretrain import pretrain

    kind = Contender(
        check_recipe, lambda one: check_optimizer(one.optimizer), pretrain, CONTENDERS, (*FREE, "evaluate_every")
    )
    return train_all(kind, read, optimizers, seeds, lambda root: _conclude(root, optimizers, seeds))


def train_all(
    kind: Contender[R],
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
    place = find_dist_env()
    try:
        with environment(place), process_group(place):
            root, runs = together(lambda: _all_runs(kind, read(), optimizers, seeds))
            ended = _agreed_ends(kind, runs, place)
    except PeerFailed as error:
        return 2 if is_mistake(error) else 1  # what is to be said, another rank says
    codes, begun, trained = [], monotonic(), 0
    wanted = sum(one.folder not in ended for one in runs)
    for number, one in enumerate(runs, start=1):
        if one.folder in ended:
            codes.append(ended[one.folder])
            continue
        if place.rank == 0:
            print(f"Run {number} of {len(runs)}{_remaining(monotonic() - begun, trained, wanted)}", flush=True)
        codes.append(kind.train(one))
        trained += 1
        if codes[-1] not in (0, DIVERGED):
            return codes[-1]
    if place.rank:
        return 0  # a launcher would end the first rank for another's bad end while it still draws
    conclude(root)
    return 1 if any(codes) else 0


def _remaining(seconds: float, trained: int, wanted: int) -> str:
    """How many runs there are to train, then what those that are left will take, as those before did."""
    if not trained:
        return f", {wanted} to train" if wanted > 1 else ""
    minutes = seconds / trained * (wanted - trained) / 60
    return f", about {minutes:,.0f} min left" if minutes >= 1 else ", less than a minute left"


def _all_runs(kind: Contender[R], recipe: R, optimizers: Sequence[str], seeds: Sequence[int]) -> tuple[Path, list[R]]:
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


def _agreed_ends(kind: Contender[R], runs: Sequence[R], place: DistEnv) -> dict[str, int]:
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
    """Where the run of an optimizer and a seed lies. Not every file system takes a colon."""
    return root / f"{name.replace(':', '+')}-seed{seed}"


def _conclude(root: Path, names: Sequence[str], seeds: Sequence[int]) -> None:
    """The table on the terminal and in a file; the picture of all seeds."""
    from frugal_dist.training.metrics.plot import plot_runs

    text = "\n".join(table(root, names, seeds))
    (root / "comparison.md").write_text(text + "\n", encoding="utf-8")
    runs = [run_folder(root, name, seed) for name in names for seed in seeds]
    drawn = [run for run in runs if of_kind(read_metrics(run), "train")]  # one may have diverged before the first line
    pictures = plot_runs(drawn, root / "comparison.png") if drawn else []
    print(text, *pictures, sep="\n")


def table(root: Path, names: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """One line per optimizer: mean and spread of the final perplexity, state, speed, and what was asked for."""
    head = ["perplexity", f"largest - smallest of {len(seeds)} seed{'s' * (len(seeds) > 1)}"]
    head += ["state on the rank with most, MB", "tokens/s", "lr", "lr_scale", "steps", "validation tokens"]
    lines = [f"| optimizer | {' | '.join(head)} |", "| --- |" + " ---: |" * len(head)]
    for name in names:
        runs = [read_metrics(run_folder(root, name, seed)) for seed in seeds]
        ends = [end_of(records) or {} for records in runs]
        speeds = [record["tokens_per_second"] for records in runs for record in of_kind(records, "train")]
        found = [end.get("perplexity") or nan for end in ends]  # none, or null: it diverged
        state = max(max(end["state_bytes"]) for end in ends) / 1e6
        spread = f"{max(found) - min(found):,.2f}" if len(found) > 1 else "-"
        cells = [f"{mean(found):,.2f}", spread, f"{state:,.2f}", f"{mean(speeds or [nan]):,.0f}"]
        lines.append(f"| {name} | {' | '.join([*cells, *_asked(runs[0])])} |")
    return lines


def _asked(records: list[dict[str, Any]]) -> list[str]:
    """What a run was told: rate, scale of the projected matrices' rate, steps, tokens of an evaluation."""
    begun = of_kind(records, "run")[-1]
    optimizer = begun["optimizer"]
    scale = config_from(preset(optimizer["name"], **optimizer["options"])).projected_lr_scale
    return [f"{optimizer['lr']:g}", f"{scale:g}", f"{begun['steps']:,}", f"{begun.get('validation_tokens', 0):,}"]
