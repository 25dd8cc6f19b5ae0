"""Random runs, stopped at a random step, saved in a random way and continued: the same bits as without the stop.

Densities change on the way, groups come later, matrices get their first gradient late, miss some, or are frozen.
"""

from __future__ import annotations

import copy
import pickle
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import resuming
import torch
from cases import LAYOUTS, PROJECTIONS, STATE_FREE
from fuzzing import Fuzz
from storages import cut_like
from threads import run_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from frugal_dist import Frugal, checkpoint

pytestmark = pytest.mark.timeout(3600)  # with --heavy, or as many runs as one likes

STEPS = 8
SHAPES = {
    "a": (6, 4),
    "b": (5, 8),
    "c": (9, 9),
    "experts": (3, 4, 6),
    "norm": (5,),
    "table": (4, 3),
    "d": (7, 6),
    "e": (3,),
}
NOW = ({"params": ["a", "b", "c", "experts"], "projected": True}, {"params": ["norm", "table"], "projected": False})
LATER = ({"params": ["d"], "projected": True, "density": 1.0}, {"params": ["e"], "projected": False})
ALONE = "one process"
PLACES = {"replicas": 2, "replicas, shared state": 3, "Shard(0)": 3, "Shard(1)": 2, "HSDP 2x2": 4}


@dataclass(frozen=True)
class Scene:
    """``later``: the step at which groups are added. ``silent``: (parameter, step) without a gradient."""

    layout: str
    way: str
    stop: int
    options: dict[str, Any]
    densities: dict[int, float]
    later: int
    silent: frozenset[tuple[str, int]]
    frozen: frozenset[tuple[str, int]]


def draw(places: tuple[str, ...], ways: tuple[str, ...]) -> Callable[[random.Random], Scene]:
    def scene(chance: random.Random) -> Scene:
        projection, side = chance.choice(PROJECTIONS)
        bound = projection == "svd" and side != "std"  # r may not exceed the rank
        densities = (0.5, 0.6) if bound else (0.5, 0.6, 0.75, 1.0)
        options = {
            "projection": projection,
            "side": side,
            "density": chance.choice(densities),
            "update_gap": chance.choice((1, 2, 3, 5)),
            "state_full": chance.choice(("adamw", "lion", "sgdm")),
            "state_free": chance.choice(STATE_FREE),
            "on_refresh": chance.choice(("reset", "keep", "project")),
            "refresh_schedule": chance.choice(("together", "staggered")),
            "compute_layout": chance.choice(("auto", "cut", "owner")),
            "weight_decay": chance.choice((0.0, 0.1)),
            "eps": 1e-3,
        }
        silent = {(name, step) for name in SHAPES for step in range(STEPS) if chance.random() < 0.1}
        for name in SHAPES:
            silent |= {(name, step) for step in range(chance.choice((0, 0, 0, 2, 5)))}
        frozen = {
            (name, step) for name in SHAPES if chance.random() < 0.2 for step in range(*chance.choice(((0, 4), (3, 6))))
        }
        return Scene(
            chance.choice(places),
            chance.choice(ways),
            chance.randrange(STEPS),
            options,
            {chance.randrange(STEPS): chance.choice(densities) for _ in range(chance.randrange(3))},
            chance.choice((STEPS, chance.randrange(1, STEPS))),
            frozenset(silent),
            frozenset(frozen),
        )

    return scene


def start() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def build(scene: Scene, weights: dict[str, Tensor], all_groups: bool) -> Frugal:
    groups = [*NOW, *LATER] if all_groups else [*NOW]
    if scene.options["projection"] != "blockwise":
        groups = [{key: value for key, value in group.items() if key != "density"} for group in groups]
    alone = {"process_group": None} if scene.layout == ALONE else {}
    return LAYOUTS.get(scene.layout, LAYOUTS["replicas"])(weights, groups, {**scene.options, **alone}).optimizer


def named(optimizer: Frugal) -> dict[str, Tensor]:
    groups = optimizer.param_groups
    return {name: p for group in groups for name, p in zip(group["param_names"], group["params"], strict=True)}


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(scene: Scene, optimizer: Frugal, first: int, last: int) -> None:
    for step in range(first, last):
        if step == scene.later and len(optimizer.param_groups) == len(NOW):
            for group in build(scene, start(), all_groups=True).param_groups[len(NOW) :]:
                members = list(zip(group["param_names"], group["params"], strict=True))
                kept = {key: group[key] for key in ("projected", "density")}
                optimizer.add_param_group({"params": members, **kept})
        for group in optimizer.param_groups[: 2 if step in scene.densities else 0]:
            group["density"] = scene.densities[step]
        grads = gradients(step)
        for name, param in named(optimizer).items():
            param.requires_grad_((name, step) not in scene.frozen)
            param.grad = cut_like(grads[name], param) if isinstance(param, DTensor) else grads[name]
            if (name, step) in scene.silent | scene.frozen:
                param.grad = None
        optimizer.step()


def through_checkpoint(optimizer: Frugal, fresh: Frugal) -> None:
    """Hyperparameters are the program's there: it would have set the density by now."""
    for group, new in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        new["density"] = group["density"]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder, "saved"), nn.ParameterDict(named(optimizer)), optimizer)
        checkpoint.load(Path(folder, "saved"), nn.ParameterDict(named(fresh)), fresh)


def through_state_dict(optimizer: Frugal, fresh: Frugal) -> None:
    fresh.load_state_dict(resuming.from_bytes(resuming.to_bytes(optimizer.state_dict())))


def through_torch(optimizer: Frugal, fresh: Frugal) -> None:
    fresh.load_state_dict(copy.deepcopy(resuming.asked_by_torch(optimizer)))


LOADED = {
    "state_dict": through_state_dict,
    "torch.distributed.checkpoint": through_torch,
    "checkpoint": through_checkpoint,
}
COPIED: dict[str, Callable[[Frugal], Frugal]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


def apart(scene: Scene) -> list[str]:
    """What is not the same, bit for bit, in the run that went on and in the one that was resumed."""
    live = build(scene, start(), all_groups=False)
    train(scene, live, 0, scene.stop)
    if scene.way in COPIED:
        resumed = COPIED[scene.way](live)
    else:
        weights = start() | {name: whole(param) for name, param in named(live).items()}
        resumed = build(scene, weights, all_groups=len(live.param_groups) > len(NOW))
        LOADED[scene.way](live, resumed)
    for optimizer in (live, resumed):
        train(scene, optimizer, scene.stop, STEPS)
    ours, theirs = named(live), named(resumed)
    found = [name for name in ours if not torch.equal(local(ours[name]), local(theirs[name]))]
    first, second = (optimizer.state_dict()["state"] for optimizer in (live, resumed))
    for number, store in first.items():
        other = second[number]
        if store.keys() != other.keys():
            found.append(f"keys of {number}: {sorted(store.keys() ^ other.keys())}")
        else:
            found += [f"{number}/{key}" for key, value in store.items() if not torch.equal(value, other[key])]
    return found


def test_one_process(fuzz: Fuzz) -> None:
    def check(scene: Scene) -> None:
        assert not apart(scene)

    fuzz(draw((ALONE,), (*LOADED, *COPIED)), check, short=25, long=2000)


@pytest.mark.filterwarnings("ignore")
def test_several_ranks(fuzz: Fuzz) -> None:
    def check(scene: Scene) -> None:
        ranks = PLACES[scene.layout]
        assert run_ranks(ranks, lambda rank: apart(scene)) == [[]] * ranks

    fuzz(draw(tuple(PLACES), ("state_dict", "torch.distributed.checkpoint", "deepcopy")), check, short=12, long=1000)
