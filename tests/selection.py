"""Which cells of a table the default run has."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from itertools import product
from typing import Any

import pytest


def cells(
    rows: Iterable[Any], columns: Iterable[Any], quick: Callable[[Any, Any], bool], name: Callable[[Any], str] = str
) -> list[Any]:
    """Every row with every column, for ``pytest.mark.parametrize``; all but the quick ones are heavy.

    Args:
        rows: values of the first argument of a test.
        columns: those of the second.
        quick: of a row and a column: is this one run by default?
        name: of a row, in the test's name.
    """
    return [
        pytest.param(row, column, id=f"{name(row)}-{column}", marks=() if quick(row, column) else (pytest.mark.heavy,))
        for row, column in product(rows, columns)
    ]


def mostly_heavy(values: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """The values of one argument; all but the quick ones are heavy."""
    return [pytest.param(value, marks=() if value in quick else (pytest.mark.heavy,)) for value in values]


def taking_turns(
    rows: Iterable[Any], columns: Iterable[Any], every: int | None = None, name: Callable[[Any], str] = str
) -> list[Any]:
    """``cells`` where by default every row has one of the columns, or ``every`` third, say: the next row has others."""
    rows, columns = list(rows), list(columns)
    apart = every or len(columns)
    return cells(rows, columns, lambda row, column: (rows.index(row) + columns.index(column)) % apart == 0, name)
