"""Runs that are saved, built anew, loaded and continued. Bodies for threads or processes as ranks."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from cases import LAYOUTS, REGULAR, STEPS, Case, gradients, weights
from storages import Held, Named
from torch.distributed.checkpoint.state_dict_saver import _stateful_to_state_dict

from frugal_dist import Frugal

Saved = tuple[Named, bytes]
"""The whole weights, and a rank's own file."""
Schedule = Callable[[int, Frugal], None]


def nothing(step: int, optimizer: Frugal) -> None:
    """No schedule."""


def of_case(case: Case, tensors: Named) -> Named:
    return {name: tensors[name] for name in (*case.names, *REGULAR)}


def build(layout: str, case: Case, start: Named) -> Held:
    return LAYOUTS[layout](of_case(case, start), case.groups(), case.options)


def to_bytes(state_dict: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(state_dict, file)
    return file.getvalue()


def from_bytes(data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True)
    return found


def asked_by_torch(optimizer: Frugal) -> dict[str, Any]:
    """The state as torch.distributed.checkpoint gets it: tensors keep their shapes from refresh to refresh."""
    found: dict[str, Any] = _stateful_to_state_dict({"optimizer": optimizer})["optimizer"]
    return found


def train(held: Held, case: Case, first: int, schedule: Schedule = nothing, last: int = STEPS) -> None:
    for step in range(first, last):
        schedule(step, held.optimizer)
        held.step(of_case(case, gradients()[step]))


def straight(
    layout: str, case: Case, points: tuple[int, ...], schedule: Schedule = nothing
) -> tuple[dict[int, Saved], Held]:
    """A run without a stop, saved before the steps in ``points``, as one file per rank."""
    held, saved = build(layout, case, weights()), {}
    for start, stop in pairwise((0, *points, STEPS)):
        train(held, case, start, schedule, stop)
        if stop in points:
            saved[stop] = (held.full(), to_bytes(held.optimizer.state_dict()))
    return saved, held


def resumed(layout: str, case: Case, step: int, saved: Saved, schedule: Schedule = nothing) -> Held:
    full, data = saved
    held = build(layout, case, full)
    held.optimizer.load_state_dict(from_bytes(data))
    train(held, case, step, schedule)
    return held


def differences(a: Held, b: Held) -> list[str]:
    """What is not equal bit for bit: weights, and state as it would be saved again."""
    ours, theirs = a.full(), b.full()
    found = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    first, second = a.optimizer.state_dict(), b.optimizer.state_dict()
    if first["param_groups"] != second["param_groups"] or first["state"].keys() != second["state"].keys():
        found.append("groups")
    for number, store in first["state"].items():
        other = second["state"][number]
        if store.keys() != other.keys():
            found.append(f"keys of {number}")
            continue
        found += [
            f"{number}/{k}" for k, v in store.items() if v.dtype != other[k].dtype or not torch.equal(v, other[k])
        ]
    return found


def resume_everywhere(
    layout: str, case: Case, points: tuple[int, ...], schedule: Schedule = nothing
) -> dict[int, list[str]]:
    """By stopping point, what differs from the run without a stop."""
    saved, whole = straight(layout, case, points, schedule)
    return {step: differences(resumed(layout, case, step, saved[step], schedule), whole) for step in points}


def save(layout: str, case: Case, step: int = 4) -> Saved:
    """What one rank saves before ``step``."""
    held = build(layout, case, weights())
    train(held, case, 0, last=step)
    return held.full(), to_bytes(held.optimizer.state_dict())


def load_and_step(layout: str, case: Case, full: Named, state_dict: dict[str, Any] | None) -> str:
    """The error of the next step, or "". None: this rank does not load."""
    held = build(layout, case, full)
    try:
        if state_dict is not None:
            held.optimizer.load_state_dict(state_dict)
        train(held, case, 4, last=5)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
