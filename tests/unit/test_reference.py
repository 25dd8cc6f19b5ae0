"""Frugal against the plain reference of reference.py: float64, odd shapes, every combination that is defined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import product

import pytest
import torch
from reference import BASES, COORDINATES, Bases, Reference, Settings
from torch import Tensor

from frugal_dist import Frugal

SHAPES = {"a": (24, 16), "b": (16, 40), "c": (7, 5), "d": (33, 33), "e": (101, 48), "f": (48, 101)}
BASE = Settings(
    lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1, update_gap=3, lr_scale=0.7, state_free_lr_scale=0.3, seed=5
)
SIDES = ("std", "reverse_std", "right", "left", "full")
ON_REFRESH = ("reset", "keep", "project")
STATE_FREE = ("sign", "sgd", "none")
ORDERS = ("random", "ascending", "descending", "mirror")


def compare(settings: Settings, shapes: dict[str, tuple[int, int]], steps: int, tolerance: float) -> Frugal:
    """Runs both on the same gradients and compares every weight after every step."""
    generator = torch.Generator().manual_seed(17)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    matrices = {name: torch.nn.Parameter(draw(*shape)) for name, shape in shapes.items()}
    regular = {"norm": torch.nn.Parameter(draw(5))}
    groups = [
        {"params": list(matrices.items()), "projected": True},
        {"params": list(regular.items()), "projected": False},
    ]
    optimizer = Frugal(groups, **asdict(settings))
    reference = Reference(dict(matrices), dict(regular), settings, random_bases_of(optimizer, matrices, settings))
    for step in range(steps):
        for parameter in [*matrices.values(), *regular.values()]:
            parameter.grad = draw(*parameter.shape)
        # Frugal goes first: a random basis is taken from its state.
        optimizer.step()
        reference.step({name: p.grad for name, p in [*matrices.items(), *regular.items()] if p.grad is not None})
        for name, expected in reference.weights().items():
            actual = matrices[name] if name in matrices else regular[name]
            distance = float((actual.detach() - expected).abs().max())
            assert distance <= tolerance, f"{name} {tuple(expected.shape)} is off by {distance:.1e} after step {step}"
    return optimizer


def random_bases_of(
    optimizer: Frugal, matrices: dict[str, torch.nn.Parameter], settings: Settings
) -> Callable[[str], Bases]:
    """What a `random` refresh drew, checked to be orthonormal and of the right size."""

    def bases(name: str) -> Bases:
        rows, columns = matrices[name].shape
        state = optimizer.state[matrices[name]]
        side = settings.side
        if side == "full":
            rank = round(settings.density * min(rows, columns))
            left, right = state["basis_left"].clone(), state["basis_right"].clone()
            check_orthonormal(left, rows, rank)
            check_orthonormal(right, columns, rank)
            return left, right
        basis = state["basis"].clone()
        on_right = {"std": rows >= columns, "reverse_std": rows < columns}.get(side, side == "right")
        length = columns if on_right else rows
        check_orthonormal(basis, length, round(settings.density * length))
        return (None, basis) if on_right else (basis, None)

    return bases


def check_orthonormal(basis: Tensor, length: int, rank: int) -> None:
    assert basis.shape == (length, rank)
    assert torch.allclose(basis.T @ basis, torch.eye(rank, dtype=basis.dtype), atol=1e-12, rtol=0)


def tolerance(settings: Settings) -> float:
    return 1e-7 if settings.side == "full" else 1e-10


@pytest.mark.parametrize("state_free", STATE_FREE)
@pytest.mark.parametrize("on_refresh", ON_REFRESH)
@pytest.mark.parametrize(("projection", "side"), list(product(BASES, SIDES)))
def test_bases(projection: str, side: str, on_refresh: str, state_free: str) -> None:
    # Right after an svd refresh PᵀGQ is diagonal, and Adam would blow its rounding up to full steps: a large eps.
    eps = 1e-3 if side == "full" else 1e-8
    settings = replace(BASE, projection=projection, side=side, on_refresh=on_refresh, state_free=state_free, eps=eps)
    compare(settings, SHAPES, 7, tolerance(settings))


@pytest.mark.parametrize("state_free", STATE_FREE)
@pytest.mark.parametrize("on_refresh", ON_REFRESH)
@pytest.mark.parametrize("projection", COORDINATES)
def test_coordinates(projection: str, on_refresh: str, state_free: str) -> None:
    settings = replace(BASE, projection=projection, on_refresh=on_refresh, state_free=state_free)
    compare(settings, SHAPES, 7, 1e-10)


@pytest.mark.parametrize("state_free", STATE_FREE)
@pytest.mark.parametrize("on_refresh", ON_REFRESH)
@pytest.mark.parametrize("block_order", ORDERS)
def test_blocks(block_order: str, on_refresh: str, state_free: str) -> None:
    """Blocks clear all state at every refresh, whatever on_refresh says."""
    settings = replace(
        BASE, projection="blockwise", block_order=block_order, on_refresh=on_refresh, state_free=state_free, density=0.4
    )
    compare(settings, SHAPES, 9, 1e-10)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("block_order", ["ascending", "descending"])
def test_blocks_wrap_around(block_order: str, density: float) -> None:
    """Five matrices and 1, 2, 4 or 5 active ones, over enough refreshes to pass both ends."""
    shapes = dict.fromkeys("abcde", (4, 3))
    settings = replace(BASE, projection="blockwise", block_order=block_order, density=density, update_gap=1)
    compare(settings, shapes, 9, 1e-10)


@pytest.mark.parametrize("count", [4, 5, 7])
def test_mirror_with_odd_and_even_counts(count: int) -> None:
    shapes = {f"w{i}": (4, 3) for i in range(count)}
    settings = replace(BASE, projection="blockwise", block_order="mirror", density=2 / count, update_gap=1)
    compare(settings, shapes, 9, 1e-10)


@pytest.mark.parametrize("on_refresh", ON_REFRESH)
@pytest.mark.parametrize("state_full", ["lion", "sgdm"])
@pytest.mark.parametrize(
    ("projection", "side"),
    [("svd", "std"), ("svd", "full"), ("random", "left"), ("dct", "std"), ("dct", "full"),
     ("randperm", "right"), ("columns", "std"), ("rows", "std"),
     ("randk", "std"), ("blockwise", "std")],
)  # fmt: skip
def test_other_state_full_rules(projection: str, side: str, state_full: str, on_refresh: str) -> None:
    if state_full == "lion" and side == "full":
        # sign(PᵀGQ) of a diagonal matrix is the sign of rounding noise: a random basis has no such zeros.
        projection = "random"
    state_free = "sgd" if state_full == "sgdm" else "sign"
    settings = replace(
        BASE, projection=projection, side=side, state_full=state_full, state_free=state_free, on_refresh=on_refresh,
        density=0.3,
    )  # fmt: skip
    compare(settings, SHAPES, 7, tolerance(settings))


@pytest.mark.parametrize("on_refresh", ON_REFRESH)
@pytest.mark.parametrize(
    ("projection", "side", "density"),
    [("svd", "std", 1.0), ("svd", "left", 1.0), ("svd", "right", 0.12), ("svd", "full", 1.0), ("random", "right", 0.5),
     ("dct", "right", 0.5), ("dct", "std", 1.0),
     ("randperm", "right", 0.5), ("randperm", "std", 1.0), ("columns", "std", 0.25), ("rows", "std", 1.0),
     ("randk", "std", 0.25)],
)  # fmt: skip
def test_one_row(projection: str, side: str, density: float, on_refresh: str) -> None:
    """A 1×9 matrix. The basis spans the whole gradient in most cases, so the residual is rounding: sgd, not sign."""
    settings = replace(
        BASE, projection=projection, side=side, density=density, on_refresh=on_refresh, state_free="sgd", eps=1e-3
    )
    compare(settings, {"row": (1, 9)}, 7, tolerance(settings))


@pytest.mark.parametrize("projection", [*BASES, *COORDINATES, "blockwise"])
def test_density_zero(projection: str) -> None:
    """rho = 0 is signSGD, whatever the projection is called."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.nn.Parameter(torch.randn(7, 5, generator=generator, dtype=torch.float64))
    expected = weight.detach().clone()
    optimizer = Frugal(
        [{"params": [("w", weight)], "projected": True}], lr=0.01, weight_decay=0.1, density=0.0, projection=projection
    )
    for _ in range(3):
        weight.grad = torch.randn(7, 5, generator=generator, dtype=torch.float64)
        optimizer.step()
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * weight.grad.sign()
        assert torch.allclose(weight.detach(), expected, atol=1e-15, rtol=0)


def test_full_density_leaves_nothing_to_the_state_free_rule() -> None:
    for projection in COORDINATES:
        settings = replace(BASE, projection=projection, density=1.0)
        compare(settings, SHAPES, 5, 1e-10)


@pytest.mark.parametrize("update_gap", [1, 2, 100])
def test_other_gaps(update_gap: int) -> None:
    for projection in ("svd", "columns", "blockwise"):
        compare(replace(BASE, projection=projection, update_gap=update_gap, density=0.3), SHAPES, 6, 1e-10)


def test_random_basis_depends_on_seed_name_and_refresh_only() -> None:
    def run(seed: int, name: str) -> list[Tensor]:
        weight = torch.nn.Parameter(torch.zeros(8, 6, dtype=torch.float64))
        optimizer = Frugal(
            [{"params": [(name, weight)], "projected": True}], projection="random", density=0.5, update_gap=1, seed=seed
        )
        bases = []
        for _ in range(2):
            weight.grad = torch.randn(8, 6, dtype=torch.float64)
            optimizer.step()
            bases.append(optimizer.state[weight]["basis"].clone())
        return bases

    first, second = run(0, "w")
    again = run(0, "w")
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, run(1, "w")[0])
    assert not torch.allclose(first, run(0, "v")[0])
