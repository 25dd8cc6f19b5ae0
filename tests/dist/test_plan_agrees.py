"""The planner's figures are those of real runs: state bytes of every rank, collectives and bytes sent."""

from __future__ import annotations

from collections.abc import Sequence
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


def planned(layout: str, options: dict[str, Any], shown: Sequence[int] = ()) -> Plan:
    params = [(name, torch.nn.Parameter(torch.empty(shape, device="meta"))) for name, shape in NAMES.items()]
    optimizer = Frugal([{"params": params, "projected": True}], process_group=None, **options)
    return make_plan(optimizer, engine_layout(ENGINES[layout]), RANKS, shown=shown)


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


@pytest.mark.parametrize("layout", ENGINES)
@pytest.mark.parametrize("share", ["auto", True, False])
def test_state_of_all_ranks_is_that_of_each(layout: str, share: bool | str) -> None:
    """Without going through the ranks; also where replicas share, or do not, what they do not by default."""
    for projection, side in SETTINGS:
        plan = planned(layout, {**options_of(projection, side), "shard_state": share})
        assert plan.states == [rank.state for rank in plan.ranked], (projection, side)
        some = planned(layout, {**options_of(projection, side), "shard_state": share}, shown=[0])
        assert some.worst.state == max(plan.states)
        assert (some.states, some.owned, some.papers) == (plan.states, plan.owned, plan.papers)
        assert sum(plan.owned) == (len(NAMES) if projection.startswith(("svd", "random")) else 0)


def test_replicas_that_do_not_share_hold_everything() -> None:
    (one,) = {tuple(planned("replicas, shared state", {**options_of("svd", "std"), "shard_state": False}).states)}
    assert len(set(one)) == 1
    assert one[0] > 2 * max(planned("replicas, shared state", options_of("svd", "std")).states)


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
