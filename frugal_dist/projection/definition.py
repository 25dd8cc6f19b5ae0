"""What a projection is: all that the rest of the package has to know of one, in one object.

A new projection is a file that makes a ``Projection``, and its line in ``registry``. Nothing else compares its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

import frugal_dist.projection
from frugal_dist.projection.basis import Basis, Dictionary, basis_shapes
from frugal_dist.projection.coordinates import Selection
from frugal_dist.projection.shapes import floor_of, round_of, sided_dim, sided_entries, sided_lines


class ProjectionSettings(Protocol):
    """What projections read of a ``FrugalConfig``, which stands above them and asks the registry for its choices."""

    @property
    def projection(self) -> str: ...

    @property
    def density(self) -> float: ...

    @property
    def side(self) -> str: ...

    @property
    def block_order(self) -> str: ...

    @property
    def svd_method(self) -> str: ...

    @property
    def seed(self) -> int: ...

    @property
    def by_lines(self) -> bool: ...

    @property
    def free_side(self) -> str: ...


@dataclass(frozen=True)
class Drawing:
    """What a refresh depends on beside the gradient: the matrix by its name, the number of the refresh, settings.

    ``side``: right, left or full. ``size``: r, or how many columns, rows or entries are selected.
    """

    config: ProjectionSettings
    name: str
    rows: int
    cols: int
    refresh: int
    side: str
    size: int

    def select(self, length: int, part: str = "") -> Tensor:
        """``size`` distinct numbers below ``length``, sorted; other ones for another ``part`` of the matrix.

        ``select_indices`` is looked up in the package at call time, so a test or a user may replace it.
        """
        seed, name = self.config.seed, self.name + part
        indices = frugal_dist.projection.select_indices(length, self.size, seed=seed, name=name, refresh=self.refresh)
        return torch.as_tensor(indices, dtype=torch.int64, device="cpu")


def _no_basis(grad: Tensor, drawing: Drawing, warm: Basis | None) -> Basis:
    raise NotImplementedError


def _no_selection(drawing: Drawing) -> Selection:
    raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Projection:
    """One way to choose the state-full part of a matrix.

    family               "basis" (R = down(G), a basis is stored), "coordinates" (R is some of G's entries, drawn from a
                         seed) or "blocks" (whole matrices).
    depends_on           hyperparameters without which state means something else, beside projection, density and rule.
    own                  options that belong to it alone: what to say of another projection that is given one.
    dim                  (side, rows, cols): of how many things density is a share.
    share                (density, number): how many that are; ``written`` is how errors write it.
    within_rank          whether r cannot be larger than the rank of a gradient.
    lines                (side): the dims along which lines are left out. A part that is stored whole along them keeps
                         its slots of R from refresh to refresh, and the other dim may be cut.
    entries              (side, rows, cols, size): how many numbers R has.
    draw                 coordinates: the selection, from settings alone, the same on every rank.
    whole_when_complete  coordinates: a selection of everything is treated as an active block is.
    index_bytes          coordinates: of what is kept for each selected entry of a rank between refreshes.
    compute              basis: the new basis of a finite gradient on its owner; ``warm`` is the old one.
    from_gradient        basis: computed from the gradient, where that lies; else drawn from the seed, on the CPU.
    starts_warm          basis: whether ``compute`` starts from the old basis, which is then sent to the owner.
    dictionary           basis: what its columns are chosen from, by the energies they catch. Their numbers are kept,
                         and ranks find them together: each adds what its part of the gradient says.
    orthonormal          basis: whether what its columns do not catch is left over; else there is no rest.
    scratch              basis: (settings, rows, cols, side, r): bytes that computing it takes at most beside the
                         gradient. An estimate: libraries do not tell what they need.
    """

    name: str
    family: str
    depends_on: tuple[str, ...]
    own: Mapping[str, str] = field(default_factory=dict)
    dim: Callable[[str, int, int], int] = lambda side, rows, cols: rows * cols
    share: Callable[[float, int], int] = floor_of
    written: str = "floor({density:g} * {dim})"
    within_rank: bool = False
    lines: Callable[[str], tuple[int, ...]] = lambda side: (0, 1)
    entries: Callable[[str, int, int, int], int]
    draw: Callable[[Drawing], Selection] = _no_selection
    whole_when_complete: bool = False
    index_bytes: int = 0
    compute: Callable[[Tensor, Drawing, Basis | None], Basis] = _no_basis
    from_gradient: bool = True
    starts_warm: Callable[[ProjectionSettings], bool] = lambda config: False
    dictionary: Dictionary | None = None
    orthonormal: bool = True
    scratch: Callable[[ProjectionSettings, int, int, str, int], int] = lambda config, rows, cols, side, r: 0

    def kept_shapes(self, side: str, rows: int, cols: int, r: int) -> dict[str, tuple[int, ...]]:
        """Shapes of what is kept of a basis between refreshes, by part: its columns, or their numbers."""
        shapes = basis_shapes(side, rows, cols, r)
        return {part: shape if self.dictionary is None else shape[1:] for part, shape in shapes.items()}


def sided(**more: Any) -> Projection:
    """A projection that follows ``side`` and has r = round(density * length) columns, rows or both."""
    usual: dict[str, Any] = {"share": round_of, "written": "r = round({density:g} * {dim})"}
    return Projection(dim=sided_dim, lines=sided_lines, entries=sided_entries, **usual | more)
