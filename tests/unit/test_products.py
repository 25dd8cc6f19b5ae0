"""``matmul``: products of two bf16 parts are nearly those of fp32, and whoever asks for them gets them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from building import build, train, weight, weights
from torch import Tensor

from frugal_dist.projection import Basis, down, exact_svd
from frugal_dist.projection.basis import add_up_, residual
from frugal_dist.projection.products import MATMULS, split

SPLIT = MATMULS["bf16x3"]


def matrix(rows: int, cols: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    """Rows of different sizes, as gradients have."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(rows, 1, generator=generator).mul_(spread).exp_()
    return torch.randn(rows, cols, generator=generator) * scale


def test_two_parts_hold_sixteen_bits() -> None:
    values = torch.cat([matrix(40, 30).flatten(), torch.tensor([0.0, -0.0, 1e-30, -3e38, 1 + 2**-9])])
    high, low = split(values)
    assert high.dtype == low.dtype == torch.bfloat16
    error = (high.double() + low.double() - values.double()).abs()
    assert bool((error <= 2**-17 * values.double().abs()).all())


SHAPES = [(64, 48, 12), (12, 48, 64), (48, 12, 64), (1, 7, 5), (5, 7, 1), (6, 1, 9), (0, 4, 3), (4, 0, 3)]


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_a_split_product_is_within_its_bound(m: int, k: int, n: int) -> None:
    """2^-15 for what both factors lack and the product left out, and the sums' own error; also transposed."""
    a, b = matrix(m, k), matrix(n, k, 1).T
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    bound = (2**-15 + 3 * max(k, 1) * 2**-24) * size
    assert bool(((SPLIT.multiply(a, b).double() - exact).abs() <= bound).all())
    out = matrix(m, n, 2)
    wanted = out.double() - 0.5 * exact
    assert SPLIT.add_(out, a, b, alpha=-0.5) is out
    assert bool(((out.double() - wanted).abs() <= bound + 2**-22 * wanted.abs()).all())
    if min(m, k, n) > 4:
        assert not torch.equal(SPLIT.multiply(a, b), a @ b), "it is another arithmetic"


@pytest.mark.parametrize("side", ["right", "left", "full"])
def test_of_the_residuals_signs_hardly_any_flips(side: str) -> None:
    """Against fp64; bf16 alone flips many times as many."""
    grad = matrix(160, 120, spread=0.5)
    basis = exact_svd(grad, side, 30)

    def signs(grad: Tensor, basis: Basis, matmul: str) -> Tensor:
        return residual(grad, down(grad, basis, matmul), basis, matmul).sign()

    want = signs(grad.double(), basis.to(torch.float64), "fp32")
    flips = {matmul: int((signs(grad, basis, matmul) != want).sum()) for matmul in MATMULS}
    rough = basis.to(torch.bfloat16).to(torch.float32)
    of_bf16 = int((signs(grad.bfloat16().float(), rough, "fp32") != want).sum())
    assert flips["fp32"] <= 1 and flips["bf16x3"] <= 2 and of_bf16 >= 15, (flips, of_bf16)


def test_fp64_is_multiplied_as_it_is() -> None:
    grad = matrix(20, 16).double()
    basis = exact_svd(grad, "right", 4)
    assert torch.equal(down(grad, basis, "bf16x3"), down(grad, basis))
    low, (one, other) = down(grad, basis), (torch.zeros_like(grad) for _ in range(2))
    assert torch.equal(add_up_(one, low, basis, matmul="bf16x3"), add_up_(other, low, basis))


OPTIONS: dict[str, Any] = {"update_gap": 4, "density": 0.25, "state_free": "sgd"}


@pytest.mark.parametrize("projection", ["svd", "random"])
def test_a_step_with_split_products_is_nearly_one_in_fp32(projection: str) -> None:
    found = {}
    for matmul in MATMULS:
        optimizer = build({"w": weight(48, 32, dtype=torch.float32)}, projection=projection, matmul=matmul, **OPTIONS)
        train(optimizer, 1, 6)
        found[matmul] = weights(optimizer)[0]
    assert not torch.equal(found["fp32"], found["bf16x3"])
    assert float((found["fp32"] - found["bf16x3"]).abs().max()) < 1e-4


def test_it_may_change_in_mid_run() -> None:
    """From the next step on, with the state that is there."""
    changed, stayed = (build({"w": weight(48, 32, dtype=torch.float32)}, projection="svd", **OPTIONS) for _ in range(2))
    train(changed, 1, 2)
    train(stayed, 1, 2)
    changed.param_groups[0]["matmul"] = "bf16x3"
    train(changed, 3, 3)
    train(stayed, 3, 3)
    assert not torch.equal(weights(changed)[0], weights(stayed)[0])
