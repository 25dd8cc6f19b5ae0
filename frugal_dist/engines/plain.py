"""Storage of ordinary tensors: the whole parameter, on one process or as replicas on every rank (DDP)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from frugal_dist.sharding.collectives import Ranks
from frugal_dist.sharding.shard import Box, LocalShard, ParamSpec


@dataclass(frozen=True)
class PlainStorage:
    """Looks parameters up in the optimizer's groups by position: engines replace the objects.

    Where the groups hold copies (DeepSpeed's stage 0 in bf16), ``models`` are the model's own parameters, one per
    original. ``check`` runs at every call.
    """

    groups: Sequence[dict[str, Any]]
    originals: Sequence[ParamSpec]
    shares_replicas: bool = True
    models: Sequence[Tensor] = ()
    check: Callable[[], None] | None = None

    def call(self) -> Sequence[int]:
        if self.check is not None:
            self.check()
        return range(len(self.originals))

    def complete_gradients(self, ranks: Ranks) -> None:
        """They are complete."""

    def moves_elsewhere(self) -> bool:
        return False

    def part(self, i: int) -> LocalShard:
        return Box(tuple((0, size) for size in self.originals[i].shape))

    def param(self, i: int) -> Tensor:
        original = self.originals[i]
        param: Tensor = self.groups[original.group]["params"][original.position]
        return param

    def frozen(self, i: int) -> bool:
        return not (self.models[i] if self.models else self.param(i)).requires_grad

    def options(self, i: int) -> dict[str, Any]:
        return self.groups[self.originals[i].group]

    def tensors(self, i: int) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        original = self.originals[i]
        param: Tensor = self.groups[original.group]["params"][original.position]
        if not self.models:
            return param, param, param.grad, not param.requires_grad
        frozen = not self.models[i].requires_grad
        return param, param, None if frozen else param.grad, frozen  # the engine makes zeros of it
