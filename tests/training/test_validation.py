"""The validation loss: over the same tokens for every number of ranks, and beside it the unigram loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
from fake_engine import FakeEngine, counting_rows

from frugal_dist.training.data.batches import DocumentRows, TokenRows
from frugal_dist.training.validation import Validation


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_validation_covers_the_same_tokens_for_every_number_of_ranks(world):
    validation = Validation(counting_rows(count=50), tokens=44 * 4 + 1)
    assert (validation.short, Validation(counting_rows(count=50), tokens=50 * 4 + 1).short) == (False, True)
    assert validation.tokens == 44 * 4
    engines = [FakeEngine(rank, world) for rank in range(world)]
    for engine in engines:
        validation.loss(engine, lambda: False)
    assert sum(sum(engine.sums) for engine in engines) == sum(range(1, 44 * 4 + 1))
    assert len({engine.calls for engine in engines}) == 1


def test_unigram_loss_is_the_entropy_of_the_validation_text():
    rows = TokenRows(np.array([0, 1, 1, 2, 1], dtype=np.uint16), 4)
    expected = -(3 * math.log(3 / 4) + math.log(1 / 4)) / 4  # targets 1, 1, 2, 1; the id 3 never occurs
    assert Validation(rows, 4).unigram_loss(4) == pytest.approx(expected)
    padded = DocumentRows(np.array([1, 1, 0, 2, 0], dtype=np.uint16), 4, separator=0)  # targets 1, 0 and 0
    expected = -(2 * math.log(2 / 3) + math.log(1 / 3)) / 3
    assert Validation(padded, 4).unigram_loss(3) == pytest.approx(expected)
