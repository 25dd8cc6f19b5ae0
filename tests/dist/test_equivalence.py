"""The same run on every layout and number of ranks gives the weights of one process.

    python -m pytest -n auto tests/dist/test_equivalence.py             # half of the settings on each number of ranks
    python -m pytest -n auto tests/dist/test_equivalence.py --heavy     # all, each matrix with each state-free rule

The largest difference of any weight on any rank is printed for every layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import tables
import torch
from cases import LAYOUTS, MATRICES, ON_REFRESH, PROJECTIONS, REGULAR, Case, label, places, reference, train
from selection import cells, mostly_heavy
from threads import run_ranks

Differences = dict[tuple[Case, str], float]
"""By setting and parameter: the largest difference on any rank to one process."""

PLACES = list(places())
VARIANTS_ON = ("replicas, shared state", "Shard(0)", "Shard(1)", "HSDP 2x2", "ZeRO-3, 4 sub-groups")
SINGLE_ON = ("replicas, shared state", "Shard(0)", "HSDP 2x2", "ZeRO-3, 4 sub-groups")
LR = 1e-2


def table_settings(turns: int) -> list[Case]:
    """Every projection and treatment of the state, with ``turns`` assignments of state-free rules to matrices."""
    pairs = [(projection, mode) for projection in PROJECTIONS for mode in ON_REFRESH]
    pairs = [pair for pair in pairs if pair[0][0] != "blockwise" or pair[1] == "reset"]  # blocks are always cleared
    return [
        Case(projection, side, on_refresh, (turn + position) % 3)
        for turn in range(turns)
        for position, ((projection, side), on_refresh) in enumerate(pairs)
    ]


def with_options(projection: str, on_refresh: str, side: str = "std", **more: Any) -> Case:
    return Case(projection, side, on_refresh, more=tuple(more.items()))


LARGE = ("tall", "wide", "square", "experts")
VARIANTS = [
    *(
        Case(projection, "std", mode, names=LARGE, later=((2, 0.5), (5, 0.2)))
        for projection, modes in (
            ("svd", ("reset", "keep", "project")),
            ("dct", ("keep",)),
            ("randperm", ("keep",)),
            ("columns", ("keep", "project")),
            ("rows", ("keep",)),
            ("randk", ("reset", "keep", "project")),
        )
        for mode in modes
    ),
    Case("blockwise", "std", "reset", names=LARGE, free="sign", later=((2, 0.9), (5, 0.2))),
    Case("randk", "std", "keep", names=LARGE, later=((2, 0.0), (5, 0.5))),
    with_options("svd", "project", compute_layout="owner"),
    with_options("svd", "project", side="left", compute_layout="cut"),
    with_options("svd", "keep", side="right", compute_layout="cut"),
    with_options("random", "keep", side="reverse_std", compute_layout="owner"),
    with_options("svd", "reset", svd_method="subspace"),
    with_options("svd", "keep", side="left", svd_method="subspace", compute_layout="owner"),
    with_options("svd", "project", side="full", svd_method="subspace"),
    with_options("svd", "keep", svd_method="gram64"),
    with_options("svd", "project", basis_dtype="bf16"),
    with_options("svd", "reset", state_full="lion"),
    with_options("svd", "project", state_full="sgdm", side="left"),
    with_options("randk", "project", state_full="lion"),
    with_options("columns", "keep", state_full="sgdm"),
    with_options("svd", "keep", refresh_schedule="staggered"),
    with_options("randk", "keep", refresh_schedule="staggered"),
    with_options("dct", "keep", side="left", compute_layout="cut"),
    with_options("dct", "project", side="full"),
    with_options("dct", "reset", compute_layout="owner", state_full="lion"),
    with_options("svd", "reset", residual_threshold=0.8),
    with_options("randperm", "project", side="full"),
    with_options("blockwise", "reset", block_order="ascending"),
    with_options("blockwise", "reset", block_order="descending", state_full="lion"),
    Case("svd", "std", "project", densities=(0.03, 0.05, 0.08, 0.25, 0.6)),
    Case("randk", "std", "keep", densities=(0.01, 0.05, 0.2)),
    Case("columns", "std", "reset", densities=(0.0,)),
    Case("columns", "std", "keep", densities=(1.0,)),
    Case("randperm", "full", "keep", densities=(1.0,)),
    Case("rows", "std", "keep", names=LARGE, later=((2, 1.0), (5, 0.4))),
    Case("columns", "std", "project", names=LARGE, later=((2, 1.0), (5, 0.4))),
]
"""Beyond the table: changing densities, forced compute layouts, other rules and schedules, on 4 ranks."""

SINGLE = [
    Case("svd", "std", "reset", free="sign"),
    Case("svd", "left", "keep", free="sign"),
    Case("random", "std", "project", free="sign"),
    Case("dct", "std", "keep", free="sign"),
    Case("svd", "full", "keep", free="sign", more=(("matmul", "bf16x3"), ("eps", 1e-3))),
    Case("svd", "std", "project", free="sign", more=(("matmul", "bf16x3"),)),
    Case("columns", "std", "keep", free="sign"),
    Case("randk", "std", "project", free="sign"),
    Case("blockwise", "std", "reset", free="sign"),
    Case("columns", "std", "reset", free="sign", more=(("rounding", "stochastic"),)),
    Case("svd", "std", "keep", free="sign", more=(("rounding", "stochastic"),)),
]
"""Compared in fp32 and bf16, where a residual near zero may change its sign: a flip moves its weight by 2 lr."""


def compare(layout: str, ranks: int, cases: Sequence[Case]) -> Differences:
    """With threads as ranks."""
    found: Differences = {}
    for case in cases:
        want = reference(case)
        for full in run_ranks(ranks, lambda rank, case=case: train(LAYOUTS[layout], case)):
            for name, value in full.items():
                found[case, name] = max(found.get((case, name), 0.0), float((value - want[name]).abs().max()))
    return found


def compare_single(layout: str, ranks: int, dtype: torch.dtype) -> dict[Case, tuple[int, int, float]]:
    """By setting: entries that flipped, all entries, and the largest difference of the others."""
    found = {}
    for case in SINGLE:
        want = reference(case, dtype)
        flips, total, worst = 0, 0, 0.0
        for full in run_ranks(ranks, lambda rank, case=case: train(LAYOUTS[layout], case, dtype)):
            for name, value in full.items():
                difference = (value.double() - want[name].double()).abs()
                flipped = difference > LR
                flips, total = flips + int(flipped.sum()), total + difference.numel()
                worst = max(worst, float(difference[~flipped].max()))
        found[case] = (flips, total, worst)
    return found


def _first(layout: str, ranks: int) -> Any:
    """By default a quarter of the settings on 2 ranks and one on 3; on 4 where a layout needs as many."""
    quick = ranks < 4 or (layout, 2) not in PLACES
    return pytest.param(layout, ranks, marks=() if quick else pytest.mark.heavy)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("layout", "ranks"), [_first(*place) for place in PLACES])
def test_every_layout_gives_the_weights_of_one_process(layout: str, ranks: int, request: pytest.FixtureRequest) -> None:
    heavy = request.config.getoption("--heavy")
    settings = table_settings(3 if heavy else 1)
    if not heavy:
        settings = settings[(list(LAYOUTS).index(layout) + ranks) % 4 :: 4]
    found = compare(layout, ranks, settings)
    for (case, name), value in found.items():
        row = label(case.projection, case.side)
        tables.note("equivalence, float64: largest difference", f"{layout}, {ranks} ranks", row, value)
        if name in MATRICES:
            column = f"{case.on_refresh} {case.state_free(name)}"
            tables.note("equivalence, float64: all layouts together", row, column, value)
    assert {name for _, name in found} == {*MATRICES, *REGULAR}
    assert not {key: value for key, value in found.items() if not value <= key[0].tolerance}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layout", mostly_heavy(VARIANTS_ON, ["Shard(0)"]))
def test_variants(layout: str, request: pytest.FixtureRequest) -> None:
    variants = VARIANTS if request.config.getoption("--heavy") else VARIANTS[::3]
    found = compare(layout, 4, variants)
    assert len({case for case, _ in found}) == len(variants)
    assert not {key: value for key, value in found.items() if not value <= key[0].tolerance}


SPLIT = [
    Case("svd", "std", "keep", free="sgd", names=LARGE),
    Case("svd", "left", "project", free="sgd", names=LARGE, more=(("compute_layout", "cut"),)),
    Case("svd", "std", "reset", free="sgd", names=LARGE, more=(("compute_layout", "owner"),)),
]


@pytest.mark.parametrize("layout", [one for one in LAYOUTS if "sub-groups" not in one])
def test_split_products_are_those_of_one_process(layout: str) -> None:
    """In fp32, where the option does something: products that forget it are a hundred times as far."""
    for case in SPLIT:
        split = replace(case, more=(*case.more, ("matmul", "bf16x3")))
        want, without = (reference(one, torch.float32) for one in (split, case))
        for full in run_ranks(4, lambda rank, split=split: train(LAYOUTS[layout], split, torch.float32)):
            assert max(float((full[name] - want[name]).abs().max()) for name in want) <= 1e-6
            assert max(float((full[name] - without[name]).abs().max()) for name in want) > 3e-6


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("dtype", "layout"),
    cells(
        [torch.float32, torch.bfloat16],
        SINGLE_ON,
        lambda dtype, layout: dtype == torch.bfloat16 and layout == "Shard(0)",
    ),
)
def test_single_and_half_precision(layout: str, dtype: torch.dtype) -> None:
    """At most one entry in 10,000 flips; the others differ by rounding of weights below 1: fp32 1e-6, bf16 one ulp."""
    found = compare_single(layout, 4, dtype)
    flips, total = (sum(values[i] for values in found.values()) for i in (0, 1))
    rest = max(values[2] for values in found.values())
    title, row = "equivalence on 4 ranks, sign rules", f"{str(dtype).removeprefix('torch.')}, {layout}"
    tables.count(title, row, "flips", flips)
    tables.count(title, row, "entries", total)
    tables.note(title, row, "largest other difference", rest)
    assert flips <= total * 1e-4
    assert rest <= (1e-6 if dtype == torch.float32 else 2**-8)
