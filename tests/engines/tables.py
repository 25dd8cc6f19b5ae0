"""Tables that the tests of this folder print at the end of a run, in Markdown, so that the docs can show them."""

from __future__ import annotations

from collections.abc import Iterator

_CELLS: dict[str, dict[tuple[str, str], str]] = {}


def put(title: str, row: str, column: str, cell: str) -> None:
    """Fill one cell; rows and columns appear in the order in which they were first filled."""
    _CELLS.setdefault(title, {})[row, column] = cell


def tables() -> Iterator[tuple[str, list[str]]]:
    """Every title with its lines."""
    for title, cells in _CELLS.items():
        rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
        lines = [["", *columns], *([row, *(cells.get((row, column), "") for column in columns)] for row in rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
        lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
        yield title, [_aligned(line, widths) for line in lines]


def _aligned(cells: list[str], widths: list[int]) -> str:
    padded = [
        cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return f"| {' | '.join(padded)} |"
