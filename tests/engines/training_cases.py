"""The training application's DeepSpeed engine on a small LLaMA, inside each rank."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed_cases as cases
import torch
from torch import nn


@dataclass(frozen=True)
class Run:
    """``weights``: a digest of all. ``sums``: in what gradients add up. ``moved``: where the whole model was moved.
    ``elements``: of the whole model; ``adamw``: bytes that AdamW's state would take on this rank.
    """

    losses: list[float]
    weights: str
    sums: str
    moved: list[str]
    elements: int
    adamw: int


def trained(zero: dict[str, Any], precision: str = "bf16") -> Run:
    """A job: three steps of two micro-batches."""
    from frugal_dist.training.engines.deepspeed import DeepSpeedEngine, deepspeed_config
    from frugal_dist.training.recipe import Optimizer, Recipe

    ranks = torch.distributed.get_world_size()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ds.json"
        path.write_text(json.dumps({"zero_optimization": zero}))
        recipe = Recipe(
            engine="deepspeed", deepspeed=str(path), precision=precision, batch=cases.ROWS,  # type: ignore[arg-type]
            micro_batch=cases.ROWS // ranks // 2, optimizer=Optimizer(options={"update_gap": 2}),
        )  # fmt: skip
        config = deepspeed_config(recipe, ranks)
    moved: list[str] = []
    model = _watched(cases.small_llama(), moved)
    elements = sum(weight.numel() for weight in model.parameters())
    engine = DeepSpeedEngine(model, config, lambda step: 1.0)
    rank = torch.distributed.get_rank()
    losses = [float(engine.train_step(cases.batch(step).chunk(ranks)[rank])) for step in range(3)]
    weights = cases.digest(cases.full_weights(engine._engine))
    adamw = engine.adamw_bytes()
    engine._engine.destroy()
    return Run(losses, weights, str(engine._engine.get_data_types()[1]), moved, elements, adamw)


def _watched(model: nn.Module, moved: list[str]) -> nn.Module:
    original = model.to

    def to(*args: Any, **options: Any) -> nn.Module:
        moved.append(str(args or options))
        return original(*args, **options)

    model.to = to  # type: ignore[method-assign]
    return model
