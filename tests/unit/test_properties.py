"""What must hold for every matrix: found by hypothesis, on small sizes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from building import build
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import frugal_dist.projection
from frugal_dist import Frugal, FrugalConfig, preset
from frugal_dist.planner.formula import Weight, frugal_bytes
from frugal_dist.projection import Basis, down, exact_svd, random_basis, select_indices, up
from frugal_dist.projection.registry import selection_size
from frugal_dist.projection.shapes import floor_of, round_of

SIDES = ("left", "right", "full")
sizes = st.integers(min_value=1, max_value=12)
seeds = st.integers(min_value=0, max_value=2**31)


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_basis(kind: str, grad: Tensor, side: str, r: int, seed: int) -> Basis:
    if kind == "svd":
        return exact_svd(grad, side, r)
    rows, columns = grad.shape
    return random_basis(rows, columns, side, r, seed=seed, name="w", refresh=0, dtype=torch.float64)


kinds = st.sampled_from(["svd", "random"])


@st.composite
def projections(draw: st.DrawFn) -> tuple[Tensor, Basis]:
    """A gradient and a basis that was made from it, or at random."""
    rows, columns, seed = draw(sizes), draw(sizes), draw(seeds)
    r = draw(st.integers(min_value=1, max_value=min(rows, columns)))
    grad = matrix(rows, columns, seed)
    return grad, some_basis(draw(kinds), grad, draw(st.sampled_from(SIDES)), r, seed)


# bases


@given(projections())
def test_bases_are_orthonormal(case: tuple[Tensor, Basis]) -> None:
    _, basis = case
    for part in basis.parts:
        assert part.is_contiguous()
        assert torch.allclose(part.T @ part, torch.eye(part.shape[1], dtype=part.dtype), atol=1e-12, rtol=0)


@given(projections(), seeds)
def test_up_is_the_adjoint_of_down(case: tuple[Tensor, Basis], seed: int) -> None:
    """<down(G), R> = <G, up(R)> for every R."""
    grad, basis = case
    low = down(grad, basis)
    other = matrix(*low.shape, seed=seed)
    assert torch.isclose((low * other).sum(), (grad * up(other, basis)).sum(), atol=1e-10, rtol=1e-10)


@given(projections())
def test_down_undoes_up(case: tuple[Tensor, Basis]) -> None:
    grad, basis = case
    low = down(grad, basis)
    assert torch.allclose(down(up(low, basis), basis), low, atol=1e-10, rtol=1e-10)


@given(projections())
def test_the_residual_is_orthogonal_to_the_basis(case: tuple[Tensor, Basis]) -> None:
    grad, basis = case
    residual = grad - up(down(grad, basis), basis)
    assert torch.allclose(down(residual, basis), torch.zeros(()).double(), atol=1e-10, rtol=0)


@given(projections(), seeds, st.floats(-3, 3), st.floats(-3, 3))
def test_down_is_linear(case: tuple[Tensor, Basis], seed: int, a: float, b: float) -> None:
    """So averaging over ranks or micro-batches may happen on either side of it."""
    grad, basis = case
    other = matrix(*grad.shape, seed=seed)
    expected = a * down(grad, basis) + b * down(other, basis)
    assert torch.allclose(down(a * grad + b * other, basis), expected, atol=1e-10, rtol=1e-10)


@given(sizes, sizes, seeds, st.data())
def test_svd_captures_at_least_as_much_as_any_other_basis(
    rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    r = data.draw(st.integers(min_value=1, max_value=min(rows, columns)))
    grad = matrix(rows, columns, seed)
    for side in ("left", "right"):
        best = down(grad, exact_svd(grad, side, r)).norm()
        other = down(grad, some_basis("random", grad, side, r, seed + 1)).norm()
        assert best >= other - 1e-10


# the optimizer


def run(projection: str, grads: list[Tensor], start: Tensor, **options: Any) -> Tensor:
    """The weight after these gradients."""
    parameter = torch.nn.Parameter(start.clone())
    optimizer = build({"w": parameter}, projection=projection, **{"update_gap": 2, **options})
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter.detach()


@given(sizes, sizes, seeds, st.sampled_from([0.0, 0.1]), st.sampled_from(["columns", "rows", "randk", "blockwise"]))
def test_full_density_is_adamw(rows: int, columns: int, seed: int, decay: float, projection: str) -> None:
    """With one state for everything and no reset, nothing is left of FRUGAL. `blockwise` always resets: no refresh."""
    grads = [matrix(rows, columns, seed + i) for i in range(5)]
    start = matrix(rows, columns, seed + 99)
    actual = run(projection, grads, start, density=1.0, on_refresh="keep", weight_decay=decay, update_gap=7)
    expected = torch.nn.Parameter(start.clone())
    adamw = torch.optim.AdamW([expected], lr=0.01, weight_decay=decay)
    for grad in grads:
        expected.grad = grad.clone()
        adamw.step()
    assert torch.allclose(actual, expected.detach(), rtol=1e-12, atol=1e-14)


def test_the_preset_is_adamw_through_refreshes() -> None:
    grads = [matrix(9, 5, i) for i in range(7)]
    found = run(grads=grads, start=matrix(9, 5, 99), update_gap=2, **preset("adamw"))
    expected = torch.nn.Parameter(matrix(9, 5, 99))
    adamw = torch.optim.AdamW([expected], lr=0.01, weight_decay=0.0)
    for grad in grads:
        expected.grad = grad.clone()
        adamw.step()
    assert torch.allclose(found, expected.detach(), rtol=1e-12, atol=1e-14)


@given(sizes, sizes, seeds, st.sampled_from(["svd", "columns", "blockwise"]))
def test_zero_density_is_signsgd(rows: int, columns: int, seed: int, projection: str) -> None:
    grads = [matrix(rows, columns, seed + i) for i in range(3)]
    start = matrix(rows, columns, seed + 99)
    actual = run(projection, grads, start, density=0.0)
    expected = start.clone()
    for grad in grads:
        expected -= 0.01 * grad.sign()
    assert torch.equal(actual, expected)


@given(
    st.integers(2, 10), st.integers(2, 10), seeds, st.sampled_from(["columns", "rows", "randk", "randperm"]),
    st.sampled_from(["adamw", "lion", "sgdm"]),
)  # fmt: skip
def test_the_order_of_indices_changes_nothing(
    rows: int, columns: int, seed: int, projection: str, state_full: str
) -> None:
    """With on_refresh="reset": kept state would stay in its place while the coordinates move under it."""
    grads = [matrix(rows, columns, seed + i) for i in range(5)]
    start = matrix(rows, columns, seed + 99)
    shuffle = torch.Generator().manual_seed(seed)
    real = frugal_dist.projection.select_indices

    def shuffled(length: int, count: int, *, seed: int, name: str, refresh: int) -> Tensor:
        drawn = real(length, count, seed=seed, name=name, refresh=refresh)
        return drawn[torch.randperm(count, generator=shuffle)]

    expected = run(projection, grads, start, density=0.5, state_full=state_full)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frugal_dist.projection, "select_indices", shuffled)
        actual = run(projection, grads, start, density=0.5, state_full=state_full)
    assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-14)


@given(
    st.integers(2, 10), st.integers(2, 10), seeds, st.sampled_from(["std", "left", "full"]),
    st.sampled_from(["reset", "project"]), st.sampled_from(["adamw", "lion", "sgdm"]),
)  # fmt: skip
def test_the_sign_of_basis_vectors_changes_nothing(
    rows: int, columns: int, seed: int, side: str, on_refresh: str, state_full: str
) -> None:
    """An SVD may return either sign, by library and machine: the run must not depend on it.

    Not so with on_refresh="keep", which carries moments over without asking how the two bases lie to each other.
    """
    grads = [matrix(rows, columns, seed + i) for i in range(5)]
    start = matrix(rows, columns, seed + 99)
    options: dict[str, Any] = {
        "side": side, "on_refresh": on_refresh, "state_full": state_full, "state_free": "sgd", "eps": 1e-3
    }  # fmt: skip
    dim = rows if side == "left" else min(rows, columns)
    # Lion takes the sign of every entry of R, and with side="full" all but the diagonal are rounding: one entry only.
    options["density"] = (1.2 if side == "full" and state_full == "lion" else 0.5 * min(rows, columns)) / dim
    flip = torch.Generator().manual_seed(seed)
    real = torch.linalg.svd

    def flipped(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vt = real(*args, **kwargs)
        signs = torch.randint(0, 2, s.shape, generator=flip).to(s.dtype) * 2 - 1
        return u * signs, s, signs[:, None] * vt

    expected = run("svd", grads, start, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "svd", flipped)
        actual = run("svd", grads, start, **options)
    assert torch.allclose(actual, expected, rtol=1e-9, atol=1e-10)


@given(st.integers(2, 10), st.integers(2, 10), seeds, st.floats(0.01, 100))
def test_the_scale_of_the_gradient_changes_nothing(rows: int, columns: int, seed: int, scale: float) -> None:
    """AdamW without eps and the sign are both free of scale."""
    grads = [matrix(rows, columns, seed + i) for i in range(4)]
    start = matrix(rows, columns, seed + 99)
    expected = run("columns", grads, start, eps=0.0)
    actual = run("columns", [scale * grad for grad in grads], start, eps=0.0)
    assert torch.allclose(actual, expected, rtol=1e-10, atol=1e-12)


# select_indices


@given(st.integers(0, 3000), st.floats(0, 1), st.integers(0, 1000), st.text(max_size=8), st.integers(0, 10**6))
def test_selections_are_distinct_sorted_and_in_range(
    length: int, share: float, seed: int, name: str, refresh: int
) -> None:
    count = int(share * length)
    drawn = select_indices(length, count, seed=seed, name=name, refresh=refresh)
    assert drawn.dtype == torch.int64
    assert drawn.shape == (count,)
    assert bool((drawn[1:] > drawn[:-1]).all())
    if count:
        assert int(drawn[0]) >= 0
        assert int(drawn[-1]) < length


@pytest.mark.parametrize(
    ("length", "count"), [(20_000, 0), (20_000, 1), (20_000, 10_000), (20_000, 19_999), (16_385, 4)]
)
def test_long_selections_have_the_exact_count(length: int, count: int) -> None:
    """Long ones are drawn in another way than short ones."""
    for refresh in range(20):
        drawn = select_indices(length, count, seed=0, name="w", refresh=refresh)
        assert drawn.shape == (count,)
        assert bool((drawn[1:] > drawn[:-1]).all())
        assert count == 0 or (int(drawn[0]) >= 0 and int(drawn[-1]) < length)


@pytest.mark.parametrize(
    ("density", "length", "down", "nearest"),
    [(0.29, 100, 29, 29), (0.57, 100, 57, 57), (1 / 3, 3, 1, 1), (2 / 13, 13, 2, 2), (0.1 * 3, 10, 3, 3),
     (0.25, 7, 1, 2), (0.575, 100, 57, 58), (0.285, 100, 28, 28), (0.1234567, 10**7, 1234567, 1234567), (1.0, 9, 9, 9),
     (0.0, 9, 0, 0), (0.999999999, 1000, 999, 1000), (1e-9, 10**9, 1, 1)],
)  # fmt: skip
def test_counts_are_those_of_the_number_that_was_written(density: float, length: int, down: int, nearest: int) -> None:
    """0.29 * 100 is 28.999999999999996 in floating point."""
    assert (floor_of(density, length), round_of(density, length)) == (down, nearest)
    columns = Weight(3, length, 1, projected=True)
    assert frugal_bytes([columns], projection="columns", density=density) == 8 * 3 * down
    if length < 1000 and down:
        config = FrugalConfig(projection="columns", density=density)
        assert selection_size(config, "w", 3, length) == down


@pytest.mark.parametrize("length", [7, 96, 100, 1000, 4096])
def test_every_count_can_be_asked_for(length: int) -> None:
    for count in range(length + 1):
        assert floor_of(count / length, length) == round_of(count / length, length) == count


def test_an_impossible_selection_is_an_error() -> None:
    for count in (-1, 6):
        with pytest.raises(ValueError, match="layer"):
            select_indices(5, count, seed=0, name="layer", refresh=0)


PRINT_SELECTIONS = """
from frugal_dist.projection import select_indices
for length, count in ((50, 12), (20_000, 5)):
    print(select_indices(length, count, seed=3, name="layers.0.q_proj.weight", refresh=7).tolist())
