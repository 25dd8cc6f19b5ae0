"""The selection of a coordinate projection at one refresh: from configuration, name and refresh number alone."""

from __future__ import annotations

import torch
from torch import Tensor

import frugal_dist.projection
from frugal_dist.config import FrugalConfig
from frugal_dist.projection.coordinates import NOTHING, Columns, Everything, Flat, Rows, Selection, Submatrix
from frugal_dist.projection.shapes import longer_dim, resolve_side


def draw_selection(config: FrugalConfig, name: str, rows: int, cols: int, refresh: int, count: int) -> Selection:
    """The ``count`` state-full columns, rows or entries of a rows x cols matrix after refresh number ``refresh``.

    ``count`` is what ``shapes.selection_size`` gave at that refresh. ``select_indices`` is looked up in the
    package at call time, so a test or a user may replace it.
    """
    if count == 0 or rows * cols == 0:
        return NOTHING
    return _DRAW[config.projection](config, name, rows, cols, refresh, count)


def whole_block(rows: int, cols: int) -> Everything:
    """An active block: everything, shared along its longer side."""
    return Everything(cols, free_dim=longer_dim(rows, cols))


def _select(length: int, count: int, config: FrugalConfig, name: str, refresh: int) -> Tensor:
    indices = frugal_dist.projection.select_indices(length, count, seed=config.seed, name=name, refresh=refresh)
    return torch.as_tensor(indices, dtype=torch.int64, device="cpu")


def _columns(config: FrugalConfig, name: str, rows: int, cols: int, refresh: int, count: int) -> Selection:
    if count == cols:
        return whole_block(rows, cols)
    return Columns(_select(cols, count, config, name, refresh))


def _rows(config: FrugalConfig, name: str, rows: int, cols: int, refresh: int, count: int) -> Selection:
    if count == rows:
        return whole_block(rows, cols)
    return Rows(_select(rows, count, config, name, refresh), cols)


def _randk(config: FrugalConfig, name: str, rows: int, cols: int, refresh: int, count: int) -> Selection:
    if count == rows * cols:
        return whole_block(rows, cols)
    return Flat(_select(rows * cols, count, config, name, refresh), cols)


def _randperm(config: FrugalConfig, name: str, rows: int, cols: int, refresh: int, count: int) -> Selection:
    """A basis of one-hot columns: the same as selecting rows or columns, rounded as a basis is."""
    side = resolve_side(config.side, rows, cols)
    if side == "right":
        return Columns(_select(cols, count, config, name, refresh))
    if side == "left":
        return Rows(_select(rows, count, config, name, refresh), cols)
    return Submatrix(
        _select(rows, count, config, name, refresh), _select(cols, count, config, f"{name}:columns", refresh)
    )


_DRAW = {"columns": _columns, "rows": _rows, "randk": _randk, "randperm": _randperm}
