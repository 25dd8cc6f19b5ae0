"""Draws the figures of docs/how-it-works.md: python docs/figures.py writes docs/images/*.svg anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

IMAGES = Path(__file__).parent / "images"
RANKS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7")
"""Okabe and Ito's colours, which colour-blind readers can tell apart."""
GREY, PALE = "#555555", "#eeeeee"


class Drawing:
    """An SVG on white, so that it can be read on dark pages, too."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
            f'font-size="13" role="img" aria-label="{title}">',
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{GREY}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, colour: str, dash: bool = False) -> None:
        """A rectangle."""
        style = ' stroke-dasharray="4 3"' if dash else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{colour}" stroke="{GREY}"{style}/>'
        )

    def text(self, x: float, y: float, words: str, where: str = "middle", bold: bool = False, size: int = 13) -> None:
        """A line of text; ``where``: start, middle or end."""
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{where}" font-size="{size}" fill="#222222"{weight}>{words}</text>'
        )

    def arrow(self, *points: tuple[float, float]) -> None:
        """From the first point over all others to the last."""
        path = "L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path d="M{path}" fill="none" stroke="{GREY}" stroke-width="1.5" marker-end="url(#tip)"/>')

    def legend(self, x: float, y: float, ranks: int) -> None:
        """Which colour is which rank."""
        for rank in range(ranks):
            self.box(x + 75 * rank, y, 14, 14, RANKS[rank])
            self.text(x + 75 * rank + 20, y + 12, f"rank {rank}", "start")

    def write(self, name: str) -> None:
        """Save it."""
        (IMAGES / name).write_text("\n".join([*self.parts, "</svg>"]) + "\n", encoding="utf-8")


ROWS, COLUMNS, CELL = 8, 8, 13
SIDE = ROWS * CELL


def matrix(drawing: Drawing, x: float, y: float, owners: list[str], columns: int = COLUMNS) -> None:
    """A matrix of cells, row by row, each in the colour of its owner."""
    for number, colour in enumerate(owners):
        row, column = divmod(number, columns)
        drawing.box(x + column * CELL, y + row * CELL, CELL, CELL, colour)


def by_rows(ranks: int) -> list[str]:
    """Owners of the cells where each rank has some rows."""
    return [RANKS[row * ranks // ROWS] for row in range(ROWS) for _ in range(COLUMNS)]


def flat(ends: tuple[int, ...]) -> list[str]:
    """Owners of the cells where each rank has an interval of the flattened matrix."""
    return [RANKS[sum(cell >= end for end in ends)] for cell in range(ROWS * COLUMNS)]


def split() -> None:
    """The two parts of a gradient."""
    drawing = Drawing(760, 262, "A gradient is split into a part with state and a rest without")
    matrix(drawing, 30, 82, [PALE] * ROWS * COLUMNS)
    drawing.text(30 + SIDE / 2, 72, "gradient", bold=True)
    drawing.arrow((144, 118), (222, 72))
    drawing.arrow((144, 150), (222, 196))
    matrix(drawing, 230, 20, [RANKS[0]] * ROWS * 2, 2)
    drawing.text(270, 68, "a quarter of the columns,", "start")
    drawing.text(270, 85, "or coordinates in a subspace", "start")
    matrix(drawing, 230, 140, [PALE] * ROWS * 6, 6)
    drawing.text(322, 188, "the other columns, or", "start")
    drawing.text(322, 205, "what the subspace lacks", "start")
    for y, rule, state in ((72, "AdamW", "two moments, a quarter each"), (192, "sign", "no state at all")):
        drawing.arrow((496, y), (552, y))
        drawing.text(562, y - 4, rule, "start", bold=True)
        drawing.text(562, y + 13, state, "start")
    drawing.write("split.svg")


def shared(drawing: Drawing, x: float, y: float, holders: list[tuple[int, ...]]) -> None:
    """A matrix of which several ranks hold the same row: the row has a stripe for each of them."""
    for row, ranks in enumerate(holders):
        for number, rank in enumerate(ranks):
            share = CELL / len(ranks)
            drawing.parts.append(
                f'<rect x="{x:g}" y="{y + row * CELL + number * share:g}" width="{SIDE}" height="{share:g}" '
                f'fill="{RANKS[rank]}"/>'
            )
    matrix(drawing, x, y, ["none"] * ROWS * COLUMNS)


def tiles() -> None:
    """How engines store a matrix."""
    drawing = Drawing(760, 218, "How engines store one matrix on four ranks")
    half = ROWS // 2
    stored: dict[str, tuple[str, Any, Any]] = {
        "DDP": ("all of it on every rank", shared, [(0, 1, 2, 3)] * ROWS),
        "FSDP2": ("whole rows", matrix, by_rows(4)),
        "HSDP 2 x 2": ("rows, each on two ranks", shared, [(0, 1)] * half + [(2, 3)] * half),
        "ZeRO-1, 2, 3": ("an interval of the flat matrix", matrix, flat((13, 34, 49))),
    }
    for number, (name, (about, draw, holders)) in enumerate(stored.items()):
        x = 40 + 188 * number
        drawing.text(x + SIDE / 2, 24, name, bold=True)
        drawing.text(x + SIDE / 2, 164, about, size=12)
        draw(drawing, x, 40, holders)
    drawing.legend(230, 188, 4)
    drawing.write("tiles.svg")


def exchange() -> None:
    """From where a gradient lies to where it is computed, and back."""
    drawing = Drawing(760, 238, "Gradients travel to where they are computed, updates travel back")
    stored, computed = flat((27,)), by_rows(2)
    for number, (name, about, owners) in enumerate(
        (
            ("gradient", "as ZeRO stores it", stored),
            ("computed", "whole rows, with moments and basis", computed),
            ("weights", "as ZeRO stores them", stored),
        )
    ):
        x = 48 + 280 * number
        drawing.text(x + SIDE / 2, 24, name, bold=True)
        matrix(drawing, x, 40, owners)
        drawing.text(x + SIDE / 2, 164, about, size=12)
    for x, about in ((162, "gradients"), (442, "updates")):
        drawing.arrow((x, 92), (x + 156, 92))
        drawing.text(x + 78, 82, f"all-to-all of {about}", size=12)
        drawing.text(x + 78, 112, "all matrices at once", size=12)
    drawing.legend(305, 196, 2)
    drawing.write("exchange.svg")


def refresh() -> None:
    """Who does what at a refresh."""
    drawing = Drawing(760, 262, "A refresh: agree, gather, compute, broadcast")
    steps = (
        ("1. agree", "one small all-reduce:", "counts, health, replicas"),
        ("2. gather", "the gradient goes", "to the matrix' owner"),
        ("3. compute", "the owner finds", "the new basis"),
        ("4. broadcast", "basis and verdict", "go to all"),
    )
    for number, (name, first, second) in enumerate(steps):
        x = 30 + 185 * number
        drawing.text(x + 70, 24, name, bold=True)
        drawing.text(x + 70, 44, first, size=12)
        drawing.text(x + 70, 60, second, size=12)
        for rank in range(4):
            y = 80 + 34 * rank
            drawing.box(x + 40, y, 60, 22, RANKS[rank])
            drawing.text(x + 70, y + 16, "owner" if rank == 1 and number else f"rank {rank}", size=12)
            if number == 1 and rank != 1:
                drawing.arrow((x + 100, y + 11), (x + 118, y + 11), (x + 118, 125), (x + 102, 125))
            if number == 3 and rank != 1:
                drawing.arrow((x + 40, 125), (x + 20, 125), (x + 20, y + 11), (x + 38, y + 11))
        if number == 0:
            drawing.box(x + 32, 74, 76, 136, "none", dash=True)
        if number == 2:
            drawing.box(x + 32, 108, 76, 34, "none", dash=True)
    drawing.text(380, 244, "Each matrix has one owner for the whole run; owners are spread over the ranks.", size=12)
    drawing.write("refresh.svg")


if __name__ == "__main__":
    for draw in (split, tiles, exchange, refresh):
        draw()
