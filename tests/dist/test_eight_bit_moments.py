"""8-bit moments on several ranks: the same as on one where no cut goes through a block, planned, resumed, portable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_plan_agrees
import test_state_dict
import torch
from cases import LAYOUTS
from selection import mostly_heavy
from storages import Held, Named
from threads import run_ranks
from torch import Tensor

from frugal_dist import checkpoint

EIGHT = {"moments": "8bit"}
SHAPES = {"long": (8, 1024), "high": (520, 12), "experts": (3, 12, 300), "embedding": (16, 300), "norm": (9,)}
REGULAR = {"embedding", "norm"}
MORE = {"density": 0.5, "update_gap": 2, "lr": 0.01, "weight_decay": 0.1, "on_refresh": "keep"}
EVERYWHERE = ["replicas", "replicas, shared state", "Shard(0)", "HSDP 2x2", "ZeRO-1/2", "ZeRO-3"]
WHOLE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "svd": ({"projection": "svd", "side": "std"}, ["replicas, shared state", "HSDP 2x2"]),
    "svd right": ({"projection": "svd", "side": "right"}, EVERYWHERE),
    "columns": ({"projection": "columns"}, ["replicas", "replicas, shared state", "Shard(0)", "HSDP 2x2"]),
    "rows": ({"projection": "rows"}, ["replicas", "Shard(0)"]),
    "blockwise": ({"projection": "blockwise"}, ["replicas", "Shard(0)"]),
}
"""Where no cut goes through a block: those of rows, and of the 1024 columns at multiples of 256."""
OUTSIDE = {"svd": {"experts"}, "svd right": {"long", "experts"}}
"""Not so of 300 columns; and a gradient of 8 rows has no 512 right singular vectors."""


def tensors(seed: int) -> Named:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def started(build: Any, options: dict[str, Any], names: set[str]) -> Held:
    weights = {name: weight for name, weight in tensors(0).items() if name in names}
    held: Held = build(weights, names - REGULAR, {**MORE, **EIGHT, **options})
    return held


def trained(held: Held, names: set[str], first: int = 1, last: int = 6) -> Held:
    for step in range(first, last):
        held.step({name: grad for name, grad in tensors(step).items() if name in names})
    return held


WAYS = [(way, layout) for way, (_, layouts) in WHOLE.items() for layout in layouts]


@pytest.mark.parametrize(("way", "layout"), WAYS)
def test_ranks_make_no_difference(way: str, layout: str) -> None:
    names = set(SHAPES) - OUTSIDE.get(way, set()) - ({"embedding"} if "ZeRO" in layout else set())
    options = WHOLE[way][0]
    (want,) = run_ranks(1, lambda rank: trained(started(LAYOUTS["replicas"], options, names), names).full())
    for full in run_ranks(4, lambda rank: trained(started(LAYOUTS[layout], options, names), names).full()):
        for name in names:
            torch.testing.assert_close(full[name], want[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("layout", ["replicas, shared state", "Shard(1)", "ZeRO-1/2", "ZeRO-3"])
def test_where_a_block_is_cut_each_side_has_its_scale(layout: str) -> None:
    """Flat intervals, columns, single entries: as near to full moments as one process is."""
    names, options = set(SHAPES), {"projection": "randk"}

    def run(rank: int, moments: str) -> Named:
        return trained(started(LAYOUTS[layout], {**options, "moments": moments}, names), names).full()

    packed, *others = run_ranks(4, lambda rank: run(rank, "8bit"))
    full, *_ = run_ranks(4, lambda rank: run(rank, "full"))
    for name in names:
        assert all(torch.equal(packed[name], other[name]) for other in others)
        assert float((packed[name] - full[name]).abs().mean()) < 2e-4, name  # of five steps of about 0.01


@pytest.mark.parametrize("layout", mostly_heavy(test_plan_agrees.ENGINES, ["replicas", "HSDP 2x2", "ZeRO-3"]))
def test_planned_equals_measured(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_plan_agrees, "NAMES", {**test_plan_agrees.NAMES, "long": (8, 700)})
    for projection, side in (("svd", "std"), ("dct", "full"), ("columns", "std"), ("rows", "std"), ("randk", "std")):
        options = {**test_plan_agrees.options_of(projection, side), **EIGHT}
        test_plan_agrees.check(layout, options)
        plan = test_plan_agrees.planned(layout, options)
        assert plan.states == [rank.state for rank in plan.ranked], (projection, side)


def test_planned_regular_parameters() -> None:
    """Flat intervals have parts of rows; those of few entries are full."""
    plan = test_plan_agrees
    shapes = {"matrix": (8, 32), "embedding": (16, 300), "vector": (5000,), "norm": (64,)}
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    options: dict[str, Any] = {"projection": "columns", "density": 0.5, **EIGHT}
    for layout in ("Shard(0)", "ZeRO-3", "HSDP 2x2"):
        params = [(name, torch.nn.Parameter(torch.empty(shape, device="meta"))) for name, shape in shapes.items()]
        groups = [{"params": params[:1], "projected": True}, {"params": params[1:], "projected": False}]
        optimizer = plan.Frugal(groups, process_group=None, **options)
        found = plan.make_plan(optimizer, plan.engine_layout(plan.ENGINES[layout]), 4)

        def body(rank: int, layout: str = layout) -> int:
            held = LAYOUTS[layout](weights, {"matrix"}, options)
            held.step(weights)
            return plan.state_bytes(held)

        measured = run_ranks(4, body)
        assert [rank.state for rank in found.ranked] == measured == found.states, layout


@pytest.mark.parametrize("layout", mostly_heavy(test_state_dict.RANKS, ["Shard(0)", "ZeRO-3", "replicas"]))
def test_bit_for_bit(layout: str) -> None:
    turn = list(test_state_dict.RANKS).index(layout)
    for case in test_state_dict.SOME[turn % 3 :: 3]:
        test_state_dict.check(layout, replace(case, more=tuple(EIGHT.items())), (2 + turn % 2,))


TRIPS = [("Shard(0)", 4, "replicas", 1), ("replicas", 1, "ZeRO-3", 3), ("ZeRO-1/2", 3, "Shard(0)", 2)]


@pytest.mark.parametrize(("source", "before", "target", "after"), TRIPS)
def test_checkpoints_on_other_ranks(source: str, before: int, target: str, after: int, tmp_path: Path) -> None:
    """On the same ranks as if nothing had been; on others too, as long as no block is cut."""
    model, names = torch.nn.Module(), {"high", "norm"}
    options = WHOLE["svd right"][0]

    def save(rank: int) -> tuple[Named, list[Tensor]]:
        held = trained(started(LAYOUTS[source], options, names), names, 1, 4)
        checkpoint.save(tmp_path / "saved", model, held.optimizer)
        return ended(trained(held, names, 4, 7))

    def load(rank: int, layout: str) -> tuple[Named, list[Tensor]]:
        held = started(LAYOUTS[layout], options, names)
        checkpoint.load(tmp_path / "saved", model, held.optimizer)
        return ended(trained(held, names, 4, 7))

    want = run_ranks(before, save)
    for (full, state), (wanted, kept) in zip(run_ranks(before, lambda rank: load(rank, source)), want, strict=True):
        assert all(torch.equal(full[name], wanted[name]) for name in names)
        assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))
    for full, _ in run_ranks(after, lambda rank: load(rank, target)):
        for name in names:
            torch.testing.assert_close(full[name], want[0][0][name], rtol=0, atol=1e-10)


def ended(held: Held) -> tuple[Named, list[Tensor]]:
    state = [store[key].clone() for store in held.optimizer.state.values() for key in sorted(store)]
    return held.full(), state


@pytest.mark.parametrize("layout", ["replicas, shared state", "Shard(1)", "ZeRO-3"])
def test_a_checkpoint_of_cut_blocks_goes_on_alike(layout: str, tmp_path: Path) -> None:
    names, options, model = set(SHAPES), {"projection": "randk"}, torch.nn.Module()

    def body(rank: int) -> bool:
        held = trained(started(LAYOUTS[layout], options, names), names, 1, 4)
        checkpoint.save(tmp_path / "saved", model, held.optimizer)
        again = started(LAYOUTS[layout], options, names)
        checkpoint.load(tmp_path / "saved", model, again.optimizer)
        (full, state), (other, kept) = ended(trained(held, names, 4, 7)), ended(trained(again, names, 4, 7))
        return all(map(torch.equal, [*full.values(), *state], [*other.values(), *kept]))

    assert run_ranks(3, body) == [True] * 3
