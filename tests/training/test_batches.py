"""Rows of a token file, and batches of them: the same for every number of ranks, in another order every epoch."""

from __future__ import annotations

import numpy as np
import pytest
from fake_engine import counting_rows

from frugal_dist.training.data.batches import Batches, TokenRows


def test_rows_overlap_by_one_token():
    rows = counting_rows().take([0, 1, 9])
    assert rows[:2].tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    assert rows[2].tolist() == [36, 37, 38, 39, 40]
    with pytest.raises(ValueError, match="sequence_length is 50"):
        TokenRows(np.zeros(50, dtype=np.uint16), 50)


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_batch_does_not_depend_on_the_number_of_ranks(world):
    batches = Batches(counting_rows(), batch_size=6, seed=3)
    for index in (0, 1, 7):
        shared = np.concatenate([batches.share(index, rank, world) for rank in range(world)])
        assert (shared == counting_rows().take(batches.numbers(index))).all()


def test_every_epoch_shows_every_row_once_in_its_own_order():
    batches = Batches(counting_rows(), batch_size=5, seed=0)
    epochs = [batches.numbers(2 * epoch) + batches.numbers(2 * epoch + 1) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert Batches(counting_rows(), 5, seed=1).numbers(0) != batches.numbers(0)
    # Frozen values: another order would silently change every run that is resumed.
    assert epochs[0] == [3, 7, 6, 4, 1, 0, 2, 8, 5, 9]


def test_unequal_shares_are_refused():
    with pytest.raises(ValueError, match="batch size 6 cannot be shared equally by 4 ranks"):
        Batches(counting_rows(), 6, seed=0).share(0, 0, 4)
