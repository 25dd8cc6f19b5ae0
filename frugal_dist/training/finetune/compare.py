"""Optimizers compared on a fine-tuning: the same model, examples, order, seed and budget for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite, nan
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from frugal_dist.presets import BEHIND, CONTENDERS, Contenders
from frugal_dist.training.compare import Contender, run_folder, train_all
from frugal_dist.training.finetune.recipe import FinetuneRecipe, check_finetune
from frugal_dist.training.finetune.run import finetune
from frugal_dist.training.metrics.record import end_of, read_metrics
from frugal_dist.training.optimizers import check_tuning
from frugal_dist.training.resume import FREE

TUNED: Contenders = {**CONTENDERS, **{name: (name, {}) for name in BEHIND}}


def compare_finetunes(read: Callable[[], FinetuneRecipe], optimizers: Sequence[str], seeds: Sequence[int]) -> int:
    """Fine-tune with each optimizer and each seed, then write the table; the exit code of ``run.run_begun``.

    Runs that are finished are not repeated, those that were interrupted go on: start the same command again.
    Raises ValueError for an optimizer that is not known, or a folder with runs of another recipe.
    """
    kind = Contender(check_finetune, lambda one: check_tuning(one.optimizer), finetune, TUNED, FREE)

    def conclude(root: Path) -> None:
        text = "\n".join(table(root, optimizers, seeds))
        (root / "comparison.md").write_text(text + "\n", encoding="utf-8")
        print(text)
        if len(seeds) > 1:
            print(f"± is the standard deviation over {len(seeds)} seeds.")

    return train_all(kind, read, optimizers, seeds, conclude)


def table(root: Path, names: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """One line per optimizer: metrics at the end (mean ± standard deviation over the seeds), best score, cost."""
    ends = {name: [_summary(root, name, seed) for seed in seeds] for name in names}
    # A run that diverged has no best model.
    measured = [key for found in ends.values() for end in found for key in end.get("best", {})]
    metrics = [key for key in dict.fromkeys(measured) if key not in ("step", "score")]
    head = [*metrics, "best score", "trained, M", "state on the rank with most, MB", "seconds"]
    lines = [f"| optimizer | {' | '.join(head)} |", "| --- |" + " ---: |" * len(head)]
    for name, found in ends.items():
        cells = [_spread([100 * end.get(metric, nan) for end in found]) for metric in metrics]
        cells.append(_spread([100 * end.get("best", {}).get("score", nan) for end in found]))
        cells.append(f"{found[0].get('trained', nan) / 1e6:,.2f}")
        cells.append(f"{max(max(end['state_bytes']) for end in found) / 1e6:,.2f}")
        cells.append(f"{mean(end['seconds'] for end in found):,.0f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _summary(root: Path, name: str, seed: int) -> dict[str, Any]:
    return end_of(read_metrics(run_folder(root, name, seed))) or {}


def _spread(values: Sequence[float]) -> str:
    spread = len(values) > 1 and all(map(isfinite, values))  # stdev does not take NaN
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if spread else "")