"""


def test_every_process_draws_the_same() -> None:
    """Ranks never tell each other what they drew, so Python's salted hash() must play no part."""
    outputs = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        result = subprocess.run(
            [sys.executable, "-c", PRINT_SELECTIONS],
            cwd=Path(__file__).parents[2],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.add(result.stdout)
    here = [select_indices(n, c, seed=3, name="layers.0.q_proj.weight", refresh=7) for n, c in ((50, 12), (20_000, 5))]
    assert outputs == {"".join(f"{drawn.tolist()}\n" for drawn in here)}


def test_seed_name_and_refresh_each_give_another_selection() -> None:
    def draw(seed: int = 0, name: str = "w", refresh: int = 0) -> tuple[int, ...]:
        return tuple(select_indices(1000, 100, seed=seed, name=name, refresh=refresh).tolist())

    different = [draw(), draw(seed=1), draw(name="v"), draw(refresh=1), draw(seed=1, refresh=1), draw(name="w1")]
    # Parts of the key must not run into each other: ("1", 1) and ("11", ...) and the like.
    different += [draw(name="w|1"), draw(name="w", refresh=11), draw(name="w1", refresh=1)]
    assert len(set(different)) == len(different)


def test_selections_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = select_indices(100, 10, seed=0, name="w", refresh=0)
    torch.manual_seed(6)
    assert torch.equal(select_indices(100, 10, seed=0, name="w", refresh=0), first)
    torch.manual_seed(5)
    select_indices(20_000, 10, seed=0, name="w", refresh=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("length", "count", "draws"), [(20, 5, 2000), (17_000, 4_000, 200)])
def test_every_index_is_equally_likely(length: int, count: int, draws: int) -> None:
    """Chi-square over the indices: far outside six standard deviations only if the sampler is biased."""
    hits = torch.zeros(length, dtype=torch.float64)
    for refresh in range(draws):
        hits[select_indices(length, count, seed=11, name="w", refresh=refresh)] += 1
    expected = draws * count / length
    # Hits of one index are binomial: normalised by that variance the sum has `length` as its mean.
    variance = draws * (count / length) * (1 - count / length)
    chi_square = float(((hits - expected) ** 2 / variance).sum())
    assert abs(chi_square - length) < 6 * (2 * length) ** 0.5


@pytest.mark.parametrize(("length", "count", "draws"), [(6, 2, 3000), (16_400, 2, 400)])
def test_pairs_are_equally_likely(length: int, count: int, draws: int) -> None:
    """Neighbours must not attract or repel each other: mean distance of two of n is (n + 1) / 3."""
    distances = torch.zeros(draws, dtype=torch.float64)
    for refresh in range(draws):
        first, second = select_indices(length, count, seed=12, name="w", refresh=refresh).tolist()
        distances[refresh] = second - first
    error = float(distances.mean()) - (length + 1) / 3
    assert abs(error) < 6 * float(distances.std()) / draws**0.5


def test_a_large_selection_needs_little_memory() -> None:
    """A quarter of 2048×5461: no permutation of all eleven million as int64, let alone a sort of them."""
    length = 2048 * 5461
    count = length // 4
    with torch.profiler.profile(profile_memory=True) as profile:
        drawn = select_indices(length, count, seed=0, name="w", refresh=0)
    assert drawn.shape == (count,)
    assert bool((drawn[1:] > drawn[:-1]).all())
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 4 * length + 1024, "no single tensor larger than one float32 for each index"
    names = {event.name for event in profile.events()}
    assert not any("sort" in name for name in names)


def test_randk_keeps_no_long_indices() -> None:
    """int64 indices would cost as much as both moments together: neither the state nor a cache may hold them."""
    weight = torch.nn.Parameter(torch.zeros(61, 67))
    optimizer = Frugal([{"params": [("w", weight)], "projected": True}], projection="randk", density=0.25)
    weight.grad = torch.ones(61, 67)
    optimizer.step()
    count = optimizer.state[weight]["exp_avg"].numel()
    assert count == 61 * 67 // 4
    alive = [item for item in gc.get_objects() if type(item) is torch.Tensor]
    assert any(tensor.numel() == count for tensor in alive)
    assert not any(tensor.numel() == count and tensor.dtype == torch.int64 for tensor in alive)
