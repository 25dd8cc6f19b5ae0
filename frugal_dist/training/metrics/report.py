"""The short report at the end of a run: what was reached, what it cost in memory, where things lie."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from frugal_dist.planner import MOMENT_BYTES

REPORT_FILE = "report.txt"


@dataclass(frozen=True)
class Summary:
    """The figures of a finished run."""

    optimizer: str
    parameters: int
    state_bytes: list[int]
    steps: int
    tokens: int
    seconds: float
    validation_tokens: int
    perplexity_at_start: float
    perplexity_at_end: float
    unigram_perplexity: float

    @property
    def ranks(self) -> int:
        """How many ranks took part."""
        return len(self.state_bytes)

    @property
    def adamw_bytes(self) -> int:
        """State that AdamW would have per rank, cut equally over the ranks as under ZeRO."""
        return math.ceil(MOMENT_BYTES * self.parameters / self.ranks)

    def record(self) -> dict[str, Any]:
        """The figures for the metrics file."""
        return {**asdict(self), "adamw_state_bytes_per_rank": self.adamw_bytes}


def report_text(summary: Summary, run: Path, config: Path) -> str:
    """The report as the user reads it."""
    largest = max(summary.state_bytes)
    share = 100 * largest / summary.adamw_bytes
    kept_below = summary.perplexity_at_end < summary.unigram_perplexity
    return "\n".join(
        [
            "",
            f"Trained {summary.parameters / 1e6:.2f} M parameters with {summary.optimizer} on {summary.tokens:,} "
            f"tokens ({summary.steps} steps, {summary.ranks} ranks, {_duration(summary.seconds)}).",
            "",
            f"Validation perplexity      {summary.perplexity_at_start:,.0f} at the start, "
            f"{summary.perplexity_at_end:,.1f} at the end ({summary.validation_tokens:,} tokens)",
            f"Unigram perplexity         {summary.unigram_perplexity:,.1f}: guessing by how frequent each token is; "
            + ("the model is below it" if kept_below else "NOT reached yet: train longer"),
            f"Optimizer state per rank   {largest / 1e6:.2f} MB measured; AdamW: {summary.adamw_bytes / 1e6:.2f} MB "
            f"({share:.0f} % of it)",
            "",
            f"Loss curve    {run / 'loss_curve.png'}",
            f"Metrics       {run / 'metrics.jsonl'}",
            f"Checkpoint    {run / 'checkpoint'}",
            f"Full output   {run / 'output.txt'}",
            "",
            f"Next: change the optimizer in {config} and run again, or use FRUGAL in your own training:",
            "the README shows the lines for plain PyTorch and for a DeepSpeed JSON.",
            "",
        ]
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
