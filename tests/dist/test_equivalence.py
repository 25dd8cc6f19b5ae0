"""The same run on every layout and number of ranks gives the weights of one process.

    python -m pytest tests/dist/test_equivalence.py             # each matrix with one state-free rule per setting
    python -m pytest tests/dist/test_equivalence.py --heavy     # each matrix with each of them

The largest difference of any weight on any rank is printed for every layout.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import pytest
import torch
from cases import LAYOUTS, MATRICES, ON_REFRESH, PROJECTIONS, REGULAR, STATE_FREE, Case, label, places, reference, train
from reporting import markdown, report
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
        Case(projection, "std", mode, names=LARGE, later=((2, 0.5), (5, 0.1)))
        for projection, modes in (
            ("svd", ("reset", "keep", "project")),
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
    with_options("svd", "reset", state_full="lion"),
    with_options("svd", "project", state_full="sgdm", side="left"),
    with_options("randk", "project", state_full="lion"),
    with_options("columns", "keep", state_full="sgdm"),
    with_options("svd", "keep", refresh_schedule="staggered"),
    with_options("randk", "keep", refresh_schedule="staggered"),
    with_options("svd", "reset", residual_threshold=0.8),
    with_options("randperm", "project", side="full"),
    with_options("blockwise", "reset", block_order="ascending"),
    with_options("blockwise", "reset", block_order="descending", state_full="lion"),
    Case("svd", "std", "project", densities=(0.03, 0.05, 0.08, 0.25, 0.6)),
    Case("randk", "std", "keep", densities=(0.01, 0.05, 0.2)),
    Case("columns", "std", "reset", densities=(0.0,)),
    Case("columns", "std", "keep", densities=(1.0,)),
]
"""Beyond the table: changing densities, forced compute layouts, other rules and schedules, on 4 ranks."""

SINGLE = [
    Case("svd", "std", "reset", free="sign"),
    Case("svd", "left", "keep", free="sign"),
    Case("random", "std", "project", free="sign"),
    Case("columns", "std", "keep", free="sign"),
    Case("randk", "std", "project", free="sign"),
    Case("blockwise", "std", "reset", free="sign"),
]
"""Compared in fp32 and bf16, where a residual near zero may change its sign: a flip moves its weight by 2 lr."""


def compare(layout: str, ranks: int, cases: Sequence[Case]) -> Differences:
    """Runs in a worker process, with threads as ranks."""
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


Compute = Callable[..., Any]


@pytest.fixture(scope="module")
def compute(request: pytest.FixtureRequest) -> Iterator[Compute]:
    """Results of the functions above, computed ahead by as many processes as there are cores."""
    pool = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))
    table = table_settings(3 if request.config.getoption("--heavy") else 1)
    futures: dict[tuple[Any, ...], Future[Any]] = {}
    for item in request.session.items:
        if item.module is not request.module:
            continue
        params = item.callspec.params
        if item.originalname == test_every_layout_gives_the_weights_of_one_process.__name__:
            key: tuple[Any, ...] = (params["layout"], params["ranks"])
            futures[key] = pool.submit(compare, *key, table)
        elif item.originalname == test_variants.__name__:
            futures["variants", params["layout"]] = pool.submit(compare, params["layout"], 4, VARIANTS)
        elif item.originalname == test_single_and_half_precision.__name__:
            key = (params["dtype"], params["layout"])
            futures[key] = pool.submit(compare_single, params["layout"], 4, params["dtype"])
    yield lambda *key: futures[key].result()
    pool.shutdown(cancel_futures=True)


ROWS: dict[tuple[str, int], Differences] = {}
PRECISION: dict[tuple[torch.dtype, str], dict[Case, tuple[int, int, float]]] = {}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("layout", "ranks"), PLACES)
def test_every_layout_gives_the_weights_of_one_process(layout: str, ranks: int, compute: Compute) -> None:
    found = ROWS[layout, ranks] = compute(layout, ranks)
    assert {name for _, name in found} == {*MATRICES, *REGULAR}
    assert not {key: value for key, value in found.items() if not value <= key[0].tolerance}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layout", VARIANTS_ON)
def test_variants(layout: str, compute: Compute) -> None:
    found = compute("variants", layout)
    assert len({case for case, _ in found}) == len(VARIANTS)
    assert not {key: value for key, value in found.items() if not value <= key[0].tolerance}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layout", SINGLE_ON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_and_half_precision(layout: str, dtype: torch.dtype, compute: Compute) -> None:
    """At most one entry in 10,000 flips; the others differ by rounding of weights below 1: fp32 1e-6, bf16 one ulp."""
    found = PRECISION[dtype, layout] = compute(dtype, layout)
    assert len(found) == len(SINGLE)
    flips, total = (sum(values[i] for values in found.values()) for i in (0, 1))
    assert flips <= total * 1e-4
    assert max(values[2] for values in found.values()) <= (1e-6 if dtype == torch.float32 else 2**-8)


def _table() -> list[str]:
    if not ROWS:
        return []
    columns = [label(*projection) for projection in PROJECTIONS]
    rows = []
    for (layout, ranks), found in ROWS.items():
        worst = dict.fromkeys(columns, 0.0)
        for (case, _), value in found.items():
            column = label(case.projection, case.side)
            worst[column] = max(worst[column], value)
        rows.append([layout, str(ranks), *(f"{worst[c]:.0e}" for c in columns), f"{max(worst.values()):.1e}"])
    return markdown(["float64: largest difference", "ranks", *columns, "worst"], rows)


def _by_rule() -> list[str]:
    if not ROWS:
        return []
    head = [(mode, free) for mode in ON_REFRESH for free in STATE_FREE]
    rows = []
    for projection in PROJECTIONS:
        cells: dict[tuple[str, str], float] = {}
        for found in ROWS.values():
            for (case, name), value in found.items():
                if (case.projection, case.side) == projection and name in MATRICES:
                    key = (case.on_refresh, case.state_free(name))
                    cells[key] = max(cells.get(key, 0.0), value)
        rows.append([label(*projection), *(f"{cells[key]:.0e}" if key in cells else "" for key in head)])
    return markdown(["float64: all layouts together", *map(" ".join, head)], rows)


def _precision() -> list[str]:
    rows = []
    for (dtype, layout), found in PRECISION.items():
        flips, total = (sum(values[i] for values in found.values()) for i in (0, 1))
        rest = max(values[2] for values in found.values())
        rows.append([f"{str(dtype).removeprefix('torch.')}, {layout}", str(flips), str(total), f"{rest:.1e}"])
    return markdown(["4 ranks", "flips", "entries", "largest other difference"], rows) if rows else []


report("equivalence: every layout against one process", _table)
report("equivalence: by rule", _by_rule)
report("equivalence: fp32 and bf16", _precision)
