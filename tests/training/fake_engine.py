"""An engine that trains nothing, and rows of counted tokens, for tests of what stands around it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from frugal_dist.step.statistics import RefreshStats
from frugal_dist.training.data.batches import TokenRows


def counting_rows(count: int = 10, length: int = 4) -> TokenRows:
    return TokenRows(np.arange(count * length + 1, dtype=np.uint16), length)


@dataclass
class FakeEngine:
    """Stands in for one rank: the loss of a token is its own value, and sums over ranks are collected."""

    rank: int
    world: int
    sums: list[float] = field(default_factory=list)
    calls: int = 0
    seen: list[int] = field(default_factory=list)

    @property
    def share(self):
        return self.rank

    @property
    def shares(self):
        return self.world

    def train_step(self, rows, targets=None):
        self.seen.extend(rows[:, 0].tolist())
        return rows.float().mean()

    def learning_rate(self):
        return 0.5

    def gradient_norm(self):
        return 1.0

    def skipped_steps(self):
        return 0

    def refresh_figures(self):
        return RefreshStats().take()

    def losses(self, rows):
        self.calls += 1
        return rows[:, 1:].flatten().float()

    def total(self, values):
        self.sums.extend(values)
        return values

    def any_told(self, me):
        return self.total([float(me)])[0] > 0
