"""Sides, shares and sizes: the arithmetic of projections."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from typing import Protocol


class Rect(Protocol):
    """A rectangle of a matrix: half-open ranges of rows and columns."""

    @property
    def rows(self) -> tuple[int, int]: ...

    @property
    def cols(self) -> tuple[int, int]: ...


SIDE_CHOICES = ("std", "reverse_std", "right", "left", "full")
SIDES = {
    (side, tall): {"std": ("left", "right"), "reverse_std": ("right", "left")}.get(side, (side, side))[tall]
    for side in SIDE_CHOICES
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


def longer_dim(rows: int, cols: int) -> int:
    """Along which replicas share a whole matrix."""
    return 0 if rows >= cols else 1


# What projections with a side have in common: R has r columns (right), r rows (left) or both (full).


def sided_dim(side: str, rows: int, cols: int) -> int:
    """Of what density is a share."""
    return {"right": cols, "left": rows, "full": min(rows, cols)}[side]


def sided_lines(side: str) -> tuple[int, ...]:
    """The dims along which R is smaller than the matrix."""
    return {"right": (1,), "left": (0,), "full": (0, 1)}[side]


def sided_entries(side: str, rows: int, cols: int, size: int) -> int:
    """How many numbers R has."""
    return size * {"right": rows, "left": cols, "full": size}[side]
