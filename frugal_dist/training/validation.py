"""Validation loss over fixed tokens, and the unigram model to compare it with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from frugal_dist.training.data.batches import IGNORED, SequenceRows
from frugal_dist.training.engines import Engine

ROWS_AT_ONCE = 16
_COUNTED_ROWS = 4096


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found: the mean loss, metrics by name, and words for the terminal."""

    loss: float
    metrics: dict[str, float]
    text: str


def perplexity_of(loss: float) -> float:
    """exp(loss); infinite where that is beyond what a float holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class Evaluation(Protocol):
    """Measures a model. Every rank calls it at the same steps, and all get the same answer."""

    def evaluate(self, engine: Engine, stop: Callable[[], bool]) -> EvalResult | None:
        """Measure now; ``stop()``, which all ranks ask together: whether to give up, and return None."""


class Validation:
    """The first `tokens` predicted tokens of a validation text, the same for every number of ranks.

    ``at_once``: rows that go through the model together on one rank. ``short``: the text has fewer than ``tokens``.
    """

    def __init__(self, rows: SequenceRows, tokens: int, at_once: int = ROWS_AT_ONCE) -> None:
        self.rows = rows
        self.at_once = at_once
        self.count = rows.enough(tokens)
        self.short = self.count == rows.count and self.tokens < tokens

    @property
    def tokens(self) -> int:
        """How many tokens are predicted; positions of padding are not."""
        return self.rows.targets(self.count)

    def evaluate(self, engine: Engine, stop: Callable[[], bool]) -> EvalResult | None:
        loss = self.loss(engine, stop)
        if loss is None:
            return None
        perplexity = perplexity_of(loss)
        return EvalResult(loss, {"perplexity": perplexity}, f"validation perplexity {perplexity:,.1f}")

    def loss(self, engine: Engine, stop: Callable[[], bool]) -> float | None:
        """Mean loss per token; None if told to stop. Row i belongs to share i mod shares."""
        # Every rank calls the model equally often, as sharded weights require; rows past the end count nothing.
        turns = -(-self.count // engine.shares)
        total = 0.0
        for first in range(0, turns, self.at_once):
            if stop():
                return None
            mine = [turn * engine.shares + engine.share for turn in range(first, min(first + self.at_once, turns))]
            rows = self.rows.take(min(number, self.count - 1) for number in mine)
            losses = engine.losses(torch.from_numpy(rows)).view(len(mine), -1).double().sum(dim=1)
            told = losses.tolist()  # a GPU is waited for once
            total += sum(loss for number, loss in zip(mine, told, strict=True) if number < self.count)
        return engine.total([total])[0] * engine.shares / engine.world / self.tokens

    def unigram_loss(self, vocab_size: int) -> float:
        """Loss of guessing every token by its share of this very text: what no model without context goes below."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for first in range(0, self.count, _COUNTED_ROWS):
            targets = self.rows.take(range(first, min(first + _COUNTED_ROWS, self.count)))[:, 1:]
            counts += np.bincount(targets[targets != IGNORED], minlength=vocab_size)
        shares = counts[counts > 0] / counts.sum()
        return -float((shares * np.log(shares)).sum())
