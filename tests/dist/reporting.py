"""Tables that tests print at the end of the run, in Markdown, so that the docs can show them as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

_MAKERS: dict[str, Callable[[], Sequence[str]]] = {}


def report(title: str, make: Callable[[], Sequence[str]]) -> None:
    """Print ``make()`` under ``title`` when all tests are done; nothing if it has no lines."""
    _MAKERS[title] = make


def tables() -> Iterator[tuple[str, Sequence[str]]]:
    for title, make in _MAKERS.items():
        if lines := make():
            yield title, lines


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """An aligned Markdown table; the first column is text, the others are numbers."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    rule = [("-" * width) if i == 0 else ("-" * (width - 1) + ":") for i, width in enumerate(widths)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    return [line(header), line(rule), *(line(row) for row in rows)]
