"""Pure mathematics of the projections, on one matrix or one tile of it. Never imports torch.distributed.

``registry`` lists them; each is an object (``definition``) made in a file of its own or of its kind.
"""

from frugal_dist.projection.basis import Basis, down, up
from frugal_dist.projection.blocks import active_blocks
from frugal_dist.projection.coordinates import Selection, select_indices
from frugal_dist.projection.definition import Projection
from frugal_dist.projection.gaussian import random_basis
from frugal_dist.projection.registry import PROJECTIONS, draw_selection, selection_size
from frugal_dist.projection.shapes import resolve_side
from frugal_dist.projection.subspace import gram_svd, subspace_svd
from frugal_dist.projection.svd import exact_svd

__all__ = [
    "PROJECTIONS",
    "Basis",
    "Projection",
    "Selection",
    "active_blocks",
    "down",
    "draw_selection",
    "exact_svd",
    "gram_svd",
    "random_basis",
    "resolve_side",
    "select_indices",
    "selection_size",
    "subspace_svd",
    "up",
]
