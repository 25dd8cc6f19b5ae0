"""The presets of other papers step as their authors' packages do, over two refreshes, in float32.

`bash tests/run.sh --all` installs the packages, by `bash tests/authors_packages.sh`. What is not installed is skipped,
and said.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from frugal_dist import PRESETS, Frugal, preset
from frugal_dist.projection.basis import Basis
from frugal_dist.projection.registry import PROJECTIONS

GAP, STEPS, LR = 3, 8, 0.01
SHAPES = [(24, 16), (16, 24), (20, 20)]
Build = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def fira(params: list[torch.nn.Parameter], rank: int) -> torch.optim.Optimizer:
    package = importlib.import_module("fira")
    group = {"params": params, "rank": rank, "update_proj_gap": GAP, "alpha": 1.0, "proj_type": "std"}
    return package.FiraAdamW([group], lr=LR, eps=1e-12, no_deprecation_warning=True)  # type: ignore[no-any-return]


def apollo(params: list[torch.nn.Parameter], rank: int, scale_type: str, scale: float) -> torch.optim.Optimizer:
    package = importlib.import_module("apollo_torch")
    group = {"params": params, "rank": rank, "update_proj_gap": GAP, "proj_type": "std", "proj": "random"}
    group |= {"scale": scale, "scale_type": scale_type}
    return package.APOLLOAdamW([group], lr=LR, eps=1e-12)  # type: ignore[no-any-return]


def racs(params: list[torch.nn.Parameter], rank: int) -> torch.optim.Optimizer:
    package = importlib.import_module("pytorch_optimizer")
    return package.RACS(params, lr=LR)  # type: ignore[no-any-return]


def muon(params: list[torch.nn.Parameter], rank: int) -> torch.optim.Optimizer:
    return torch.optim.Muon(params, lr=LR, weight_decay=0.1, momentum=0.95)


def adamw(params: list[torch.nn.Parameter], rank: int) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR, weight_decay=0.1)


class SignSGD(torch.optim.Optimizer):
    """Of the paper (arXiv 1802.04434)."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for weight in self.param_groups[0]["params"]:
            weight.data -= LR * weight.grad.sign()


class Scale(torch.optim.Optimizer):
    """Of the paper (arXiv 2506.16659), which has no package: rows of the gradient by their root mean squares."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for weight in self.param_groups[0]["params"]:
            weight.data -= LR * weight.grad / weight.grad.square().mean(1, keepdim=True).sqrt()


class SinkGD(torch.optim.Optimizer):
    """Of the paper (arXiv 2502.06742): five times rows, then columns, to norms of the root of their length."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for weight in self.param_groups[0]["params"]:
            direction = weight.grad.clone()
            rows, cols = direction.shape
            for _ in range(5):
                direction *= cols**0.5 / direction.norm(dim=1, keepdim=True)
                direction *= rows**0.5 / direction.norm(dim=0, keepdim=True)
            weight.data -= LR * direction


