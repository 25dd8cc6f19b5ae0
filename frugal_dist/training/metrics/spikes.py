"""Which steps are not taken: no finite gradient, or one that is far larger than those before."""

from __future__ import annotations

import math
from dataclasses import dataclass

MEMORY = 0.98
"""How much of the mean stays at every step: it reaches back about 50 steps."""
FIRST = 10
"""So many norms make a mean to compare with."""


@dataclass
class SpikeGuard:
    """``factor``: a norm above so many times the mean of those before is a spike; 0: nothing is.

    Norms that are the same on all ranks give the same answers on all ranks.
    """

    factor: float
    mean: float = 0.0
    count: int = 0

    def passes(self, norm: float) -> bool:
        """Whether to take this step; what passes is remembered."""
        if not math.isfinite(norm):
            return False
        if self.factor and self.count >= FIRST and norm > self.factor * self.mean:
            return False
        share = max(1.0 - MEMORY, 1.0 / (self.count + 1))
        self.mean += share * (norm - self.mean)
        self.count += 1
        return True

    def state_dict(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on; a checkpoint of another engine holds nothing of it."""
        self.mean, self.count = float(state.get("mean", 0.0)), int(state.get("count", 0))
