"""Stochastic rounding: unbiased, exact where nothing is to be rounded, and the same however a parameter is cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from frugal_dist import Frugal
from frugal_dist.step import inputs
from frugal_dist.update.stochastic_rounding import random_bits, round_stochastically_, row_starts

KEY = {"seed": 3, "name": "w", "step": 5}


def rounded(wide: Tensor, starts: Tensor | None = None, **key: object) -> Tensor:
    target = torch.empty(wide.shape, dtype=torch.bfloat16)
    starts = row_starts(tuple((0, n) for n in wide.shape), tuple(wide.shape), wide.device) if starts is None else starts
    round_stochastically_(target, wide, starts, **{**KEY, **key})  # type: ignore[arg-type]
    return target


def test_right_on_average_and_never_further_than_the_two_neighbours() -> None:
    value, below, above = 1.0 + 0.3 * 2**-7, 1.0, 1.0 + 2**-7
    for sign in (1.0, -1.0):
        found = rounded(torch.full((200, 1000), sign * value)).float() * sign
        assert set(found.unique().tolist()) == {below, above}
        share = float((found == above).float().mean())
        assert abs(share - 0.3) < 4 * (0.3 * 0.7 / found.numel()) ** 0.5


def test_what_bf16_has_stays() -> None:
    exact = torch.cat([torch.randn(500).bfloat16().float(), torch.tensor([0.0, -0.0, float("inf"), -float("inf")])])
    assert torch.equal(rounded(exact).float(), exact)
    assert torch.isnan(rounded(torch.full((100,), float("nan"))).float()).all()


def test_bits_look_random() -> None:
    """All 16 bits are balanced, and uncorrelated between neighbours, between steps and between each other."""
    index = torch.arange(1 << 16) + (1 << 32) - (1 << 15)  # across the end of 32 bits
    one, other = (random_bits(index, keys) for keys in ((1, 2), (3, 4)))
    planes = [((bits >> k) & 1).double() * 2 - 1 for bits in (one, other) for k in range(16)]
    planes += [planes[0].roll(1), planes[15].roll(1)]
    correlations = torch.corrcoef(torch.stack(planes)) - torch.eye(len(planes))
    assert float(torch.stack(planes).mean(1).abs().max()) < 5 / 2**8
    assert float(correlations.abs().max()) < 5 / 2**8
    assert len(one.unique()) > 40_000


def test_seed_name_and_step_matter() -> None:
    wide = torch.randn(64, 64)
    first = rounded(wide)
    assert torch.equal(first, rounded(wide))
    for key in ({"seed": 4}, {"name": "v"}, {"step": 6}):
        assert not torch.equal(first, rounded(wide, **key))


def test_any_cut_gives_the_same() -> None:
    torch.manual_seed(0)
    wide = torch.randn(6, 70, 50)
    whole = rounded(wide)
    box = ((2, 5), (10, 33), (7, 40))
    part = wide[2:5, 10:33, 7:40]
    assert torch.equal(rounded(part.contiguous(), row_starts(box, (6, 70, 50), wide.device)), whole[2:5, 10:33, 7:40])
    flat = rounded(wide.view(-1)[123:9999], row_starts(((123, 9999),), (9999,), wide.device))
    assert torch.equal(flat, whole.view(-1)[123:9999])


def test_rows_longer_than_a_chunk() -> None:
    wide = torch.randn(2, 70_000)
    assert torch.equal(rounded(wide).view(-1), rounded(wide.view(-1)))


@pytest.mark.parametrize(("rounding", "moves"), [("nearest", False), ("stochastic", True)])
def test_small_steps_arrive_on_average(rounding: str, moves: bool) -> None:
    """Steps and weight decay far below what bf16 resolves at 1."""
    weights = [torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)) for _ in range(2)]
    groups = [{"params": [(f"w{p}", weight)], "projected": p} for p, weight in zip((True, False), weights, strict=True)]
    optimizer = Frugal(groups, lr=1e-4, projection="columns", weight_decay=1.0, rounding=rounding, process_group=None)
    for _ in range(50):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    for weight in weights:
        assert weight.dtype == torch.bfloat16
        assert float(weight.detach().float().mean()) == (pytest.approx(0.99, abs=1e-3) if moves else 1.0)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_regular_parameters_in_slices_step_as_whole_ones(rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Low-precision ones are stepped some rows at a time, to bound their fp32 copies."""
    found = []
    for size in (1 << 24, 30):
        monkeypatch.setattr(inputs, "SLICE", size)
        generator = torch.Generator().manual_seed(0)
        shapes = {"w": (32, 32), "embedding": (23, 7), "norm": (50,), "scale": ()}
        named = {n: torch.nn.Parameter(torch.randn(s, generator=generator).bfloat16()) for n, s in shapes.items()}
        groups = [{"params": [(n, p)], "projected": n == "w"} for n, p in named.items()]
        optimizer = Frugal(groups, lr=1e-2, projection="columns", weight_decay=0.1, rounding=rounding)
        for _ in range(3):
            for parameter in named.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16()
            optimizer.step()
        found.append([parameter.detach() for parameter in named.values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_fp32_weights_are_not_rounded() -> None:
    found = []
    for rounding in ("nearest", "stochastic"):
        weight = torch.nn.Parameter(torch.ones(8, 8))
        optimizer = Frugal([{"params": [("w", weight)], "projected": True}], rounding=rounding, process_group=None)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        found.append(weight.detach())
    assert torch.equal(*found)


def test_float16_is_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.float16))
    optimizer = Frugal([{"params": [("w", weight)], "projected": True}], rounding="stochastic", process_group=None)
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match="w is float16, but rounding='stochastic'"):
        optimizer.step()


@pytest.mark.parametrize("side", ["std", "full"])
def test_bases_in_bf16_are_half_the_bytes_and_come_back_from_a_save(side: str) -> None:
    weights = [torch.nn.Parameter(torch.zeros(48, 32)) for _ in range(2)]
    options = {"projection": "svd", "side": side, "update_gap": 2, "on_refresh": "project", "process_group": None}
    torch.manual_seed(0)
    grads = [torch.randn(48, 32) for _ in range(5)]
    optimizers = [
        Frugal([{"params": [("w", weight)], "projected": True}], basis_dtype="bf16", **options)  # type: ignore[arg-type]
        for weight in weights
    ]
    for number, grad in enumerate(grads):
        if number == 3:
            weights[1].data.copy_(weights[0].data)
            optimizers[1].load_state_dict(optimizers[0].state_dict())
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = grad
            if number >= 3 or optimizer is optimizers[0]:
                optimizer.step()
    assert torch.equal(*weights)
    bases = [value for key, value in optimizers[1].state[weights[1]].items() if key.startswith("basis")]
    assert bases and all(basis.dtype == torch.bfloat16 for basis in bases)
