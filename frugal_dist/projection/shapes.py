"""Sizes of projections: which side, how many columns of a basis, how many coordinates. Pure arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from typing import Protocol

from frugal_dist.config import FrugalConfig

FAMILY = {
    "svd": "basis",
    "random": "basis",
    "randperm": "coordinates",
    "columns": "coordinates",
    "rows": "coordinates",
    "randk": "coordinates",
    "blockwise": "blocks",
}


class Rect(Protocol):
    """A rectangle of a matrix: half-open ranges of rows and columns."""

    @property
    def rows(self) -> tuple[int, int]: ...

    @property
    def cols(self) -> tuple[int, int]: ...


def family(config: FrugalConfig) -> str:
    """One of "basis", "coordinates" or "blocks"; density 0 selects no coordinates, whatever the projection."""
    return FAMILY[config.projection] if config.density > 0 else "coordinates"


SIDES = {
    (side, tall): {"std": ("left", "right"), "reverse_std": ("right", "left")}.get(side, (side, side))[tall]
    for side in ("std", "reverse_std", "right", "left", "full")
    for tall in (False, True)
}
"""(asked for, rows >= cols): one of "right", "left" and "full"; in the paper right if rows >= cols, else left."""


def resolve_side(side: str, rows: int, cols: int) -> str:
    """One of "right", "left" and "full" for a matrix."""
    return SIDES[side, rows >= cols]


_LARGEST_DENOMINATOR = 10**6


@lru_cache(maxsize=64)
def as_written(density: float) -> Fraction:
    """The number that somebody wrote as this float: 29/100 for 0.29, 1/3 for 1 / 3.

    In floating point 0.29 * 100 is 28.999999999999996, and its floor 28. The simplest fraction within two units in the
    last place is meant; among those of small denominators there is at most one. Else the shortest decimal.
    """
    near = Fraction(density).limit_denominator(_LARGEST_DENOMINATOR)
    return near if abs(near - Fraction(density)) <= 2 * Fraction(math.ulp(density)) else Fraction(repr(density))


def floor_of(density: float, length: int) -> int:
    """floor(density * length), exactly."""
    return math.floor(as_written(density) * length)


def round_of(density: float, length: int) -> int:
    """round(density * length), exactly; halves to even, as Python rounds."""
    return round(as_written(density) * length)


def basis_columns(config: FrugalConfig, name: str, rows: int, cols: int) -> int:
    """R of a basis projection or of randperm: round(density * dim of the side). ValueError for r = 0 or too large."""
    side = resolve_side(config.side, rows, cols)
    dim = {"right": cols, "left": rows, "full": min(rows, cols)}[side]
    r = round_of(config.density, dim)
    if r == 0:
        raise ValueError(_empty(config, name, rows, cols, f"r = round({config.density:g} * {dim})"))
    if config.projection == "svd" and r > min(rows, cols):
        raise ValueError(
            f"{name} is {rows}x{cols} and density={config.density:g} with side={config.side!r} asks for r = {r} basis "
            f"columns, but a gradient of this shape has rank at most {min(rows, cols)}. "
            "Lower density, use side='std', or leave this parameter out of the projected ones."
        )
    return r


def coordinate_count(config: FrugalConfig, name: str, rows: int, cols: int) -> int:
    """How many columns, rows or entries are state-full: floor(density * dim). ValueError for 0 at density > 0."""
    if config.density == 0:
        return 0
    if config.projection == "randperm":
        return basis_columns(config, name, rows, cols)
    dim = {"columns": cols, "rows": rows, "randk": rows * cols}[config.projection]
    count = floor_of(config.density, dim)
    if count == 0:
        raise ValueError(_empty(config, name, rows, cols, f"floor({config.density:g} * {dim})"))
    return count


def selection_size(config: FrugalConfig, name: str, rows: int, cols: int) -> int:
    """R of a basis, or the number of selected columns, rows or entries; 0 for an empty matrix."""
    if rows * cols == 0 or config.density == 0:
        return 0
    size = basis_columns if family(config) == "basis" else coordinate_count
    return size(config, name, rows, cols)


def takes_everything(config: FrugalConfig, rows: int, cols: int, size: int) -> bool:
    """Whether a coordinate selection of this size leaves nothing of a matrix out.

    Not what density says: randperm on both sides selects a square of min(rows, cols).
    """
    if config.projection == "randk":
        return size == rows * cols
    side = resolve_side(config.side, rows, cols)
    kind = {"columns": "right", "rows": "left", "randperm": side}[config.projection]
    return (kind == "left" or size == cols) and (kind == "right" or size == rows)


def longer_dim(rows: int, cols: int) -> int:
    """Along which replicas share a whole matrix."""
    return 0 if rows >= cols else 1


def dim_left_free(config: FrugalConfig, rows: int, cols: int, size: int) -> int | None:
    """The dim along which replicas share a coordinate selection of this size; None: along the list of its entries."""
    if config.projection != "randperm" and takes_everything(config, rows, cols, size):
        return longer_dim(rows, cols)
    side = resolve_side(config.side, rows, cols)
    kind = {"columns": "right", "rows": "left", "randperm": side}.get(config.projection, "full")
    return {"right": 0, "left": 1}.get(kind)


def _empty(config: FrugalConfig, name: str, rows: int, cols: int, formula: str) -> str:
    return (
        f"{name} is {rows}x{cols}: projection={config.projection!r}, side={config.side!r} gives {formula} = 0, so "
        "nothing of it would be state-full. Raise density, choose another projection or side, or leave this parameter "
        "out of the projected ones. (density=0 asks for pure state-free steps.)"
    )
