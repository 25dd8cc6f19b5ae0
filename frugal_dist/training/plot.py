"""The loss curve of a run as a picture."""

from __future__ import annotations

import math
from pathlib import Path

from frugal_dist.training.metrics import of_kind, read_metrics

PLOT_FILE = "loss_curve.png"


def plot_run(run: Path) -> Path:
    """Draw training loss and validation perplexity against tokens, with the unigram model as a line to beat."""
    records = read_metrics(run)
    train, validation = of_kind(records, "train"), of_kind(records, "validation")
    if not train:
        raise ValueError(f"{run} has no training records yet; run it for a few more steps.")

    # The object interface needs no display and no global backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot([row["tokens"] / 1e3 for row in train], [row["loss"] for row in train], color="C0", label="training")
    left.set(xlabel="thousand tokens", ylabel="training loss (nats per token)")
    right.plot(
        [row["tokens"] / 1e3 for row in validation],
        [row["perplexity"] for row in validation],
        color="C1",
        marker="o",
        label="validation",
    )
    right.set(xlabel="thousand tokens", ylabel="validation perplexity", yscale="log")
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # readable numbers instead of powers of ten
    right.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    right.yaxis.set_minor_formatter(NullFormatter())
    for setup in of_kind(records, "run"):
        left.axhline(setup["unigram_loss"], color="0.5", linestyle="--", label="unigram model")
        right.axhline(math.exp(setup["unigram_loss"]), color="0.5", linestyle="--", label="unigram model")
        figure.suptitle(f"{setup['model']}: {setup['parameters'] / 1e6:.1f} M parameters, {setup['optimizer']}")
    for panel in (left, right):
        panel.grid(alpha=0.3)
        panel.legend()
    path = run / PLOT_FILE
    figure.savefig(path, dpi=100)
    return path
