"""Storage of ordinary tensors: the whole parameter, on one process or as replicas on every rank (DDP)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from frugal_dist.sharding.storage import Box, Original, Part


@dataclass(frozen=True)
class PlainStorage:
    """Looks parameters up in the optimizer's groups by position: engines replace the objects."""

    groups: Sequence[dict[str, Any]]
    originals: Sequence[Original]
    shares_replicas: bool = True

    def call(self) -> Sequence[int]:
        return range(len(self.originals))

    def part(self, i: int) -> Part:
        return Box(tuple((0, size) for size in self.originals[i].shape))

    def carrier(self, i: int) -> Tensor:
        original = self.originals[i]
        param: Tensor = self.groups[original.group]["params"][original.position]
        return param

    def options(self, i: int) -> dict[str, Any]:
        return self.groups[self.originals[i].group]

    def weight(self, i: int) -> Tensor:
        return self.carrier(i).detach()

    def grad(self, i: int) -> Tensor | None:
        return self.carrier(i).grad
