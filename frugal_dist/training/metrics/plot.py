"""Runs as pictures: loss and quality against tokens and time, memory, refreshes; one run or several side by side."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frugal_dist.training.folders import runs_in
from frugal_dist.training.metrics.record import end_of, of_kind, read_metrics

Record = dict[str, Any]
Runs = dict[str, list[Record]]
"""Records by the run's name."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which colour-blind readers can tell apart; without yellow, which is pale on white."""
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "*")
_OF_ITSELF = ("kind", "seed", "folder", "start", "ranks", "host", "device", "time", "version", "versions", "commit")
"""What a record says of a run that may differ between seeds."""

PLOT_FILE = "loss_curve.png"
SEVERAL_FILE = "runs.png"
SCALES = {"perplexity": "log", "score": "linear"}
"""What validation measures: the perplexity of pre-training, the score of fine-tuning."""
BEGINNING = {"train": 0.1, "validation": 0.2}
"""The share of a course that does not set the limits of its axis: an untrained model is a thousand times worse. Of
several runs twice as much, as it is their ends that are compared.
"""
WIDTH, CURVES, LINE_OF_LEGEND = 9.0, 3.0, 0.21
"""Inches: of the picture, and the heights of a row of curves and of a line of the legend."""
CHARACTERS = 138
"""Of the legend's text that have room beside each other."""

Axis = tuple[str, Callable[[Record], float | None]]
"""A label, and the place of a record; None if it says nothing of it."""
STATE_KINDS = {"bases": ("0.35", "////"), "moments": ("0.65", ""), "state": ("0.65", ""), "remainders": ("0.8", "xx"),
               "other": ("0.9", "..")}  # fmt: skip
"""Greys and hatches, as the colours are the runs'."""
SMALL = 0.003
"""The share of a bar that cannot be seen."""
BAR, AROUND = 0.42, 0.95
"""Inches: of a bar with its name, and of what is above and below them."""


def plot_runs(runs: Sequence[Path], out: Path) -> list[Path]:
    """Training loss and validation perplexity (score) against tokens and minutes, the memory that was used, and what
    the refreshes found, if there were any. Runs that differ in nothing but the seed are one line, their mean, in a band
    from the lowest to the highest.

    ``out``: a PNG and an SVG of this name are written, or one file of another kind that its ending names, such as .pdf;
    in a folder, runs.png and runs.svg. Raises ValueError for a folder that holds no run, or none that has trained, for
    runs of different kinds, and if ``out`` cannot be written.
    """
    paths = _paths(out)
    records_by_name = _read([run for given in runs for run in runs_in(given)])
    measures = {_measure(records) for records in records_by_name.values()}
    if len(measures) > 1:
        raise ValueError("these are runs of pre-training and of fine-tuning; draw them apart.")
    figure = _drawn(grouped(records_by_name), measures.pop())
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=100)
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}. Name another place with --out.") from error
    return paths


def _paths(out: Path) -> list[Path]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if out.is_dir():
        out = out / SEVERAL_FILE
    kind = out.suffix[1:].lower()
    known = FigureCanvasAgg.get_supported_filetypes()
    if kind in ("png", "svg"):
        return [out.with_suffix(".png"), out.with_suffix(".svg")]
    if kind in known:
        return [out]
    if re.fullmatch("[a-z]+", kind):
        raise ValueError(f"--out {out}: pictures are not written as .{kind}, but as {', '.join(sorted(known))}.")
    return [out.with_name(f"{out.name}.{each}") for each in ("png", "svg")]  # a name that has no ending


def _read(runs: Sequence[Path]) -> Runs:
    places = list(dict.fromkeys(run.absolute() for run in runs))
    names = [run.name for run in places]
    records_by_name = {
        run.name if names.count(run.name) == 1 else f"{run.parent.name}/{run.name}": read_metrics(run) for run in places
    }
    for name, records in records_by_name.items():
        if not of_kind(records, "train"):
            raise ValueError(f"{name} has no training records yet; run it for a few more steps.")
    return records_by_name


def _measure(records: list[Record]) -> str:
    return "score" if any("score" in row for row in of_kind(records, "validation")) else "perplexity"


