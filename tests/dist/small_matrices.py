"""A few small matrices on every layout: what tests of rules and of what is registered train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from cases import LAYOUTS
from storages import Held, Named
from threads import run_ranks

SHAPES: dict[str, tuple[int, ...]] = {"tall": (24, 16), "wide": (16, 40), "square": (33, 33)}
WITH_EXPERTS = {**SHAPES, "experts": (3, 10, 6)}
MORE = {"density": 0.5, "update_gap": 2, "lr": 0.01, "weight_decay": 0.1}


def tensors(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Named:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def trained(build: Any, options: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Named:
    held: Held = build(tensors(0, shapes), set(shapes), {**MORE, **options})
    for step in range(1, 6):
        held.step(tensors(step, shapes))
    return held.full()


def check_layout(layout: str, options: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> None:
    """Four ranks have the weights of one process."""
    (want,) = run_ranks(1, lambda rank: trained(LAYOUTS["replicas"], options, shapes))
    for full in run_ranks(4, lambda rank: trained(LAYOUTS[layout], options, shapes)):
        for name, weight in full.items():
            torch.testing.assert_close(weight, want[name], rtol=0, atol=1e-10)
