"""Optimizers compared on a fine-tuning: the same model, examples, order, seed and budget for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite, nan
from statistics import mean, stdev

from frugal_dist.training.compare import MOST_STATE, Comparison, Records, compare_runs, ends_of, most_state
from frugal_dist.training.finetune.recipe import FinetuneRecipe, check_finetune
from frugal_dist.training.finetune.run import finetune
from frugal_dist.training.resume import FREE


def compare_finetunes(read: Callable[[], FinetuneRecipe], optimizers: Sequence[str], seeds: Sequence[int]) -> int:
    """Fine-tune with each optimizer and each seed, see ``compare_runs``."""
    note = f"± is the standard deviation over {len(seeds)} seeds." if len(seeds) > 1 else ""
    return compare_runs(Comparison(check_finetune, finetune, FREE, _rows, note), read, optimizers, seeds)


def _rows(runs: Mapping[str, list[Records]]) -> tuple[list[str], dict[str, list[str]]]:
    """Metrics at the end (mean ± standard deviation over the seeds), best score, cost."""
    ends = {name: ends_of(of_seeds) for name, of_seeds in runs.items()}
    # A run that diverged has no best model.
    measured = [key for of_seeds in ends.values() for end in of_seeds for key in end.get("best", {})]
    metrics = [key for key in dict.fromkeys(measured) if key not in ("step", "score")]
    return [*metrics, "best score", "trained, M", MOST_STATE, "seconds"], {
        name: [
            *(_spread([100 * end.get(metric, nan) for end in of_seeds]) for metric in metrics),
            _spread([100 * end.get("best", {}).get("score", nan) for end in of_seeds]),
            f"{of_seeds[0].get('trained', nan) / 1e6:,.2f}",
            most_state(of_seeds),
            f"{mean(end['seconds'] for end in of_seeds):,.0f}",
        ]
        for name, of_seeds in ends.items()
    }


def _spread(values: Sequence[float]) -> str:
    spread = len(values) > 1 and all(map(isfinite, values))  # stdev does not take NaN
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if spread else "")
