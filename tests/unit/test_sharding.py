"""Who holds which tile, who computes it, what travels: pure functions of the layout, the same on every rank."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frugal_dist.sharding.placement import assign_owners, compute_layout, free_cut, owner_layout, refresh_cost
from frugal_dist.sharding.redistribution import Redistribution, fill_buckets, limit_for_owners
from frugal_dist.sharding.tile import (
    Layout,
    Tile,
    box_tiles,
    check_cover,
    elements,
    interval_tiles,
    split_evenly,
    whole,
)

LLAMA_1B = [(2048, 2048)] * 4 + [(5461, 2048)] * 2 + [(2048, 5461)]


def row_shards(rows: int, cols: int, ranks: int) -> Layout:
    return tuple(box_tiles(span, (0, cols)) for span in split_evenly(rows, ranks))


def flat_shards(rows: int, cols: int, cuts: list[int]) -> Layout:
    points = [0, *sorted(min(cut, rows * cols) for cut in cuts), rows * cols]
    return tuple(interval_tiles(a, b, cols) for a, b in itertools.pairwise(points))


@given(st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(0, 81), max_size=5), st.sampled_from([0, 1]))
def test_a_cut_covers_everything_once_and_splits_no_contraction(
    rows: int, cols: int, cuts: list[int], free_dim: int
) -> None:
    storage = flat_shards(rows, cols, cuts)
    check_cover("w", storage, rows, cols)
    layout = free_cut(storage, rows, cols, free_dim, index=1)
    check_cover("w", layout, rows, cols)
    for tile in (tile for tiles in layout for tile in tiles):
        assert (tile.cols == (0, cols)) if free_dim == 0 else (tile.rows == (0, rows))


@given(st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(0, 81), max_size=5), st.sampled_from([0, 1]))
def test_what_is_sent_is_what_is_received(rows: int, cols: int, cuts: list[int], free_dim: int) -> None:
    """Both ends of a message list the same pieces in the same order."""
    storage = flat_shards(rows, cols, cuts)
    layout = free_cut(storage, rows, cols, free_dim, index=0)
    crossing = Redistribution(storage, layout)
    routes = [crossing.route(rank, 0) for rank in range(len(storage))]
    for sender, mine in enumerate(routes):
        for receiver, theirs in enumerate(routes):
            for which in ("gradient_in", "update_out"):
                sent = [m for m in getattr(mine, which) if (m.source, m.target) == (sender, receiver)]
                received = [m for m in getattr(theirs, which) if (m.source, m.target) == (sender, receiver)]
                assert sent == received


def test_a_hole_or_an_overlap_is_refused() -> None:
    with pytest.raises(ValueError, match="do not cover it evenly"):
        check_cover("w", (box_tiles((0, 2), (0, 4)), box_tiles((3, 4), (0, 4))), 4, 4)
    with pytest.raises(ValueError, match="do not cover it evenly"):
        check_cover("w", (whole(4, 4), box_tiles((3, 4), (0, 4))), 4, 4)


_RANGES = st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(lambda pair: pair[0] < pair[1])


@given(st.lists(st.builds(Tile, _RANGES, _RANGES), max_size=6))
def test_covers_are_counted_element_by_element(tiles: list[Tile]) -> None:
    counts = [[sum(tile.contains(Tile((y, y + 1), (x, x + 1))) for tile in tiles) for x in range(4)] for y in range(4)]
    even = {count for row in counts for count in row} in ({1}, {2}, {3}, {4}, {5}, {6})
    with nullcontext() if even else pytest.raises(ValueError, match="do not cover it evenly"):
        check_cover("w", tuple((tile,) for tile in tiles), 4, 4)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=3))
def test_even_covers_are_accepted(cuts: list[tuple[int, int]]) -> None:
    """Every copy cut into four somewhere else."""
    tiles: list[Tile] = []
    for y, x in [(2, 2), *cuts]:
        tiles += [*box_tiles((0, y), (0, x)), *box_tiles((0, y), (x, 4)), *box_tiles((y, 4), (0, 4))]
    check_cover("w", tuple((tile,) for tile in tiles), 4, 4)


def test_owners_are_balanced_at_scale() -> None:
    """LLaMA-1B on 64 ranks: the busiest owner has at most a fifth more to do than the mean."""
    costs = [refresh_cost(rows, cols) for _ in range(24) for rows, cols in LLAMA_1B]
    assert assign_owners([1.0, 1.0, 8.0], 2, known=[0, 1]) == [0, 1, 0]
    assert assign_owners([1.0, 1.0, 8.0, 8.0], 2, known=[0, 1]) == [0, 1, 0, 1]
    owners = assign_owners(costs, 64)
    load = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(64)]
    assert max(load) / (sum(load) / 64) < 1.2


@pytest.mark.parametrize(("ranks", "owner"), [(2, False), (8, False), (64, True)])
def test_many_ranks_prefer_whole_matrix_owners(ranks: int, owner: bool) -> None:
    storage = row_shards(2048, 2048, ranks)
    layout = compute_layout(storage, 2048, 2048, "right", 512, 0, 1, "auto", True)
    assert (layout == owner_layout(ranks, 1, 2048, 2048)) is owner
    assert (layout == storage) is not owner


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=12))
def test_buckets_hold_everything_once_within_the_limit(loads: list[tuple[int, int]]) -> None:
    buckets = fill_buckets(loads, limit=60)
    assert sorted(item for bucket in buckets for item in bucket) == list(range(len(loads)))
    for bucket in buckets:
        assert len(bucket) == 1 or max(sum(loads[i][rank] for i in bucket) for rank in (0, 1)) <= 60


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_matrices_larger_than_a_bucket_are_computed_by_all_owners_at_once(ranks: int) -> None:
    """Else a 7B model's SVDs would run one after the other, on whatever number of ranks."""
    matrix = 11008 * 4096
    loads = [tuple(-(-matrix // ranks) + matrix * (rank == owner) for rank in range(ranks)) for owner in range(ranks)]
    assert fill_buckets(loads, limit_for_owners(loads, 1 << 24)) == [list(range(ranks))]


def test_an_interval_has_up_to_three_tiles() -> None:
    tiles = interval_tiles(3, 17, 5)
    assert [(tile.rows, tile.cols) for tile in tiles] == [((0, 1), (3, 5)), ((1, 3), (0, 5)), ((3, 4), (0, 2))]
    assert elements(tiles) == 14
