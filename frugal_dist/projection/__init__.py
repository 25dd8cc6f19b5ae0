"""Pure mathematics of the projections, on one matrix or one tile of it. Never imports torch.distributed."""

from frugal_dist.projection.basis import Basis, down, exact_svd, random_basis, up
from frugal_dist.projection.coordinates import Selection, select_indices
from frugal_dist.projection.draw import draw_selection
from frugal_dist.projection.shapes import basis_columns, coordinate_count, resolve_side
from frugal_dist.projection.subspace import gram_svd, subspace_svd

from frugal_dist.projection.blocks import active_blocks  # isort: skip  (uses the package itself at call time)

__all__ = [
    "Basis",
    "Selection",
    "active_blocks",
    "basis_columns",
    "coordinate_count",
    "down",
    "draw_selection",
    "exact_svd",
    "gram_svd",
    "random_basis",
    "resolve_side",
    "select_indices",
    "subspace_svd",
    "up",
]
