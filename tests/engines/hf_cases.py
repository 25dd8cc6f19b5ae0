"""What the tests of the Trainer and of Accelerate share: rows of tokens in order, plain PyTorch, comparisons."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import deepspeed_cases as cases
import torch
from deepspeed_cases import Weights
from torch import Tensor, nn

STEPS, BATCH, MIDDLE = 6, 12, 3
"""Refreshes are at 0, 2 and 4: a checkpoint of step MIDDLE lies between two. 1 to 4 ranks share a batch evenly."""
LIMIT = 2e-5
OPTIONS: dict[str, Any] = {**cases.SMOOTH, "update_gap": 2}
MOMENTS = 40560
"""Elements of Frugal's moments for this model, when one rank holds them all."""
BLOCKS = "LlamaDecoderLayer"


def rows() -> Tensor:
    return torch.randint(0, cases.VOCAB, (STEPS * BATCH, cases.LENGTH), generator=torch.Generator().manual_seed(9))


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Fixed rows of tokens."""

    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": rows()[i], "labels": rows()[i]}


def rate(step: int) -> float:
    """The Trainer's linear schedule."""
    return float(OPTIONS["lr"]) * (1 - step / STEPS)


@lru_cache(maxsize=8)
def _plain(projection: str) -> Weights:
    from frugal_dist import Frugal, split_parameters

    model = cases.small_llama()
    given = {**OPTIONS, "projection": projection}
    optimizer = Frugal(split_parameters(model), process_group=None, **given)
    for step, batch in enumerate(rows().chunk(STEPS)):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.zero_grad()
        cases.loss_of(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def apart(found: Weights, projection: str = "svd") -> float:
    """The largest difference of any weight to plain PyTorch in one process."""
    return cases.difference_to(found, _plain(projection)).largest


def whole(model: nn.Module) -> Weights:
    """The whole weights, also of FSDP2. Collective."""
    found = {}
    for name, param in model.named_parameters():
        value = param.detach()
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        found[name.removeprefix("module.")] = value.clone().float()
    return found


def differing(found: Weights, want: Weights) -> list[str]:
    """Names of weights that are not equal bit for bit."""
    assert list(found) == list(want)
    return [name for name in want if not torch.equal(want[name], found[name])]


def spoil(model: nn.Module) -> None:
    """Weights that only a checkpoint can bring back."""
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1)


def innermost(optimizer: Any) -> Any:
    """The optimizer inside its wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def reset() -> None:
    """Accelerate keeps its state, and the environment, for the whole process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state()
    PartialState._reset_state()
    GradientState._reset_state()
    for key in list(os.environ):
        if key.startswith(("ACCELERATE_", "FSDP_")):
            del os.environ[key]


def allow_fsdp() -> None:
    """Accelerate quietly turns FSDP into DDP on CPUs. Lift that: all that follows is the real thing, on the CPU."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


def message_of(job: Callable[[], object], kinds: tuple[type[Exception], ...] = (ValueError,)) -> str:
    """What the job raises, with its type; "" if nothing."""
    try:
        job()
    except kinds as error:
        return f"{type(error).__name__}: {error}"
    finally:
        reset()
    return ""


def steps_of(batches: Iterable[Tensor]) -> list[Tensor]:
    """This rank's share of every batch."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return [batch.chunk(ranks)[rank] for batch in batches]
