"""What it would cost to draw a random basis again at every step, in place of keeping it. CPU time, one thread.

python benchmarks/redraw.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from frugal_dist import Frugal, preset
from frugal_dist.projection import resolve_side
from frugal_dist.projection.gaussian import gaussian_columns, random_basis

SHAPES = [(512, 512)] * 8 + [(1376, 512)] * 4 + [(512, 1376)] * 2
"""Two layers of LLaMA-60M."""
R = 128
WAYS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "random": (random_basis, {"projection": "random"}),
    "gaussian (apollo)": (gaussian_columns, preset("apollo")),
}


def median_ms(do: Callable[[], object], times: int = 5) -> float:
    found = []
    for _ in range(times):
        start = time.process_time()
        do()
        found.append(1e3 * (time.process_time() - start))
    return statistics.median(found)


def drawn(draw: Callable[..., Any]) -> None:
    for rows, cols in SHAPES:
        draw(rows, cols, resolve_side("std", rows, cols), R, seed=0, name="w", refresh=1, dtype=torch.float32)


def main() -> None:
    torch.set_num_threads(1)
    for name, (draw, options) in WAYS.items():
        params = [(f"w{number}", torch.nn.Parameter(torch.randn(shape))) for number, shape in enumerate(SHAPES)]
        optimizer = Frugal(params, project=["*"], process_group=None, update_gap=1000, **options)
        for _, param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
        step, drawing = median_ms(optimizer.step), median_ms(partial(drawn, draw))
        print(f"{name}: step {step:.1f} ms, drawing {drawing:.1f} ms, together {(step + drawing) / step:.2f} times")


if __name__ == "__main__":
    main()
