"""columns, rows and randperm: whole lines of the matrix, drawn from the seed."""

from __future__ import annotations

from frugal_dist.projection.coordinates import Columns, Rows, Selection, Submatrix
from frugal_dist.projection.definition import Drawing, Projection, sided


def _columns(drawing: Drawing) -> Selection:
    return Columns(drawing.select(drawing.cols))


def _rows(drawing: Drawing) -> Selection:
    return Rows(drawing.select(drawing.rows), drawing.cols)


def _both(drawing: Drawing) -> Selection:
    return Submatrix(drawing.select(drawing.rows), drawing.select(drawing.cols, ":columns"))


_RANDPERM = {"right": _columns, "left": _rows, "full": _both}

COLUMNS = Projection(
    name="columns",
    family="coordinates",
    depends_on=("seed",),
    dim=lambda side, rows, cols: cols,
    lines=lambda side: (1,),
    entries=lambda side, rows, cols, size: size * rows,
    draw=_columns,
    whole_when_complete=True,
)

ROWS = Projection(
    name="rows",
    family="coordinates",
    depends_on=("seed",),
    dim=lambda side, rows, cols: rows,
    lines=lambda side: (0,),
    entries=lambda side, rows, cols, size: size * cols,
    draw=_rows,
    whole_when_complete=True,
)

RANDPERM = sided(
    name="randperm",
    family="coordinates",
    depends_on=("side", "seed"),
    draw=lambda drawing: _RANDPERM[drawing.side](drawing),
)
"""A basis of one-hot columns: the same as selecting rows or columns, rounded as a basis is."""
