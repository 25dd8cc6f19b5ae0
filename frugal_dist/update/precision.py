"""Low-precision weights in a step: fp32 copies before it, one rounding after it.

Kernels, and a single addition of torch's, round what they write; all else that widens or rounds weights is here.

``config.rounding`` says how: to the nearest, stochastically (``stochastic_rounding``), or to the nearest with what is
rounded off kept (``remainder``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from frugal_dist.config import FrugalConfig
from frugal_dist.update.remainder import joined, split_
from frugal_dist.update.stochastic_rounding import round_stochastically_, rounds_stochastically, row_starts

Spans = tuple[tuple[int, int], ...]


class Rounded(NamedTuple):
    """Whose weights are rounded: settings, name and shape of the whole parameter or matrix, number of the step."""

    config: FrugalConfig
    name: str
    shape: tuple[int, ...]
    step: int


def widened(weight: Tensor, remainder: Tensor | None) -> Tensor:
    """An fp32 copy: the exact weight where remainders are kept."""
    return weight.float() if remainder is None else joined(weight, remainder)


def narrow_(
    weight: Tensor,
    wide: Tensor,
    remainder: Tensor | None,
    whose: Rounded,
    boxes: Iterable[tuple[Spans, Tensor, Tensor]],
) -> None:
    """Write fp32 ``wide`` to ``weight``.

    Args:
        weight: in bf16 or fp16.
        wide: of its shape.
        remainder: int16 of its shape, where it is kept.
        whose: decides how, and which random bits are drawn.
        boxes: where boxes of the whole parameter lie in both, as (spans there, part of weight, part of wide): what is
            rounded stochastically depends on the place in the whole.
    """
    config = whose.config
    if remainder is not None:
        split_(weight, remainder, wide)
    elif rounds_stochastically(config, weight.dtype):
        for spans, target, source in boxes:
            starts = row_starts(spans, whose.shape, target.device)
            round_stochastically_(target, source, starts, seed=config.seed, name=whose.name, step=whose.step)
    else:
        weight.copy_(wide)
