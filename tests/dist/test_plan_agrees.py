"""The planner's figures are those of real runs: state bytes of every rank, collectives and bytes sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import LAYOUTS
from storages import Held
from test_collectives import RANKS, SHAPES, metered
from threads import run_ranks

from frugal_dist import Frugal
from frugal_dist.planner.engines import engine_layout
from frugal_dist.planner.plan import Plan, RankPlan, make_plan

ENGINES = {
    "replicas, shared state": "ddp",
    "replicas": "zero0",
    "Shard(0)": "fsdp2",
    "HSDP 2x2": "hsdp:2",
    "ZeRO-1/2": "zero2",
    "ZeRO-3": "zero3",
}
SETTINGS = [("svd", "std"), ("svd subspace", "std"), ("svd exact bf16", "std"), ("svd", "left"), ("random", "right"), ("columns", "std"), ("rows", "std"), ("randk", "std"),
            ("blockwise", "std")]  # fmt: skip
NAMES = {**SHAPES, "more": (48, 48)}


def options_of(projection: str, side: str) -> dict[str, Any]:
    """``projection``: itself, the svd_method and the basis_dtype."""
    projection, method, dtype = (projection.split() + ["exact", "full"][len(projection.split()) - 1 :])[:3]
    return {"projection": projection, "svd_method": method, "basis_dtype": dtype, "side": side, "density": 0.5,
            "update_gap": 2}  # fmt: skip


def planned(layout: str, options: dict[str, Any]) -> Plan:
    params = [(name, torch.nn.Parameter(torch.empty(shape, device="meta"))) for name, shape in NAMES.items()]
    optimizer = Frugal([{"params": params, "projected": True}], process_group=None, **options)
    return make_plan(optimizer, engine_layout(ENGINES[layout]), RANKS)


def state_bytes(held: Held) -> int:
    tensors = [t for store in held.optimizer.state.values() for t in store.values() if isinstance(t, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measured(layout: str, options: dict[str, Any]) -> list[tuple[int, list[str], int, list[str], int]]:
    """By rank: state bytes after the first refresh (coordinates move with each); calls and bytes of a step; calls and bytes that a refresh adds."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in NAMES.items()}

    def body(rank: int, meter: Any) -> tuple[int, list[str], int, list[str], int]:
        held, found, states = LAYOUTS[layout](weights, set(NAMES), options), [], []
        for _ in range(3):  # set-up with the first refresh; an ordinary step; a refresh
            meter.start()
            held.step(weights)
            found.append(meter.stop())
            states.append(state_bytes(held))
        _, step, refresh = found
        extra = list(refresh.calls)
        for call in step.calls:
            extra.remove(call)
        return states[0], step.calls, step.sent, extra, refresh.sent - step.sent

    with metered() as meter:
        return run_ranks(RANKS, lambda rank: body(rank, meter))


def calls(counter: Any) -> list[str]:
    names = {"all_to_all": "all_to_all_single"}
    return sorted(names.get(name, name) for name, count in counter.items() for _ in range(count))


@pytest.mark.parametrize("layout", ENGINES)
@pytest.mark.parametrize(("projection", "side"), SETTINGS)
def test_planned_equals_measured(layout: str, projection: str, side: str) -> None:
    options = options_of(projection, side)
    plan = planned(layout, options)
    for want, (state, step_calls, sent, refresh_calls, refreshed) in zip(
        plan.ranked, measured(layout, options), strict=True
    ):
        assert want.state == state, f"rank {want.rank}: state"
        assert calls(want.step_calls) == sorted(_plain(step_calls)), f"rank {want.rank}: calls of a step"
        assert want.step_sent == sent, f"rank {want.rank}: bytes of a step"
        check_refresh(want, projection, refresh_calls, refreshed)


def _plain(names: list[str]) -> list[str]:
    """torch 2.13 renamed one of them."""
    return ["all_gather" if name.startswith("all_gather") else name for name in names]


def check_refresh(want: RankPlan, projection: str, found: list[str], sent: int) -> None:
    """Bytes without the small all-reduce by which ranks agree, which the plan leaves out."""
    if projection.split()[0] not in ("svd", "random"):
        assert want.refresh_sent == 0
        return
    assert calls(want.refresh_calls) == sorted(_plain(found)), f"rank {want.rank}: calls of a refresh"
    assert 0 <= sent - want.refresh_sent <= 1024, f"rank {want.rank}: bytes of a refresh"
