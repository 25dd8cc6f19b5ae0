"""The tables that these tests print when all is done: the worst of everything that fell into a cell."""

from __future__ import annotations

from collections.abc import Iterator

from reporting import markdown

_CELLS: dict[str, dict[tuple[str, str], list[float]]] = {}


def note(title: str, row: str, column: str, value: float) -> None:
    """Add one measurement to a cell."""
    _CELLS.setdefault(title, {}).setdefault((row, column), []).append(value)


def tables() -> Iterator[tuple[str, list[str]]]:
    for title, cells in _CELLS.items():
        rows = list(dict.fromkeys(row for row, _ in cells))
        columns = list(dict.fromkeys(column for _, column in cells))
        count = sum(len(values) for values in cells.values())
        body = [[row, *(_shown(cells.get((row, column), [])) for column in columns)] for row in rows]
        yield f"{title} ({count} runs)", markdown(["", *columns], body)


def _shown(values: list[float]) -> str:
    return "" if not values else "exact" if max(values) == 0 else f"{max(values):.0e}"
