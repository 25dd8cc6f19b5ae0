"""deepspeed.moe with Frugal: what the user reads, or how far it trains. Runs inside each rank."""

from __future__ import annotations

from typing import Any

import deepspeed_cases as cases
import torch
from torch import Tensor, nn


class Experts(nn.Module):
    """A layer for all rows, then two experts."""

    def __init__(self, ep_size: int) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.Linear(12, 12)
        self.moe = MoE(12, nn.Linear(12, 12), num_experts=2, ep_size=ep_size, k=1, use_rts=False)

    def forward(self, rows: Tensor) -> Tensor:
        found, loss, _ = self.moe(self.dense(rows))
        return found.square().mean() + loss


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """As DeepSpeed's tutorial makes them."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    groups = {"params": list(model.parameters()), "name": "parameters"}
    found: list[dict[str, Any]] = split_params_into_different_moe_groups_for_optimizer(groups)
    return found


def trained(ep_size: int, zero: dict[str, Any]) -> str:
    """The error, nothing if it trains two steps."""
    from deepspeed.utils import groups

    before, engine, ranks = dict(vars(groups)), None, torch.distributed.get_world_size()
    try:
        model = Experts(ep_size)
        config = cases.config_of({"lr": 1e-3, "density": 0.5, "project": ["*weight"]}, zero, ranks)
        engine = cases.start(config, model, model_parameters=groups_of(model))
        for step in range(2):
            rows = torch.randn(4, 12, generator=torch.Generator().manual_seed(10 * step + torch.distributed.get_rank()))
            engine.backward(engine(rows))
            engine.step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        vars(groups).update(before)
        if engine is not None:
            engine.destroy()
    return ""