def _drawn(groups: list[Group], key: str) -> Any:
    """The figure: two rows of curves, one of bars, one of refreshes if there were any, and what is what below."""
    # The object interface needs no display and no global backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    refreshed = any(rows for group in groups for rows in group.rows("refresh"))
    labels = [*(_label(group, key) for group in groups), *map(_unigram_label, _unigram_losses(groups))]
    columns = max(1, min(len(labels), int(CHARACTERS / max(len(label) + 9 for label in labels))))
    lines = math.ceil(len(labels) / columns) + 1
    heights = [CURVES, CURVES, height_of_bars(groups), *[CURVES] * refreshed, LINE_OF_LEGEND * lines + 0.2]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06)
    rows: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
    tokens = _tokens_axis(groups)
    curves = [row.subplots(1, 2) for row in rows[:2]]
    for panels, axis in zip(curves, (tokens, ("minutes", _minutes)), strict=True):
        _draw_losses(panels, groups, axis, key)
    draw_memory(rows[2].subplots(1, 2), groups)
    if refreshed:
        curves.append(rows[3].subplots(1, 2))
        _draw_refreshes(curves[-1], groups, tokens)
    for panel in (panel for panels in curves for panel in panels):
        panel.grid(alpha=0.3)
        panel.locator_params(axis="x", nbins=7)
    handles, labels = curves[0][0].get_legend_handles_labels()
    bands = "; several seeds: mean as line, lowest to highest as band" if _has_seeds(groups) else ""
    rows[-1].legend(
        handles,
        labels,
        title=f"validation {key} at the end{bands}",
        loc="center",
        ncols=columns,
        handlelength=4.0,
        fontsize="small",
        frameon=False,
    )
    if heading := _heading(groups):
        rows[0].suptitle(heading)
    return figure


def _has_seeds(groups: list[Group]) -> bool:
    return any(len(group.seeds) > 1 for group in groups)


def _heading(groups: list[Group]) -> str:
    setups = [setup for group in groups for setup in of_kind(group.first, "run") if "parameters" in setup]
    if len(groups) > 1 or not setups:
        return ""
    setup = setups[-1]
    return f"{setup['model']}: {setup['parameters'] / 1e6:.1f} M parameters, {setup['optimizer']}"


def _tokens_axis(groups: list[Group]) -> Axis:
    most = max(row["tokens"] for group in groups for rows in group.rows("train") for row in rows)
    unit, name = (1e6, "million") if most >= 1e6 else (1e3, "thousand")
    return f"{name} tokens", lambda row: row["tokens"] / unit


def _minutes(row: Record) -> float | None:
    return row["seconds"] / 60 if "seconds" in row else None


# --- looks: no two runs alike, told apart by colour, line and marker; seeds of one run together -----------------------


