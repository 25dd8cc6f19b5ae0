"""One leg of a training that changes engines on its way: start an engine, load, train some steps, save."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed_cases
import torch
import torch.distributed as dist
from deepspeed_cases import SMOOTH, Weights, batch, loss_of, small_llama
from torch import Tensor, nn

from frugal_dist import Frugal, checkpoint, split_parameters

DECAY = 0.8
"""Every step's learning rate is this times the last one's."""


@dataclass
class Running:
    """An engine at work; ``engine`` is the model itself without DeepSpeed."""

    engine: Any
    optimizer: Any
    scheduler: Any
    step: Callable[[Tensor], None]
    weights: Callable[[], Weights]


def deepspeed_engine(options: dict[str, Any], stage: int, half: bool = False) -> Running:
    more = deepspeed_cases.BF16 if half else {}
    zero = {"stage": stage, "stage3_param_persistence_threshold": 200}
    config = deepspeed_cases.config_of(options, zero, dist.get_world_size(), **more)
    model = small_llama()
    engine = deepspeed_cases.start(config, model, model_parameters=model.parameters(), lr_scheduler=_schedule)

    def step(tokens: Tensor) -> None:
        engine.backward(loss_of(engine, tokens))
        engine.step()

    scheduler = engine.lr_scheduler
    return Running(engine, engine.optimizer, scheduler, step, lambda: deepspeed_cases.full_weights(engine))


def torch_engine(options: dict[str, Any], prepare: Callable[[nn.Module], nn.Module]) -> Running:
    model = prepare(small_llama())
    optimizer = Frugal(split_parameters(model), **options)
    scheduler = _schedule(optimizer)

    def step(tokens: Tensor) -> None:
        loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

    return Running(model, optimizer, scheduler, step, lambda: _full(model))


def _schedule(optimizer: Any) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: DECAY**step)


def _full(model: nn.Module) -> Weights:
    inner = getattr(model, "module", model)
    return {
        name: (param.full_tensor() if hasattr(param, "full_tensor") else param).detach().clone()
        for name, param in inner.named_parameters()
    }


def _fsdp2(model: nn.Module, *shape: int) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


ENGINES: dict[str, Callable[[dict[str, Any]], Running]] = {
    "one process": lambda options: torch_engine(options, lambda model: model),
    "DDP": lambda options: torch_engine(options, nn.parallel.DistributedDataParallel),
    "FSDP2": lambda options: torch_engine(options, lambda model: _fsdp2(model, dist.get_world_size())),
    "HSDP": lambda options: torch_engine(options, lambda model: _fsdp2(model, 2, dist.get_world_size() // 2)),
    "ZeRO-0": lambda options: deepspeed_engine(options, 0),
    "ZeRO-1": lambda options: deepspeed_engine(options, 1),
    "ZeRO-2": lambda options: deepspeed_engine(options, 2),
    "ZeRO-3": lambda options: deepspeed_engine(options, 3),
    "ZeRO-1 bf16": lambda options: deepspeed_engine(options, 1, half=True),
    "ZeRO-2 bf16": lambda options: deepspeed_engine(options, 2, half=True),
    "ZeRO-3 bf16": lambda options: deepspeed_engine(options, 3, half=True),
}


def leg(engine: str, projection: str, steps: tuple[int, int], load: Path | None, save: Path | None) -> Weights:
    """Train ``steps``; the fp32 weights at the end. A run that loads starts from weights that are all zero."""
    running = ENGINES[engine]({**SMOOTH, **deepspeed_cases.PROJECTIONS[projection]})
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    first, last = steps
    if load is not None:
        extra = checkpoint.load(load, running.engine, running.optimizer)
        assert extra == {"done": first, "schedule": extra["schedule"]}
        checkpoint.load_schedule(running.scheduler, extra["schedule"])
    for number in range(first, last):
        running.step(batch(number).chunk(ranks)[rank])
    if save is not None:
        extra = {"done": last, "schedule": running.scheduler.state_dict()}
        checkpoint.save(save, running.engine, running.optimizer, extra)
    found = running.weights()
    if hasattr(running.engine, "destroy"):
        running.engine.destroy()
    return found


def leg_as_bytes(*arguments: Any) -> bytes:
    """``leg`` for ranks whose answers go through a pipe."""
    torch.save(leg(*arguments), buffer := io.BytesIO())
    return buffer.getvalue()


def weights_from(answer: bytes) -> Weights:
    found: Weights = torch.load(io.BytesIO(answer), weights_only=True)
    return found
