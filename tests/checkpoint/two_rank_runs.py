"""Small runs on two ranks for tests of what goes wrong: both ranks must hear the same, and nothing may have changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import Case, gradients
from places import MODEL, PLACES, Ended, ended, start
from storages import Held
from threads import run_ranks

from frugal_dist import checkpoint

CASE = Case("svd", "std", on_refresh="keep")
PLACE = PLACES["ZeRO-3, 3"]
STEPS = 8
SAVED_AT = 4


def trained(case: Case = CASE, steps: int = SAVED_AT) -> Held:
    """One rank's run up to ``steps``. To be called on every rank."""
    held = start(PLACE, case, torch.float64)
    for grads in gradients(torch.float64, STEPS)[:steps]:
        held.step(grads)
    return held


def saved(folder: Path, case: Case = CASE, steps: int = SAVED_AT) -> Path:
    """A checkpoint of three ranks."""

    def body(rank: int) -> None:
        checkpoint.save(folder, MODEL, trained(case, steps).optimizer, {"rank": rank, "step": steps})

    run_ranks(PLACE.ranks, body)
    return folder


def refused(action: Callable[[Held], Any], case: Case = CASE) -> list[checkpoint.CheckpointError]:
    """What every rank raises when it does ``action``. Afterwards the run goes on as if nothing had happened."""

    def body(rank: int) -> tuple[checkpoint.CheckpointError | None, Ended, Ended]:
        held = trained(case, 2)
        before, error = ended(held), None
        try:
            action(held)
        except checkpoint.CheckpointError as found:
            error = found
        return error, before, ended(held)

    found = run_ranks(PLACE.ranks, body)
    for error, before, after in found:
        assert error is not None, "it was accepted"
        for name, weight in before.weights.items():
            assert torch.equal(after.weights[name], weight), f"{name} was changed"
        for mine, theirs in zip(before.state, after.state, strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in mine), "the state was changed"
    errors = [error for error, _, _ in found if error is not None]
    assert len({(type(error), str(error)) for error in errors}) == 1, "the ranks were told different things"
    return errors


def load_refused(folder: Path, case: Case = CASE, **options: Any) -> checkpoint.CheckpointError:
    """The error of loading ``folder``, the same on all ranks."""
    return refused(lambda held: checkpoint.load(folder, MODEL, held.optimizer, **options), case)[0]
