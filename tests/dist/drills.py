"""Things that go wrong on one rank. The bodies run on threads or on processes as ranks, and alone as the reference."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from cases import GAP, LAYOUTS, STEPS, gradients, weights
from storages import Held, Named, replicas

import frugal_dist.projection.svd
from frugal_dist.projection.svd import exact_svd
from frugal_dist.step.state import COUNTERS

NAMES = ("tall", "wide", "square", "experts", "norm")
OTHER_NAME = {"wide": "other"}
VICTIM = "square"
SPOILED = 1
"""The rank on which it happens."""


@dataclass
class Outcome:
    """How one rank ended: its error or "", the whole weights, its counts, and how many steps it made."""

    error: str
    weights: Named
    counters: dict[str, int]
    steps: int


@dataclass
class Plan:
    """What a rank builds; a drill may change it before."""

    weights: Named
    groups: list[dict[str, Any]]
    options: dict[str, Any]


def nothing(*args: Any) -> None:
    """Leave everything as it is."""


@dataclass(frozen=True)
class Drill:
    """A run on ``layout`` with ``ranks`` ranks, and what happens in it.

    ``build(rank, plan)`` changes what a rank builds, ``grads(rank, step, grads)`` the gradients it sees (a None deletes
    one), ``before(rank, step, held)`` meddles with the optimizer, ``svd`` stands in for ``exact_svd``.
    """

    layout: str
    options: dict[str, Any]
    build: Callable[[int, Plan], None] = nothing
    grads: Callable[[int, int, dict[str, Any]], None] = nothing
    before: Callable[[int, int, Held], None] = nothing
    svd: Callable[[], Callable[..., Any]] | None = None
    ranks: int = 2
    steps: int = STEPS

    def patched(self) -> contextlib.AbstractContextManager[Any]:
        if self.svd is None:
            return contextlib.nullcontext()
        return mock.patch.object(frugal_dist.projection.svd, "exact_svd", self.svd())

    def alone(self) -> Outcome:
        """On one process, which sees what the spoiled rank sees."""
        return self.run(SPOILED, alone=True)

    def run(self, rank: int, alone: bool = False) -> Outcome:
        start = {name: weights()[name] for name in NAMES}
        projected = [name for name in NAMES if name != "norm"]
        groups = [{"params": projected, "projected": True}, {"params": ["norm"], "projected": False}]
        plan = Plan(start, groups, {"update_gap": GAP, "lr": 1e-2, "weight_decay": 0.1, **self.options})
        if alone:
            plan.options["process_group"] = None
        else:
            self.build(rank, plan)
        held, step, error = None, 0, ""
        try:
            held = (replicas if alone else LAYOUTS[self.layout])(plan.weights, plan.groups, plan.options)
            for step in range(self.steps):
                seen: dict[str, Any] = {n: _gradient(step, n, w.shape) for n, w in plan.weights.items()}
                self.grads(rank, step, seen)
                if not alone:
                    self.before(rank, step, held)
                held.step({name: grad for name, grad in seen.items() if grad is not None})
        except (ValueError, RuntimeError) as problem:
            error = f"{type(problem).__name__}: {problem}"
        full = held.full() if held is not None and not error else {}
        return Outcome(error, full, _counters(held), step)


def _gradient(step: int, name: str, shape: torch.Size) -> torch.Tensor:
    known = {other: name for name, other in OTHER_NAME.items()}
    return gradients()[step][known.get(name, name)].clone().view(shape)


def _counters(held: Held | None) -> dict[str, int]:
    stores = held.optimizer.state.values() if held is not None else ()
    return {
        f"{number}/{key}": int(value)
        for number, store in enumerate(stores)
        for key, value in store.items()
        if key.rpartition("/")[2] in COUNTERS
    }


# --- what happens ----------------------------------------------------------------------------------


def entry(value: float, at: int) -> Callable[[int, int, dict[str, Any]], None]:
    """One entry of the victim's gradient, in the last row, which sharded layouts store on one rank only."""

    def change(rank: int, step: int, grads: dict[str, Any]) -> None:
        if step == at and rank == SPOILED:
            grads[VICTIM][-1, -1] = value

    return change


def everywhere(change: Callable[[int, int, dict[str, Any]], None]) -> Callable[[int, int, dict[str, Any]], None]:
    """The gradient is the same whoever looks: in sharded layouts each rank sees its own part of it."""
    return lambda rank, step, grads: change(SPOILED, step, grads)


