"""The other ways to a projector: as good as the full SVD where that is well defined, and singular vectors always."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from frugal_dist import Frugal
from frugal_dist.config import FrugalConfig
from frugal_dist.projection import Basis, down, exact_svd, gram_svd, random_basis, subspace_svd
from frugal_dist.projection.subspace import COLD_ROUNDS, WARM_ROUNDS

SHAPES = [(48, 32), (32, 48), (40, 40)]
SIDES = ["right", "left", "full"]
R = 8


def matrix(rows: int, cols: int, decay: float = 0.7, seed: int = 0) -> Tensor:
    """Singular values that fall by ``decay`` from one to the next."""
    generator = torch.Generator().manual_seed(seed)
    k = min(rows, cols)
    left, right = (torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q for n in (rows, cols))
    return (left * decay ** torch.arange(k, dtype=torch.float64)) @ right.T


def cold(grad: Tensor, side: str, r: int = R, seed: int = 0) -> Basis:
    return subspace_svd(grad, side, r, None, seed=seed, name="w", refresh=0)


METHODS = {"subspace": cold, "gram64": lambda grad, side, r=R: gram_svd(grad, side, r)}


def aligned(found: Tensor, want: Tensor) -> float:
    """The smallest |cosine| of corresponding columns: their sign is free."""
    return float((found * want).sum(0).abs().min())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_the_singular_vectors_themselves(rows: int, cols: int, side: str, method: str) -> None:
    """Not just their span."""
    grad = matrix(rows, cols)
    found, want = METHODS[method](grad, side), exact_svd(grad, side, R)
    for one, other in zip(found.parts, want.parts, strict=True):
        assert one.shape == other.shape and one.is_contiguous() and one.dtype == grad.dtype
        torch.testing.assert_close(one.T @ one, torch.eye(R, dtype=one.dtype), rtol=0, atol=1e-12)
        assert aligned(one, other) > 1 - 1e-8


@pytest.mark.parametrize("method", [*METHODS, "exact", "random"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("rows", "cols"), [(48, 32), (1, 9), (9, 1), (1, 1)])
def test_a_single_column_has_the_strides_of_a_new_tensor(rows: int, cols: int, side: str, method: str) -> None:
    """They decide which way BLAS goes, so the last bits; who received a basis, or loaded it, has a new one."""
    grad = matrix(rows, cols)
    if method == "random":
        found = random_basis(rows, cols, side, 1, seed=0, name="w", refresh=0, dtype=torch.float64)
    else:
        found = METHODS.get(method, exact_svd)(grad, side, 1)
    for part in (*found.parts, *found.moved(grad.device, torch.float32).parts):
        assert part.stride() == torch.empty(part.shape).stride()


@pytest.mark.parametrize("method", [*METHODS, "exact"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_what_a_basis_catches_is_known_with_it(rows: int, cols: int, side: str, method: str) -> None:
    grad = matrix(rows, cols, 0.95)
    found = METHODS.get(method, lambda grad, side: exact_svd(grad, side, R))(grad, side)
    assert found.captured is not None
    torch.testing.assert_close(found.captured, down(grad, found).square().sum(), rtol=1e-10, atol=0)
    assert found.moved(grad.device, torch.float32).captured is None


@pytest.mark.parametrize("side", SIDES)
def test_from_the_old_basis_fewer_rounds_find_as_much(side: str) -> None:
    old, grad = matrix(48, 32, 0.9), matrix(48, 32, 0.9) + 0.02 * matrix(48, 32, 0.9, seed=1)
    assert WARM_ROUNDS < COLD_ROUNDS
    want = exact_svd(grad, side, R)
    found = subspace_svd(grad, side, R, exact_svd(old, side, R), seed=0, name="w", refresh=1)
    for one, other in zip(found.parts, want.parts, strict=True):
        assert aligned(one, other) > 0.99
        overlap = torch.linalg.svdvals(one.T @ other)
        assert float(overlap.min()) > 0.999


def test_the_shift_finds_more_with_the_same_products(monkeypatch: pytest.MonkeyPatch) -> None:
    old = matrix(128, 96, 0.97)
    grad = old + 0.02 * torch.randn(128, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) / 128**0.5
    warm, want = exact_svd(old, "right", 32), exact_svd(grad, "right", 32).parts[0]

    def error() -> float:
        found = subspace_svd(grad, "right", 32, warm, seed=0, name="w", refresh=1).parts[0]
        return float((want - found @ (found.T @ want)).norm())

    shifted = error()
    monkeypatch.setattr(Tensor, "addcmul_", lambda self, *_, **__: self)
    assert shifted < 0.75 * error()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", SIDES)
def test_a_gradient_of_low_rank(side: str, method: str) -> None:
    grad = matrix(48, 32, 0.5)
    grad = (grad @ exact_svd(grad, "right", 3).right) @ exact_svd(grad, "right", 3).right.T  # type: ignore[union-attr]
    for part in METHODS[method](grad.float(), side).parts:
        torch.testing.assert_close(part.T @ part, torch.eye(R), rtol=0, atol=1e-5)


def test_all_columns_that_there_are() -> None:
    grad = matrix(6, 9)
    assert aligned(cold(grad, "left", 6).parts[0], exact_svd(grad, "left", 6).parts[0]) > 1 - 1e-8


def test_the_same_seed_name_and_refresh_give_the_same_bits() -> None:
    grad = matrix(48, 32, 0.95).float()
    assert torch.equal(cold(grad, "right").parts[0], cold(grad, "right").parts[0])
    assert not torch.equal(cold(grad, "right").parts[0], cold(grad, "right", seed=1).parts[0])


def optimizer_of(weight: torch.nn.Parameter, **options: object) -> Frugal:
    groups = [{"params": [("w", weight)], "projected": True}]
    return Frugal(groups, update_gap=1, process_group=None, **options)  # type: ignore[arg-type]


def test_a_refresh_starts_from_the_old_projector_also_after_loading() -> None:
    weight, rows, cols = torch.nn.Parameter(torch.zeros(48, 32)), 48, 32
    grads = [matrix(rows, cols, 0.97, seed).float() for seed in range(3)]
    optimizer = optimizer_of(weight, svd_method="subspace", seed=5)
    warm = None
    for number, grad in enumerate(grads):
        if number == 2:
            saved = optimizer.state_dict()
            optimizer = optimizer_of(weight, svd_method="subspace", seed=5)
            optimizer.load_state_dict(saved)
        weight.grad = grad
        optimizer.step()
        want = subspace_svd(grad, "right", R, warm, seed=5, name="w", refresh=number)
        assert torch.equal(optimizer.state[weight]["basis"], want.parts[0])
        warm = want


def test_gram64_is_what_the_optimizer_uses_when_told() -> None:
    weight = torch.nn.Parameter(torch.zeros(48, 32))
    weight.grad = matrix(48, 32, 0.9).float()
    optimizer = optimizer_of(weight, svd_method="gram64")
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["basis"], gram_svd(weight.grad, "right", R).parts[0])


@pytest.mark.parametrize("method", ["subspace", "gram64"])
def test_only_svd_has_a_method(method: str) -> None:
    with pytest.raises(ValueError, match=f"svd_method='{method}' belongs to projection='svd'.*'columns'"):
        FrugalConfig(projection="columns", svd_method=method)