def galore(params: list[torch.nn.Parameter], rank: int) -> torch.optim.Optimizer:
    package = importlib.import_module("galore_torch")
    group = {"params": params, "rank": rank, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
    return package.GaLoreAdamW([group], lr=LR, eps=1e-12, no_deprecation_warning=True)  # type: ignore[no-any-return]


THEIRS: dict[str, tuple[str, Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "fira": ("fira", fira, {"eps": 1e-12}),
    "apollo": ("apollo_torch", lambda params, rank: apollo(params, rank, "channel", 1.0), {"eps": 1e-12}),
    "apollo_mini": ("apollo_torch", lambda params, rank: apollo(params, 1, "tensor", 128.0), {"eps": 1e-12}),
    "racs": ("pytorch_optimizer", racs, {}),
    "galore": ("galore_torch", galore, {"eps": 1e-12}),
    "muon": ("torch", muon, {"weight_decay": 0.1}),
    "adamw": ("torch", adamw, {"weight_decay": 0.1}),
    "signsgd": ("torch", lambda params, rank: SignSGD(params, {}), {}),
    "scale": ("torch", lambda params, rank: Scale(params, {}), {}),
    "sinkgd": ("torch", lambda params, rank: SinkGD(params, {}), {}),
}

ELSEWHERE = {"badam": "below", "frugal": "test_golden.py", "frugal_dct": "test_reference.py"}
"""frugal replays what the authors' code did; dct beside sign is ours, and has a dense reference."""
NOT_USED = {
    "galore_torch.adamw8bit": SimpleNamespace(AdamW8bit=None),
    "apollo_torch.adamw8bit": SimpleNamespace(AdamW8bit=None),
    "apollo_torch.q_apollo": SimpleNamespace(AdamW=None),
}
"""Modules of the packages that import bitsandbytes, 125 MB, and are not what is compared with."""


@pytest.fixture(autouse=True)
def _without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, empty in NOT_USED.items():
        monkeypatch.setitem(sys.modules, name, empty)


def test_every_preset_is_compared() -> None:
    assert sorted([*THEIRS, *ELSEWHERE]) == sorted(PRESETS)


def their_projection(optimizer: torch.optim.Optimizer, weight: Tensor, at: list[Tensor]) -> None:
    """Remember what was drawn at a refresh: another generator's numbers are other numbers."""
    drawn = getattr(optimizer.state[weight].get("projector"), "ortho_matrix", None)
    if drawn is not None and (not at or at[-1] is not drawn):
        at.append(drawn)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", THEIRS)
def test_steps_as_the_authors_package(name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    package, build, more = THEIRS[name]
    pytest.importorskip(package, exc_type=ImportError)
    torch.manual_seed(0)
    start = torch.randn(shape) * 0.1
    theirs, ours = (torch.nn.Parameter(start.clone()) for _ in range(2))
    drawn: list[Tensor] = []

    def same_numbers(grad: Tensor, drawing: Any, warm: Basis | None) -> Basis:
        return Basis(right=drawn[-1].T.contiguous()) if drawing.side == "right" else Basis(left=drawn[-1].clone())

    monkeypatch.setitem(PROJECTIONS, "gaussian", replace(PROJECTIONS["gaussian"], compute=same_numbers))
    settings = preset(name, lr=LR, update_gap=GAP, **more)
    settings.setdefault("density", 0.25)
    reference = build([theirs], round(0.25 * min(shape)))
    optimizer = Frugal([("w", ours)], project=["w"], process_group=None, **settings)
    for step in range(STEPS):
        torch.manual_seed(step)
        theirs.grad = torch.randn(shape) * (1.0 + step)  # growing, so that limiters have something to limit
        ours.grad = theirs.grad.clone()
        reference.step()
        their_projection(reference, theirs, drawn)
        optimizer.step()
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=2e-5, atol=2e-6)


@pytest.mark.filterwarnings("ignore:BAdam expect model to be loaded in fp16")
def test_blocks_take_turns_as_in_badam() -> None:
    """Once around and over: every matrix has its turn, and the first a second one, with new moments."""
    package = pytest.importorskip("badam", exc_type=ImportError)
    torch.manual_seed(0)
    start = {f"layer{i}.weight": torch.randn(shape) * 0.1 for i, shape in enumerate([*SHAPES, (5, 7)])}
    theirs, ours = ({name: torch.nn.Parameter(weight.clone()) for name, weight in start.items()} for _ in range(2))
    reference = package.BlockOptimizer(
        torch.optim.AdamW(theirs.values(), lr=LR, weight_decay=0.0),
        list(theirs.items()),
        block_prefix_list=[[name] for name in theirs],
        switch_block_every=GAP,
        switch_mode="ascending",
    )
    reference.global_step = -1  # it counts so that the first block has a step less than the others
    settings = preset("badam", lr=LR, update_gap=GAP, density=1 / len(start), block_order="ascending")
    optimizer = Frugal(ours.items(), project=["*"], process_group=None, **settings)
    for step in range(GAP * (len(start) + 1)):
        torch.manual_seed(step)
        for name, weight in theirs.items():
            ours[name].grad = torch.randn(weight.shape)
            weight.grad = ours[name].grad.clone() if weight.requires_grad else None
        reference.step()
        optimizer.step()
        for name, weight in theirs.items():
            torch.testing.assert_close(ours[name].detach(), weight.detach(), rtol=2e-5, atol=2e-6)
