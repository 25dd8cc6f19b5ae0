"""Sequence classification: encoded examples as rows, what a model makes of them, and the loss.

Rows of a batch are one int64 tensor of shape (examples, 2, 1 + width): in the first plane the label, then the token
ids, with IGNORED where an example is shorter than the batch's longest; in the second plane the token types. Labels of a
regression are the bits of a float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from frugal_dist.training.data.batches import IGNORED
from frugal_dist.training.finetune.examples import Examples

_TOGETHER = 1000  # examples encoded at once
Row = npt.NDArray[np.int64]


class ExampleRows:
    """Encoded examples by number. ``length``: tokens of an example on average, which is what speeds are told by."""

    full = True  # every row has one target, whatever its padding

    def __init__(self, ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]], labels: Sequence[Any]) -> None:
        self.sizes = np.array([len(tokens) for tokens in ids], dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self._ids = np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=int(self._starts[-1]))
        self._types = np.fromiter(chain.from_iterable(types), dtype=np.int8, count=int(self._starts[-1]))
        regression = any(isinstance(label, float) for label in labels)
        self.labels: npt.NDArray[Any] = np.array(labels, dtype=np.float64 if regression else np.int64)
        self.count = len(ids)
        self.length = max(1, round(float(self.sizes.mean())))

    def take(self, numbers: Iterable[int]) -> Row:
        """The rows of these numbers, the shortest first, so that a part of them needs little padding."""
        wanted = sorted(numbers, key=lambda number: self.sizes[number])
        rows = np.full((len(wanted), 2, 1 + int(self.sizes[wanted].max())), IGNORED, dtype=np.int64)
        rows[:, 1] = 0
        rows[:, 0, 0] = self.labels[wanted].view(np.int64)
        for row, number in zip(rows, wanted, strict=True):
            start, size = self._starts[number], self.sizes[number]
            row[0, 1 : 1 + size] = self._ids[start : start + size]
            row[1, 1 : 1 + size] = self._types[start : start + size]
        return rows

    def enough(self, tokens: int) -> int:
        """All rows."""
        return self.count

    def targets(self, count: int) -> int:
        """One per row."""
        return count


def encode(tokenizer: Any, examples: Examples, length: int) -> ExampleRows:
    """Examples as rows of at most so many tokens."""
    ids: list[list[int]] = []
    types: list[list[int]] = []
    for first in range(0, len(examples.texts), _TOGETHER):
        part = slice(first, first + _TOGETHER)
        pairs = None if examples.pairs is None else examples.pairs[part]
        encoded = tokenizer(examples.texts[part], pairs, truncation=True, max_length=length)
        ids += encoded["input_ids"]
        types += encoded.get("token_type_ids") or [[0] * len(tokens) for tokens in encoded["input_ids"]]
    return ExampleRows(ids, types, examples.labels)


@dataclass(frozen=True)
class Classifier:
    """What is asked of a model. ``pad``: the token id for padding; ``typed``: whether the model reads token types."""

    pad: int
    typed: bool
    regression: bool

    def logits(self, model: nn.Module, rows: Tensor) -> Tensor:
        """One line per row, one column per class; a single column for a regression."""
        longest = 1 + int((rows[:, 0, 1:] != IGNORED).sum(dim=1).max())  # of a part of a batch
        ids, types = rows[:, 0, 1:longest], rows[:, 1, 1:longest]
        real = ids != IGNORED
        more = {"token_type_ids": types} if self.typed else {}
        logits: Tensor = model(input_ids=ids.where(real, self.pad), attention_mask=real.long(), **more).logits
        return logits.float()

    def losses(self, model: nn.Module, rows: Tensor) -> Tensor:
        """The loss of every row: cross entropy, or the squared error of a regression."""
        return self.losses_of(self.logits(model, rows), self.labels(rows))

    def labels(self, rows: Tensor) -> Tensor:
        """The label of every row: class numbers, or the numbers of a regression."""
        labels = rows[:, 0, 0].contiguous()
        return labels.view(torch.float64) if self.regression else labels

    def losses_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The same for logits that are there already."""
        if self.regression:
            return functional.mse_loss(logits[:, 0], labels.to(logits.dtype), reduction="none")
        return functional.cross_entropy(logits, labels, reduction="none")

    def predictions(self, logits: Tensor) -> npt.NDArray[Any]:
        """Class numbers, or the numbers of a regression."""
        predictions: npt.NDArray[Any] = (logits[:, 0] if self.regression else logits.argmax(dim=1)).numpy()
        return predictions
