"""The planner's figures are those of real runs: state bytes of every rank, collectives and bytes sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import pytest
import torch
from cases import LAYOUTS
from selection import taking_turns
from storages import Held
from test_collectives import RANKS, SHAPES, Meter, Traffic, metered
from threads import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from frugal_dist import Frugal
from frugal_dist.engines.dtensor import DTensorStorage
from frugal_dist.planner.layouts import engine_layout
from frugal_dist.planner.mesh import CUT_BY_COLUMNS, CUT_BY_ROWS
from frugal_dist.planner.plan import Plan, make_plan
from frugal_dist.projection.coordinates import Flat
from frugal_dist.sharding.shard import ParamSpec

ENGINES = {
    "replicas, shared state": "ddp",
    "replicas": "zero0",
    "Shard(0)": "fsdp2",
    "HSDP 2x2": "hsdp:2",
    "ZeRO-1/2": "zero2",
    "ZeRO-3": "zero3",
}
SETTINGS = [("svd", "std"), ("svd subspace", "std"), ("svd exact bf16", "std"), ("svd", "left"), ("random", "right"),
            ("dct", "std"), ("dct", "full"), ("columns", "std"), ("rows", "std"), ("randk", "std"),
            ("blockwise", "std")]  # fmt: skip
DRAWN = [("columns", "std"), ("rows", "std"), ("randk", "std"), ("randperm", "full")]
NAMES = {**SHAPES, "more": (49, 47)}


def options_of(projection: str, side: str, on_refresh: str = "reset") -> dict[str, Any]:
    """``projection``: itself, the svd_method and the basis_dtype."""
    projection, method, dtype = (projection.split() + ["exact", "full"][len(projection.split()) - 1 :])[:3]
    return {"projection": projection, "svd_method": method, "basis_dtype": dtype, "side": side, "density": 0.5,
            "update_gap": 2, "on_refresh": on_refresh}  # fmt: skip


def planned(layout: str, options: dict[str, Any], ranks: int = RANKS, shown: Sequence[int] = ()) -> Plan:
    params = [(name, torch.nn.Parameter(torch.empty(shape, device="meta"))) for name, shape in NAMES.items()]
    optimizer = Frugal([{"params": params, "projected": True}], process_group=None, **options)
    return make_plan(optimizer, engine_layout(ENGINES[layout]), ranks, shown=shown)


def state_bytes(held: Held) -> int:
    tensors = [t for store in held.optimizer.state.values() for t in store.values() if isinstance(t, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def selected_bytes(held: Held) -> int:
    assert held.optimizer._runtime is not None
    pieces = [piece for cut in held.optimizer._runtime.cuts.values() for piece in cut.pieces]
    kept = [piece.selection.index for piece in pieces if isinstance(piece.selection, Flat)]
    return sum(index.numel() * index.element_size() for index in kept)


@dataclass
class Seen:
    """On one rank: state after the first refresh (coordinates move with each), and which entries randk selects, in
    bytes; a step; what a refresh adds to one.
    """

    state: int
    selected: int
    step: Traffic
    refresh: Traffic


def measured(layout: str, options: dict[str, Any], ranks: int) -> list[Seen]:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if options.get("rounding") == "remainder" else torch.float32
    weights = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in NAMES.items()}

    def body(rank: int, meter: Meter) -> Seen:
        held, found, states = LAYOUTS[layout](weights, set(NAMES), options), [], []
        for _ in range(4):  # set-up with the first refresh; a step; a refresh; a step with what was drawn at that one
            meter.start()
            held.step(weights)
            found.append(meter.stop())
            states.append(state_bytes(held))
        _, step, refresh, after = found
        for call in after.calls:
            refresh.calls.remove(call)
        return Seen(states[0], selected_bytes(held), step, Traffic(refresh.calls, refresh.sent - after.sent))

    with metered() as meter:
        return run_ranks(ranks, lambda rank: body(rank, meter))


def calls(counter: Any) -> list[str]:
    names = {"all_to_all": "all_to_all_single"}
    return sorted(names.get(name, name) for name, count in counter.items() for _ in range(count))


def check(layout: str, options: dict[str, Any], ranks: int = RANKS) -> None:
    plan, found = planned(layout, options, ranks), measured(layout, options, ranks)
    # Each rank has about its share of a matrix' entries; the shares make up the whole but for rounding.
    assert abs(sum(one.selected for one in plan.ranked) - sum(one.selected for one in found)) <= ranks * len(NAMES)
    for want, seen in zip(plan.ranked, found, strict=True):
        case = f"{options}, rank {want.rank} of {ranks}"
        assert want.state == seen.state, f"{case}: state"
        assert calls(want.step_calls) == _plain(seen.step.calls), f"{case}: calls of a step"
        assert want.step_sent == seen.step.sent, f"{case}: bytes of a step"
        assert calls(want.refresh.calls) == _plain(seen.refresh.calls), f"{case}: calls of a refresh"
        assert want.refresh.sent == seen.refresh.sent, f"{case}: bytes of a refresh"


@pytest.mark.parametrize(("setting", "layout"), taking_turns(SETTINGS, ENGINES, every=2, name=" ".join))
def test_planned_equals_measured(layout: str, setting: tuple[str, str]) -> None:
    check(layout, options_of(*setting))


@pytest.mark.parametrize(("on_refresh", "layout"), taking_turns(["keep", "project"], ENGINES, every=2))
def test_moments_that_change_ranks(layout: str, on_refresh: str) -> None:
    for projection, side in DRAWN:
        check(layout, options_of(projection, side, on_refresh))


@pytest.mark.parametrize("layout", [name for name, engine in ENGINES.items() if not engine.startswith("zero")])
def test_remainders(layout: str) -> None:
    options = {**options_of("randk", "std", "keep"), "rounding": "remainder"}
    check(layout, options)
    plan = planned(layout, options)
    assert plan.states == [rank.state for rank in plan.ranked]
    held = sum(rank.remainders for rank in plan.ranked)
    copies = {"Shard(0)": 1, "HSDP 2x2": 2}.get(layout, RANKS)
    assert held == 2 * copies * sum(map(prod, NAMES.values()))


def test_replicas_that_hold_their_part_each() -> None:
    for projection in ("svd", "columns", "randk"):
        check("HSDP 2x2", {**options_of(projection, "std", "keep"), "shard_state": False})


@pytest.mark.parametrize("ranks", [1, 2])
def test_few_ranks(ranks: int) -> None:
    for layout in set(ENGINES) - {"HSDP 2x2"}:
        for projection in ("svd", "randk"):
            check(layout, options_of(projection, "std", "keep"), ranks)


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
    return sorted("all_gather" if name.startswith("all_gather") else name for name in names)


def _llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=26, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=11,
        )
    )  # fmt: skip


@pytest.mark.parametrize(("engine", "shape"), [("fsdp2:3xtp:2", (1, 3, 2)), ("hsdp:2x2xtp:2", (2, 2, 2)),
                                              ("tp:2", (1, 1, 2)), ("fsdp2xtp:2", (1, 4, 2))])  # fmt: skip
def test_parts_on_meshes_are_those_of_torch(engine: str, shape: tuple[int, int, int]) -> None:
    """parallelize_module and fully_shard; 26 and 13 rows do not divide by three."""
    ranks = prod(shape)
    _llama()  # imported by one thread

    def apart(rank: int) -> list[str]:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "fsdp", "tp"))
        model = _llama()
        for layer in model.model.layers:
            names = {name.rpartition(".")[2]: name for name, _ in layer.named_modules()}
            plan = {names[last]: ColwiseParallel() for last in CUT_BY_ROWS}
            plan |= {names[last]: RowwiseParallel() for last in CUT_BY_COLUMNS}
            parallelize_module(layer, mesh["tp"], plan)
        if shape[1] > 1:
            fully_shard(model, mesh=mesh["replicas", "fsdp"] if shape[0] > 1 else mesh["fsdp"])
        named = list(model.named_parameters())
        originals = [ParamSpec(n, tuple(p.shape), True, True, 0, i) for i, (n, p) in enumerate(named)]
        storage = DTensorStorage([{"params": [p for _, p in named]}], originals)
        pairs = [(storage.part(i), part) for i, part in enumerate(engine_layout(engine).parts(originals, rank, ranks))]
        found = []
        for one, (there, planned) in zip(originals, pairs, strict=True):
            nothing = 0 in there.local_shape == planned.local_shape
            found += [] if nothing or there == planned else [one.name]
        return found

    assert run_ranks(ranks, apart) == [[]] * ranks


def test_experts_lie_on_a_mesh_of_their_own() -> None:
    """Experts first, as whole ones; then what FSDP2 leaves of them."""
    originals = [ParamSpec("experts", (4, 6, 5), True, True, 0, 0), ParamSpec("dense", (8, 5), True, True, 0, 1)]
    parts = [engine_layout("fsdp2xep:2").parts(originals, rank, 4) for rank in range(4)]
    assert [part[0].spans[0] for part in parts] == [(0, 1), (2, 3), (1, 2), (3, 4)]  # type: ignore[union-attr]
    assert [part[1].spans[0] for part in parts] == [(0, 2), (2, 4), (4, 6), (6, 8)]  # type: ignore[union-attr]
    assert engine_layout("ep:2").parts(originals, 1, 4) == parts[1]
