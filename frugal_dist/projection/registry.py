"""All projections by their names, and what is asked of the one that is configured. To add one: see ``definition``."""

from __future__ import annotations

from frugal_dist.projection.blocks import BLOCKWISE
from frugal_dist.projection.coordinates import NOTHING, Selection, whole_block
from frugal_dist.projection.definition import Drawing, Projection, ProjectionSettings
from frugal_dist.projection.dictionary import DCT
from frugal_dist.projection.entries import RANDK
from frugal_dist.projection.gaussian import GAUSSIAN, RANDOM
from frugal_dist.projection.lines import COLUMNS, RANDPERM, ROWS
from frugal_dist.projection.shapes import longer_dim, resolve_side
from frugal_dist.projection.svd import SVD

PROJECTIONS: dict[str, Projection] = {
    one.name: one
    for one in (
        SVD,
        DCT,
        RANDOM,
        GAUSSIAN,
        RANDPERM,
        COLUMNS,
        ROWS,
        RANDK,
        BLOCKWISE,
    )
}


def family(config: ProjectionSettings) -> str:
    """One of "basis", "coordinates" or "blocks"; density 0 selects no coordinates, whatever the projection.

    Rules that need whole lines compute as bases do, where these are whole: also with a basis of no columns (density 0),
    and where nothing is left out.
    """
    chosen = PROJECTIONS[config.projection].family
    if config.by_lines and (config.density == 0 or undivided(config)):
        return "basis"
    return chosen if config.density > 0 else "coordinates"


def undivided(config: ProjectionSettings) -> bool:
    """Whether a rule gets whole gradients: lines of coordinates, and all of them."""
    lines = PROJECTIONS[config.projection].whole_when_complete
    return config.by_lines and lines and config.density == 1.0


def side_of(config: ProjectionSettings, rows: int, cols: int) -> str:
    """Of a basis: one of "right", "left" and "full" for a matrix."""
    if undivided(config):
        return "right"
    return config.free_side if config.by_lines and config.density == 0 else resolve_side(config.side, rows, cols)


def depends_on(config: ProjectionSettings) -> tuple[str, ...]:
    """The hyperparameters without which state means something else, beside projection, density and rule."""
    chosen = PROJECTIONS[config.projection]
    return chosen.depends_on if chosen.family == family(config) else ("seed",)


def options_of_others(projection: str) -> list[tuple[str, Projection]]:
    """The options that mean nothing for this projection, each with the one that has it."""
    return [(key, one) for one in PROJECTIONS.values() if one.name != projection for key in one.own]


def selection_size(config: ProjectionSettings, name: str, rows: int, cols: int) -> int:
    """R of a basis, or the number of selected columns, rows or entries; 0 for an empty matrix.

    ValueError for 0 at a density above 0, and for more than a gradient has.
    """
    if rows * cols == 0 or config.density == 0:
        return 0
    if undivided(config):
        return cols
    chosen = PROJECTIONS[config.projection]
    dim = chosen.dim(resolve_side(config.side, rows, cols), rows, cols)
    size = chosen.share(config.density, dim)
    if size == 0:
        formula = chosen.written.format(density=config.density, dim=dim)
        raise ValueError(
            f"{name} is {rows}x{cols}: projection={config.projection!r}, side={config.side!r} gives {formula} = 0, so "
            "nothing of it would be state-full. Raise density, choose another projection or side, or leave this "
            "parameter out of the projected ones. (density=0 asks for pure state-free steps.)"
        )
    if chosen.within_rank and size > min(rows, cols):
        raise ValueError(
            f"{name} is {rows}x{cols} and density={config.density:g} with side={config.side!r} asks for r = {size} "
            f"basis columns, but a gradient of this shape has rank at most {min(rows, cols)}. "
            "Lower density, use side='std', or leave this parameter out of the projected ones."
        )
    return size


def takes_everything(config: ProjectionSettings, rows: int, cols: int, size: int) -> bool:
    """Whether a coordinate selection of this size leaves nothing of a matrix out.

    Not what density says: randperm on both sides selects a square of min(rows, cols).
    """
    entries = PROJECTIONS[config.projection].entries(resolve_side(config.side, rows, cols), rows, cols, size)
    return entries == rows * cols


def dim_left_free(config: ProjectionSettings, rows: int, cols: int, size: int) -> int | None:
    """The dim along which replicas share a coordinate selection of this size; None: along the list of its entries."""
    chosen = PROJECTIONS[config.projection]
    if chosen.whole_when_complete and takes_everything(config, rows, cols, size):
        return longer_dim(rows, cols)
    lines = chosen.lines(resolve_side(config.side, rows, cols))
    return 1 - lines[0] if len(lines) == 1 else None


def draw_selection(config: ProjectionSettings, name: str, rows: int, cols: int, refresh: int, count: int) -> Selection:
    """The ``count`` state-full columns, rows or entries of a rows x cols matrix after refresh number ``refresh``.

    ``count`` is what ``selection_size`` gave at that refresh.
    """
    if count == 0 or rows * cols == 0:
        return NOTHING
    chosen, side = PROJECTIONS[config.projection], resolve_side(config.side, rows, cols)
    if chosen.whole_when_complete and takes_everything(config, rows, cols, count):
        return whole_block(rows, cols)
    return chosen.draw(Drawing(config, name, rows, cols, refresh, side, count))
