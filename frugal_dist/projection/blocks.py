"""Blockwise: which whole matrices are state-full at refresh j (FRUGAL, Algorithm 5; BAdam). Pure arithmetic."""

from __future__ import annotations

import frugal_dist.projection
from frugal_dist.projection.definition import Projection, ProjectionSettings
from frugal_dist.projection.shapes import round_of


def active_count(config: ProjectionSettings, matrices: int) -> int:
    """C = round(density * matrices). ValueError for 0 at density > 0, and for an odd count with order "mirror"."""
    count = round_of(config.density, matrices)
    if count == 0 and config.density > 0:
        raise ValueError(
            f"projection='blockwise' with density={config.density:g} over {matrices} matrices makes "
            f"round({config.density:g} * {matrices}) = 0 of them state-full. Raise density, or use density=0 for pure "
            "state-free steps."
        )
    if config.block_order == "mirror" and count % 2:
        raise ValueError(
            f"block_order='mirror' takes matrices in pairs, but density={config.density:g} of {matrices} matrices is "
            f"{count}, an odd number. Change density, or use another block_order."
        )
    return count


def active_blocks(config: ProjectionSettings, matrices: int, refresh: int, count: int) -> frozenset[int]:
    """The ``count`` positions (0 to ``matrices`` - 1, in the group's order) state-full after refresh ``refresh``."""
    return frozenset(ORDERS[config.block_order](config, matrices, count, refresh))


def _random(config: ProjectionSettings, matrices: int, count: int, refresh: int) -> list[int]:
    select = frugal_dist.projection.select_indices
    return [int(i) for i in select(matrices, count, seed=config.seed, name="blocks", refresh=refresh)]


def _ascending(config: ProjectionSettings, matrices: int, count: int, refresh: int) -> list[int]:
    return [(refresh * count + a) % matrices for a in range(count)]


def _descending(config: ProjectionSettings, matrices: int, count: int, refresh: int) -> list[int]:
    return [(matrices - 1 - refresh * count - a) % matrices for a in range(count)]


def _mirror(config: ProjectionSettings, matrices: int, count: int, refresh: int) -> list[int]:
    half = matrices // 2
    lower = [(refresh * (count // 2) + a) % half for a in range(count // 2)]
    return lower + [matrices - 1 - i for i in lower]


ORDERS = {"random": _random, "ascending": _ascending, "descending": _descending, "mirror": _mirror}

BLOCKWISE = Projection(
    name="blockwise",
    family="blocks",
    depends_on=("block_order", "seed"),
    share=round_of,
    entries=lambda side, rows, cols, size: rows * cols,
)
