"""A few small matrices on every layout: what tests of rules, presets and of what is registered train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from cases import LAYOUTS
from storages import Held, Named
from threads import run_ranks
from torch import nn

from frugal_dist import Frugal, checkpoint

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


def model_of(options: Mapping[str, Any]) -> tuple[nn.Module, Frugal]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False)).double()
    return model, Frugal(model.named_parameters(), project=["*"], process_group=None, **{**MORE, **options})


def train(model: nn.Module, optimizer: Frugal, first: int, last: int) -> None:
    for step in range(first, last + 1):
        torch.manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()


def check_resume(options: Mapping[str, Any], portable: bool, folder: Path) -> None:
    """A loaded run repeats the uninterrupted one bit for bit: from its state_dict, or from a portable checkpoint."""
    model, optimizer = model_of(options)
    train(model, optimizer, 1, 3)
    later, resumed = model_of(options)
    if portable:
        checkpoint.save(folder / "here", model, optimizer)
        checkpoint.load(folder / "here", later, resumed)
    else:
        later.load_state_dict(model.state_dict())
        resumed.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 4, 7)
    train(later, resumed, 4, 7)
    for one, other in zip(model.parameters(), later.parameters(), strict=True):
        assert torch.equal(one, other)
