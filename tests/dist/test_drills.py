"""When something goes wrong on one rank, all ranks agree or all raise, and none hangs."""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import cases
import drills
import pytest
import torch
from drills import ALL, FAILING, LIKE_ALONE, REFUSED, VICTIM, Drill, Outcome
from processes import Fleet
from selection import mostly_heavy
from storages import replicas
from threads import run_ranks

from frugal_dist import Frugal, engines
from frugal_dist.step import column_refresh

REAL = (
    "NaN at a refresh, replicas, shared state",
    "NaN at a refresh, Shard(0)",
    "zero at a refresh, Shard(0)",
    "SVD fails once, Shard(0)",
    "out of memory, then enough, Shard(0)",
    "another seed, Shard(0)",
    "another order, replicas, shared state",
    "a missing parameter, Shard(0)",
    "another shape, Shard(0)",
    "SVD keeps failing, Shard(0)",
    "memory keeps failing, replicas, shared state",
    "a schedule of regular parameters on one rank, Shard(0)",
    "another weight, replicas, shared state",
    "no gradient on one rank at step 3, replicas, shared state",
    "no gradients on one rank at (3,), svd, Shard(0)",
)
"""Once more with real processes and gloo."""


def on_threads(drill: Drill) -> tuple[list[Outcome], list[str]]:
    with drill.patched(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        outcomes = run_ranks(drill.ranks, drill.run)
    return outcomes, [str(one.message) for one in told]


def check(name: str, outcomes: list[Outcome], told: list[str]) -> None:
    drill = ALL[name]
    assert len({outcome.error for outcome in outcomes}) == 1, "one error on all ranks, or none"
    assert len({outcome.steps for outcome in outcomes}) == 1, "all ranks stop at the same step"
    if name in LIKE_ALONE:
        check_like_alone(drill, outcomes)
    elif name in REFUSED:
        apart = name.startswith("no replicas")
        assert outcomes[0].error.startswith(f"ValueError: {VICTIM}: ranks (" if apart else "ValueError: rank 0 ")
        assert ("hold different weights" if apart else "rank 1") in outcomes[0].error
        assert outcomes[0].steps == 0
        if name.startswith("another seed"):
            assert "have different hyperparameters: seed of group 0: 0 against 7; " in outcomes[0].error
    elif name in FAILING:
        check_failing(name, outcomes[0])
    else:
        check_agreement(name, outcomes, told)


def check_like_alone(drill: Drill, outcomes: list[Outcome]) -> None:
    with drill.patched(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = drill.alone()
    assert not want.error
    for outcome in outcomes:
        assert not outcome.error
        for name, weight in want.weights.items():
            torch.testing.assert_close(outcome.weights[name], weight, rtol=0, atol=1e-10, equal_nan=True)
        assert outcome.counters == outcomes[0].counters


def check_failing(name: str, outcome: Outcome) -> None:
    if name.startswith("a schedule"):
        assert outcome.error.startswith("ValueError: The ranks have different hyperparameters at this refresh: lr of ")
        assert " is 0.01 on rank 0, 0.001 on rank 1. " in outcome.error
    elif name.startswith("structure"):
        assert outcome.error.startswith("ValueError: param_groups[0]: side was changed from 'std' to 'full'")
        assert outcome.steps == 4, "at once"
    elif name.startswith("density"):
        assert "a density schedule cannot go to 0" in outcome.error
    else:
        assert outcome.error.startswith(
            f"RuntimeError: {VICTIM}: the projector refresh failed 3 times in a row on rank "
        )
    assert 2 < outcome.steps < drills.STEPS - 1


def check_agreement(name: str, outcomes: list[Outcome], told: list[str]) -> None:
    """Replicas are equal; bases were refreshed together (coordinates that nobody shares need no agreement)."""
    first = outcomes[0]
    assert not first.error
    for outcome in outcomes:
        for key, weight in first.weights.items():
            assert torch.equal(outcome.weights[key].nan_to_num(), weight.nan_to_num()), key
        if ALL[name].options["projection"] in ("svd", "random"):
            late = {key: value for key, value in outcome.counters.items() if "refreshe" in key}
            assert late == {key: first.counters[key] for key in late}
    if name.startswith("another weight"):
        assert any("had different weights" in text and VICTIM in text for text in told)


@pytest.mark.parametrize("name", mostly_heavy(ALL, list(ALL)[::4]))
def test_on_threads(name: str) -> None:
    check(name, *on_threads(ALL[name]))


def test_where_warnings_are_errors_no_rank_raises_alone(capsys: pytest.CaptureFixture[str]) -> None:
    drill = ALL["another weight, replicas, shared state"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outcomes = run_ranks(drill.ranks, drill.run)
    assert not any(outcome.error for outcome in outcomes)
    assert "had different weights" in capsys.readouterr().err


@pytest.fixture(scope="module")
def real(fleet: Fleet) -> dict[str, tuple[list[Outcome], list[str]]]:
    """The drills of REAL on 3 processes, all in one job."""
    by_rank = fleet.run(3, drills.run_named, REAL)
    found = {}
    for position, name in enumerate(REAL):
        entries = [results[position] for results in by_rank]
        found[name] = ([outcome for outcome, _ in entries], [text for _, told in entries for text in told])
    return found


@pytest.mark.heavy
@pytest.mark.parametrize("name", REAL)
def test_on_processes(name: str, real: dict[str, tuple[list[Outcome], list[str]]]) -> None:
    check(name, *real[name])


def test_ranks_with_other_kernels_are_refused_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without a C compiler: its replicas would drift from the others' in the last bits."""
    monkeypatch.setattr(engines, "kind_for", lambda weight: ("triton", "torch")[torch.distributed.get_rank()])

    def told(rank: int) -> str:
        optimizer = Frugal([{"params": [("w", torch.nn.Parameter(torch.zeros(8, 8)))], "projected": True}])
        with pytest.raises(ValueError) as caught:
            optimizer.step()
        return str(caught.value)

    for text in run_ranks(2, told):
        assert "kernels (FRUGAL_KERNELS=torch makes them equal): 'triton' against 'torch'" in text


def test_what_one_rank_cannot_begin_with_is_told_on_all() -> None:
    """A value or a shape of one rank only, at a first step and after a load: none waits for a rank that has raised."""

    def told(rank: int, density: object, size: int, loaded: bool) -> str:
        weight = torch.nn.Parameter(torch.ones(8, 8))
        optimizer = Frugal([{"params": [("w", weight)], "projected": True}], projection="columns", density=0.25)
        if loaded:
            weight.grad = torch.ones(8, 8)
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        if rank == 1:
            optimizer.param_groups[0]["density"] = density
            weight.data = torch.ones(8, size)
        weight.grad = torch.ones_like(weight)
        with pytest.raises(ValueError) as caught:
            optimizer.step()
        return str(caught.value)

    for density, size, loaded, words in (
        ("much", 8, False, "rank 1: density='much' must be a number"),
        ("much", 8, True, "rank 1: density='much' must be a number"),
        (0.25, 2, False, "rank 1: w is 8x2"),
    ):
        for text in run_ranks(2, lambda rank, case=(density, size, loaded): told(rank, *case)):
            assert words in text


def test_the_advice_is_given_by_one_rank() -> None:
    def told(rank: int) -> None:
        shapes = {"embed.weight": (50, 8), "q_proj.weight": (8, 8)}
        Frugal([(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()])

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run_ranks(2, told)
    assert sum("Only 14% of the parameters" in str(one.message) for one in found) == 1


@pytest.mark.parametrize("what", ["largest", "down"], ids=["the choice", "its figures"])
def test_dct_fails_on_an_owner_and_no_rank_waits(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No memory left, once: the matrix is left alone until the next step, or only its figures are missing."""
    whole, failed = getattr(column_refresh, what), []

    def fails_once(*given: Any) -> Any:
        if not failed:
            failed.append(what)
            raise MemoryError("none left")
        return whole(*given)

    case = cases.Case("dct", "full", "reset")

    def body(rank: int) -> dict[str, torch.Tensor]:
        held = replicas(cases.weights(), case.groups(), case.options)
        for grads in cases.gradients():
            held.step(grads)
        return held.full()

    with mock.patch.object(column_refresh, what, fails_once):
        first, second = run_ranks(2, body)
    assert failed and "MemoryError: none left" in capsys.readouterr().err
    assert all(torch.equal(second[name], value) for name, value in first.items())
