"""The tiny run whose checkpoints lie in tests/golden/checkpoints. The code that wrote them and today's both train it.

At commit 7b22ff0, the last one that wrote format 1 and called ``projected_lr_scale`` by its old name, they were made by

    PYTHONPATH=. python .../old_run.py svd .../golden/checkpoints
    PYTHONPATH=. torchrun --nproc-per-node 2 .../old_run.py columns .../golden/checkpoints
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR

from frugal_dist import Frugal, checkpoint

SAVED_AFTER, MORE = 7, 3
SHAPES = {"tall": (8, 6), "wide": (6, 8), "square": (7, 7), "experts": (2, 6, 4), "embedding": (7, 4), "norm": (5,)}
GROUPS: list[dict[str, Any]] = [
    {"params": ["tall", "wide"], "projected": True, "update_gap": 5, "on_refresh": "keep"},
    {"params": ["square", "experts"], "projected": True, "update_gap": 4, "on_refresh": "project"},
    {"params": ["embedding", "norm"], "projected": False, "weight_decay": 0.0},
]
"""At the save all matrices are between two refreshes. One group has its next in the second step after; with "keep" that
would depend on the signs that LAPACK gives to singular vectors.
"""


def drawn(seed: int) -> dict[str, Tensor]:
    """Weights or gradients, the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


class Run:
    """A model with a frozen parameter and a buffer, Frugal, and a schedule."""

    def __init__(self, projection: str, lr: float = 1e-2, **options: Any) -> None:
        self.model = nn.Module()
        for name, weight in drawn(0).items():
            self.model.register_parameter(name, nn.Parameter(weight))
        self.model.register_parameter("frozen", nn.Parameter(torch.ones(3).double(), requires_grad=False))
        self.model.register_buffer("steps", torch.zeros(1))
        named = dict(self.model.named_parameters())
        groups = [{**group, "params": [(name, named[name]) for name in group["params"]]} for group in GROUPS]
        self.optimizer = Frugal(groups, lr, weight_decay=0.1, density=0.5, projection=projection, **options)
        self.scheduler = ExponentialLR(self.optimizer, 0.9)

    def train(self, first: int, steps: int) -> None:
        """``steps`` steps; ``first`` is the number of those before."""
        for number in range(first + 1, first + steps + 1):
            for name, grad in drawn(number).items():
                self.model.get_parameter(name).grad = grad
            self.optimizer.step()
            self.scheduler.step()
            self.model.get_buffer("steps").fill_(number)


def write(projection: str, folder: Path) -> None:
    """A checkpoint and what torch saves of it, and the model ``MORE`` steps later."""
    torch.manual_seed(1)
    run = Run(projection, lr_scale=0.5, state_free_lr_scale=0.7)
    run.train(0, SAVED_AFTER)
    extra = {"done": SAVED_AFTER, "schedule": run.scheduler.state_dict()}
    model: nn.Module = nn.parallel.DistributedDataParallel(run.model) if dist.is_initialized() else run.model
    checkpoint.save(folder / projection, model, run.optimizer, extra)
    if not dist.is_initialized():
        parts = {"model": run.model, "optimizer": run.optimizer, "scheduler": run.scheduler}
        torch.save({name: part.state_dict() for name, part in parts.items()}, folder / f"{projection}.pt")
    run.train(SAVED_AFTER, MORE)
    if not dist.is_initialized() or dist.get_rank() == 0:
        later = {name: value.numpy() for name, value in run.model.state_dict().items()}
        np.savez(folder / f"{projection}_later.npz", **later, generator=torch.rand(3).numpy())


if __name__ == "__main__":
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    write(sys.argv[1], Path(sys.argv[2]))
