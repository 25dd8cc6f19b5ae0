"""The memory of runs as bars: optimizer state by kind beside AdamW's, and the most that was used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from frugal_dist.training.metrics.looks import Group, Record
from frugal_dist.training.metrics.record import end_of, of_kind

KINDS = {"bases": ("0.35", "////"), "moments": ("0.65", ""), "state": ("0.65", ""), "other": ("0.9", "..")}
"""Greys and hatches, as the colours are the runs'."""
SMALL = 0.003
"""The share of a bar that cannot be seen."""
BAR, AROUND = 0.42, 0.95
"""Inches: of a bar with its name, and of what is above and below them."""


def height_of_bars(groups: Sequence[Group]) -> float:
    """Inches of the row: bars are as thick for one run as for ten."""
    return BAR * len(groups) + AROUND


def draw_memory(panels: Sequence[Any], groups: Sequence[Group]) -> None:
    """Optimizer state on the left, memory in all on the right."""
    state, peak = panels
    _draw_state(state, groups)
    peaks = [max(_peaks(group), default=0.0) / 2**30 for group in groups]
    peak.barh(range(len(groups)), peaks, height=0.4, color="0.65")
    _name(peak, groups, peaks, [f"{value:,.2f}" if value else "" for value in peaks])
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
        shade, hatch = KINDS.get(kind, KINDS["other"])
        panel.barh(
            range(len(groups)), widths, left=begin, height=0.4, color=shade, hatch=hatch, edgecolor="white", label=kind
        )
        begin = [start + width for start, width in zip(begin, widths, strict=True)]
    if any(adamw):
        panel.barh(
            range(len(groups)), adamw, height=0.4, fill=False, edgecolor="black", linestyle="--", label="AdamW's"
        )
    longest = [max(pair) for pair in zip(begin, adamw, strict=True)]
    _name(panel, groups, longest, [_amount(own, its) for own, its in zip(begin, adamw, strict=True)])
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
    found: dict[str, float] = {"state": max(sizes)} if kinds is None else kinds[sizes.index(max(sizes))]
    return {kind: size for kind, size in found.items() if size > SMALL * sum(found.values())}


def _peaks(group: Group) -> list[float]:
    return [max((row.get("peak_memory", 0) for row in of_kind(records, "train")), default=0) for records in group.seeds]


def _name(panel: Any, groups: Sequence[Group], lengths: Sequence[float], amounts: Sequence[str]) -> None:
    """Names and amounts above their bars, where no bar is; the first run on top."""
    most = max(lengths, default=0.0) or 1.0  # none is known: an empty panel
    panel.set(yticks=[], ylim=(len(groups) - 0.7, -0.8), xlim=(0, 1.05 * most))
    panel.grid(alpha=0.3, axis="x")
    panel.set_axisbelow(True)
    for number, (group, amount) in enumerate(zip(groups, amounts, strict=True)):
        place = panel.get_yaxis_transform()
        panel.text(0.01, number - 0.25, group.name, transform=place, va="bottom", fontsize="small")
        panel.text(0.99, number - 0.25, amount, transform=place, va="bottom", ha="right", fontsize="small")