def zeros(at: int) -> Callable[[int, int, dict[str, Any]], None]:
    def change(rank: int, step: int, grads: dict[str, Any]) -> None:
        if step == at:
            grads[VICTIM].zero_()

    return change


def only_the_victim_moves(at: int) -> Callable[[int, int, dict[str, Any]], None]:
    """Before step ``at`` all other gradients are zeros, as behind gates that start at zero."""

    def change(rank: int, step: int, grads: dict[str, Any]) -> None:
        for name in grads:
            if step < at and name != VICTIM:
                grads[name].zero_()

    return change


def mostly_zeros(at: int) -> Callable[[int, int, dict[str, Any]], None]:
    """Only the first row of the gradient is not zero: most ranks see zeros, and yet it is a gradient."""

    def change(rank: int, step: int, grads: dict[str, Any]) -> None:
        if step == at:
            grads[VICTIM][1:].zero_()

    return change


def missing(names: tuple[str, ...], at: tuple[int, ...], on: int | None) -> Callable[[int, int, dict[str, Any]], None]:
    """No gradient at all, on one rank or on all."""

    def change(rank: int, step: int, grads: dict[str, Any]) -> None:
        if step in at and on in (None, rank):
            grads.update(dict.fromkeys(names))

    return change


def late_nan(rank: int, step: int, grads: dict[str, Any]) -> None:
    """Steps without a gradient put the refresh off; a NaN comes before it."""
    if step in (1, 2):
        grads[VICTIM] = None
    if step == GAP:
        grads[VICTIM][-1, -1] = math.nan


def by_turns(rank: int, step: int, grads: dict[str, Any]) -> None:
    """Each rank has no gradient at other steps than its neighbour; all have one at the last, a refresh."""
    if step < STEPS - 1 and (step + rank) % 3 == 0:
        grads.update(dict.fromkeys(NAMES[:-1]))


def failing_svd(calls: set[int], error: Callable[[str], Exception]) -> Callable[[], Callable[..., Any]]:
    """Raises on the numbered attempts (from 1) at the victim, whose shape is unique; only its owner ever tries."""

    def make() -> Callable[..., Any]:
        attempt = 0

        def svd(grad: torch.Tensor, side: str, r: int) -> Any:
            nonlocal attempt
            if tuple(grad.shape) == tuple(weights()[VICTIM].shape):
                attempt += 1
                if attempt in calls:
                    raise error("drill")
            return exact_svd(grad, side, r)

        return svd

    return make


def on_spoiled(change: Callable[[Plan], None]) -> Callable[[int, Plan], None]:
    def build(rank: int, plan: Plan) -> None:
        if rank == SPOILED:
            change(plan)

    return build


def reversed_order(plan: Plan) -> None:
    plan.groups[0]["params"] = plan.groups[0]["params"][::-1]


def without_wide(plan: Plan) -> None:
    plan.groups[0]["params"] = [name for name in plan.groups[0]["params"] if name != "wide"]
    del plan.weights["wide"]


def reshaped(plan: Plan) -> None:
    plan.weights = {**plan.weights, "tall": plan.weights["tall"].view(12, -1)}


def renamed(plan: Plan) -> None:
    plan.weights = {OTHER_NAME.get(name, name): weight for name, weight in plan.weights.items()}
    plan.groups[0]["params"] = [OTHER_NAME.get(name, name) for name in plan.groups[0]["params"]]


def regular_instead(plan: Plan) -> None:
    plan.groups[0]["params"].remove("wide")
    plan.groups[1]["params"].append("wide")


def other_option(key: str, value: Any) -> Callable[[Plan], None]:
    return lambda plan: plan.options.update({key: value})


def touch_weights(at: int) -> Callable[[int, int, Held], None]:
    """Something outside the optimizer changes a weight on one rank."""

    def touch(rank: int, step: int, held: Held) -> None:
        if rank == SPOILED and step == at:
            param = next(p for p in held.optimizer.param_groups[0]["params"] if p.shape == weights()[VICTIM].shape)
            local = param.to_local() if hasattr(param, "to_local") else param
            with torch.no_grad():
                local[-1, -1] += 1.0

    return touch


def freeze(at: Sequence[int]) -> Callable[[int, int, Held], None]:
    """Everything, on all ranks; what has a gradient all the same is stepped."""

    def change(rank: int, step: int, held: Held) -> None:
        for group in held.optimizer.param_groups:
            for param in group["params"]:
                param.requires_grad_(step not in at)

    return change


