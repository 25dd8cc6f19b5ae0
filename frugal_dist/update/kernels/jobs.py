"""What the step of one tile needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from frugal_dist.config import FrugalConfig
from frugal_dist.projection.basis import Basis
from frugal_dist.projection.coordinates import Selection


class Noise(NamedTuple):
    """How bf16 weights are rounded stochastically (``rounding``): the keys of this step, the index of the tile's first
    entry in the whole matrix, and how far it is from one row to the next.
    """

    keys: tuple[int, int]
    first: int
    stride: int


class TileUpdate(NamedTuple):
    """One tile and its step; ``weight`` and ``grad`` are 2-D, all is on one device. ``moments`` are of R's shape, in
    their form (``update.moment_storage``).

    ``selection``: the state-full entries of a coordinate or block projection, None: there are none in the whole matrix.
    ``noise``: None for weights that are rounded to the nearest. ``basis``: of a basis projection, with its ``side`` and
    the ``shape`` of the whole matrix. ``free``: what the state-free rule keeps.
    """

    weight: Tensor
    grad: Tensor
    selection: Selection | None
    moments: Sequence[Any]
    step: int
    decay: float
    config: FrugalConfig
    noise: Noise | None = None
    basis: Basis | None = None
    side: str = ""
    shape: tuple[int, int] = (0, 0)
    free: Mapping[str, Tensor] | None = None
