"""Parameter groups as they are given to the optimizer: brought into one form, divided for ZeRO, checked."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from frugal_dist import engines
from frugal_dist.config import HYPERPARAMETERS
from frugal_dist.names import clean_name, is_projected_name
from frugal_dist.sharding.storage import Original


def as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Torch-style groups of what an optimizer is given. ValueError for a bare tensor or nothing."""
    if isinstance(params, Tensor):
        raise ValueError("params must be named parameters or groups, not a single tensor.")
    members = list(params)
    if not members:
        raise ValueError("params is empty: pass model.named_parameters() or split_parameters(model).")
    return members if isinstance(members[0], dict) else [{"params": members}]


def arranged(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """ZeRO-1/2 give every rank an equal part of each group. Projected and regular parameters have unequal state, so a
    group that does not say which it holds becomes two, and the state is spread evenly.
    """
    if not engines.cuts_groups_evenly():
        return groups
    return [part for group in groups for part in _divided(group)]


def _divided(group: dict[str, Any]) -> list[dict[str, Any]]:
    members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    tensors = [member[1] if isinstance(member, tuple) else member for member in members]
    known = engines.names_of(tensors)
    names = [m[0] if isinstance(m, tuple) else name for m, name in zip(members, known, strict=True)]
    if "projected" in group or None in names:
        return [{**group, "params": members}]
    parts: dict[bool, list[Any]] = {True: [], False: []}
    for name, tensor in zip(names, tensors, strict=True):
        parts[is_projected_name(clean_name(str(name)), engines.full_shape(tensor))].append((name, tensor))
    return [{**group, "params": part, "projected": kind} for kind, part in parts.items() if part]


def check_group_keys(group: dict[str, Any]) -> None:
    """Groups may carry keys of their own, but a misspelled hyperparameter must not pass silently."""
    if group.get("maximize"):
        raise ValueError("Parameter group: maximize is not supported; negate the loss instead.")
    for key in group:
        close = difflib.get_close_matches(key, HYPERPARAMETERS, n=1, cutoff=0.8)
        if key not in HYPERPARAMETERS and close:
            raise ValueError(f"Parameter group: unknown key {key!r}. Did you mean {close[0]!r}?")


def check_unique(originals: Sequence[Original]) -> None:
    """ValueError, naming it, if two parameters have the same name."""
    seen: set[str] = set()
    for original in originals:
        if original.name in seen:
            raise ValueError(
                f"Two parameters are called {original.name!r}. Names must be unique: they identify the state."
            )
        seen.add(original.name)
