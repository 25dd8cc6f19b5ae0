"""What a training loop asks of an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from frugal_dist.update.remainder import REMAINDER
from frugal_dist.update.rules import every_moment

Losses = Callable[[nn.Module, Tensor], Tensor]
"""What is trained: from a model and rows to the loss of every target, as many for each full row."""
Schedule = Callable[[int], float]
"""The factor on the learning rate at a step, from 0."""


class Engine(Protocol):
    """One rank of a distributed training; every rank calls the same methods in the same order."""

    rank: int
    world: int
    share: int
    """Which part of every batch is this rank's; ranks of tensor parallelism have the same."""
    shares: int
    """Into how many parts a batch is divided."""

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

    def any_told(self, me: bool) -> bool:
        """Whether any rank was told so; on a GPU by the call before, so that nothing waits for the step."""

    def state_kinds(self) -> dict[str, int]:
        """This rank's bytes by kind: moments, bases, other."""

    def adamw_bytes(self) -> int:
        """What AdamW's state would take on this rank under the same engine."""

    def refresh_figures(self) -> list[float]:
        """This rank's sums of the refreshes since the last call, see ``frugal_dist.step.statistics``."""

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


def count_adamw_bytes(parameters: Iterable[torch.Tensor]) -> int:
    """Two moments of every element that is trained and lies on this rank."""
    return sum(2 * _local(one).numel() * one.element_size() for one in parameters if one.requires_grad)


def count_state_kinds(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of the tensors in ``optimizer.state`` on this rank by kind; other: counters."""
    parts = dict.fromkeys(every_moment(), "moments") | {"basis": "bases", REMAINDER: "remainders"}
    kind_bytes = {"moments": 0, "bases": 0, "other": 0}
    for state in optimizer.state.values():
        for name, value in state.items():
            if torch.is_tensor(value):
                kind = next((kind for part, kind in parts.items() if part in name), "other")
                kind_bytes[kind] = kind_bytes.get(kind, 0) + _local(value).numel() * value.element_size()
    return kind_bytes


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