@dataclass(frozen=True)
class Look:
    """Colour, line and marker: 252 of them before one comes again."""

    number: int

    @property
    def colour(self) -> str:
        return COLOURS[self.number % len(COLOURS)]

    @property
    def line(self) -> Any:
        return LINES[self.number % len(LINES)]

    @property
    def marker(self) -> str:
        return MARKERS[self.number % len(MARKERS)]


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed, drawn as one; most often a single run."""

    name: str
    look: Look
    seeds: list[list[Record]]

    @property
    def first(self) -> list[Record]:
        return self.seeds[0]

    def rows(self, kind: str) -> Iterator[list[Record]]:
        """The records of a kind, seed by seed."""
        return (of_kind(records, kind) for records in self.seeds)


def grouped(runs: Runs) -> list[Group]:
    """In the order in which they were given."""
    by_setting: dict[str, dict[str, list[Record]]] = {}
    for name, records in runs.items():
        by_setting.setdefault(_setting(name, records), {})[name] = records
    return [
        Group(_common_name(list(members)), Look(number), list(members.values()))
        for number, members in enumerate(by_setting.values())
    ]


def _setting(name: str, records: list[Record]) -> str:
    """What seeds of one run have in common; a run that does not say its seed is alone."""
    run_records = of_kind(records, "run")
    if not run_records or "seed" not in run_records[-1] or "folder" not in run_records[-1]:
        return name
    kept = {key: value for key, value in run_records[-1].items() if key not in _OF_ITSELF}
    return json.dumps([_without_seed(name), kept], sort_keys=True)


def _common_name(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{_without_seed(names[0])}, {len(names)} seeds"


def _without_seed(name: str) -> str:
    return re.sub(r"[-_ ]?seed[-_ ]?\d+$", "", name) or name


# --- curves -----------------------------------------------------------------------------------------------------------


def _draw_losses(panels: Sequence[Any], groups: list[Group], axis: Axis, key: str) -> None:
    """Training loss on the left, what validation measures on the right; what the unigram model has, as dots."""
    loss, quality = panels
    for group in groups:
        _draw(loss, group, "train", axis, "loss", _label(group, key))
        _draw(quality, group, "validation", axis, key)
    _enlarge(loss, groups, "train", "loss")
    _enlarge(quality, groups, "validation", key)
    for value in _unigram_losses(groups):
        _line_to_beat(loss, value, _unigram_label(value))
        _line_to_beat(quality, math.exp(value), "")
    loss.set(xlabel=axis[0], ylabel="training loss (nats per token)" if key == "perplexity" else "training loss")
    quality.set(xlabel=axis[0], ylabel=f"validation {key}", yscale=SCALES[key])
    if SCALES[key] == "log":
        _readable(quality)


def _readable(panel: Any) -> None:
    """Plain numbers, enough of them, also where the axis covers less than a factor of two."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    low, high = panel.get_ylim()
    steps = [step * 10.0**power for power in range(-2, 7) for step in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)]
    ticks = [tick for tick in steps if low <= tick <= high]
    if len(ticks) < 3:
        step = 10.0 ** math.floor(math.log10(max(high - low, 1e-9)))
        step = step if (high - low) / step >= 3 else step / 5
        ticks = [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    while len(ticks) > 8:
        ticks = ticks[::2]
    panel.yaxis.set_major_locator(FixedLocator(ticks))
    panel.yaxis.set_minor_locator(NullLocator())
    digits = 0 if all(abs(tick - round(tick)) < 1e-6 for tick in ticks) else 1
    panel.yaxis.set_major_formatter(StrMethodFormatter(f"{{x:,.{digits}f}}"))


def _label(group: Group, key: str) -> str:
    """The name, and what it came to at the end, to be read off."""
    ends = [rows[-1].get(key) for rows in group.rows("validation") if rows]
    values = [end for end in ends if end is not None]
    if len(values) < len(group.seeds) or not values:
        diverged = any((end_of(records) or {}).get("kind") == "diverged" for records in group.seeds)
        return f"{group.name}: diverged" if diverged else group.name
    digits = 3 if key == "score" else 1
    spread = f" ({min(values):,.{digits}f} to {max(values):,.{digits}f})" if len(values) > 1 else ""
    return f"{group.name}: {sum(values) / len(values):,.{digits}f}{spread}"


def _draw_refreshes(panels: Sequence[Any], groups: list[Group], axis: Axis) -> None:
    """What was left to the state-free rule at every refresh, and how far the bases turned."""
    wanted = {"residual_energy": "share of energy in the residual", "overlap": "overlap with the basis before"}
    for panel, (key, label) in zip(panels, wanted.items(), strict=True):
        for group in groups:
            _draw(panel, group, "refresh", axis, key)
        panel.set(xlabel=axis[0], ylabel=label, ylim=(-0.02, 1.02))
        if not any(len(line.get_xdata()) for line in panel.lines):
            panel.text(0.5, 0.5, "not measured: no bases", transform=panel.transAxes, ha="center", color="0.45")
            panel.set(xticks=[])


Points = list[tuple[float, float]]


def _points(rows: list[Record], axis: Axis, key: str) -> Points:
    """Values that are null, such as a NaN loss, are left out."""
    points = [(axis[1](row), row.get(key)) for row in rows]
    return [(x, y) for x, y in points if x is not None and y is not None]


def _draw(panel: Any, group: Group, kind: str, axis: Axis, key: str, label: str | None = None) -> None:
    """The mean of the seeds in a band where all were measured at the same places; else each of them."""
    courses = [_points(rows, axis, key) for rows in group.rows(kind)]
    places = [[x for x, _ in course] for course in courses]
    look = group.look
    style: dict[str, Any] = {"color": look.colour, "linestyle": look.line, "marker": look.marker, "markersize": 4.5}
    if len(courses) > 1 and all(place == places[0] for place in places):
        values = list(zip(*([y for _, y in course] for course in courses), strict=True))
        panel.fill_between(places[0], list(map(min, values)), list(map(max, values)), color=look.colour, alpha=0.2)
        courses = [[(x, sum(at) / len(at)) for x, at in zip(places[0], values, strict=True)]]
    for course in courses:
        apart = max(1, len(course) // 8)
        panel.plot(
            [x for x, _ in course],
            [y for _, y in course],
            label=label,
            markevery=(look.number * max(1, apart // 4) % apart, apart),
            **style,
        )
        label = None


def _enlarge(panel: Any, groups: list[Group], kind: str, key: str) -> None:
    """Limits that the end of the courses sets, the same against tokens and time; what lies above enters from there, and
    the highest is said.
    """
    by_tokens: Axis = "", lambda row: row["tokens"]
    courses = [_points(rows, by_tokens, key) for group in groups for rows in group.rows(kind)]
    begin = (
        BEGINNING[kind]
        * (1 if len(groups) == 1 else 2)
        * max((x for course in courses for x, _ in course), default=0.0)
    )
    late = [y for course in courses for x, y in course if x >= begin]
    if not late or key == "score":
        return
    low, high = min(late), max(late)
    room = 0.06 * (high - low) or 0.05 * abs(high)
    panel.set_ylim(low - room, high + room)
    first = max((y for course in courses for _, y in course), default=high)
    if first > high + room:
        text = f"{first:,.0f}" if first >= 100 else f"{first:.1f}"
        where: dict[str, Any] = {"transform": panel.transAxes, "ha": "right", "va": "top"}
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        panel.text(0.98, 0.96, f"\u2191 from {text}", fontsize="small", bbox=box, **where)


def _unigram_losses(groups: list[Group]) -> set[float]:
    rows = [row for group in groups for records in group.seeds for row in of_kind(records, "run")]
    return {row["unigram_loss"] for row in rows if "unigram_loss" in row}


def _unigram_label(loss: float) -> str:
    return f"unigram model: {math.exp(loss):,.1f}"


def _line_to_beat(panel: Any, value: float, label: str) -> None:
    """Where it lies within what is shown. In the legend it is in any case."""
    low, high = panel.get_ylim()
    if any(len(line.get_xdata()) for line in panel.lines):  # alone it would have an axis without extent
        panel.axhline(value, color="0.45", linestyle=":", label=label or None)
        panel.set_ylim(low, high)


# --- memory as bars: optimizer state by kind beside AdamW's, and the most that was used -------------------------------


def height_of_bars(groups: Sequence[Group]) -> float:
    """Inches of the row: bars are as thick for one run as for ten."""
    return BAR * len(groups) + AROUND


def draw_memory(panels: Sequence[Any], groups: Sequence[Group]) -> None:
    """Optimizer state on the left, memory in all on the right."""
    state, peak = panels
    _draw_state(state, groups)
    peaks = [max(_peaks(group), default=0.0) / 2**30 for group in groups]
    peak.barh(range(len(groups)), peaks, height=0.4, color="0.65")
    _name_bars(peak, groups, peaks, [f"{value:,.2f}" if value else "" for value in peaks])
    peak.set(xlabel="peak memory of rank 0, GiB")


def _draw_state(panel: Any, groups: Sequence[Group]) -> None:
    """Optimizer state of the rank that has most, by kind, and AdamW's as a frame; runs that are not finished have none
    yet.
    """
    parts = [_state_of_most(end_of(group.first)) for group in groups]
    adamw = [(end_of(group.first) or {}).get("adamw_state_bytes_per_rank", 0) / 1e6 for group in groups]
    begin = [0.0] * len(groups)
    for kind in sorted({kind for sizes in parts for kind in sizes}):
        widths = [sizes.get(kind, 0) / 1e6 for sizes in parts]
        shade, hatch = STATE_KINDS.get(kind, STATE_KINDS["other"])
        panel.barh(
            range(len(groups)), widths, left=begin, height=0.4, color=shade, hatch=hatch, edgecolor="white", label=kind
        )
        begin = [start + width for start, width in zip(begin, widths, strict=True)]
    if any(adamw):
        panel.barh(
            range(len(groups)), adamw, height=0.4, fill=False, edgecolor="black", linestyle="--", label="AdamW's"
        )
    longest = [max(pair) for pair in zip(begin, adamw, strict=True)]
    _name_bars(panel, groups, longest, [_amount(own, its) for own, its in zip(begin, adamw, strict=True)])
    panel.set(xlabel="optimizer state, MB on the rank with most")
    if panel.patches:
        panel.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize="small", frameon=False, borderpad=0)


def _amount(own: float, adamw: float) -> str:
    if not own:
        return ""
    return f"{own:,.1f}" + (f", {100 * own / adamw:.0f} % of {adamw:,.1f}" if adamw else "")


def _state_of_most(end: Record | None) -> dict[str, float]:
    if end is None:
        return {}
    sizes, kinds = end["state_bytes"], end.get("state_kinds")
    by_kind: dict[str, float] = {"state": max(sizes)} if kinds is None else kinds[sizes.index(max(sizes))]
    return {kind: size for kind, size in by_kind.items() if size > SMALL * sum(by_kind.values())}


def _peaks(group: Group) -> list[float]:
    return [max((row.get("peak_memory", 0) for row in of_kind(records, "train")), default=0) for records in group.seeds]


def _name_bars(panel: Any, groups: Sequence[Group], lengths: Sequence[float], amounts: Sequence[str]) -> None:
    """Names and amounts above their bars, where no bar is; the first run on top."""
    most = max(lengths, default=0.0) or 1.0  # none is known: an empty panel
    panel.set(yticks=[], ylim=(len(groups) - 0.7, -0.8), xlim=(0, 1.05 * most))
    panel.grid(alpha=0.3, axis="x")
    panel.set_axisbelow(True)
    for number, (group, amount) in enumerate(zip(groups, amounts, strict=True)):
        place = panel.get_yaxis_transform()
        panel.text(0.01, number - 0.25, group.name, transform=place, va="bottom", fontsize="small")
        panel.text(0.99, number - 0.25, amount, transform=place, va="bottom", ha="right", fontsize="small")
