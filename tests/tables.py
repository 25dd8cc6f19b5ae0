"""Tables that tests fill, cell by cell, and that are printed when all is done: in Markdown, for the docs as they are.

    tables.put("State per rank", "ZeRO-2", "svd", "1.2 MB")              # a text
    tables.note("Largest difference", "ZeRO-2", "svd", 3.1e-7)           # the worst of all that fell into a cell
    tables.count("Flips", "ZeRO-2", "svd", 3)                            # the sum

Tests may run in several processes (pytest-xdist): every worker sends its cells to the process that prints. Rows and
columns appear in the order of the tests that filled them first, however the tests were spread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

Value = str | float
Cells = dict[tuple[str, str, str], tuple[str, Value, tuple[int, int]]]
"""By title, row and column: how to merge, the value, and (number of the test, number of the cell) for the order."""

_cells: Cells = {}
_test = 0

_MERGE: dict[str, Callable[[Any, Any], Value]] = {
    "text": lambda old, new: new,
    "worst": lambda old, new: old if old != old else max(old, new),  # a NaN stays
    "sum": lambda old, new: old + new,
}
_SHOW: dict[str, Callable[[Any], str]] = {
    "text": str,
    "worst": lambda value: "exact" if value == 0 else f"{value:.1e}",
    "sum": lambda value: f"{value:,}",
}


def put(title: str, row: str, column: str, text: str) -> None:
    """Fill a cell with a text."""
    _add(_cells, (title, row, column), ("text", text, (_test, len(_cells))))


def note(title: str, row: str, column: str, value: float) -> None:
    """Add a measurement; the cell shows the largest."""
    _add(_cells, (title, row, column), ("worst", value, (_test, len(_cells))))


def count(title: str, row: str, column: str, value: int) -> None:
    """Add a number; the cell shows the sum."""
    _add(_cells, (title, row, column), ("sum", value, (_test, len(_cells))))


def begin(test: int) -> None:
    """What follows is filled by the test of this number."""
    global _test
    _test = test


def _add(cells: Cells, key: tuple[str, str, str], new: tuple[str, Value, tuple[int, int]]) -> None:
    how, value, order = new
    if key in cells:
        assert cells[key][0] == how, f"{key} is filled in two ways"
        value, order = _MERGE[how](cells[key][1], value), min(order, cells[key][2])
    cells[key] = (how, value, order)


def packed() -> list[Any]:
    """This process's cells as plain lists, to be sent."""
    return [[*key, how, value, *order] for key, (how, value, order) in _cells.items()]


def receive(cells: Iterable[Sequence[Any]]) -> None:
    """Merge what another process packed."""
    for title, row, column, how, value, test, number in cells:
        _add(_cells, (title, row, column), (how, value, (test, number)))


def tables() -> Iterator[tuple[str, list[str]]]:
    """Every title with its lines."""
    ordered = sorted(_cells.items(), key=lambda item: item[1][2])
    for title in dict.fromkeys(key[0] for key, _ in ordered):
        cells = {key[1:]: _SHOW[how](value) for key, (how, value, _) in ordered if key[0] == title}
        rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
        yield title, markdown(["", *columns], [[row, *(cells.get((row, c), "") for c in columns)] for row in rows])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """An aligned Markdown table; the first column is text, the others are numbers."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    rule = [("-" * width) if i == 0 else ("-" * (width - 1) + ":") for i, width in enumerate(widths)]
    aligned = [
        [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        for line in (header, rule, *rows)
    ]
    return [f"| {' | '.join(line)} |" for line in aligned]
