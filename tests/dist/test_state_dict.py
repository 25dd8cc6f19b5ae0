"""state_dict, copies and pickles on several ranks: loaded anew, a run ends in the bits of one without a stop.

What does not fit is refused on all ranks alike at the next step.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cases
import pytest
import resuming
import torch
import torch.distributed as dist
from cases import ON_REFRESH, PROJECTIONS, Case, gradients, weights
from resuming import Saved, from_bytes
from selection import mostly_heavy, taking_turns
from storages import Held, cut_like, replicas
from threads import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from frugal_dist import Frugal

NAMES = ("tall", "wide", "row", "experts")
LAYOUTS = {"replicas, shared state": 3, "Shard(0)": 3, "HSDP 2x2": 4}
MORE_LAYOUTS = {"replicas": 2, "Shard(1)": 2, "ZeRO-1/2, 3 sub-groups": 3, "ZeRO-3": 3}
RANKS = {**LAYOUTS, **MORE_LAYOUTS}


def case_of(projection: str, side: str, mode: str, turn: int = 0) -> Case:
    return Case(projection, side, mode, turn, names=NAMES, free="sign" if projection == "blockwise" else "")


CASES = [
    case_of(projection, side, mode, turn)
    for turn, (projection, side) in enumerate(PROJECTIONS)
    for mode in ON_REFRESH
    if projection != "blockwise" or mode == "reset"
]
SOME = [case_of(projection, side, ON_REFRESH[turn % 3], turn) for turn, (projection, side) in enumerate(PROJECTIONS)]


def named(case: Case) -> str:
    return f"{case.projection}-{case.side}-{case.on_refresh}"


def check(layout: str, case: Case, points: tuple[int, ...], schedule: resuming.Schedule = resuming.nothing) -> None:
    found = run_ranks(RANKS[layout], lambda rank: resuming.resume_everywhere(layout, case, points, schedule))
    assert found == [{step: [] for step in points}] * RANKS[layout]


@pytest.mark.parametrize(("case", "layout"), taking_turns(CASES, LAYOUTS, every=4, name=named))
def test_bit_for_bit_at_and_between_refreshes(layout: str, case: Case, request: pytest.FixtureRequest) -> None:
    """Step 3 refreshes, step 2 does not. They take turns, with --heavy each has both."""
    turn = (list(LAYOUTS).index(layout) + CASES.index(case)) % 2
    check(layout, case, (2, 3) if request.config.getoption("--heavy") else (2 + turn,))


@pytest.mark.parametrize(("case", "layout"), taking_turns(SOME, MORE_LAYOUTS, every=2, name=named))
def test_bit_for_bit_on_other_layouts(layout: str, case: Case, request: pytest.FixtureRequest) -> None:
    """The moments take turns."""
    turn = (list(MORE_LAYOUTS).index(layout) + SOME.index(case)) % 2
    check(layout, case, (2, 3) if request.config.getoption("--heavy") else (2 + turn,))


@pytest.mark.parametrize("layout", mostly_heavy(RANKS, ["replicas, shared state", "HSDP 2x2", "ZeRO-3"]))
def test_before_the_first_step_and_after_the_last(layout: str) -> None:
    check(layout, case_of("svd", "std", "keep"), (0, 1, 4, 6))
    check(layout, case_of("randk", "std", "keep"), (0, 1, 4, 6))


@pytest.mark.parametrize(
    ("layout", "projection"),
    taking_turns([*LAYOUTS, "replicas", "Shard(1)"], ["svd", "columns", "randk", "blockwise"], every=2),
)
def test_state_that_an_engine_creates_with_zero_gradients(layout: str, projection: str) -> None:
    """torch.distributed.checkpoint makes its template so. It must fit what a run saves, and be a beginning."""
    case = case_of(projection, "std", "keep")

    def body(rank: int) -> list[str]:
        held = resuming.build(layout, case, resuming.weights())
        held.step({name: torch.zeros_like(grad) for name, grad in resuming.of_case(case, gradients()[0]).items()})
        template = resuming.to_bytes(resuming.asked_by_torch(held.optimizer))
        at_four, whole = resuming.build(layout, case, resuming.weights()), resuming.straight(layout, case, ())[1]
        resuming.train(at_four, case, 0, last=4)
        run = resuming.to_bytes(resuming.asked_by_torch(at_four.optimizer))
        started = resuming.resumed(layout, case, 0, (resuming.weights(), template))
        resumed = resuming.resumed(layout, case, 4, (at_four.full(), run))
        apart = [*resuming.differences(started, whole), *resuming.differences(resumed, whole)]
        return [*shapes_apart(from_bytes(template), from_bytes(run)), *apart]

    assert run_ranks(RANKS[layout], body) == [[]] * RANKS[layout]


def shapes_apart(template: dict[str, Any], run: dict[str, Any]) -> list[str]:
    stores = [found["state"] for found in (template, run)]
    shapes = [{(n, key): value.shape for n, store in state.items() for key, value in store.items()} for state in stores]
    return [str(key) for key in {**shapes[0], **shapes[1]} if shapes[0].get(key) != shapes[1].get(key)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_frozen_parameters(layout: str) -> None:
    """Frozen in steps 0, 1 and 4: saved before there are moments, while training, and frozen with moments."""
    case = case_of("svd", "std", "keep")

    def go_on(held: Held, first: int, last: int) -> Held:
        for step in range(first, last):
            groups, frozen = held.optimizer.param_groups, step in (0, 1, 4)
            grads = resuming.of_case(case, gradients()[step])
            for group in (groups[0], groups[-1]):
                group["params"][0].requires_grad_(not frozen)
            for name in (case.groups()[0]["params"][0], case.groups()[-1]["params"][0]) if frozen else ():
                del grads[name]
            held.step(grads)
        return held

    def body(rank: int) -> list[str]:
        held, saved, apart = resuming.build(layout, case, resuming.weights()), {}, []
        for start, stop in ((0, 2), (2, 4), (4, 5), (5, 6)):
            go_on(held, start, stop)
            saved[stop] = (held.full(), resuming.to_bytes(held.optimizer.state_dict()))
        for stop in (2, 4, 5):
            again = resuming.build(layout, case, saved[stop][0])
            again.optimizer.load_state_dict(from_bytes(saved[stop][1]))
            apart += resuming.differences(go_on(again, stop, 6), held)
        first = from_bytes(saved[2][1])["state"][0]
        return [*apart, *(key for key in first if "exp_avg" in key or "basis" in key)]

    assert run_ranks(RANKS[layout], body) == [[]] * RANKS[layout]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_changed_density_does_not_move_the_state(layout: str) -> None:
    """The cost rule would compute elsewhere with the new density, but the state lies where it was put at first."""

    def schedule(step: int, optimizer: Frugal) -> None:
        for group in optimizer.param_groups[:-1]:
            group["density"] = 0.25 if step < 2 else 0.9
            group["lr"] = 1e-2 / (1 + step)

    case = Case("svd", "std", "keep", names=("tall", "square", "experts"))
    check(layout, case, (2, 3, 4), schedule)


@pytest.mark.parametrize("refresh_schedule", ["together", "staggered"])
@pytest.mark.parametrize("state_full", mostly_heavy(["lion", "sgdm"], ["sgdm"]))
def test_other_rules_and_schedules(state_full: str, refresh_schedule: str) -> None:
    more = (("state_full", state_full), ("refresh_schedule", refresh_schedule))
    for projection in ("svd", "randk"):
        check("HSDP 2x2", replace(case_of(projection, "std", "project"), more=more), (2, 3))


# --- what is refused -------------------------------------------------------------------------------

Loaded = Callable[[int, list[Saved]], dict[str, Any] | None]


def refused(layout: str, case: Case, files: Loaded, ranks: int | None = None) -> str:
    """Save on the usual number of ranks, load ``files(rank, saved)`` on ``ranks``: the one error of all ranks."""
    saved = run_ranks(RANKS[layout], lambda rank: resuming.save(layout, case))
    ranks = ranks or RANKS[layout]
    errors = run_ranks(ranks, lambda rank: resuming.load_and_step(layout, case, saved[0][0], files(rank, saved)))
    assert len(set(errors)) == 1, errors
    return str(errors[0])


def own(rank: int, saved: list[Saved]) -> dict[str, Any]:
    return from_bytes(saved[rank % len(saved)][1])


def without(keys: Callable[[str], bool]) -> Loaded:
    """Rank 1 misses some keys."""

    def files(rank: int, saved: list[Saved]) -> dict[str, Any]:
        state_dict = own(rank, saved)
        if rank == 1:
            for store in state_dict["state"].values():
                for key in [key for key in store if keys(key)]:
                    del store[key]
        return state_dict

    return files


def halved(rank: int, saved: list[Saved]) -> dict[str, Any]:
    """Rank 1's first moments are too short."""
    state_dict = own(rank, saved)
    for store in state_dict["state"].values() if rank == 1 else ():
        for key, value in store.items():
            if "exp_avg" in key and value.numel() > 1:
                store[key] = value.view(-1)[: value.numel() // 2].clone()
    return state_dict


def stale(layout: str, case: Case) -> Loaded:
    """Rank 1's file is older."""
    old = run_ranks(RANKS[layout], lambda rank: resuming.save(layout, case, 2))
    return lambda rank, saved: own(rank, old if rank == 1 else saved)


SVD, RANDK = case_of("svd", "std", "reset"), case_of("randk", "std", "keep")
REFUSED = [("replicas, shared state", SVD), ("replicas, shared state", RANDK), ("Shard(0)", RANDK), ("HSDP 2x2", SVD)]


@pytest.mark.parametrize("projection", ["svd", "columns"])
def test_a_file_of_ranks_that_shared_nothing(projection: str) -> None:
    """The hyperparameters are the same: shard_state, or the number of ranks, must come up."""
    case = case_of(projection, "std", "reset")
    full, data = run_ranks(2, lambda rank: resuming.save("replicas", case))[0]
    for error in run_ranks(
        2, lambda rank: resuming.load_and_step("replicas, shared state", case, full, from_bytes(data))
    ):
        assert error.startswith("ValueError: rank 0: ")
        assert "shard_state as it was" in error
        assert "frugal_dist.checkpoint" in error


@pytest.mark.parametrize(
    ("layout", "case"), REFUSED, ids=lambda value: value if isinstance(value, str) else named(value)
)
class TestRefused:
    def test_the_file_of_rank_0_on_all_ranks(self, layout: str, case: Case) -> None:
        error = refused(layout, case, lambda rank, saved: from_bytes(saved[0][1]))
        assert error.startswith("ValueError: rank 1: ")
        assert "save one file per rank" in error

    def test_another_number_of_ranks(self, layout: str, case: Case) -> None:
        layout = "Shard(0)" if layout == "HSDP 2x2" else layout  # a 2x2 mesh has 4 ranks
        error = refused(layout, case, own, ranks=2)
        assert error.startswith("ValueError: rank 0: ")
        assert "frugal_dist.checkpoint" in error

    def test_missing_counts(self, layout: str, case: Case) -> None:
        assert "rank 1 nothing" in refused(layout, case, without(lambda key: True))

    def test_missing_moments(self, layout: str, case: Case) -> None:
        error = refused(layout, case, without(lambda key: "exp_avg_sq" in key))
        assert error.startswith("ValueError: rank 1: ")
        assert "has no exp_avg_sq" in error or "the loaded exp_avg_sq has nothing" in error

    def test_moments_of_another_shape(self, layout: str, case: Case) -> None:
        error = refused(layout, case, halved)
        assert error.startswith("ValueError: rank 1: ")
        assert "the loaded exp_avg has" in error

    def test_a_rank_that_does_not_load(self, layout: str, case: Case) -> None:
        error = refused(layout, case, lambda rank, saved: None if rank == 1 else own(rank, saved))
        assert error == (
            "ValueError: load_state_dict was called on rank 0, but not on rank 1. All ranks must load or none."
        )

    def test_a_file_of_another_step(self, layout: str, case: Case) -> None:
        assert "were saved at different steps" in refused(layout, case, stale(layout, case))


@pytest.mark.parametrize("projection", ["svd", "columns", "randk"])
def test_whole_state_does_not_become_shared_state(projection: str) -> None:
    case = case_of(projection, "std", "reset")
    saved = run_ranks(2, lambda rank: resuming.save("replicas", case))

    def load(rank: int) -> str:
        state_dict = from_bytes(saved[rank][1])
        return resuming.load_and_step("replicas, shared state", case, saved[0][0], state_dict)

    errors = run_ranks(2, load)
    assert len(set(errors)) == 1
    assert errors[0].startswith("ValueError: rank 0: ")


@pytest.mark.parametrize("projection", ["rows", "randk", "randperm", "blockwise"])
def test_a_state_dict_takes_no_memory_of_its_own(projection: str) -> None:
    """Where the number of selected entries on a rank changes, only torch.distributed.checkpoint gets whole tiles."""

    def body(rank: int) -> bool:
        held = resuming.build("Shard(0)", case_of(projection, "std", "keep"), resuming.weights())
        resuming.train(held, case_of(projection, "std", "keep"), 0, last=4)
        live, saved = held.optimizer.state.values(), held.optimizer.state_dict()["state"].values()
        pointers = [{v.data_ptr() for store in stores for v in store.values() if v.dim()} for stores in (live, saved)]
        return pointers[0] == pointers[1]

    assert run_ranks(3, body) == [True] * 3


# --- copies, groups that come later, owners ---------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("projection", ["svd", "columns", "randk", "blockwise"])
def test_copies_stay_with_their_ranks(projection: str, shared: bool) -> None:
    """Two models of the same names on two halves of the ranks: a copy that took all ranks would mix their weights."""

    def body(rank: int, way: Callable[[Any], Any]) -> list[torch.Tensor]:
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        generator = torch.Generator().manual_seed(rank // 2)
        named = {n: torch.nn.Parameter(torch.randn(8, 6, generator=generator)) for n in "ab"}
        optimizer = Frugal([{"params": list(named.items()), "projected": True}], projection=projection, density=0.5,
                           update_gap=2, process_group=groups[rank // 2], shard_state=shared)  # fmt: skip
        for step in range(6):
            for param in (p for group in optimizer.param_groups for p in group["params"]):
                param.grad = torch.randn(8, 6, generator=generator)
            optimizer.step()
            optimizer = way(optimizer) if step == 2 else optimizer
        with pytest.raises(ValueError, match="process_group of its own cannot be pickled"):
            pickle.dumps(optimizer)
        return [p.detach() for group in optimizer.param_groups for p in group["params"]]

    want = run_ranks(4, lambda rank: body(rank, lambda optimizer: optimizer))
    for way in (copy.deepcopy, copy.copy):
        found = run_ranks(4, lambda rank, way=way: body(rank, way))
        assert all(
            torch.equal(a, b) for one, other in zip(found, want, strict=True) for a, b in zip(one, other, strict=True)
        )


@pytest.mark.parametrize(
    ("projection", "side"), [("svd", "std"), ("svd", "full"), ("random", "full"), ("randk", "std")]
)
def test_a_group_that_came_later(projection: str, side: str) -> None:
    """Built at once in the run that goes on. Owners compute where there was one fewer matrix to share out."""
    options = {"projection": projection, "side": side, "density": 0.5, "compute_layout": "owner", "update_gap": 3}
    groups = [{"params": ["square", "tall"], "projected": True}, {"params": ["high", "small"], "projected": True}]
    start = {name: resuming.weights()[name] for group in groups for name in group["params"]}

    def body(rank: int, layout: str) -> list[str]:
        live, named = cases.LAYOUTS[layout](start, groups[:1], options), {}
        for step, grads in enumerate(gradients()[:6]):
            if step == 2:  # the parameters of a group are cut as the others are
                later = cases.LAYOUTS[layout](start, groups, options).optimizer.param_groups[1]["params"]
                named = dict(zip(groups[1]["params"], later, strict=True))
                live.optimizer.add_param_group({"params": list(named.items()), "projected": True})
            if step == 4:
                full = live.full() | {name: whole(param) for name, param in named.items()}
                twin = cases.LAYOUTS[layout](full, groups, options)
                twin.optimizer.load_state_dict(from_bytes(resuming.to_bytes(live.optimizer.state_dict())))
            for held in (live, twin) if step >= 4 else (live,):
                for name, param in named.items():
                    param.grad = cut_like(grads[name], param) if isinstance(param, DTensor) else grads[name].clone()
                held.step({name: grads[name] for name in start})
        ours, theirs = live.full() | {name: whole(param) for name, param in named.items()}, twin.full()
        return [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]

    for layout in ("replicas, shared state", "Shard(0)"):
        assert run_ranks(3, lambda rank, layout=layout: body(rank, layout)) == [[]] * 3, layout


def whole(param: torch.Tensor) -> torch.Tensor:
    return (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()


@pytest.mark.parametrize("side", ["std", "full"])
def test_state_that_other_owners_saved(side: str) -> None:
    """Versions that shared out the owners otherwise: who holds the moments of a matrix goes on as its owner."""
    case = replace(case_of("svd", side, "keep"), more=(("compute_layout", "owner"),))
    saved, whole_run = {}, {}

    def save(rank: int) -> None:
        held = resuming.build("Shard(0)", case, resuming.weights())
        resuming.train(held, case, 0, last=4)
        saved[rank] = (held.full(), from_bytes(resuming.to_bytes(held.optimizer.state_dict())))
        resuming.train(held, case, 4)
        whole_run[rank] = held.full()

    def exchanged(rank: int) -> dict[str, Any]:
        """Rank 0's and rank 1's moments and bases of matrices in each other's place."""
        other, state_dict = 1 - rank, copy.deepcopy(saved[rank][1])
        for number, store in state_dict["state"].items():
            owned = [key for key in store if "basis" in key or "exp_avg" in key]
            if "updates" in {key.rpartition("/")[2] for key in store}:
                for key in owned:
                    del store[key]
                theirs = saved[other][1]["state"][number]
                store.update({k.replace(f"@rank{other}", f"@rank{rank}"): v for k, v in theirs.items() if v.ndim})
        return state_dict

    def body(rank: int) -> list[str]:
        held = resuming.build("Shard(0)", case, saved[rank][0])
        held.optimizer.load_state_dict(exchanged(rank))
        resuming.train(held, case, 4)
        return [
            name
            for name, tensor in held.full().items()
            if not torch.allclose(tensor, whole_run[rank][name], rtol=0, atol=1e-12)
        ]

    run_ranks(2, save)
    assert run_ranks(2, body) == [[], []]


def test_what_cannot_be_loaded_is_told_at_the_next_step_of_all_ranks() -> None:
    case = case_of("svd", "std", "keep")

    def other_optimizer(state_dict: dict[str, Any]) -> None:
        for group in state_dict["param_groups"]:
            del group["projection"]

    def other_name(state_dict: dict[str, Any]) -> None:
        state_dict["param_groups"][0]["param_names"][0] = "renamed"

    def other_order(state_dict: dict[str, Any]) -> None:
        names = state_dict["param_groups"][-1]["param_names"]
        names[:2] = names[1::-1]

    for change, said in ((other_optimizer, "another optimizer"), (other_name, "renamed"), (other_order, "elsewhere")):

        def files(rank: int, saved: list[Saved], change: Callable[[dict[str, Any]], None] = change) -> dict[str, Any]:
            state_dict = own(rank, saved)
            if rank == 1 or change is other_order:
                change(state_dict)
            return state_dict

        assert said in refused("Shard(0)", case, files)


def test_who_saves_one_rank_of_ddp_is_told() -> None:
    """The idiom of torch's tutorials would lose the other ranks' parts."""

    def save(rank: int) -> None:
        held = replicas(weights(), Case("columns", "std", "reset").groups(), {"lr": 1e-2, "projection": "columns"})
        held.step(gradients()[0])
        for _ in range(2):
            held.optimizer.state_dict()

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run_ranks(2, save)
    assert sum("only rank 0's part" in str(one.message) for one in found) == 1


def test_parameters_that_are_wrapped_after_loading() -> None:
    """Accelerate loads the optimizer's own state before it shards the model, on one rank as on many."""

    def run(rank: int) -> torch.Tensor:
        plain = torch.nn.Parameter(weights()["high"].clone())
        optimizer = Frugal([{"params": [("w", plain)], "projected": True}], lr=1e-2, projection="columns")
        optimizer.load_state_dict(optimizer.state_dict())
        mesh = init_device_mesh("cpu", (1,))
        param = torch.nn.Parameter(DTensor.from_local(weights()["high"].clone(), mesh, [Shard(0)]))
        optimizer.param_groups[0]["params"] = [param]
        param.grad = DTensor.from_local(gradients()[0]["high"].clone(), mesh, [Shard(0)])
        optimizer.step()
        return param.detach().to_local()

    assert not torch.equal(run_ranks(1, run)[0], weights()["high"])
