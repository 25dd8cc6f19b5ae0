"""Runs as pictures: the loss curve of one, or several side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frugal_dist.training.metrics import of_kind, read_metrics

PLOT_FILE = "loss_curve.png"


def plot_run(run: Path) -> Path:
    """Draw training loss and validation perplexity (score) against tokens, the unigram model as a line to beat."""
    records = read_metrics(run)
    train, validation = of_kind(records, "train"), of_kind(records, "validation")
    key = _measure(records)
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
    left.set(xlabel="thousand tokens", ylabel=_loss_label(key))
    right.plot(
        [row["tokens"] / 1e3 for row in validation],
        [row[key] for row in validation],
        color="C1",
        marker="o",
        label="validation",
    )
    right.set(xlabel="thousand tokens", ylabel=f"validation {key}", yscale=SCALES[key])
    if SCALES[key] == "log":
        right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # readable numbers instead of powers of ten
        right.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        right.yaxis.set_minor_formatter(NullFormatter())
    for setup in (record for record in of_kind(records, "run") if "unigram_loss" in record):
        left.axhline(setup["unigram_loss"], color="0.5", linestyle="--", label="unigram model")
        right.axhline(math.exp(setup["unigram_loss"]), color="0.5", linestyle="--", label="unigram model")
        figure.suptitle(f"{setup['model']}: {setup['parameters'] / 1e6:.1f} M parameters, {setup['optimizer']}")
    for panel in (left, right):
        panel.grid(alpha=0.3)
        panel.legend()
    path = run / PLOT_FILE
    figure.savefig(path, dpi=100)
    return path


SCALES = {"perplexity": "log", "score": "linear"}
"""What validation measures: the perplexity of pre-training, the score of fine-tuning."""


def _measure(records: list[dict[str, Any]]) -> str:
    return "score" if any("score" in row for row in of_kind(records, "validation")) else "perplexity"


def _loss_label(key: str) -> str:
    return "training loss (nats per token)" if key == "perplexity" else "training loss"


# --- several runs

Points = list[tuple[float, float]]


def plot_runs(runs: Sequence[Path], out: Path) -> list[Path]:
    """Loss and perplexity (score) of several runs, and the optimizer state they took; a PNG and an SVG, named after
    ``out``.

    Raises ValueError for a folder that holds no run, or none that has trained, and for runs of different kinds.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [run.name for run in runs]
    everything = {
        run.name if names.count(run.name) == 1 else f"{run.parent.name}/{run.name}": read_metrics(run) for run in runs
    }
    for name, records in everything.items():
        if not of_kind(records, "train"):
            raise ValueError(f"{name} has no training records yet; run it for a few more steps.")
    measures = {_measure(records) for records in everything.values()}
    if len(measures) > 1:
        raise ValueError("these are runs of pre-training and of fine-tuning; draw them apart.")
    key = measures.pop()
    refreshes = {name: of_kind(records, "refresh") for name, records in everything.items()}
    rows = 3 if any(refreshes.values()) else 2
    figure = Figure(figsize=(9.0, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, 2)
    (loss, quality), (time, state) = panels[:2]
    for name, records in everything.items():
        train, validation = of_kind(records, "train"), of_kind(records, "validation")
        _line(loss, name, [(row["tokens"] / 1e6, row["loss"]) for row in train])
        _line(quality, name, [(row["tokens"] / 1e6, row[key]) for row in validation], marker="o")
        _line(time, name, [(r["seconds"] / 60, r[key]) for r in validation if "seconds" in r], marker="o")
    loss.set(xlabel="million tokens", ylabel=_loss_label(key))
    quality.set(xlabel="million tokens", ylabel=f"validation {key}", yscale=SCALES[key])
    time.set(xlabel="minutes", ylabel=f"validation {key}", yscale=SCALES[key])
    _bars(state, {name: of_kind(records, "summary") for name, records in everything.items()})
    for panel in (loss, quality, time):
        panel.grid(alpha=0.3)
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=2)  # one, beside all curves
    if rows == 3:
        _draw_refreshes(panels[2][0], panels[2][1], refreshes)
    paths = [out.with_suffix(".png"), out.with_suffix(".svg")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100)
    return paths


def _draw_refreshes(energy: Any, overlap: Any, refreshes: dict[str, list[dict[str, Any]]]) -> None:
    """What was left to the state-free rule at every refresh, and how far the bases turned."""
    for number, (name, found) in enumerate(refreshes.items()):
        for panel, key in ((energy, "residual_energy"), (overlap, "overlap")):
            points = [(row["tokens"] / 1e6, row[key]) for row in found if row[key] is not None]
            if points:
                _line(panel, name, points, marker=".", color=f"C{number}")
    energy.set(xlabel="million tokens", ylabel="share of energy in the residual", ylim=(0, 1))
    overlap.set(xlabel="million tokens", ylabel="overlap with the basis before", ylim=(0, 1))
    for panel in (energy, overlap):
        panel.grid(alpha=0.3)


def _line(panel: Any, name: str, points: Points, marker: str = "", color: str | None = None) -> None:
    panel.plot([x for x, _ in points], [y for _, y in points], label=name, marker=marker, color=color)


def _bars(panel: Any, summaries: dict[str, list[dict[str, Any]]]) -> None:
    """Optimizer state of the rank that has most; runs that are not finished have none yet."""
    sizes = {name: max(found[-1]["state_bytes"]) / 1e6 for name, found in summaries.items() if found}
    panel.barh(list(sizes), list(sizes.values()), color=[f"C{list(summaries).index(name)}" for name in sizes])
    panel.invert_yaxis()
    panel.set(xlabel="optimizer state, MB on the rank with most")
