"""torch.distributed.checkpoint saves on some ranks and loads on others. Runs inside each rank."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import meshes
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import LAYOUTS, Case, gradients, weights
from storages import Held, Named

from frugal_dist import Frugal, checkpoint

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


class ByNames:
    """An optimizer in a container like torchtitan's: flat keys of parameters' names, those to load looked up in what
    is live.
    """

    def __init__(self, optimizer: Frugal) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        plain, flat = self.optimizer.state_dict(), {}
        for group in plain["param_groups"]:
            for number, name in zip(group["params"], group["param_names"], strict=True):
                state = plain["state"].get(number, {})
                flat |= {f"state.{name}.{key}": value for key, value in state.items()}
                flat |= {f"param_groups.{name}.{key}": group[key] for key in group.keys() - {"params", "param_names"}}
        return flat

    def load_state_dict(self, flat: dict[str, Any]) -> None:
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        for group in self.optimizer.param_groups:
            numbers, names = [], group["param_names"]
            for name, param in zip(names, group["params"], strict=True):
                numbers.append(len(numbers) + sum(len(one["params"]) for one in groups))
                live = self.optimizer.state.get(param, {})
                state[numbers[-1]] = {key: flat[f"state.{name}.{key}"] for key in live if f"state.{name}.{key}" in flat}
            keys = group.keys() - {"params", "param_names"}
            groups.append({"params": numbers, **{key: flat[f"param_groups.{names[0]}.{key}"] for key in keys}})
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _state(held: Held, by_names: bool) -> dict[str, Any]:
    params = [param for group in held.optimizer.param_groups for param in group["params"]]
    optimizer = ByNames(held.optimizer) if by_names else held.optimizer
    return {"optimizer": optimizer, "weights": {str(i): param.detach() for i, param in enumerate(params)}}


def save(layout: str, case: Case, folder: Path, by_names: bool, beside: bool) -> None:
    held = _build(layout, case, weights(dtype_of(case)))
    for grads in gradients(dtype_of(case))[:SAVED_AFTER]:
        held.step(grads)
    _save_portable(held, case, folder, ".saved")
    if not beside:
        dcp.save(_state(held, by_names), checkpoint_id=folder)
        return
    own = dist.new_group()  # which no step uses meanwhile
    saving = dcp.async_save(_state(held, by_names), checkpoint_id=folder, process_group=own)
    held.step(gradients(dtype_of(case))[SAVED_AFTER])
    assert isinstance(saving, Future)
    saving.result()


def load(layout: str, case: Case, folder: Path, by_names: bool) -> Named:
    """The weights at the end of the run that ``save`` began."""
    grads_of = gradients(dtype_of(case))
    held = _build(layout, case, {name: torch.zeros_like(weight) for name, weight in weights(dtype_of(case)).items()})
    held.step({name: torch.zeros_like(grad) for name, grad in grads_of[0].items()})  # makes the template
    dcp.load(_state(held, by_names), checkpoint_id=folder)
    _save_portable(held, case, folder, ".loaded")
    for grads in grads_of[SAVED_AFTER:]:
        held.step(grads)
    return held.full()


def save_all(layout: str, cases: list[Case], folder: Path, by_names: bool = False, beside: bool = False) -> None:
    """``beside``: while the next step is taken."""
    for number, case in enumerate(cases):
        save(layout, case, folder / str(number), by_names, beside)


def load_all(layout: str, cases: list[Case], folder: Path, by_names: bool = False) -> list[Named]:
    return [load(layout, case, folder / str(number), by_names) for number, case in enumerate(cases)]
