"""What a step and a refresh send: counted calls and bytes, compared with the formulas of the design."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import meshes
import pytest
import tables
import torch
import torch.distributed as dist
from cases import LAYOUTS
from threads import run_ranks

SHAPES = {"tall": (64, 32), "wide": (32, 64)}
ITEM = 8  # float64
RANKS = 4
COORDINATES = ("columns", "rows", "randk", "blockwise")
UNREPLICATED = ("Shard(0)", "Shard(1)", "ZeRO-1/2", "ZeRO-3")


@dataclass
class Traffic:
    """Calls and bytes of one rank."""

    calls: list[str] = field(default_factory=list)
    sent: int = 0

    def __str__(self) -> str:
        return f"{len(self.calls)}, {self.sent:,}"


class Meter:
    """Counts what each rank (thread) sends through torch.distributed while it is on."""

    def __init__(self) -> None:
        self.local = threading.local()

    def start(self) -> None:
        self.local.traffic = Traffic()

    def stop(self) -> Traffic:
        traffic: Traffic = self.local.traffic
        del self.local.traffic
        return traffic

    def note(self, name: str, size: int) -> None:
        if hasattr(self.local, "traffic"):
            self.local.traffic.calls.append(name)
            self.local.traffic.sent += size


def _bytes_of(name: str, args: Any, kwargs: Any) -> int:
    """What this rank sends to others."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if name == "all_to_all_single":
        splits = list(kwargs["input_split_sizes"])
        assert splits[rank] == 0, "a rank sends to itself"
        return sum(splits) * args[1].element_size()
    if name == "broadcast":
        return args[0].numel() * args[0].element_size() if kwargs["src"] == rank else 0
    if name == "all_reduce":
        return args[0].numel() * args[0].element_size()
    return args[1].numel() * args[1].element_size() * (ranks - 1)


