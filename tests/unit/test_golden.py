"""Replays the recorded trajectories of tests/golden through the public API, step by step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import frugal_dist.projection
from frugal_dist import Frugal

FOLDER = Path(__file__).parent.parent / "golden"
FILES = sorted(FOLDER.glob("*.npz"))
TOLERANCE = 2e-6

# What the authors' classes assume when a file does not say otherwise.
AUTHORS_DEFAULTS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    "Lion": {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0},
    "SGD": {"lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0},
}
STATE_FULL = {"AdamW": "adamw", "Lion": "lion", "SGD": "sgdm"}
STATE_FREE = {"sign_sgd": "sign", "sgd": "sgd", "no": "none"}
RENAMED = {"proj_side": "side", "proj_params_lr_scale": "lr_scale", "inactive_lr_scale": "state_free_lr_scale"}
SAME_NAME = {"lr", "density", "update_gap", "block_order", "weight_decay", "eps", "betas", "momentum"}
ABOUT_THE_FILE = {"name", "cls", "steps", "shapes", "reg_shapes", "no_deprecation_warning"}
# Values that change nothing. Any other value is something we do not offer, and an error below.
NEUTRAL: dict[str, Any] = {
    "correct_bias": True, "dampening": 0, "nesterov": False, "sign_update": False, "proj_type": "svd"
}  # fmt: skip


class Recording:
    """One file: its hyperparameters in our names, its selections, and its trajectory."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as archive:
            self.arrays = {key: archive[key] for key in archive.files if key != "meta"}
            self.meta: dict[str, Any] = json.loads(bytes(archive["meta"]).decode())
        self.family, self.rule = self._split_class(self.meta["cls"])
        self.steps = int(self.meta["steps"])
        self.matrices = len(self.meta["shapes"])
        self.regulars = len(self.meta["reg_shapes"])
        self.hyperparameters = self._translate()

    @staticmethod
    def _split_class(name: str) -> tuple[str, str]:
        for family in ("Galore", "Coord", "Block"):
            if name.startswith(family) and name.removeprefix(family) in STATE_FULL:
                return family, name.removeprefix(family)
        raise ValueError(f"unknown class {name!r} in a golden file")

    def _translate(self) -> dict[str, Any]:
        ours: dict[str, Any] = {**AUTHORS_DEFAULTS[self.rule], "state_full": STATE_FULL[self.rule]}
        ours |= {"density": 0.25, "update_gap": 200, "state_free": "sign", "on_refresh": "reset"}
        ours |= {"Galore": {"projection": "svd", "side": "std"}, "Coord": {"projection": "columns"},
                 "Block": {"projection": "blockwise", "block_order": "random"}}[self.family]  # fmt: skip
        for key, value in self.meta.items():
            if key in SAME_NAME:
                ours[key] = tuple(value) if key == "betas" else value
            elif key in RENAMED:
                ours[RENAMED[key]] = value
            elif key == "inactive_update_rule":
                ours["state_free"] = STATE_FREE[value]
            elif key == "reset_statistics":
                ours["on_refresh"] = "reset" if value else "keep"
            elif key == "coord_choice":
                ours["projection"] = value
            elif key in NEUTRAL:
                assert value == NEUTRAL[key], f"{key}={value!r} has no counterpart here"
            else:
                assert key in ABOUT_THE_FILE, f"unknown hyperparameter {key!r} in a golden file"
        return ours

    def tensor(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key].copy())

    def select_indices(
        self, length: int, count: int, *, seed: int, name: str, refresh: int, ordered: bool = True
    ) -> torch.Tensor:
        """What the authors drew at this refresh, in the place of our own random numbers."""
        step = 1 + refresh * int(self.hyperparameters["update_gap"])
        if name == "blocks":
            active = [i for i in range(self.matrices) if bool(self.arrays[f"A{i}_{step}"])]
            drawn = torch.tensor(active, dtype=torch.int64)
        else:
            drawn = self.tensor(f"I{name.removeprefix('w')}_{step}").to(torch.int64)
        assert len(drawn) == count, f"{name}, step {step}: {count} of {length} asked for, {len(drawn)} recorded"
        assert count == 0 or int(drawn.max()) < length
        return drawn.sort().values if ordered else drawn

    @property
    def order_matters(self) -> bool:
        """Kept state stays in its place of R, so the order of the coordinates decides what it means."""
        return self.family == "Coord" and self.hyperparameters["on_refresh"] == "keep"


def deviations(recording: Recording) -> dict[str, float]:
    """Largest distance from the recorded weights after any step, for every parameter."""
    weights = {f"w{i}": torch.nn.Parameter(recording.tensor(f"W{i}_0")) for i in range(recording.matrices)}
    regular = {f"b{i}": torch.nn.Parameter(recording.tensor(f"B{i}_0")) for i in range(recording.regulars)}
    groups = [
        {"params": list(weights.items()), "projected": True},
        {"params": list(regular.items()), "projected": False},
    ]
    optimizer = Frugal(groups, **recording.hyperparameters)
    worst = dict.fromkeys([*weights, *regular], 0.0)
    for step in range(1, recording.steps + 1):
        for name, parameter in {**weights, **regular}.items():
            parameter.grad = recording.tensor(f"G{name[0].upper()}{name[1:]}_{step}")
        optimizer.step()
        for name, parameter in {**weights, **regular}.items():
            expected = recording.tensor(f"{name[0].upper()}{name[1:]}_{step}")
            worst[name] = max(worst[name], float((parameter.detach() - expected).abs().max()))
    return worst


def replay(path: Path, monkeypatch: pytest.MonkeyPatch, ordered: bool) -> dict[str, float]:
    recording = Recording(path)

    def recorded(length: int, count: int, *, seed: int, name: str, refresh: int) -> torch.Tensor:
        return recording.select_indices(length, count, seed=seed, name=name, refresh=refresh, ordered=ordered)

    monkeypatch.setattr(frugal_dist.projection, "select_indices", recorded)
    return deviations(recording)


def test_every_kind_of_recording_is_there() -> None:
    """An empty folder would turn the tests below into no tests at all."""
    families = {Recording(path).family for path in FILES}
    assert families == {"Galore", "Coord", "Block"}
    assert len(FILES) >= 13


@pytest.mark.parametrize("ordered", [False, True], ids=["as_recorded", "sorted"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_trajectory_is_followed(path: Path, ordered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ordered = ordered and not Recording(path).order_matters
    worst = replay(path, monkeypatch, ordered)
    assert max(worst.values()) <= TOLERANCE, worst


def test_a_wrong_selection_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The replay must be able to fail: one exchanged column has to show."""
    path = FOLDER / "columns_a.npz"
    recording = Recording(path)
    drawn = recording.arrays["I0_4"]
    drawn[0] = next(column for column in range(16) if column not in drawn)

    def recorded(length: int, count: int, *, seed: int, name: str, refresh: int) -> torch.Tensor:
        return recording.select_indices(length, count, seed=seed, name=name, refresh=refresh)

    monkeypatch.setattr(frugal_dist.projection, "select_indices", recorded)
    worst = deviations(recording)
    assert worst.pop("w0") > 100 * TOLERANCE
    assert max(worst.values()) <= TOLERANCE, "the other parameters must not be touched by it"
