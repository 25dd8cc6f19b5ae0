"""FRUGAL against AdamW in one picture, quality and bytes, from the first table of docs/comparison.md.

    python benchmarks/comparison_picture.py          # writes docs/images/frugal_adamw.svg

Needs matplotlib (extra train). The numbers are those of the table; nothing is trained.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "comparison.md"
PICTURE = ROOT / "docs" / "images" / "frugal_adamw.svg"
OURS, OTHERS = "#0072B2", "#999999"
Row = tuple[str, list[float], str, float]
"""A name, the perplexity of each seed, the mean as it is written, MB of state."""


def rows_of(page: str) -> list[Row]:
    """The rows of the table: ``| name | seed 0 | seed 1 | mean | state |``."""
    numbers = r"([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+)"
    found = re.findall(rf"^\| ([^|]+?) \| {numbers} \|$", page, re.M)
    return [(name, [float(first), float(second)], mean, float(state)) for name, first, second, mean, state in found]


def draw(rows: list[Row], out: Path) -> None:
    """Two panels beside each other: points for the seeds, bars for the bytes."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "frugal", "font.size": 10})
    import matplotlib.pyplot as plt

    figure, (quality, state) = plt.subplots(1, 2, figsize=(8.6, 0.36 * len(rows) + 1.0), sharey=True)
    for place, (name, seeds, mean, megabytes) in enumerate(rows):
        colour = OURS if name.startswith("FRUGAL") else OTHERS
        quality.plot(seeds, [place] * len(seeds), "-", color=colour, linewidth=1)
        quality.plot(seeds, [place] * len(seeds), "o", color=colour, markersize=4)
        quality.text(max(seeds) + 0.8, place, mean, va="center")
        state.barh(place, megabytes, color=colour, height=0.6)
        state.text(megabytes + 0.5, place, f"{megabytes:.1f}", va="center")
    quality.set_yticks(range(len(rows)), [name for name, *_ in rows])
    quality.invert_yaxis()
    quality.set_xlabel("validation perplexity: each seed, and the mean")
    quality.set_xlim(right=max(max(seeds) for _, seeds, _, _ in rows) + 5)
    state.set_xlabel("optimizer state, MB")
    state.set_xlim(right=1.12 * max(megabytes for *_, megabytes in rows))
    for panel in (quality, state):
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(left=False)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=PICTURE, help="default: docs/images/frugal_adamw.svg")
    draw(rows_of(PAGE.read_text(encoding="utf-8")), parser.parse_args().out)


if __name__ == "__main__":
    main()