def forget_schedule(group: int) -> Callable[[int, int, Held], None]:
    """A learning rate that is changed on one rank only."""

    def change(rank: int, step: int, held: Held) -> None:
        if rank == SPOILED and step == 2:
            held.optimizer.param_groups[group]["lr"] = 1e-3

    return change


def halve_density(rank: int, step: int, held: Held) -> None:
    for group in held.optimizer.param_groups:
        group["density"] = group["density"] if step != GAP - 1 else group["density"] / 1.5


def density_to_zero(rank: int, step: int, held: Held) -> None:
    for group in held.optimizer.param_groups:
        group["density"] = 0.25 if step < 4 else 0.0


def structure_changes(rank: int, step: int, held: Held) -> None:
    """What the state depends on, on all ranks."""
    if step == 4:
        held.optimizer.param_groups[0]["side"] = "full"


# --- which ones ------------------------------------------------------------------------------------

SVD: dict[str, Any] = {"projection": "svd"}
LINALG, MEMORY = torch.linalg.LinAlgError, torch.OutOfMemoryError
REPLICATED = ("replicas", "replicas, shared state")
SHARDED = ("Shard(0)", "HSDP 2x2", "ZeRO-1/2, 3 sub-groups", "ZeRO-3")


def _ranks(layout: str) -> int:
    return 4 if layout.startswith("HSDP") else 3


def _like_alone() -> dict[str, Drill]:
    """Drills whose outcome must be that of one process."""
    found = {}
    for layout in (*REPLICATED, *SHARDED):
        same = everywhere if layout in SHARDED else (lambda change: change)
        spoiled = {
            "NaN at a refresh": same(entry(math.nan, GAP)),
            "Inf at the first step": same(entry(-math.inf, 0)),
            "zero at the first step": zeros(0),
            "zero at a refresh": zeros(GAP),
            "zero on most ranks": mostly_zeros(GAP),
        }
        for what, grads in spoiled.items():
            found[f"{what}, {layout}"] = Drill(layout, SVD, grads=grads, ranks=_ranks(layout))
        failures = {"SVD fails once": {2, 3, 4}, "SVD fails at first": {1, 2, 3}, "SVD fails twice": set(range(2, 8))}
        for what, calls in failures.items():
            found[f"{what}, {layout}"] = Drill(layout, SVD, svd=failing_svd(calls, LINALG), ranks=_ranks(layout))
        memory = failing_svd({1, 2, 4}, MEMORY)
        found[f"out of memory, then enough, {layout}"] = Drill(layout, SVD, svd=memory, ranks=_ranks(layout))
    for layout in SHARDED:
        for projection in ("svd", "columns"):
            grads = everywhere(entry(math.nan, GAP + 1))
            found[f"NaN between refreshes, {projection}, {layout}"] = Drill(
                layout, {"projection": projection}, grads=grads, ranks=_ranks(layout)
            )
    for layout in (*REPLICATED, "Shard(0)", "HSDP 2x2"):
        found[f"NaN where a refresh could be due, but is not, {layout}"] = Drill(
            layout, SVD, grads=everywhere(late_nan), ranks=_ranks(layout)
        )
        for projection in ("svd", "randk", "columns"):
            options = {"projection": projection, "on_refresh": "keep"}
            frozen = Drill(layout, options, before=freeze((0, *range(GAP - 1, STEPS))), ranks=_ranks(layout))
            found[f"frozen with its gradient, {projection}, {layout}"] = frozen
    for layout in ("ZeRO-1/2, 3 sub-groups", "ZeRO-3, 4 sub-groups"):
        for projection in ("svd", "columns", "blockwise"):
            found[f"zeros but for one matrix, {projection}, {layout}"] = Drill(
                layout, {"projection": projection, "density": 0.5}, grads=only_the_victim_moves(2), ranks=2
            )
    for layout in ("replicas, shared state", "Shard(0)", "HSDP 2x2"):
        for projection in ("svd", "randk"):
            grads = missing((VICTIM, "norm"), (0, GAP, GAP + 1), None)
            found[f"no gradient anywhere, {projection}, {layout}"] = Drill(
                layout, {"projection": projection, "on_refresh": "keep"}, grads=grads, ranks=_ranks(layout)
            )
    return found


