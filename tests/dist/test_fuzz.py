"""Random runs on random layouts, threads as ranks: the weights of one process, equal replicas, exact resumes.

python -m pytest -n 0 tests/dist/test_fuzz.py --fuzz-seed 1000 --fuzz-runs 500
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import LAYOUTS, places
from fuzzing import Fuzz
from random_runs import Named, Run, draw_run, gradients, prepare, weights
from storages import Held, replicas
from threads import run_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of NaN, of little that is projected
    pytest.mark.timeout(3600),  # with --heavy, or as many runs as one likes
]
PLACES = list(places())
DEADLINE = 30.0
"""Seconds after which ranks count as hanging."""


@dataclass(frozen=True)
class Spread:
    """A run on a layout. ``absent``: (step, rank, name) of gradients that only this rank misses."""

    layout: str
    ranks: int
    run: Run
    dtype: torch.dtype = torch.float64
    absent: tuple[tuple[int, int, str], ...] = ()


def draw(dice: random.Random) -> Spread:
    layout, ranks = dice.choice(PLACES)
    run = draw_run(dice, ranks=True, plain=layout.startswith("ZeRO"))
    if len(run.shapes) < 4:  # no sub-group is left empty
        layout = layout.split(",")[0] if layout.startswith("ZeRO") else layout
    return Spread(layout, ranks, run)


def draw_narrow(dice: random.Random) -> Spread:
    """In the precisions in which last bits show soonest."""
    return replace(draw(dice), dtype=dice.choice((torch.float64, torch.float32, torch.bfloat16)))


def draw_ragged(dice: random.Random) -> Spread:
    """Gradients that some ranks miss."""
    layout, ranks = dice.choice([place for place in PLACES if not place[0].startswith("ZeRO")])
    run = draw_run(dice, ranks=True)
    names = dice.sample(list(run.shapes), min(2, len(run.shapes)))
    absent = [(s, r, n) for n in names for s in range(run.steps) for r in range(ranks) if dice.random() < 0.3]
    return Spread(layout, ranks, run, absent=tuple(absent))


def test_every_layout_gives_the_weights_of_one_process(fuzz: Fuzz) -> None:
    fuzz(draw, compare, short=20, long=1500)


def test_replicas_and_resumes_are_equal_bit_for_bit(fuzz: Fuzz) -> None:
    fuzz(draw_narrow, resume, short=15, long=1000)


def test_a_gradient_that_some_ranks_miss_stops_nobody(fuzz: Fuzz) -> None:
    fuzz(draw_ragged, finish, short=15, long=1000)


def build(spread: Spread, start: Named, alone: bool = False) -> Held:
    options: dict[str, Any] = {"no_decay": list(spread.run.no_decay) or None}
    make = replicas if alone else LAYOUTS[spread.layout]
    return make(start, spread.run.of_optimizer(), {**options, "process_group": None} if alone else options)


def train(spread: Spread, held: Held, first: int = 0) -> None:
    for step in range(first, spread.run.steps):
        one_step(spread, held, step)


def one_step(spread: Spread, held: Held, step: int) -> None:
    groups = held.optimizer.param_groups
    params = [param for group in groups for param in group["params"]]
    named = dict(zip(spread.run.shapes, params, strict=True)) if spread.run.frozen else {}  # never on flat partitions
    prepare(spread.run, step, groups, named)
    absent = {
        name for at, rank, name in spread.absent if at == step and dist.is_initialized() and rank == dist.get_rank()
    }
    grads = {name: grad.to(spread.dtype) for name, grad in gradients(spread.run, step).items() if name not in absent}
    held.step(grads)


def start_of(spread: Spread) -> Named:
    return {name: weight.to(spread.dtype) for name, weight in weights(spread.run).items()}


def whole_run(spread: Spread, alone: bool = False) -> Named:
    held = build(spread, start_of(spread), alone)
    train(spread, held)
    return held.full()


def compare(spread: Spread) -> None:
    want = whole_run(spread, alone=True)
    for rank, full in enumerate(run_ranks(spread.ranks, lambda rank: whole_run(spread), DEADLINE)):
        for name, expected in want.items():
            apart = bool((full[name].isnan() != expected.isnan()).any())
            distance = float((full[name] - expected).nan_to_num().abs().max()) if expected.numel() else 0.0
            assert distance <= tolerance(spread.run) and not apart, f"{name} on rank {rank} is off by {distance:.1e}"


def tolerance(run: Run) -> float:
    """Gram matrices have less exact vectors."""
    return run.tolerance


def resume(spread: Spread) -> None:
    def body(rank: int) -> tuple[Named, Named]:
        held, saved = build(spread, start_of(spread)), (start_of(spread), b"")
        for step in range(spread.run.steps):
            if step == spread.run.resume:
                file = io.BytesIO()
                torch.save(held.optimizer.state_dict(), file)
                saved = held.full(), file.getvalue()
            one_step(spread, held, step)
        again = build(spread, saved[0])
        again.optimizer.load_state_dict(torch.load(io.BytesIO(saved[1]), weights_only=True))
        train(spread, again, spread.run.resume)
        return held.full(), again.full()

    everyone = run_ranks(spread.ranks, body, DEADLINE)
    for rank, (full, resumed) in enumerate(everyone):
        for name, value in everyone[0][0].items():
            assert torch.equal(full[name].nan_to_num(), value.nan_to_num()), f"{name} on rank {rank}"
            assert torch.equal(resumed[name].nan_to_num(), value.nan_to_num()), f"{name} on rank {rank} after a resume"


def finish(spread: Spread) -> None:
    """Bases were refreshed together; who had no gradient may lag behind, and counts agree again at a refresh."""

    def body(rank: int) -> None:
        train(spread, build(spread, start_of(spread)))

    run_ranks(spread.ranks, body, DEADLINE)
