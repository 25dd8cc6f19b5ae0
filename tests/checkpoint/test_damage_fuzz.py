"""Random damage: it is named before anything has changed, or what is loaded is what was saved, bit for bit.

python -m pytest -n 0 tests/checkpoint/test_damage_fuzz.py --fuzz-seed 1000 --fuzz-runs 2000
"""

from __future__ import annotations

import random
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, gradients
from damaging import SEEN, UNSEEN
from fuzzing import Fuzz
from places import PLACES, start
from storages import Held
from tables import count
from threads import run_ranks
from torch import nn
from two_rank_runs import PLACE

from frugal_dist import checkpoint
from frugal_dist.checkpoint import CheckpointError

pytestmark = pytest.mark.timeout(3600)  # of thousands of runs

PROJECTIONS = ("svd", "columns", "randk", "blockwise")
NAMES_A_FILE = r"/(index\.json|rank\d+\.(safetensors|extra\.pt)|latest)"
Everything = dict[str, Any]


class Rest(nn.Module):
    """What the optimizer does not hold."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.full((3, 2), value), requires_grad=False)
        self.register_buffer("counts", torch.arange(5.0) * value)


@dataclass
class Run:
    """One process to load into, at its start."""

    held: Held
    rest: Rest

    def everything(self) -> Everything:
        """All that a load may change."""
        found: Everything = {f"weight/{name}": value.clone() for name, value in self.held.full().items()}
        found |= {f"rest/{name}": value.clone() for name, value in self.rest.state_dict().items()}
        for number, store in enumerate(self.held.optimizer.state.values()):
            found |= {f"state/{number}/{key}": value.clone() for key, value in store.items()}
        for number, group in enumerate(self.held.optimizer.param_groups):
            found |= {f"group/{number}/{key}": value for key, value in group.items() if key != "params"}
        return {**found, "torch": torch.get_rng_state(), "python": random.getstate()}


def fresh(projection: str) -> Run:
    torch.manual_seed(1)
    random.seed(1)
    held = start(PLACES["one process"], case_of(projection), torch.float64, zeros=True)
    held.optimizer.everything()  # creates the state
    return Run(held, Rest(0.0))


def case_of(projection: str) -> Case:
    return Case(projection, "std", on_refresh="keep")


def differences(mine: Everything, theirs: Everything) -> list[str]:
    return [key for key in mine.keys() | theirs.keys() if not _same(mine.get(key), theirs.get(key))]


def _same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    return type(mine) is type(theirs) and bool(mine == theirs)


@dataclass(frozen=True)
class Sound:
    """A folder of two checkpoints of three ranks, and what loading each of them brings, its extra included."""

    root: Path
    older: Everything
    newer: Everything


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sound]:
    return {projection: _saved(projection, tmp_path_factory.mktemp(projection)) for projection in PROJECTIONS}


def _saved(projection: str, root: Path) -> Sound:
    def body(rank: int) -> None:
        held = start(PLACE, case_of(projection), torch.float64)
        for step, grads in enumerate(gradients(torch.float64, 5), start=1):
            held.step(grads)
            if step >= 4:
                checkpoint.save_step(root, step, Rest(float(step)), held.optimizer, {"step": step, "rank": rank})

    run_ranks(PLACE.ranks, body)
    brought = []
    for step in (4, 5):
        run = fresh(projection)
        extra = checkpoint.load(root / f"step_{step:06d}", run.rest, run.held.optimizer)
        brought.append({**run.everything(), "extra": extra})
    assert len(differences(*brought)) > 10
    return Sound(root, *brought)


@dataclass(frozen=True)
class Attempt:
    """A damage and a way to load."""

    projection: str
    damage: str
    seed: int
    way: str
    verify: bool


def attempt(damages: dict[str, Any], draw: random.Random) -> Attempt:
    way = draw.choice(("load", "load", "load", "load_latest", "SavedWeights"))
    projection, damage = draw.choice(PROJECTIONS), draw.choice(sorted(damages))
    return Attempt(projection, damage, draw.randrange(2**32), way, draw.random() < 0.9)


def check(one: Attempt, sound: Sound, root: Path, trusted: bool) -> None:
    """``trusted``: the damage must be seen, unless without checksums."""
    newest, other = root / "step_000005", sound.root / "step_000004"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(sound.root, root)
    {**SEEN, **UNSEEN}[one.damage](random.Random(one.seed), newest, other)
    run = fresh(one.projection)
    before = run.everything()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            brought = WAYS[one.way](run, root, newest, one.verify)
    except CheckpointError as error:
        text = str(error)
    else:
        count("random damage to checkpoints", one.damage.replace("_", " "), "loaded", 1)
        if trusted and one.verify:
            want = {"load": [sound.newer], "load_latest": [sound.newer, sound.older]}.get(one.way)
            wanted = [_weights(sound.newer)] if want is None else want
            assert [] in [differences(brought, each) for each in wanted], "something else was loaded"
        return
    count("random damage to checkpoints", one.damage.replace("_", " "), "refused", 1)
    assert str(newest) in text
    assert not trusted or re.search(re.escape(str(newest)) + NAMES_A_FILE, text), f"no file is named: {text}"
    assert differences(before, run.everything()) == [], f"changed before it was refused: {text}"


def _load(run: Run, root: Path, newest: Path, verify: bool) -> Everything:
    extra = checkpoint.load(newest, run.rest, run.held.optimizer, verify=verify)
    return {**run.everything(), "extra": extra}


def _load_latest(run: Run, root: Path, newest: Path, verify: bool) -> Everything:
    found = checkpoint.load_latest(root, run.rest, run.held.optimizer, on_damaged="previous", verify=verify)
    assert found is not None
    assert found[0] == found[1]["step"]
    return {**run.everything(), "extra": found[1]}


def _saved_weights(run: Run, root: Path, newest: Path, verify: bool) -> Everything:
    weights = checkpoint.SavedWeights(newest, verify)
    found = {name: weights[name] for name in weights.shapes}
    return {**found, **{name: weights.buffer(name) for name in weights.buffer_shapes}}


def _weights(everything: Everything) -> Everything:
    """As SavedWeights names them."""
    return {key.partition("/")[2]: value for key, value in everything.items() if key.startswith(("weight/", "rest/"))}


WAYS: dict[str, Callable[[Run, Path, Path, bool], Everything]] = {
    "load": _load,
    "load_latest": _load_latest,
    "SavedWeights": _saved_weights,
}


def test_damage_is_named_or_harmless(fuzz: Fuzz, sound: dict[str, Sound], tmp_path: Path) -> None:
    """Bits, lengths, files that are missing, mixed, changed about; values of indexes and headers."""
    fuzz(
        lambda draw: attempt(SEEN, draw),
        lambda one: check(one, sound[one.projection], tmp_path / "run", trusted=True),
        short=25,
        long=3000,
    )


def test_an_index_that_cannot_be_told_from_a_sound_one_never_fails_half_way(
    fuzz: Fuzz, sound: dict[str, Sound], tmp_path: Path
) -> None:
    """Changed values under a right checksum, or in the first format, which had none."""
    fuzz(
        lambda draw: attempt(UNSEEN, draw),
        lambda one: check(one, sound[one.projection], tmp_path / "run", trusted=False),
        short=25,
        long=2000,
    )
