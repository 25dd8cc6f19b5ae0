"""What a training loop asks of an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Losses = Callable[[nn.Module, Tensor], Tensor]
"""What is trained: from a model and rows to the loss of every target, as many for each full row."""
Schedule = Callable[[int], float]
"""The factor on the learning rate at a step, from 0."""


class Engine(Protocol):
    """One rank of a distributed training; every rank calls the same methods in the same order."""

    rank: int
    world: int
    batch_size: int
    optimizer_name: str

    def train_step(self, rows: Tensor, targets: float | None = None) -> Tensor:
        """One optimizer step on this rank's rows of the batch; returns their loss, divided by ``targets``.

        ``targets``: predicted tokens of a rank, on average over the ranks, where rows may be padded: the mean over
        ranks is then the mean over the batch's tokens. None: all rows are full.
        """

    def losses(self, rows: Tensor) -> Tensor:
        """The loss of every target, without gradient."""

    def outputs(self, function: Losses, rows: Tensor) -> Tensor:
        """What a function makes of the model and these rows, without gradient."""

    def total(self, values: list[float]) -> list[float]:
        """Each value summed over the ranks."""

    def state_bytes(self) -> list[int]:
        """Bytes of optimizer state on each rank, counted from the tensors there are."""

    def learning_rate(self) -> float:
        """The rate of the next step."""

    def gradient_norm(self) -> float:
        """The norm of the last step's gradient, before clipping; NaN if it is not known."""

    def skipped_steps(self) -> int:
        """Steps so far that changed nothing, because a gradient was not finite."""

    def save(self, root: Path, step: int, extra: dict[str, Any], **options: Any) -> bool:
        """Write a checkpoint of this step under ``root``; whether it worked. ``options``: see checkpoint.save_step."""

    def resume(self, root: Path) -> tuple[int, dict[str, Any]] | None:
        """Load the latest checkpoint under ``root``: its step and what was saved as ``extra``, or None."""

    def close(self) -> None:
        """Leave the process group, so that no rank waits for another at exit."""


def count_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in ``optimizer.state`` on this rank."""
    tensors = (value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))
    return sum(_local(tensor).numel() * tensor.element_size() for tensor in tensors)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