def _refused() -> dict[str, Drill]:
    """Drills that must end in the same error on all ranks before anything is updated."""
    changes: dict[str, Callable[[Plan], None]] = {
        "another seed": other_option("seed", 7),
        "another density": other_option("density", 0.5),
        "another projection": other_option("projection", "columns"),
        "another shard_state": other_option("shard_state", False),
        "another order": reversed_order,
        "a missing parameter": without_wide,
        "another shape": reshaped,
        "another name": renamed,
        "another treatment": regular_instead,
    }
    layouts = ("replicas, shared state", "Shard(0)")
    found = {
        f"{what}, {layout}": Drill(layout, SVD, build=on_spoiled(change), ranks=_ranks(layout))
        for what, change in changes.items()
        for layout in layouts
    }
    for layout, projection in (("replicas", "columns"), ("replicas, shared state", "svd"), ("HSDP 2x2", "svd")):
        options = {"projection": projection, "density": 0.5}
        found[f"no replicas, {layout}"] = Drill(layout, options, before=touch_weights(0), ranks=_ranks(layout))
    return found


def _failing() -> dict[str, Drill]:
    """Drills that end in an error on all ranks in the middle of the run."""
    always = set(range(2, 100))
    found = {}
    for layout in (*REPLICATED, *SHARDED):
        for what, error in (("SVD", LINALG), ("memory", MEMORY)):
            svd = failing_svd(always, error)
            found[f"{what} keeps failing, {layout}"] = Drill(layout, SVD, svd=svd, ranks=_ranks(layout))
        found[f"density goes to 0, {layout}"] = Drill(layout, SVD, before=density_to_zero, ranks=_ranks(layout))
        found[f"structure changes, {layout}"] = Drill(layout, SVD, before=structure_changes, ranks=_ranks(layout))
    for layout in (*REPLICATED, "Shard(0)", "HSDP 2x2"):
        for group, kind in enumerate(("projected", "regular")):
            drill = Drill(layout, SVD, before=forget_schedule(group), ranks=_ranks(layout))
            found[f"a schedule of {kind} parameters on one rank, {layout}"] = drill
    return found


def _healed() -> dict[str, Drill]:
    """Drills after which replicas must be equal again."""
    found = {}
    for layout in (*REPLICATED, "HSDP 2x2"):
        for projection in ("svd", "columns", "blockwise"):
            name = f"another weight, {layout}" + ("" if projection == "svd" else f", {projection}")
            options = SVD if projection == "svd" else {**SVD, "projection": projection, "density": 0.5}
            found[name] = Drill(layout, options, before=touch_weights(1), ranks=_ranks(layout))
    for layout in REPLICATED:
        for at in (GAP - 1, GAP):
            grads = missing((VICTIM,), (at,), SPOILED)
            found[f"no gradient on one rank at step {at}, {layout}"] = Drill(layout, SVD, grads=grads)
        found[f"NaN between refreshes on one rank, {layout}"] = Drill(layout, SVD, grads=entry(math.nan, 1))
    return found


def _lagging() -> dict[str, Drill]:
    """Sharded: one rank has no gradient for some steps. Its own rows stand still, the counts agree again later."""
    found = {}
    for layout in ("Shard(0)", "HSDP 2x2"):
        for projection in ("svd", "random", "randk", "blockwise"):
            for at in ((0,), (1,), (GAP,), (GAP - 1, GAP)):
                grads = missing(NAMES[:-1], at, SPOILED)
                options = {"projection": projection, "on_refresh": "keep", "density": 0.5}
                found[f"no gradients on one rank at {at}, {projection}, {layout}"] = Drill(
                    layout, options, grads=grads, ranks=_ranks(layout)
                )
            if layout == "Shard(0)":  # replicas would be apart until the next refresh
                found[f"a density schedule and no gradients by turns, {projection}"] = Drill(
                    layout, {**options, "density": 0.75}, grads=by_turns, before=halve_density, ranks=3
                )
            for at in (range(STEPS - 1), range(2, STEPS - 1), (GAP,)):
                grads = missing(NAMES[:-1], tuple(at), SPOILED)
                found[f"frozen, no gradients on one rank at {tuple(at)}, {projection}, {layout}"] = Drill(
                    layout, options, grads=grads, before=freeze(at), ranks=_ranks(layout)
                )
    return found


LIKE_ALONE, REFUSED, FAILING, HEALED, LAGGING = _like_alone(), _refused(), _failing(), _healed(), _lagging()
ALL = {**LIKE_ALONE, **REFUSED, **FAILING, **HEALED, **LAGGING}


def run_named(names: tuple[str, ...]) -> list[tuple[Outcome, list[str]]]:
    """On a process that is a rank: the outcomes of these drills and what they warned of."""
    found = []
    for name in names:
        drill = ALL[name]
        with drill.patched(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            outcome = drill.run(dist.get_rank())
        found.append((outcome, [str(one.message) for one in told]))
    return found
