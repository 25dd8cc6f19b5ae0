"""A refresh that cannot be done: zero and non-finite gradients, an SVD that does not converge.

The matrix must come out of it unharmed, and its clock must not shift against the clock of the others.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from building import PROJECTIONS, build, counters, parameters_of, set_grads, train, weight, weights

from frugal_dist import Frugal

BASES = ("svd", "random", "dct")


def bases(optimizer: Frugal, parameter: torch.Tensor) -> torch.Tensor:
    """The basis, or both of side="full" on top of each other."""
    state = optimizer.state[parameter]
    return torch.cat([state[key] for key in ("basis", "basis_left", "basis_right") if key in state])


def refresh_steps(optimizer: Frugal, parameter: torch.Tensor, first: int, last: int) -> list[int]:
    """The steps from `first` to `last` at which the number of refreshes grew."""
    seen = []
    for step in range(first, last + 1):
        before = counters(optimizer, parameter).get("refreshes", 0)
        train(optimizer, step, step)
        if counters(optimizer, parameter)["refreshes"] > before:
            seen.append(step)
    return seen


# non-finite gradients


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["std", "left", "full"])
def test_a_non_finite_gradient_at_a_refresh_skips_the_whole_matrix(value: float, side: str) -> None:
    """With the old projector one NaN entry would destroy a whole row, so nothing of the matrix may move."""
    w, other = weight(8, 6), weight(6, 8, seed=1)
    optimizer = build({"w": w, "other": other}, {"b": weight(5)}, side=side, weight_decay=0.1, eps=1e-3)
    train(optimizer, 1, 3)
    before = {key: tensor.clone() for key, tensor in optimizer.state[w].items() if key != "updates"}
    old, other_old = w.detach().clone(), other.detach().clone()
    set_grads(optimizer, 4)
    assert w.grad is not None
    w.grad[2, 1] = value
    optimizer.step()
    assert torch.equal(w, old)
    for key, value in before.items():
        assert torch.equal(optimizer.state[w][key], value), key
    assert not torch.equal(other, other_old), "the other matrices go on"
    assert counters(optimizer, other)["refreshes"] == 2


def test_a_skipped_refresh_is_retried_at_the_next_step() -> None:
    """The skipped step is no update, so refreshes stay at the updates 0, 3, 6, 9 as if it had not been there."""
    w = weight(8, 6)
    optimizer = build({"w": w})
    assert refresh_steps(optimizer, w, 1, 3) == [1]
    set_grads(optimizer, 4)
    assert w.grad is not None
    w.grad.fill_(math.nan)
    optimizer.step()
    assert counters(optimizer, w)["updates"] == 3
    for step, updates in ((5, 3), (8, 6), (11, 9)):
        assert refresh_steps(optimizer, w, step, step) == [step]
        assert counters(optimizer, w)["refreshed_at"] == updates
        assert refresh_steps(optimizer, w, step + 1, step + 2) == []


def test_many_non_finite_gradients_in_a_row() -> None:
    w = weight(8, 6)
    optimizer = build({"w": w})
    train(optimizer, 1, 3)
    old = w.detach().clone()
    for _ in range(5):
        w.grad = torch.full((8, 6), math.nan, dtype=torch.float64)
        optimizer.step()
    assert torch.equal(w, old)
    train(optimizer, 9, 9)
    assert torch.isfinite(w).all()
    assert counters(optimizer, w)["refreshes"] == 2


def test_a_non_finite_gradient_at_the_very_first_step() -> None:
    w = weight(8, 6)
    fresh = torch.nn.Parameter(w.detach().clone())
    optimizer, reference = build({"w": w}, weight_decay=0.1), build({"w": fresh}, weight_decay=0.1)
    w.grad = torch.full((8, 6), math.nan, dtype=torch.float64)
    optimizer.step()
    assert torch.equal(w, fresh)
    train(optimizer, 1, 1)
    train(reference, 1, 1)
    assert torch.equal(w, fresh), "the first good step is a first step"


def test_a_non_finite_gradient_between_refreshes_is_used_as_in_other_optimizers() -> None:
    """Checking every gradient would cost a pass over all of them: between refreshes NaN comes through, as in torch."""
    w = weight(8, 6)
    optimizer = build({"w": w}, projection="svd")
    train(optimizer, 1, 1)
    set_grads(optimizer, 2)
    assert w.grad is not None
    w.grad[2, 1] = math.nan
    optimizer.step()
    assert torch.isnan(w[2]).any()
    assert torch.isfinite(w[0]).all(), "a right projector mixes within a row only"


@pytest.mark.parametrize("projection", ["columns", "rows", "randk", "randperm"])
def test_coordinates_need_no_gradient_to_refresh(projection: str) -> None:
    """A NaN at a refresh step reaches its own entry and no other, and the refresh takes place."""
    w = weight(8, 6)
    optimizer = build({"w": w}, projection=projection)
    set_grads(optimizer, 1)
    assert w.grad is not None
    w.grad[2, 1] = math.nan
    optimizer.step()
    assert counters(optimizer, w)["refreshes"] == 1
    w.data[2, 1] = 0.0  # NaN where it was selected; where not, sign(NaN) is 0
    assert torch.isfinite(w).all()


# zero gradients


@pytest.mark.parametrize("side", ["std", "left", "full"])
def test_a_zero_gradient_at_a_refresh_keeps_the_projector_and_goes_on(side: str) -> None:
    """Then the step is one with the old basis, and the refresh comes one step later, state treatment included."""
    options: dict[str, Any] = {"side": side, "eps": 1e-3}
    w, late = weight(8, 6), weight(8, 6)
    optimizer = build({"w": w}, **options)
    never = build({"w": late}, update_gap=100, **options)
    for step in (1, 2, 3):
        train(optimizer, step, step)
        train(never, step, step)
    basis = bases(optimizer, w)
    for parameter, o in ((w, optimizer), (late, never)):
        parameter.grad = torch.zeros(8, 6, dtype=torch.float64)
        o.step()
    assert torch.equal(w, late), "as a step without refresh: momentum moves the weight"
    assert torch.equal(bases(optimizer, w), basis)
    assert counters(optimizer, w)["step"] == 4, "no reset without a refresh"
    assert refresh_steps(optimizer, w, 5, 10) == [5, 7, 10]


def test_a_zero_gradient_of_one_matrix_at_the_very_first_step() -> None:
    """There is no old projector: this matrix is left alone, weight decay included. The others start."""
    w, other = weight(8, 6), weight(6, 8, seed=1)
    optimizer = build({"w": w, "other": other}, weight_decay=0.1)
    set_grads(optimizer, 1)
    w.grad = torch.zeros(8, 6, dtype=torch.float64)
    old, other_old = w.detach().clone(), other.detach().clone()
    optimizer.step()
    assert torch.equal(w, old)
    assert not torch.equal(other, other_old)
    train(optimizer, 2, 2)
    assert not torch.equal(w, old)
    assert counters(optimizer, w)["refreshes"] == 1
    assert counters(optimizer, w)["step"] == 1


@pytest.mark.parametrize("projection", ["columns", "rows", "randk", "randperm", "blockwise"])
def test_a_zero_gradient_is_an_ordinary_gradient_for_coordinates(projection: str) -> None:
    w = weight(8, 6)
    optimizer = build({"w": w}, projection=projection, density=1.0 if projection == "blockwise" else 0.5)
    train(optimizer, 1, 3)
    w.grad = torch.zeros(8, 6, dtype=torch.float64)
    optimizer.step()
    assert counters(optimizer, w)["refreshes"] == 2


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("state_full", ["adamw", "lion", "sgdm"])
def test_the_initialising_step_changes_nothing(projection: str, state_full: str) -> None:
    """Engines call step() once with all-zero gradients, only to have the state created."""
    options: dict[str, Any] = {"projection": projection, "state_full": state_full, "weight_decay": 0.1}
    optimizer = build({"a": weight(8, 6), "b": weight(6, 8, seed=1)}, {"c": weight(5)}, **options)
    plain = build({"a": weight(8, 6), "b": weight(6, 8, seed=1)}, {"c": weight(5)}, **options)
    before = weights(optimizer)
    for parameter in parameters_of(optimizer):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for old, new in zip(before, weights(optimizer), strict=True):
        assert torch.equal(old, new)
    for parameter in parameters_of(optimizer):
        assert optimizer.state[parameter], "state is there"
        assert not any(counters(optimizer, parameter).get(key, 0) for key in ("step", "updates", "refreshes"))
    created = [{k: v.shape for k, v in optimizer.state[p].items()} for p in parameters_of(optimizer)]
    for step in range(1, 8):
        train(optimizer, step, step)
        train(plain, step, step)
        for expected, actual in zip(weights(plain), weights(optimizer), strict=True):
            assert torch.equal(expected, actual)
        if step == 1 and projection != "blockwise":
            shapes = [{k: v.shape for k, v in optimizer.state[p].items()} for p in parameters_of(optimizer)]
            assert shapes == created, "the initialising step created every tensor"


# an SVD that fails


class FailingSvd:
    """torch.linalg.svd that raises the first `failures` times."""

    def __init__(self, failures: float, error: Exception) -> None:
        self.real, self.failures, self.error, self.calls = torch.linalg.svd, failures, error, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return self.real(*args, **kwargs)


ERRORS = [torch.linalg.LinAlgError("svd: failed to converge"), torch.cuda.OutOfMemoryError("out of memory")]


@pytest.mark.parametrize("error", ERRORS, ids=["not_converged", "out_of_memory"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_failing_svd_is_repaired_in_the_same_step(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, error: Exception
) -> None:
    w, expected = weight(8, 6, dtype=dtype), weight(8, 6, dtype=dtype)
    # sgd: in float32 another SVD may give other last bits, and a sign of the residual would jump.
    optimizer, healthy = (build({"w": p}, state_free="sgd", eps=1e-3) for p in (w, expected))
    failing = FailingSvd(1, error)
    train(healthy, 1, 1)
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "svd", failing)
        train(optimizer, 1, 1)
    assert failing.calls == 2
    assert counters(optimizer, w)["refreshes"] == 1
    assert torch.allclose(w, expected, atol=1e-5 if dtype == torch.float32 else 1e-12, rtol=0)


def test_an_svd_that_fails_in_every_way_keeps_the_old_projector_first(monkeypatch: pytest.MonkeyPatch) -> None:
    w, other = weight(8, 6), weight(8, 6)
    optimizer, never = build({"w": w}), build({"w": other}, update_gap=100)
    train(optimizer, 1, 3)
    train(never, 1, 4)
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "svd", FailingSvd(math.inf, ERRORS[0]))
        with pytest.warns(UserWarning, match="w: the refresh failed"):
            train(optimizer, 4, 4)
    assert torch.equal(w, other), "the step is made with the old projector"
    assert refresh_steps(optimizer, w, 5, 10) == [5, 7, 10]


def test_an_svd_that_never_works_ends_in_an_error_that_names_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight(8, 6)
    optimizer = build({"layers.3.q_proj.weight": w})
    train(optimizer, 1, 3)
    monkeypatch.setattr(torch.linalg, "svd", FailingSvd(math.inf, ERRORS[0]))
    with (
        pytest.warns(UserWarning, match=r"layers\.3\.q_proj\.weight"),
        pytest.raises(RuntimeError, match=r"layers\.3\.q_proj\.weight"),
    ):
        train(optimizer, 4, 30)


@pytest.mark.parametrize("projection", BASES)
def test_a_basis_owns_its_memory(projection: str) -> None:
    """A view of an SVD factor would keep the whole factor alive: four times the memory at density 0.25."""
    for side in ("left", "right", "full"):
        w = weight(32, 24, dtype=torch.float32)
        optimizer = build({"w": w}, projection=projection, side=side, density=0.25)
        train(optimizer, 1, 4)
        for key, value in optimizer.state_dict()["state"][0].items():
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), (side, key)
