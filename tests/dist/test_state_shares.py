"""Each rank keeps its share of the low-rank state: the ranks' elements add up to one process's, none twice."""

from __future__ import annotations

from math import prod

import pytest
import tables
import torch
from cases import GAP, LAYOUTS, MATRICES, PROJECTIONS, Case, gradients, label, weights
from selection import taking_turns
from storages import replicas
from threads import run_ranks

from frugal_dist import Frugal

RANKS = 4
CUT_EVENLY = [(p, s) for p, s in PROJECTIONS if p in ("svd", "random", "dct") and s != "full"]
"""Bases that are cut in proportion to what a rank holds; of coordinates a rank has what falls into its part."""


def elements(build: object, case: Case) -> dict[str, int]:
    """Elements of the moments of every matrix on this rank, after the second refresh."""
    held = build(weights(), case.groups(), case.options)  # type: ignore[operator]
    for grads in gradients()[: GAP + 1]:
        held.step(grads)
    _, inputs = held.optimizer.everything()
    found: dict[str, int] = {}
    for mat in inputs.mats:
        moments = [mat.state.get(name) for name in ("exp_avg", "exp_avg_sq")]
        name = mat.matrix.name.split("[")[0]
        found[name] = found.get(name, 0) + sum(moment.numel() for moment in moments if moment is not None)
    return found


@pytest.mark.parametrize(("chosen", "layout"), taking_turns(PROJECTIONS, LAYOUTS, every=5, name="-".join))
def test_the_ranks_elements_add_up(chosen: tuple[str, str], layout: str) -> None:
    projection, side = chosen
    case = Case(projection, side, "reset")
    alone = Case(projection, side, "reset", more=(("process_group", None),))
    total = elements(replicas, alone)
    ranks = run_ranks(RANKS, lambda rank: elements(LAYOUTS[layout], case))
    copies = RANKS if layout == "replicas" else 1
    for name in MATRICES:
        assert sum(found[name] for found in ranks) == copies * total[name], name
    title, row = "elements of low-rank moments per rank", f"{layout}, {label(projection, side)}"
    for rank, found in enumerate(ranks):
        tables.count(title, row, f"rank {rank}", sum(found.values()))
    tables.count(title, row, "sum", sum(sum(found.values()) for found in ranks))


@pytest.mark.parametrize("side", ["full", "std"])
@pytest.mark.parametrize("layout", ["auto", "owner"])
def test_matrices_added_later_leave_the_others_where_their_state_is(layout: str, side: str) -> None:
    """A larger one would change all owners if they were chosen anew."""

    def run(**options: object) -> list[torch.Tensor]:
        def group(*names: str) -> dict[str, object]:
            for name in names:
                named[name] = torch.nn.Parameter(torch.zeros(sizes[name], sizes[name], dtype=torch.float64))
            return {"params": [(name, named[name]) for name in names], "projected": True}

        sizes, named = {"a": 8, "b": 8, "late": 16}, {}  # type: ignore[var-annotated]
        optimizer = Frugal([group("a", "b")], lr=0.01, update_gap=3, side=side, eps=1e-3, state_free="sgd", **options)
        for step in range(8):
            if step == 4:
                saved = [sorted(store) for store in optimizer.state_dict()["state"].values()]
                optimizer.add_param_group(group("late"))
                assert [sorted(store) for store in optimizer.state_dict()["state"].values()] == saved
            for number, parameter in enumerate(named.values()):
                generator = torch.Generator().manual_seed(100 * step + number)
                parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            optimizer.step()
        return [parameter.detach() for parameter in named.values()]

    expected = run(process_group=None)
    for found in run_ranks(2, lambda rank: run(compute_layout=layout)):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("layout", ["replicas, shared state", "ZeRO-3"])
@pytest.mark.parametrize(("projection", "side"), CUT_EVENLY)
def test_a_rank_holds_its_share_within_rounding(layout: str, projection: str, side: str) -> None:
    """What is stored evenly is computed evenly: at most one line of R more or less per matrix and moment."""
    case = Case(projection, side, "reset")
    total = elements(replicas, Case(projection, side, "reset", more=(("process_group", None),)))
    for found in run_ranks(RANKS, lambda rank: elements(LAYOUTS[layout], case)):
        for name, shape in MATRICES.items():
            stack = prod(shape[:-2])
            line = max(shape[-2:]) * 2 * stack  # a row or column of R has r entries, r <= the shorter side
            assert abs(found[name] - total[name] / RANKS) <= line, name


def test_a_basis_is_kept_by_those_who_use_it() -> None:
    """Under whole-matrix owners exactly one rank has the basis."""
    case = Case("svd", "std", "reset", more=(("compute_layout", "owner"),))

    def bases(rank: int) -> list[bool]:
        held = LAYOUTS["Shard(0)"](weights(), case.groups(), case.options)
        held.step(gradients()[0])
        _, inputs = held.optimizer.everything()
        return [mat.state.get("basis") is not None for mat in inputs.mats]

    for holders in zip(*run_ranks(RANKS, bases), strict=True):
        assert sum(holders) == 1


@pytest.mark.parametrize("layout", ["Shard(0)", "ZeRO-3"])
def test_dct_has_a_basis_on_no_rank(layout: str) -> None:
    """Beside moments and counters a rank keeps numbers of columns, r at most for each matrix and expert."""

    def beside(rank: int) -> list[tuple[torch.dtype, int]]:
        case = Case("dct", "std", "keep")
        held = LAYOUTS[layout](weights(), case.groups(), case.options)
        for grads in gradients()[: GAP + 1]:
            held.step(grads)
        stores = [store.items() for store in held.optimizer.state.values()]
        named = [pair for items in stores for pair in items if "exp_avg" not in pair[0]]
        return [(value.dtype, value.numel()) for _, value in named if value.dim()]

    most = sum(prod(shape[:-2]) * min(shape[-2:]) for shape in MATRICES.values())
    for found in run_ranks(RANKS, beside):
        assert {dtype for dtype, _ in found} == {torch.int32}
        assert sum(count for _, count in found) < most
        assert max(count for _, count in found) < max(min(shape[-2:]) for shape in MATRICES.values())


def test_a_moment_is_stored_once() -> None:
    """No view keeps more memory alive than the moment itself."""

    def excess(rank: int) -> int:
        case = Case("svd", "std", "reset")
        held = LAYOUTS["ZeRO-3"](weights(), case.groups(), case.options)
        held.step(gradients()[0])
        tensors = [v for store in held.optimizer.state.values() for v in store.values() if v.dim()]
        return sum(v.untyped_storage().nbytes() - v.numel() * v.element_size() for v in tensors)

    assert run_ranks(RANKS, excess) == [0] * RANKS