@contextmanager
def metered() -> Iterator[Meter]:
    meter = Meter()
    names = [n for n in ("all_to_all_single", "broadcast", "all_reduce", "all_gather_single", "all_gather_into_tensor")
             if hasattr(dist, n)]  # fmt: skip
    originals = {name: getattr(dist, name) for name in names}

    def wrap(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            meter.note(name, _bytes_of(name, args, kwargs))
            return originals[name](*args, **kwargs)

        return call

    try:
        for name in names:
            setattr(dist, name, wrap(name))
        yield meter
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


def measure(layout: Any, projection: str, side: str = "std", **more: Any) -> list[tuple[Traffic, Traffic]]:
    """For every rank the traffic of an ordinary step and of one with a refresh. ``layout``: (name, ranks) on meshes."""
    build, size = (LAYOUTS[layout], RANKS) if isinstance(layout, str) else (meshes.LAYOUTS[layout], layout[1])
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    options = {"projection": projection, "side": side, "density": 0.5, "update_gap": 2, **more}

    def body(rank: int, meter: Meter) -> tuple[Traffic, Traffic]:
        held = build(weights, set(SHAPES), options)
        found = []
        for _ in range(3):  # set-up with the first refresh; an ordinary step; a refresh
            meter.start()
            held.step(weights)
            found.append(meter.stop())
        return found[1], found[2]

    with metered() as meter:
        return run_ranks(size, lambda rank: body(rank, meter))


def _note(layout: str, name: str, found: list[tuple[Traffic, Traffic]]) -> None:
    step, refresh = (max((pair[i] for pair in found), key=lambda t: t.sent) for i in (0, 1))
    title = f"collectives per rank, 64x32 and 32x64 in float64 on {RANKS} ranks (worst rank)"
    tables.put(title, f"{layout}, {name}", "step: calls, bytes sent", str(step))
    tables.put(title, f"{layout}, {name}", "refresh: calls, bytes sent", str(refresh))


@pytest.mark.parametrize("layout", UNREPLICATED)
@pytest.mark.parametrize("projection", COORDINATES)
def test_coordinates_never_communicate(layout: str, projection: str) -> None:
    found = measure(layout, projection)
    assert all(not step.calls and not refresh.calls for step, refresh in found)
    _note(layout, projection, found)


def test_right_bases_on_row_shards_step_in_silence() -> None:
    found = measure("Shard(0)", "svd", side="right", density=0.25)
    assert all(not step.calls for step, _ in found)
    _note("Shard(0)", "svd right", found)


def test_left_bases_on_row_shards_send_what_the_formula_says() -> None:
    """Gradient in, update out: 2 m n (N-1) / N^2 elements per rank, for each of the two matrices."""
    found = measure("Shard(0)", "svd", side="left", compute_layout="cut")
    elements = sum(2 * m * n * (RANKS - 1) // RANKS**2 for m, n in SHAPES.values())
    for step, _ in found:
        assert step.calls == ["all_to_all_single"] * 2
        assert step.sent == elements * ITEM
    _note("Shard(0)", "svd left, cut", found)


def test_owners_send_whole_matrices() -> None:
    """Everyone sends its part of each gradient to the owner, and the owner the update to everyone."""
    found = measure("Shard(0)", "svd", compute_layout="owner")
    total = sum(m * n for m, n in SHAPES.values())
    assert sum(step.sent for step, _ in found) == 2 * total * (RANKS - 1) // RANKS * ITEM
    assert all(step.calls == ["all_to_all_single"] * 2 for step, _ in found)
    _note("Shard(0)", "svd, owner", found)


@pytest.mark.parametrize("projection", ["svd", "columns", "randk"])
def test_replicas_gather_once(projection: str) -> None:
    """Shared state: one all-gather; complete updates of a basis, of coordinates only the state-full entries."""
    found = measure("replicas, shared state", projection)
    share = 1.0 if projection == "svd" else 0.5
    expected = sum(int(m * n * share) for m, n in SHAPES.values()) // RANKS * (RANKS - 1) * ITEM
    for step, _ in found:
        assert len(step.calls) == 1
        assert step.calls[0].startswith("all_gather")
        assert step.sent == expected
    _note("replicas, shared state", projection, found)


@pytest.mark.parametrize("projection", COORDINATES)
def test_replicated_shards_gather_once(projection: str) -> None:
    """HSDP: each replica steps its share of the rows, and the others get them."""
    found = measure("HSDP 2x2", projection)
    for step, refresh in found:
        assert step.calls == ["all_to_all_single"]
        assert refresh.calls.count("all_reduce") == 1
    _note("HSDP 2x2", projection, found)


def test_replicas_that_keep_everything_step_in_silence() -> None:
    for projection in ("svd", *COORDINATES):
        found = measure("replicas", projection)
        assert all(not step.calls for step, _ in found)
        _note("replicas", projection, found)


@pytest.mark.parametrize("layout", ["Shard(0)", "Shard(1)", "ZeRO-1/2", "ZeRO-3", "replicas, shared state", "HSDP 2x2"])
def test_a_refresh_agrees_once_gathers_once_and_broadcasts_per_owner(layout: str) -> None:
    """Beyond the step's own calls: one all-reduce, at most one gather of gradients, one broadcast per owner."""
    found = measure(layout, "svd")
    owners = len(SHAPES)
    for step, refresh in found:
        extra = list(refresh.calls)
        for call in step.calls:
            extra.remove(call)
        assert extra.count("all_reduce") == 1
        assert extra.count("broadcast") == owners
        assert extra.count("all_to_all_single") <= 1
        assert len(extra) <= 2 + owners
    assert len({tuple(refresh.calls) for _, refresh in found}) == 1, "ranks differ in what they call"
    _note(layout, "svd", found)


TENSOR_PARALLEL = ("FSDP2 2 x TP 2", 4)


@pytest.mark.parametrize("projection", COORDINATES)
def test_coordinates_never_communicate_on_meshes_that_cut_everything(projection: str) -> None:
    found = measure(TENSOR_PARALLEL, projection)
    assert all(not step.calls and not refresh.calls for step, refresh in found)
    _note(TENSOR_PARALLEL[0], projection, found)


def test_bases_beside_tensor_parallelism_send_what_is_cut_the_other_way() -> None:
    """The tall matrix is cut by rows on both axes and has a right basis: nothing. The wide one lies in quarters and has
    a left basis: each rank has one half of the columns that it computes, and gets the other.
    """
    found = measure(TENSOR_PARALLEL, "svd", density=0.25)
    rows, cols = SHAPES["wide"]
    for step, refresh in found:
        assert step.calls == ["all_to_all_single"] * 2
        assert step.sent == 2 * (rows * cols // RANKS // 2) * ITEM
        assert sorted(set(refresh.calls) - {"all_to_all_single"}) == ["all_reduce", "broadcast"]
        assert refresh.calls.count("all_reduce") == 1
    _note(TENSOR_PARALLEL[0], "svd", found)
