"""randk: single entries of the matrix, drawn from the seed."""

from __future__ import annotations

import torch

from frugal_dist.projection.coordinates import Flat
from frugal_dist.projection.definition import Projection

RANDK = Projection(
    name="randk",
    family="coordinates",
    depends_on=("seed",),
    entries=lambda side, rows, cols, size: size,
    draw=lambda drawing: Flat(drawing.select(drawing.rows * drawing.cols), drawing.cols),
    whole_when_complete=True,
    index_bytes=torch.int32.itemsize,
)
