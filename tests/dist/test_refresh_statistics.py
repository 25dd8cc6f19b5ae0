"""Figures of the refreshes: right on one process, and the same however the matrices lie on ranks."""

from __future__ import annotations

import math

import pytest
import torch
from cases import GAP, LAYOUTS, PROJECTIONS, Case, gradients, weights
from selection import taking_turns
from storages import replicas
from threads import run_ranks

from frugal_dist import Frugal
from frugal_dist.step.statistics import RefreshReport

RANKS = 4


def reports(build: object, case: Case) -> list[list[float]]:
    """This rank's sums after the first refresh, and those of the second; nothing is left to take then."""
    held = build(weights(), case.groups(), case.options)  # type: ignore[operator]
    found = []
    for grads in gradients()[: 2 * GAP]:
        held.step(grads)
        found.append(held.optimizer.take_refresh_figures())
    assert all(found[step] == [0.0] * 5 for step in range(2 * GAP) if step % GAP)
    return [found[0], found[GAP]]


@pytest.mark.parametrize(("chosen", "layout"), taking_turns(PROJECTIONS, LAYOUTS, every=5, name="-".join))
def test_the_same_on_every_layout(chosen: tuple[str, str], layout: str) -> None:
    projection, side = chosen
    case = Case(projection, side, "reset")
    alone = reports(replicas, Case(projection, side, "reset", more=(("process_group", None),)))
    ranks = run_ranks(RANKS, lambda rank: reports(LAYOUTS[layout], case))
    for number, expected in enumerate(alone):
        summed = [sum(values) for values in zip(*(found[number] for found in ranks), strict=True)]
        assert summed[1:] == pytest.approx(expected[1:], rel=1e-9, abs=1e-12)
        basis = projection in ("svd", "random", "dct")
        assert summed[0] == expected[0] if basis else summed[0] >= expected[0]  # coordinates count tiles
        assert bool(expected[3]) == (basis and number == 1)


def one_matrix(**options: object) -> tuple[Frugal, torch.nn.Parameter]:
    weight = torch.nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    optimizer = Frugal([{"params": [("w", weight)], "projected": True}], density=0.5, update_gap=1, **options)
    return optimizer, weight


def test_what_is_caught_and_how_far_it_turns() -> None:
    """A gradient with known singular values: 3, 2, 1, 0 along the axes; then the axes exchanged."""
    optimizer, weight = one_matrix(projection="svd")
    weight.grad = torch.zeros(6, 4, dtype=torch.float64)
    for axis, value in enumerate((3.0, 2.0, 1.0)):
        weight.grad[axis, axis] = value
    optimizer.step()
    first = RefreshReport.of(optimizer.take_refresh_figures())
    assert (first.matrices, first.turned) == (1, 0)
    assert first.residual_energy == pytest.approx(1 / 14)
    assert math.isnan(first.overlap)
    optimizer.step()  # the same gradient
    assert RefreshReport.of(optimizer.take_refresh_figures()).overlap == pytest.approx(1.0)
    weight.grad = weight.grad.roll(1, dims=1)  # now axes 1 and 2: one of them is old
    optimizer.step()
    assert RefreshReport.of(optimizer.take_refresh_figures()).overlap == pytest.approx(0.5)


def test_columns_catch_what_they_select() -> None:
    optimizer, weight = one_matrix(projection="columns")
    weight.grad = torch.ones(6, 4, dtype=torch.float64)
    optimizer.step()
    found = RefreshReport.of(optimizer.take_refresh_figures())
    assert found.residual_energy == pytest.approx(0.5)
    assert math.isnan(found.overlap)


def test_nothing_before_the_first_step() -> None:
    optimizer, _ = one_matrix()
    found = RefreshReport.of(optimizer.take_refresh_figures())
    assert (found.matrices, found.turned) == (0, 0)
    assert math.isnan(found.residual_energy)
