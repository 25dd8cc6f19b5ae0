"""Meshes of several axes: every layout gives the weights of one process, float64 to 1e-10.

python -m pytest tests/dist/test_meshes.py             # every projection on every layout
python -m pytest tests/dist/test_meshes.py --heavy     # each with every treatment of the state
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import tables
import torch
import torch.distributed as dist
from cases import MATRICES, ON_REFRESH, PROJECTIONS, REGULAR, Case, gradients, label, reference, weights
from meshes import LAYOUTS, Cut, Place, mesh, on_places, pipeline
from selection import mostly_heavy, taking_turns
from storages import Named, replicas
from test_state_shares import elements
from threads import run_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from frugal_dist import Frugal
from frugal_dist.engines import dtensor
from frugal_dist.sharding.shard import Box, ParamSpec

COUNTED = (("FSDP2 2 x TP 2", 4), ("HSDP 2 x FSDP2 2 x TP 2", 8), ("FSDP2 2 x EP 2", 4))
"""Their elements of state are added up."""


def settings(turn: int, heavy: bool) -> list[Case]:
    found = []
    for position, (projection, side) in enumerate(PROJECTIONS):
        modes = ON_REFRESH if projection != "blockwise" else ON_REFRESH[:1]
        chosen = modes if heavy else [modes[(turn + position) % len(modes)]]
        found += [Case(projection, side, mode, (turn + position) % 3) for mode in chosen]
    return found


def trained(layout: tuple[str, int], case: Case) -> list[Named]:
    def body(rank: int) -> Named:
        held = LAYOUTS[layout](weights(), case.groups(), case.options)
        for grads in gradients() if held else ():
            held.step(grads)
        return held.full() if held else {}

    return run_ranks(layout[1], body)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "layout",
    mostly_heavy(LAYOUTS, [layout for layout in LAYOUTS if layout[1] < 8]),
    ids=lambda layout: f"{layout[0]}, {layout[1]} ranks",
)
def test_the_weights_of_one_process(layout: tuple[str, int], request: pytest.FixtureRequest) -> None:
    worst = {}
    for case in settings(list(LAYOUTS).index(layout), request.config.getoption("--heavy")):
        want, found = reference(case), 0.0
        for full in trained(layout, case):
            assert set(full) in ({*MATRICES, *REGULAR}, set())
            found = max([found, *(float((value - want[name]).abs().max()) for name, value in full.items())])
        tables.note(
            "meshes, float64: largest difference",
            f"{layout[0]}, {layout[1]} ranks",
            label(case.projection, case.side),
            found,
        )
        worst[case] = found
    assert not {case: value for case, value in worst.items() if not value <= case.tolerance}


@pytest.mark.parametrize(
    ("chosen", "layout"),
    taking_turns(
        PROJECTIONS, [("FSDP2 2 x TP 2", 4), ("HSDP 2 x FSDP2 2 x TP 2", 8), ("FSDP2 2 x EP 2", 4)], name="-".join
    ),
)
def test_the_ranks_elements_add_up(chosen: tuple[str, str], layout: tuple[str, int]) -> None:
    projection, side = chosen
    case = Case(projection, side, "reset")
    total = elements(replicas, Case(projection, side, "reset", more=(("process_group", None),)))
    ranks = run_ranks(layout[1], lambda rank: elements(LAYOUTS[layout], case))
    for name in MATRICES:
        assert sum(found[name] for found in ranks) == total[name], name
    title, row = "elements of low-rank moments per rank, meshes", f"{layout[0]}, {label(projection, side)}"
    for rank, found in enumerate(ranks):
        tables.count(title, row, f"rank {rank}", sum(found.values()))
    tables.count(title, row, "sum", sum(sum(found.values()) for found in ranks))


# --- which part lies where --------------------------------------------------------------------------------------------

SHAPES = ((8, 12), (16, 8, 8), (13, 7), (5, 3), (2, 9))
MESHES = ((4,), (2, 2), (4, 2), (2, 2, 2))


def _part(tensor: DTensor) -> Tensor:
    """The numbers of what is said to lie here, put together in the order of the local tensor."""
    numbers = torch.arange(tensor.numel()).view(tensor.shape)
    part = dtensor._part("w", tensor)
    found = torch.full(tensor.to_local().shape, -1)
    for box, here in part.boxes(found):  # type: ignore[union-attr]
        here.copy_(numbers[tuple(slice(*span) for span in box.spans)])
    return found


def _on_every_rank(shape: tuple[int, ...]) -> Any:
    """A mesh as each rank sees it, in one process; nothing can be sent."""
    for rank in range(int(torch.Size(shape).numel())):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=int(torch.Size(shape).numel()))
        try:
            yield mesh(*shape)
        finally:
            dist.destroy_process_group()


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_parts_are_what_torch_puts_there(shape: tuple[int, ...]) -> None:
    """distribute_tensor cuts axis after axis from the left. Where everything divides, FSDP2 cuts the same."""
    choices = (Replicate(), Shard(0), Shard(1), Shard(-1))
    checked = 0
    for axes in _on_every_rank(shape):
        for size, placements in product(SHAPES, product(choices, repeat=len(shape))):
            whole = torch.arange(int(torch.Size(size).numel())).view(size)
            tensor = distribute_tensor(whole, axes, placements, src_data_rank=None)
            assert torch.equal(_part(tensor), tensor.to_local()), (size, placements)
            found = dtensor._part("w", tensor)
            assert isinstance(found, Box)
            if tensor.to_local().numel() and Shard(-1) not in placements:
                local, offset = compute_local_shape_and_global_offset(size, axes, placements)
                assert found.spans == tuple((a, a + n) for a, n in zip(offset, local, strict=True))
            checked += 1
        for factor, size in product((2, 4), SHAPES[:2]):  # packed layers
            placements = (_StridedShard(0, split_factor=factor), *[Replicate()] * (len(shape) - 1))
            whole = torch.arange(int(torch.Size(size).numel())).view(size)
            tensor = distribute_tensor(whole, axes, placements, src_data_rank=None)
            assert torch.equal(_part(tensor), tensor.to_local()), (size, placements)
    assert checked


@pytest.mark.parametrize("packed", [1, 2])
@pytest.mark.parametrize("shape", MESHES[1:], ids=str)
def test_parts_that_fsdp_cuts_after_others_uneven_or_packed(shape: tuple[int, ...], packed: int) -> None:
    """There the words of the placements say something else than what lies there, and FSDP2 is right."""
    for axes in _on_every_rank(shape):
        for size in SHAPES:
            last = len(shape) - 1
            for dim in range(len(size) - 1):
                cuts = (Cut(last, dim, packed), *(Cut(axis, dim) for axis in reversed(range(last))))
                place = Place(axes, cuts)
                numbers = torch.arange(int(torch.Size(size).numel())).view(size)
                assert torch.equal(_part(place.put(numbers)), place.local(numbers)), (size, cuts)


def test_a_shard_of_another_size_is_refused() -> None:
    for axes in _on_every_rank((4,)):
        tensor = DTensor.from_local(torch.ones(3, 2), axes, [Shard(0)], run_check=False, shape=(8, 2), stride=(2, 1))
        with pytest.raises(ValueError, match="w: this rank's shard is"):
            dtensor._part("w", tensor)
        partial = DTensor.from_local(torch.ones(8, 2), axes, [Partial()], run_check=False)
        with pytest.raises(ValueError, match="a Partial parameter has no values"):
            dtensor._part("w", partial)


def test_a_grid_is_cut_by_rows_and_members() -> None:
    part = dtensor.Grid((((0, 1), (3, 4)), ((0, 2), (4, 6)), ((0, 5),)))
    spec = ParamSpec("w", (4, 8, 5), True, True, 0, 0)
    numbers = torch.arange(4 * 8 * 5).view(4, 8, 5)
    local = torch.cat([torch.cat([numbers[e : e + 1, :2], numbers[e : e + 1, 4:6]], 1) for e in (0, 3)])
    assert part.tiles(spec, 1) == ()
    tiles = part.tiles(spec, 3)
    for tile, view in zip(tiles, part.views(local, spec, 3, tiles), strict=True):
        assert torch.equal(view, numbers[3, slice(*tile.rows), slice(*tile.cols)])
    assert [box.spans[0] for box, _ in part.rows(1, 2).boxes(local[1:2])] == [(3, 4), (3, 4)]


# --- gradients that are not everywhere, or not whole ------------------------------------------------------------------


@pytest.mark.parametrize("silent", [False, True])
def test_experts_without_tokens(silent: bool) -> None:
    """An expert that gets no token has zeros, or, on ranks that have no other, no gradient at all: as everywhere it is
    left alone then.
    """
    idle = (0, 1, 3)

    def trained(build: Any, **options: Any) -> Named:
        case = Case("svd", "std", "keep", free="sgd")
        held = build(weights(), case.groups(), {**case.options, **options})
        for step in range(6):
            grads = {name: grad.clone() for name, grad in gradients()[step].items()}
            grads["experts"][2] *= 0.0 if step in idle else 1.0
            held.step(grads)
        full: Named = held.full()
        return full

    def build(start: Named, groups: Any, options: dict[str, Any]) -> Any:
        dense, experts = mesh(4), mesh(2, 2)

        def place(name: str, weight: Tensor) -> Place:
            return Place(experts, (Cut(1, 0), Cut(0, 1))) if weight.dim() == 3 else Place(dense, (Cut(0, 0),))

        def lacks(name: str, step: int) -> bool:
            return silent and name == "experts" and step in idle and dist.get_rank() % 2 == 1

        return on_places(start, groups, options, place, lacks)

    want = trained(replicas, process_group=None)
    for full in run_ranks(4, lambda rank: trained(build)):
        apart = {name: (full[name] - want[name]).abs() for name in want}
        if silent:
            assert float(apart["experts"][2].max()) > 1e-4
            apart["experts"] = apart["experts"][:2]
        assert max(float(difference.max()) for difference in apart.values()) < 1e-10


def test_addends_of_which_a_rank_has_none() -> None:
    """One rank has seen no token, and so no gradient of the norm; the others' add up without it."""

    def body(rank: int) -> tuple[float, list[int]]:
        tp, ones = mesh(4), torch.ones(8, 8, dtype=torch.float64)
        weight, norm = (nn.Parameter(distribute_tensor(ones.clone(), tp, [p])) for p in (Shard(0), Replicate()))
        groups = [{"params": [("w", weight)], "projected": True}, {"params": [("norm", norm)], "projected": False}]
        optimizer, steps = Frugal(groups, lr=0.1, state_full="sgdm", momentum=0.0, density=0.5), []
        for silent in ((1,), (0, 1, 2, 3), (2, 3)):
            weight.grad = torch.ones_like(weight)
            grad = DTensor.from_local(ones * (rank + 1), tp, [Partial()], run_check=False)
            norm.grad = None if rank in silent else grad
            optimizer.step()
            steps.append(int(optimizer.state[norm]["step"]))
        return float(norm.detach().to_local()[0, 0]), steps

    found = run_ranks(4, body)
    assert [value for value, _ in found] == pytest.approx([1 - 0.1 * (1 + 3 + 4) - 0.1 * (1 + 2)] * 4)
    assert [steps for _, steps in found] == [[1, 1, 2]] * 4


