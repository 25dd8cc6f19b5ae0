"""A projection and rules that only this file knows: they train, shard, are saved and planned as the others are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from selection import taking_turns
from small_matrices import MORE, check_layout, check_resume, tensors
from test_plan_agrees import ENGINES, check
from torch import Tensor, nn

from frugal_dist import Frugal, FrugalConfig
from frugal_dist.planner import Weight, frugal_bytes
from frugal_dist.projection.basis import Basis, basis_shapes
from frugal_dist.projection.coordinates import Rows
from frugal_dist.projection.definition import Drawing, Projection, sided
from frugal_dist.projection.registry import PROJECTIONS
from frugal_dist.update.definition import Moment, RuleSettings, StateFree, StateFull, Tensors
from frugal_dist.update.rules import STATE_FREE, STATE_FULL

# --- what a file of its own would have --------------------------------------------------------------------------------


def identity(grad: Tensor, drawing: Drawing, warm: Basis | None) -> Basis:
    """Other lines of the identity at each refresh."""
    shapes = basis_shapes(drawing.side, drawing.rows, drawing.cols, drawing.size)
    lines = {part: torch.eye(length, dtype=grad.dtype).roll(drawing.refresh, 0) for part, (length, _) in shapes.items()}
    return Basis(**{part: lines[part][:, : drawing.size].contiguous() for part in shapes})


FIRST = sided(name="first", family="basis", depends_on=("side",), compute=identity)

NEXT = Projection(
    name="next",
    family="coordinates",
    depends_on=(),
    dim=lambda side, rows, cols: rows,
    lines=lambda side: (0,),
    entries=lambda side, rows, cols, size: size * cols,
    draw=lambda one: Rows(((torch.arange(one.size) + one.refresh) % one.rows).sort().values, one.cols),
)
"""One row further at each refresh."""

SOFT = StateFree(name="soft", direction=torch.tanh)


def slow(params: Tensors, grads: Tensors, moments: Sequence[Tensors], step: int, lr: float, decay: float,
         config: RuleSettings) -> None:  # fmt: skip
    """A fast and a slow average."""
    for param, grad, fast, slow in zip(params, grads, *moments, strict=True):
        fast.lerp_(grad, 1.0 - config.beta_pair[0])
        slow.add_(fast, alpha=0.01)
        param.mul_(1.0 - lr * decay).sub_(lr * (fast + slow))


SLOW = StateFull(name="slow", moments=(Moment("exp_avg"), Moment("slow_avg")), update=slow)


def unit(params: Tensors, grads: Tensors, moments: Sequence[Tensors], step: int, lr: float, decay: float,
         config: RuleSettings) -> None:  # fmt: skip
    """Momentum, as long as the matrix has rows: no rank can do it with a part of R."""
    for param, grad, buffer in zip(params, grads, *moments, strict=True):
        buffer.mul_(config.momentum).add_(grad)
        param.mul_(1.0 - lr * decay).sub_(lr * buffer / buffer.norm())


UNIT = StateFull(name="unit", moments=(Moment("exp_avg"),), update=unit, elementwise=False)


# --- what their lines in the registries do ----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for projection in (FIRST, NEXT):
        monkeypatch.setitem(PROJECTIONS, projection.name, projection)
    monkeypatch.setitem(STATE_FREE, "soft", SOFT)
    for rule in (SLOW, UNIT):
        monkeypatch.setitem(STATE_FULL, rule.name, rule)


WAYS: dict[str, dict[str, Any]] = {
    "first": {"projection": "first", "on_refresh": "project"},
    "first left": {"projection": "first", "side": "left", "on_refresh": "keep"},
    "next": {"projection": "next", "on_refresh": "keep", "state_free": "soft"},
    "next project": {"projection": "next", "on_refresh": "project"},
    "soft svd": {"state_free": "soft"},
    "slow svd": {"state_full": "slow", "on_refresh": "project"},
    "slow columns": {"state_full": "slow", "projection": "columns", "on_refresh": "keep"},
    "slow blocks": {"state_full": "slow", "projection": "blockwise"},
    "unit": {"state_full": "unit", "on_refresh": "keep"},
}


@pytest.mark.parametrize(
    ("way", "layout"),
    taking_turns(WAYS, ["replicas, shared state", "Shard(0)", "HSDP 2x2", "ZeRO-1/2", "ZeRO-3"], every=2),
)
def test_every_layout_gives_the_weights_of_one_process(layout: str, way: str) -> None:
    check_layout(layout, WAYS[way])


@pytest.mark.parametrize(("way", "layout"), taking_turns(WAYS, ENGINES, every=2))
def test_planned_equals_measured(layout: str, way: str) -> None:
    check(layout, {**MORE, **WAYS[way]})


def test_the_first_columns_are_those_of_adamw_and_the_others_of_sign() -> None:
    weight, want = (nn.Parameter(tensors(0)["tall"]) for _ in range(2))
    optimizer = Frugal([("tall", weight)], project=["*"], process_group=None, lr=0.01, density=0.5, projection="first")
    adamw = torch.optim.AdamW([want], lr=0.01, weight_decay=0.0)
    for step in range(1, 6):
        weight.grad, want.grad = tensors(step)["tall"], tensors(step)["tall"]
        signed = want.detach()[:, 8:] - 0.01 * want.grad[:, 8:].sign()
        optimizer.step()
        adamw.step()
        want.data[:, 8:] = signed
    torch.testing.assert_close(weight, want, rtol=0, atol=1e-12)
    entries = 24 * 8 * 8 + 16 * 8 * 4
    assert frugal_bytes([Weight(24, 16, 1, projected=True)], projection="first", density=0.5) == entries


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("portable", [False, True])
def test_a_run_goes_on_where_it_was(way: str, portable: bool, tmp_path: Path) -> None:
    check_resume(WAYS[way], portable, tmp_path)


def test_what_is_not_elementwise_takes_whole_matrices() -> None:
    with pytest.raises(ValueError, match=r"state_full='unit' updates whole matrices.*projection='columns'"):
        FrugalConfig(state_full="unit", projection="columns")
    named = [("w", nn.Parameter(torch.ones(6, 4))), ("norm", nn.Parameter(torch.ones(4)))]
    with pytest.raises(ValueError, match="norm is not projected, and state_full='unit'"):
        Frugal(named, project=["w"], state_full="unit", process_group=None)
