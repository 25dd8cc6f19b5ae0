"""One leg of a training that changes engines on its way: start an engine, load, train some steps, save."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed_cases
import torch
import torch.distributed as dist
from deepspeed_cases import SMOOTH, Weights, batch, loss_of, small_llama
from save_and_load_ways import PORTABLE, WAYS, Running
from torch import Tensor, nn

from frugal_dist import Frugal, split_parameters

DECAY = 0.8
"""Every step's learning rate is this times the last one's."""


@dataclass
class Training(Running):
    """With what it needs to go on, and the whole fp32 weights."""

    step: Callable[[Tensor], None]
    weights: Callable[[], Weights]


def deepspeed_engine(options: dict[str, Any], setting: str) -> Training:
    chosen = deepspeed_cases.SETTINGS[setting]
    zero = {**chosen.zero, "stage3_param_persistence_threshold": 200}
    config = deepspeed_cases.config_of(options, zero, dist.get_world_size(), **chosen.more)
    model = small_llama()
    engine = deepspeed_cases.start(config, model, model_parameters=model.parameters(), lr_scheduler=_schedule)

    def step(tokens: Tensor) -> None:
        engine.backward(loss_of(engine, tokens))
        engine.step()

    scheduler = engine.lr_scheduler
    return Training(engine, engine.optimizer, scheduler, step, lambda: deepspeed_cases.full_weights(engine))


def torch_engine(options: dict[str, Any], prepare: Callable[[nn.Module], nn.Module]) -> Training:
    model = prepare(small_llama())
    optimizer = Frugal(split_parameters(model), **options)
    scheduler = _schedule(optimizer)

    def step(tokens: Tensor) -> None:
        loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

    return Training(model, optimizer, scheduler, step, lambda: _full(model))


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


SETTINGS = {
    "ZeRO-0": "0",
    "ZeRO-1": "1",
    "ZeRO-2": "2",
    "ZeRO-3": "3",
    "ZeRO-0 bf16": "0, bf16",
    "ZeRO-1 bf16": "1, bf16",
    "ZeRO-2 bf16": "2, bf16",
    "ZeRO-3 bf16": "3, bf16",
    "BF16_Optimizer": "BF16_Optimizer",
    "ZeRO-2 offload": "2, offload",
    "ZeRO-3 offload": "3, offload",
}
"""Of DeepSpeed, by the names of these tests and of tests/engines."""
ENGINES: dict[str, Callable[[dict[str, Any]], Training]] = {
    "one process": lambda options: torch_engine(options, lambda model: model),
    "DDP": lambda options: torch_engine(options, nn.parallel.DistributedDataParallel),
    "FSDP2": lambda options: torch_engine(options, lambda model: _fsdp2(model, dist.get_world_size())),
    "HSDP": lambda options: torch_engine(options, lambda model: _fsdp2(model, 2, dist.get_world_size() // 2)),
    **{name: partial(deepspeed_engine, setting=setting) for name, setting in SETTINGS.items()},
}


Spot = tuple[str, str, str]
"""Engine, projection, state-full rule."""
Places = dict[tuple[str, int], Path]
"""Where to save, or where to load from: by the way of saving and the number of steps done."""


def leg(spot: Spot, steps: tuple[int, int], load: Path | None, saves: Places) -> Weights:
    """Train ``steps``, saving at some of them; the fp32 weights at the end. What is loaded was saved portably."""
    training = _start(spot)
    if load is not None:
        assert WAYS[PORTABLE].load(load, training) == steps[0]
    return _train(training, steps, saves)


def resumes(spot: Spot, last: int, saved: Places) -> dict[tuple[str, int], Weights]:
    """For each saved run the weights at the end of a run that goes on from there."""
    found = {}
    for (way, done), folder in saved.items():
        training = _start(spot)
        assert WAYS[way].load(folder, training) == done
        found[way, done] = _train(training, (done, last), {})
    return found


def _start(spot: Spot) -> Training:
    engine, projection, rule = spot
    return ENGINES[engine]({**SMOOTH, **deepspeed_cases.PROJECTIONS[projection], "state_full": rule})


def _train(training: Training, steps: tuple[int, int], saves: Places) -> Weights:
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    first, last = steps
    for done in range(first, last + 1):
        if done > first:
            training.step(batch(done - 1).chunk(ranks)[rank])
        for (way, when), folder in saves.items():
            if when == done:
                WAYS[way].save(folder, training, done)
    found = training.weights()
    if hasattr(training.engine, "destroy"):
        training.engine.destroy()
    return found


def as_bytes(job: str, *arguments: Any) -> bytes:
    """``leg`` or ``resumes`` for ranks whose answers go through a pipe."""
    return to_bytes({"leg": leg, "resumes": resumes}[job](*arguments))


def to_bytes(value: Any) -> bytes:
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


def from_bytes(answer: bytes) -> Any:
    return torch.load(io.BytesIO(answer), weights_only=True)
