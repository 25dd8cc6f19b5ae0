"""Where the tests train: the ways to store the same parameters, and one run on such a place that saves or loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import LAYOUTS, Build, Case, gradients, weights
from meshes import expert_parallel, fsdp_packed, fsdp_tensor_parallel, hybrid_tensor_parallel, pipeline
from storages import Held, Named, replicas
from threads import run_ranks
from torch import nn

from frugal_dist import checkpoint

STEPS, GAP = 8, 3
MODEL = nn.Module()
"""The parameters are the optimizer's alone."""


@dataclass(frozen=True)
class Place:
    """A layout on a number of ranks. ``group``: who saves together, if not the optimizer's ranks."""

    name: str
    ranks: int
    build: Build
    group: str | None = None


PLACES = {
    place.name: place
    for place in (
        Place("one process", 1, replicas),
        Place("DDP, 2 ranks", 2, LAYOUTS["replicas"]),
        Place("DDP, shared state, 3", 3, LAYOUTS["replicas, shared state"]),
        Place("Shard(0), 4", 4, LAYOUTS["Shard(0)"]),
        Place("Shard(1), 2", 2, LAYOUTS["Shard(1)"]),
        Place("HSDP 2x2", 4, LAYOUTS["HSDP 2x2"]),
        Place("ZeRO-2, 4", 4, LAYOUTS["ZeRO-1/2"]),
        Place("ZeRO-3, 3", 3, LAYOUTS["ZeRO-3, 4 sub-groups"]),
        Place("FSDP2 2 x TP 2", 4, fsdp_tensor_parallel),
        Place("FSDP2 2 x TP 2, packed layers", 4, fsdp_packed),
        Place("FSDP2 2 x EP 2, Shard(1)", 4, expert_parallel(1)),
        Place("two stages x FSDP2 2", 4, pipeline, "auto"),
    )
}

THREE = Place("three stages", 3, partial(pipeline, count=3), "auto")
LARGE = Place("HSDP 2 x FSDP2 2 x TP 2", 8, hybrid_tensor_parallel)


@dataclass
class Ended:
    """The weights and the tensors of the optimizer's state at the end of a run, on one rank."""

    weights: Named
    state: list[dict[str, torch.Tensor]]


def start(place: Place, case: Case, dtype: torch.dtype, zeros: bool = False) -> Held:
    """The optimizer at step 0; with ``zeros`` every weight is zero: a load must bring all of them."""
    given = weights(dtype)
    if zeros:
        given = {name: torch.zeros_like(weight) for name, weight in given.items()}
    return place.build(given, case.groups(), case.options)


def train_and_save(place: Place, case: Case, dtype: torch.dtype, folders: dict[int, Path]) -> list[Ended]:
    """Train all steps; save after those that ``folders`` names."""

    def body(rank: int) -> Ended:
        held = start(place, case, dtype)
        for step, grads in enumerate(gradients(dtype, STEPS), start=1):
            held.step(grads)
            if step in folders:
                extra = {"rank": rank, "step": step}
                checkpoint.save(folders[step], MODEL, held.optimizer, extra, process_group=place.group)
        return ended(held)

    return run_ranks(place.ranks, body)


def load_and_train(
    place: Place, case: Case, dtype: torch.dtype, folder: Path, step: int, **options: Any
) -> list[Ended]:
    """Load what was saved after ``step`` and train the rest."""

    def body(rank: int) -> Ended:
        held = start(place, case, dtype, zeros=True)
        extra = checkpoint.load(folder, MODEL, held.optimizer, process_group=place.group, **options)
        assert extra["step"] == step
        for grads in gradients(dtype, STEPS)[step:]:
            held.step(grads)
        return ended(held)

    return run_ranks(place.ranks, body)


def ended(held: Held) -> Ended:
    state = [{key: value.clone() for key, value in store.items()} for store in held.optimizer.state.values()]
    return Ended(held.full(), state)


def apart(found: Sequence[Ended], want: Named) -> float:
    """The largest difference of any weight on any rank."""
    return max(float((one.weights[name] - want[name]).abs().max()) for one in found for name in want)


def identical(found: Sequence[Ended], want: Sequence[Ended]) -> bool:
    """Weights and state of every rank, bit for bit."""
    return all(
        _same(mine.weights, theirs.weights)
        and len(mine.state) == len(theirs.state)
        and all(_same(a, b) for a, b in zip(mine.state, theirs.state, strict=True))
        for mine, theirs in zip(found, want, strict=True)
    )


def _same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(
        mine[key].dtype == theirs[key].dtype and torch.equal(mine[key], theirs[key]) for key in mine
    )
