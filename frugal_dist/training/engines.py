"""What a training loop asks of an engine, and DeepSpeed behind it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn

import frugal_dist  # noqa: F401  (makes "type": "Frugal" known to DeepSpeed)
from frugal_dist.training.models import token_losses

Schedule = Callable[[int], float]


class Engine(Protocol):
    """One rank of a distributed training; every rank calls the same methods in the same order."""

    rank: int
    world: int
    batch_size: int
    optimizer_name: str

    def train_step(self, rows: Tensor) -> Tensor:
        """One optimizer step on this rank's rows of the batch; returns their mean loss."""

    def losses(self, rows: Tensor) -> Tensor:
        """The loss of every predicted token, without gradient."""

    def total(self, values: list[float]) -> list[float]:
        """Each value summed over the ranks."""

    def state_bytes(self) -> list[int]:
        """Bytes of optimizer state on each rank, counted from the tensors there are."""

    def learning_rate(self) -> float:
        """The rate of the next step."""

    def gradient_norm(self) -> float:
        """The norm of the last step's gradient, before clipping."""

    def save(self, folder: Path) -> None:
        """Write a checkpoint from which the engine can go on."""


class DeepSpeedEngine:
    """The DeepSpeed engine for a model and the settings of a DeepSpeed JSON."""

    def __init__(self, model: nn.Module, config: dict[str, Any], schedule: Schedule) -> None:
        import deepspeed

        deepspeed.init_distributed()
        self.world = distributed.get_world_size()
        self.rank = distributed.get_rank()
        self.batch_size = _batch_size(config, self.world)
        # A scheduler in the JSON is the user's word; ours knows the number of steps and is the default.
        ours = None if "scheduler" in config else partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=schedule)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._engine, *_ = deepspeed.initialize(
            model=model, model_parameters=parameters, config=config, lr_scheduler=ours
        )
        self.optimizer_name = type(self._engine.basic_optimizer).__name__

    def train_step(self, rows: Tensor) -> Tensor:
        """One optimizer step, in as many micro-batches as the JSON asks for."""
        self._engine.train()
        parts = rows.split(self._engine.train_micro_batch_size_per_gpu())
        mean = torch.zeros((), device=self._engine.device)
        for part in parts:
            loss = token_losses(self._engine, part.to(self._engine.device)).mean()
            self._engine.backward(loss)
            self._engine.step()
            mean += loss.detach() / len(parts)
        return mean

    @torch.no_grad()
    def losses(self, rows: Tensor) -> Tensor:
        """The loss of every predicted token, without gradient."""
        self._engine.eval()
        return token_losses(self._engine, rows.to(self._engine.device))

    def total(self, values: list[float]) -> list[float]:
        """Each value summed over the ranks, in double precision."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self._engine.device)
        distributed.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def state_bytes(self) -> list[int]:
        """Bytes of optimizer state on each rank, counted from the base optimizer's tensors."""
        own = torch.tensor([count_state_bytes(self._engine.basic_optimizer)], device=self._engine.device)
        everyone = [torch.zeros_like(own) for _ in range(self.world)]
        distributed.all_gather(everyone, own)
        return [int(count) for count in everyone]

    def learning_rate(self) -> float:
        """The rate of the next step."""
        return float(self._engine.get_lr()[0])

    def gradient_norm(self) -> float:
        """The norm of the last step's gradient, before clipping; NaN if DeepSpeed did not compute one."""
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def save(self, folder: Path) -> None:
        """Write a DeepSpeed checkpoint."""
        self._engine.save_checkpoint(str(folder))

    def close(self) -> None:
        """Leave the process group, so that no rank waits for another at exit."""
        distributed.destroy_process_group()


def read_deepspeed_config(path: Path) -> dict[str, Any]:
    """A DeepSpeed JSON, checked for what the loop needs."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the DeepSpeed configuration {path}: {error.strerror}.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict) or "optimizer" not in config:
        raise ValueError(f'{path} has no "optimizer" section; add {{"type": "Frugal", "params": {{...}}}}.')
    return config


def count_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in `optimizer.state`."""
    tensors = (value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _batch_size(config: dict[str, Any], world: int) -> int:
    """The global batch, which must not depend on the number of ranks."""
    size = config.get("train_batch_size")
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"train_batch_size is {size!r} in the DeepSpeed configuration; give the sequences per step.")
    if size % world:
        raise ValueError(
            f"train_batch_size is {size}, which {world} ranks cannot share equally; change it or the number of ranks."
        )
    return size
