"""A small model with everything that gradients can be late for, and its training with and without step_in_backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from frugal_dist.presets import PRESETS, preset
from frugal_dist.projection.registry import PROJECTIONS
from frugal_dist.update.rules import STATE_FREE, STATE_FULL

VOCAB, WIDTH, STEPS = 17, 12, 5
OPTIONS: dict[str, Any] = {"lr": 1e-2, "update_gap": 2, "density": 0.5, "weight_decay": 0.1}


class Block(nn.Module):
    """Odd shapes; ``unused`` never has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 21)
        self.down = nn.Linear(21, WIDTH, bias=False)
        self.unused = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    """Embedding and head are one matrix. ``skipped``: the second block is not used where it is True."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embedding.weight
        generator = torch.Generator().manual_seed(0)  # ranks may be threads, which share the global one
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(0.3 * torch.randn(param.shape, generator=generator))
        self.skipped = False

    def forward(self, x: Tensor) -> Tensor:
        found = self.embedding(x)
        for block in self.blocks[: 1 if self.skipped else None]:
            found = block(found)
        return self.head(self.norm(found))


def loss_of(model: nn.Module, step: int, rank: int = 0) -> Tensor:
    """Of a batch that depends on nothing else."""
    tokens = torch.randint(0, VOCAB, (6, 5), generator=torch.Generator().manual_seed(100 * step + rank))
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def settings() -> dict[str, dict[str, Any]]:
    """Options by name: every preset, every projection on every side, every rule."""
    found = {name: preset(name) for name in PRESETS}
    for name, one in ((name, one) for name, one in PROJECTIONS.items() if one.orthonormal):  # the others have presets
        sides = ("std", "left", "full") if one.family == "basis" else ("std",)
        found |= {f"{name} {side}": {"projection": name, "side": side} for side in sides}
    for free in STATE_FREE:
        found[f"state_free {free}"] = {"projection": "svd", "state_free": free, "on_refresh": "project"}
    for full in STATE_FULL:
        found[f"state_full {full}"] = {"projection": "columns", "density": 1.0, "state_full": full}
    found["staggered"] = {"projection": "columns", "refresh_schedule": "staggered", "update_gap": 3}
    found["kept, thresholded"] = {"projection": "svd", "on_refresh": "keep", "residual_threshold": 1e-3}
    return {name: {**OPTIONS, **options} for name, options in found.items()}
