"""What FSDP2 must never hold whole on a rank: the model, and its gradient while micro-batches add up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

pytest.importorskip("jsonargparse")

from frugal_dist.training.distributed.place import find_dist_env
from frugal_dist.training.engines.plain import PlainEngine
from frugal_dist.training.recipe import Recipe


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


class Stack(nn.Module):
    """Refuses to be moved whole, as a model would that fits on no GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, rows: Tensor) -> Tensor:
        for layer in self.layers:
            rows = layer(rows)
        return rows

    def to(self, *args: Any, **options: Any) -> Stack:
        raise AssertionError("the whole model was moved at once")


def test_fsdp2_never_has_model_or_gradient_whole(one_rank: None) -> None:
    reduced: list[bool] = []

    def losses(model: nn.Module, rows: Tensor) -> Tensor:
        reduced.append(all(isinstance(parameter.grad, DTensor) for parameter in model.parameters()))
        return model(rows).square().flatten()

    recipe = Recipe(engine="fsdp2", batch=6, micro_batch=2, precision="fp32")
    model = Stack()
    start = [parameter.detach().clone() for parameter in model.parameters()]
    engine = PlainEngine(model, recipe, lambda step: 1.0, find_dist_env({}), losses)
    engine.train_step(torch.randn(6, 4))
    assert reduced == [False, True, True], "the first micro-batches' gradients wait, whole, for the last"
    weights = [parameter.detach().full_tensor() for parameter in model.parameters()]
    assert not any(torch.equal(old, new) for old, new in zip(start, weights, strict=True))
