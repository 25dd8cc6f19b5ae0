"""torch.distributed.checkpoint saves on some ranks and loads on others. Runs inside each rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import meshes
import torch
import torch.distributed.checkpoint as dcp
from cases import LAYOUTS, Case, gradients, weights
from storages import Held, Named

from frugal_dist import checkpoint

SAVED_AFTER = 4
ROUNDED = ("rounding", "remainder")


def dtype_of(case: Case) -> torch.dtype:
    """Remainders are of bf16 weights."""
    return torch.bfloat16 if ROUNDED in case.more else torch.float64


def _save_portable(held: Held, case: Case, folder: Path, when: str) -> None:
    if ROUNDED in case.more:  # whose last 16 bits do not show in the weights at once
        checkpoint.save(folder.with_suffix(when), torch.nn.Module(), held.optimizer)


def _build(layout: str, case: Case, start: Named) -> Held:
    build = LAYOUTS[layout] if layout in LAYOUTS else next(b for (n, _), b in meshes.LAYOUTS.items() if n == layout)
    held: Held = build(start, case.groups(), case.options)
    return held


def _state(held: Held) -> dict[str, Any]:
    params = [param for group in held.optimizer.param_groups for param in group["params"]]
    return {"optimizer": held.optimizer, "weights": {str(i): param.detach() for i, param in enumerate(params)}}


def save(layout: str, case: Case, folder: Path) -> None:
    held = _build(layout, case, weights(dtype_of(case)))
    for grads in gradients(dtype_of(case))[:SAVED_AFTER]:
        held.step(grads)
    _save_portable(held, case, folder, ".saved")
    dcp.save(_state(held), checkpoint_id=folder)


def load(layout: str, case: Case, folder: Path) -> Named:
    """The weights at the end of the run that ``save`` began."""
    grads_of = gradients(dtype_of(case))
    held = _build(layout, case, {name: torch.zeros_like(weight) for name, weight in weights(dtype_of(case)).items()})
    held.step({name: torch.zeros_like(grad) for name, grad in grads_of[0].items()})  # makes the template
    dcp.load(_state(held), checkpoint_id=folder)
    _save_portable(held, case, folder, ".loaded")
    for grads in grads_of[SAVED_AFTER:]:
        held.step(grads)
    return held.full()


def save_all(layout: str, cases: list[Case], folder: Path) -> None:
    for number, case in enumerate(cases):
        save(layout, case, folder / str(number))


def load_all(layout: str, cases: list[Case], folder: Path) -> list[Named]:
    return [load(layout, case, folder / str(number)) for number, case in enumerate(cases)]