def test_ordinary_tensors_beside_dtensors_are_replicas_or_refused() -> None:
    def body(rank: int, equal: bool) -> str:
        sharded = nn.Parameter(
            distribute_tensor(weights()["tall"], mesh(2, 2), [Shard(0), Shard(1)], src_data_rank=None)
        )
        plain = nn.Parameter(weights()["square"] + (0 if equal else rank))
        optimizer = Frugal([{"params": [("a", sharded), ("b", plain)], "projected": True}], lr=1e-2)
        sharded.grad, plain.grad = sharded.detach() * 2, torch.ones_like(plain)
        try:
            optimizer.step()
        except ValueError as error:
            return str(error)
        return ""

    assert run_ranks(4, lambda rank: body(rank, True)) == [""] * 4
    for message in run_ranks(4, lambda rank: body(rank, False)):
        assert "b: ranks (0, 1, 2, 3) hold different weights under this name" in message


# --- groups -----------------------------------------------------------------------------------------------------------


def test_groups_are_made_once() -> None:
    """Two meshes that overlap, and ranks that know each other through others only."""

    def body(rank: int) -> tuple[bool, list[int]]:
        both = mesh(2, 4, names="ab")[("a", "b")]
        first, second = both["a"], mesh(4, 2, names="cd")["d"]
        tensors = [
            distribute_tensor(torch.ones(4, 4), axes, [Shard(0)], src_data_rank=None) for axes in (first, second)
        ]
        group, again = dtensor.mesh_group(tensors), dtensor.mesh_group(tensors)
        return group is again, dist.get_process_group_ranks(group)

    # {0,4} {1,5} {2,6} {3,7} along a, {0,1} {2,3} {4,5} {6,7} along d.
    expected = [[0, 1, 4, 5], [2, 3, 6, 7]]
    for rank, (same, ranks) in enumerate(run_ranks(8, body)):
        assert same
        assert ranks == expected[rank % 4 // 2]


@pytest.mark.parametrize(("projection", "schedule"), [("blockwise", "together"), ("svd", "staggered")])
def test_stages_that_count_need_the_whole_model(projection: str, schedule: str) -> None:
    case = Case(projection, "std", "reset", free="sgd", more=(("refresh_schedule", schedule),))

    def body(rank: int, **more: Any) -> str:
        try:
            held = pipeline(weights(), case.groups(), {**case.options, **more})
            for _ in range(2):
                held.step(gradients()[0])
        except ValueError as error:
            return str(error)
        return ""

    def without(rank: int) -> str:
        return body(rank, whole_model=None)

    assert run_ranks(4, body) == [""] * 4
    for message in run_ranks(4, without):
        assert "counts the matrices of the whole model" in message
        assert "whole_model=split_parameters(model)" in message


def test_staggered_stages_refresh_as_one_process_does() -> None:
    case = Case("svd", "std", "keep", more=(("refresh_schedule", "staggered"),))
    want = reference(case)

    def body(rank: int) -> Named:
        held = pipeline(weights(), case.groups(), case.options)
        for grads in gradients():
            held.step(grads)
        return held.full()

    for full in run_ranks(4, body):
        assert max(float((full[name] - want[name]).abs().max()) for name in want) < 1e-10
