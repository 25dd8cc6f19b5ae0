"""Optimizer-state bytes from shapes alone: no model, no GPU, no tensors.

The state of AdamW is two fp32 moments, eight bytes per parameter. FRUGAL keeps them only for the regular parameters
and for the projected part of every Linear weight; a basis projection also stores its basis, in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from frugal_dist.projection.registry import PROJECTIONS
from frugal_dist.projection.shapes import SIDE_CHOICES, resolve_side, round_of

MOMENT_BYTES = 8  # two fp32 moments per stateful entry
BASIS_BYTES = 4  # one fp32 number per basis entry
GIB = 2**30


@dataclass(frozen=True)
class LlamaShape:
    """The numbers that fix every weight of a LLaMA-style model with untied embeddings."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int


# The sizes of the GaLore and FRUGAL papers, and the model of the quickstart.
LLAMA_SHAPES = {
    "quick": LlamaShape(256, 688, 4, 4, 4096),
    "9M": LlamaShape(128, 352, 4, 4, 32000),
    "20M": LlamaShape(256, 688, 4, 4, 32000),
    "60M": LlamaShape(512, 1376, 8, 8, 32000),
    "130M": LlamaShape(768, 2048, 12, 12, 32000),
    "350M": LlamaShape(1024, 2736, 24, 16, 32000),
    "1B": LlamaShape(2048, 5461, 24, 32, 32000),
    "3B": LlamaShape(2560, 6848, 32, 32, 32000),
    "7B": LlamaShape(4096, 11008, 32, 32, 32000),
}


@dataclass(frozen=True)
class Weight:
    """A parameter's shape, how often it occurs, and whether FRUGAL projects it."""

    rows: int
    cols: int
    count: int
    projected: bool

    @property
    def numel(self) -> int:
        """Entries of all its copies together."""
        return self.rows * self.cols * self.count


def llama_weights(shape: LlamaShape) -> list[Weight]:
    """Every weight of the model: Linear layers are projected; embedding, head and norms are regular."""
    hidden, inner, layers = shape.hidden, shape.intermediate, shape.layers
    return [
        Weight(shape.vocab, hidden, 2, projected=False),  # input embedding and output head
        Weight(1, hidden, 2 * layers + 1, projected=False),  # norms
        Weight(hidden, hidden, 4 * layers, projected=True),  # q, k, v, o
        Weight(inner, hidden, 2 * layers, projected=True),  # gate, up
        Weight(hidden, inner, layers, projected=True),  # down
    ]


def adamw_bytes(weights: Iterable[Weight]) -> int:
    """State of AdamW with fp32 moments."""
    return sum(weight.numel for weight in weights) * MOMENT_BYTES


def frugal_bytes(
    weights: Iterable[Weight], *, projection: str = "svd", density: float = 0.25, side: str = "std"
) -> int:
    """State of FRUGAL with the AdamW rule, summed over the model. Step counters are left out."""
    _check(projection, density, side)
    items = list(weights)
    if PROJECTIONS[projection].family == "blocks":
        return _blockwise_bytes(items, density)
    return sum(
        weight.count * _projected_bytes(weight.rows, weight.cols, projection, density, side)
        if weight.projected
        else weight.numel * MOMENT_BYTES
        for weight in items
    )


def _projected_bytes(rows: int, cols: int, projection: str, density: float, side: str) -> int:
    """State of one projected matrix."""
    if density == 0:
        return 0
    chosen, side = PROJECTIONS[projection], resolve_side(side, rows, cols)
    size = chosen.share(density, chosen.dim(side, rows, cols))
    bases = chosen.kept_shapes(side, rows, cols, size).values() if chosen.family == "basis" else ()
    return MOMENT_BYTES * chosen.entries(side, rows, cols, size) + BASIS_BYTES * sum(map(prod, bases))


def _blockwise_bytes(weights: list[Weight], density: float) -> int:
    """Average over the refreshes: which matrices are active changes, and they differ in size."""
    projected = [weight for weight in weights if weight.projected]
    matrices = sum(weight.count for weight in projected)
    regular = sum(weight.numel for weight in weights if not weight.projected)
    if not matrices:
        return regular * MOMENT_BYTES
    active = round_of(density, matrices) / matrices
    return round((regular + active * sum(weight.numel for weight in projected)) * MOMENT_BYTES)


def _check(projection: str, density: float, side: str) -> None:
    """Refuse settings the formula does not know."""
    if projection not in PROJECTIONS:
        raise ValueError(f"projection is {projection!r}; the memory formula knows {', '.join(PROJECTIONS)}.")
    if side not in SIDE_CHOICES:
        raise ValueError(f"side is {side!r}; the memory formula knows {', '.join(SIDE_CHOICES)}.")
    if not 0 <= density <= 1:
        raise ValueError(f"density is {density}; it must lie between 0 and 1.")


def memory_table(density: float = 0.25, sizes: Iterable[str] = ("60M", "130M", "350M", "1B", "7B")) -> str:
    """The papers' LLaMA sizes against the choices of state, in GiB, as a Markdown table."""
    return table_of({name: llama_weights(LLAMA_SHAPES[name]) for name in sizes}, density)


def table_of(weights: Mapping[str, Sequence[Weight]], density: float) -> str:
    """Models by their names against the choices of state, in GiB, as a Markdown table."""
    names, models = list(weights), list(weights.values())
    lines: list[tuple[str, list[int]]] = [
        ("AdamW", [adamw_bytes(model) for model in models]),
        (
            f"FRUGAL, density {density:g}, columns or blockwise",
            [frugal_bytes(model, projection="columns", density=density) for model in models],
        ),
        (
            f"FRUGAL, density {density:g}, svd (basis in fp32)",
            [frugal_bytes(model, projection="svd", density=density) for model in models],
        ),
        ("FRUGAL, density 0", [frugal_bytes(model, density=0.0) for model in models]),
    ]
    width = max(len(label) for label, _ in lines)
    header = f"| {'GiB of optimizer state':<{width}} | " + " | ".join(f"{name:>6}" for name in names) + " |"
    wide = [max(6, len(name)) for name in names]
    rule = f"|{'-' * (width + 2)}|" + "|".join("-" * (size + 1) + ":" for size in wide) + "|"
    body = [
        f"| {label:<{width}} | "
        + " | ".join(f"{count / GIB:{size}.3f}" for count, size in zip(counts, wide, strict=True))
        + " |"
        for label, counts in lines
    ]
    return "\n".join([header, rule, *body])
