"""Runs as pictures: loss and quality against tokens and time, memory, refreshes; one run or several side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from frugal_dist.training.metrics import end_of, of_kind, read_metrics

PLOT_FILE = "loss_curve.png"
SCALES = {"perplexity": "log", "score": "linear"}
"""What validation measures: the perplexity of pre-training, the score of fine-tuning."""

Record = dict[str, Any]
Runs = dict[str, list[Record]]
"""Records by the run's name."""
Axis = tuple[str, Callable[[Record], float | None]]
"""A label, and the place of a record; None if it says nothing of it."""


def plot_run(run: Path) -> list[Path]:
    """Draw one run into its own folder, see ``plot_runs``."""
    return plot_runs([run], run / PLOT_FILE)


def plot_runs(runs: Sequence[Path], out: Path) -> list[Path]:
    """Training loss and validation perplexity (score) against tokens and minutes, the memory that was used, and what
    the refreshes found, if there were any; a PNG and an SVG, named after ``out``.

    Raises ValueError for a folder that holds no run, or none that has trained, and for runs of different kinds.
    """
    # The object interface needs no display and no global backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = _read(runs)
    measures = {_measure(records) for records in found.values()}
    if len(measures) > 1:
        raise ValueError("these are runs of pre-training and of fine-tuning; draw them apart.")
    key = measures.pop()
    rows = 4 if any(of_kind(records, "refresh") for records in found.values()) else 3
    figure = Figure(figsize=(9.0, 3.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, 2)
    tokens = _tokens_axis(found)
    for line, axis in zip(panels, (tokens, ("minutes", _minutes)), strict=False):
        _draw_losses(line, found, axis, key)
    _state_bars(panels[2][0], found)
    _peak_bars(panels[2][1], found)
    if rows == 4:
        _draw_refreshes(panels[3], found, tokens)
    _explain(figure, panels, found)
    paths = [out.with_suffix(".png"), out.with_suffix(".svg")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100)
    return paths


def _read(runs: Sequence[Path]) -> Runs:
    names = [run.name for run in runs]
    found = {
        run.name if names.count(run.name) == 1 else f"{run.parent.name}/{run.name}": read_metrics(run) for run in runs
    }
    for name, records in found.items():
        if not of_kind(records, "train"):
            raise ValueError(f"{name} has no training records yet; run it for a few more steps.")
    return found


def _measure(records: list[Record]) -> str:
    return "score" if any("score" in row for row in of_kind(records, "validation")) else "perplexity"


def _tokens_axis(found: Runs) -> Axis:
    most = max(row["tokens"] for records in found.values() for row in of_kind(records, "train"))
    unit, name = (1e6, "million") if most >= 1e6 else (1e3, "thousand")
    return f"{name} tokens", lambda row: row["tokens"] / unit


def _minutes(row: Record) -> float | None:
    return row["seconds"] / 60 if "seconds" in row else None


# --- curves -----------------------------------------------------------------------------------------------------------


def _draw_losses(panels: Sequence[Any], found: Runs, axis: Axis, key: str) -> None:
    """Training loss on the left, what validation measures on the right; what the unigram model has, as dashes."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    loss, quality = panels
    for number, (name, records) in enumerate(found.items()):
        _line(loss, name, of_kind(records, "train"), axis, "loss", number)
        _line(quality, name, of_kind(records, "validation"), axis, key, number, marker="o")
    unigram = {row["unigram_loss"] for rows in found.values() for row in of_kind(rows, "run") if "unigram_loss" in row}
    for value in unigram:
        _line_to_beat(loss, value)
        _line_to_beat(quality, math.exp(value))
    loss.set(xlabel=axis[0], ylabel="training loss (nats per token)" if key == "perplexity" else "training loss")
    quality.set(xlabel=axis[0], ylabel=f"validation {key}", yscale=SCALES[key])
    if SCALES[key] == "log":
        quality.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # readable numbers instead of powers of ten
        quality.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        quality.yaxis.set_minor_formatter(NullFormatter())


def _draw_refreshes(panels: Sequence[Any], found: Runs, axis: Axis) -> None:
    """What was left to the state-free rule at every refresh, and how far the bases turned."""
    wanted = {"residual_energy": "share of energy in the residual", "overlap": "overlap with the basis before"}
    for panel, (key, label) in zip(panels, wanted.items(), strict=True):
        for number, (name, records) in enumerate(found.items()):
            _line(panel, name, of_kind(records, "refresh"), axis, key, number, marker=".")
        panel.set(xlabel=axis[0], ylabel=label, ylim=(0, 1))


def _line(panel: Any, name: str, rows: list[Record], axis: Axis, key: str, number: int, marker: str = "") -> None:
    """A curve in the run's own colour. Values that are null, such as a NaN loss, are left out."""
    points = [(axis[1](row), row.get(key)) for row in rows]
    points = [(x, y) for x, y in points if x is not None and y is not None]
    panel.plot([x for x, _ in points], [y for _, y in points], label=name, marker=marker, color=f"C{number}")


def _line_to_beat(panel: Any, value: float) -> None:
    if any(len(line.get_xdata()) for line in panel.lines):  # alone it would have an axis without extent
        panel.axhline(value, color="0.5", linestyle="--", label="unigram model")


# --- memory -----------------------------------------------------------------------------------------------------------


def _state_bars(panel: Any, found: Runs) -> None:
    """Optimizer state of the rank that has most, by kind; runs that are not finished have none yet."""
    begin = dict.fromkeys(found, 0.0)
    parts = {name: _state_of_most(end_of(records)) for name, records in found.items()}
    for number, kind in enumerate(sorted({kind for sizes in parts.values() for kind in sizes})):
        widths = [parts[name].get(kind, 0) / 1e6 for name in found]
        shade = f"{0.6 + 0.12 * number}"  # grey, as the colours are the runs'
        panel.barh(list(found), widths, left=list(begin.values()), color=shade, label=kind)
        begin = {name: begin[name] + width for name, width in zip(found, widths, strict=True)}
    _name_bars(panel, begin)
    panel.set(xlabel="optimizer state, MB on the rank with most")


def _state_of_most(end: Record | None) -> dict[str, float]:
    if end is None:
        return {}
    sizes, kinds = end["state_bytes"], end.get("state_kinds")
    found: dict[str, float] = {"state": max(sizes)} if kinds is None else kinds[sizes.index(max(sizes))]
    return {kind: size for kind, size in found.items() if size}


def _peak_bars(panel: Any, found: Runs) -> None:
    """The most memory that rank 0 used."""
    peaks = {
        name: max((row.get("peak_memory", 0) for row in of_kind(records, "train")), default=0) / 2**30
        for name, records in found.items()
    }
    panel.barh(list(peaks), list(peaks.values()), color=[f"C{number}" for number in range(len(peaks))], alpha=0.6)
    _name_bars(panel, peaks)
    panel.set(xlabel="peak memory of rank 0, GiB")


def _name_bars(panel: Any, lengths: dict[str, float]) -> None:
    """Inside, where long names take no room from the curves above; the first run on top."""
    most = max(lengths.values()) or 1.0  # none is known: an empty panel
    panel.set(yticks=[], ylim=(len(lengths) - 0.5, -0.5), xlim=(0, 1.05 * most))
    for number, name in enumerate(lengths):
        panel.text(0.02, number, name, transform=panel.get_yaxis_transform(), va="center")


# --- around -----------------------------------------------------------------------------------------------------------


def _explain(figure: Any, panels: Any, found: Runs) -> None:
    """Grids, one legend beside all curves, one of the kinds of state, and a title if the run says what it is."""
    for number, line in enumerate(panels):
        for panel in line:
            panel.grid(alpha=0.3, axis="x" if number == 2 else "both")
    handles, labels = panels[0][0].get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))  # a label once
    figure.legend(by_label.values(), by_label.keys(), loc="outside lower center", ncols=2)
    if panels[2][0].patches:
        panels[2][0].legend(fontsize="small", loc="lower right")
    setups = [setup for records in found.values() for setup in of_kind(records, "run") if "parameters" in setup]
    if len(found) == 1 and setups:
        setup = setups[-1]
        figure.suptitle(f"{setup['model']}: {setup['parameters'] / 1e6:.1f} M parameters, {setup['optimizer']}")
