"""Checkpoints that an earlier version wrote load and go on as they went on there.

tests/golden/checkpoints was written by the code of commit 7b22ff0, see old_run.py: "svd" by one process, "columns" by
DDP on two ranks that share state, each with the model as that code left it three steps later.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from old_run import MORE, SAVED_AFTER, Run
from threads import run_ranks

from frugal_dist import checkpoint

FOLDER = Path(__file__).parents[1] / "golden" / "checkpoints"
TOLERANCE = 1e-10


def blank(projection: str, **options: float) -> Run:
    """The program that loads: no weight, buffer or learning rate is what it will be."""
    run = Run(projection, lr=1.0, **options)
    for value in run.model.state_dict().values():
        value.zero_()
    return run


def apart(run: Run, projection: str) -> dict[str, float]:
    """How far weights and buffers are from those of the earlier code."""
    with np.load(FOLDER / f"{projection}_later.npz") as later:
        return {
            name: float((value - torch.from_numpy(later[name])).abs().max())
            for name, value in run.model.state_dict().items()
        }


@pytest.mark.parametrize(("projection", "ranks"), [("svd", 1), ("columns", 2), ("columns", 1), ("svd", 2)])
def test_portable_checkpoints_of_before_go_on(projection: str, ranks: int) -> None:
    folder = FOLDER / projection
    assert json.loads((folder / "index.json").read_text())["version"] == 1

    def body(rank: int) -> dict[str, float]:
        run = blank(projection, projected_lr_scale=0.5, state_free_lr_scale=0.7)
        extra = checkpoint.load(folder, run.model, run.optimizer)
        assert extra["done"] == SAVED_AFTER
        checkpoint.load_schedule(run.scheduler, extra["schedule"])
        run.train(SAVED_AFTER, MORE)
        return apart(run, projection)

    for differences in run_ranks(ranks, body):
        assert all(difference <= TOLERANCE for difference in differences.values()), differences


def test_generators_go_on() -> None:
    run = blank("svd", projected_lr_scale=0.5, state_free_lr_scale=0.7)
    checkpoint.load(FOLDER / "svd", run.model, run.optimizer)
    with np.load(FOLDER / "svd_later.npz") as later:
        assert torch.rand(3).tolist() == later["generator"].tolist()


def test_a_state_dict_of_before_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    """Hyperparameters are the saved run's, ``lr_scale`` under its name of today."""
    saved = torch.load(FOLDER / "svd.pt", weights_only=True)
    assert "lr_scale" in saved["optimizer"]["param_groups"][0]
    run = blank("svd")
    for name, part in (("model", run.model), ("optimizer", run.optimizer), ("scheduler", run.scheduler)):
        part.load_state_dict(saved[name])
    assert "projected_lr_scale=0.5 instead of 1.0" in capsys.readouterr().err
    assert [group["projected_lr_scale"] for group in run.optimizer.param_groups] == [0.5] * 3
    run.train(SAVED_AFTER, MORE)
    differences = apart(run, "svd")
    assert all(difference <= TOLERANCE for difference in differences.values()), differences
