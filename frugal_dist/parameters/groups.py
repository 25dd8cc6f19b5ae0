"""Parameter groups as they are given to the optimizer, brought into one form, divided for ZeRO, checked; and as they
come back from a saved state.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from frugal_dist import engines
from frugal_dist.config import (
    HYPERPARAMETERS,
    NEVER,
    OLD_NAMES,
    TAKEN_UP,
    config_from,
    python_value,
    saved_group,
    unknown_keys,
)
from frugal_dist.parameters.names import Choice, clean_name, is_table_name
from frugal_dist.sharding.shard import ParamSpec

_PASS = "Pass model.named_parameters() or split_parameters(model)"


def as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Torch-style groups of what an optimizer is given. ValueError for what has no parameters: a model, one tensor."""
    if isinstance(params, Mapping):
        what = "one group: put it into a list" if "params" in params else "a dict: pass its items()"
        raise ValueError(f"params must be named parameters or groups, not {what}.")
    if isinstance(params, Tensor | str) or not isinstance(params, Iterable):
        raise ValueError(f"params must be named parameters or groups, not a single {type(params).__name__}. {_PASS}.")
    members = list(params)
    if not members:
        raise ValueError(f"params is empty. {_PASS}.")
    return members if isinstance(members[0], dict) else [{"params": members}]


def tables_in(groups: list[dict[str, Any]]) -> frozenset[tuple[int, ...]]:
    """The shapes of all embeddings, judged by names."""
    shapes = [(name, engines.full_shape(tensor)) for group in groups for name, tensor in _named(group)]
    return frozenset(shape for name, shape in shapes if name is not None and is_table_name(name, shape))


def arranged(groups: list[dict[str, Any]], choice: Choice) -> list[dict[str, Any]]:
    """ZeRO-1/2 give every rank an equal part of each group. Projected and regular parameters have unequal state, so a
    group that does not say which it holds becomes two, and the state is spread evenly.
    """
    if not engines.cuts_groups_evenly():
        return groups
    return [part for group in groups for part in _divided(group, choice)]


def _divided(group: dict[str, Any], choice: Choice) -> list[dict[str, Any]]:
    named = _named(group)
    group = {key: value for key, value in group.items() if key != "param_names"}
    if "projected" in group or any(name is None for name, _ in named):
        return [{**group, "params": [pair if pair[0] is not None else pair[1] for pair in named]}]
    parts: dict[bool, list[Any]] = {True: [], False: []}
    for name, tensor in named:
        parts[choice(clean_name(str(name)), engines.full_shape(tensor))].append((name, tensor))
    return [{**group, "params": part, "projected": kind} for kind, part in parts.items() if part]


def _named(group: dict[str, Any]) -> list[tuple[str | None, Tensor]]:
    """Members with the names that the group or else the engine gives them."""
    members = members_of(group)
    known = engines.names_of([tensor for _, tensor in members])
    return [(name or other, tensor) for (name, tensor), other in zip(members, known, strict=True)]


def members_of(group: dict[str, Any]) -> list[tuple[str | None, Tensor]]:
    """A group's members with the names that it gives them: in pairs, or in torch's "param_names"."""
    if not isinstance(group, Mapping) or not isinstance(group.get("params"), Iterable):
        given = group.get("params") if isinstance(group, Mapping) else group
        raise ValueError(
            f"A parameter group must be a dict with a list under the key 'params', not {type(given).__name__}. {_PASS}."
        )
    members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    names = group.get("param_names") or [None] * len(members)
    if not isinstance(names, list | tuple):
        raise ValueError(f"Parameter group: param_names={names!r} must be a list of names, one for each parameter.")
    if len(names) != len(members):
        raise ValueError(f"Parameter group: param_names has {len(names)} names for {len(members)} parameters.")
    pairs = [
        member if isinstance(member, tuple) else (name, member) for member, name in zip(members, names, strict=True)
    ]
    for pair in pairs:
        if len(pair) != 2 or not isinstance(pair[1], Tensor):
            kinds = ", ".join(type(one).__name__ for one in pair if one is not None)
            raise ValueError(f"A parameter group has a member ({kinds}) that is not (name, parameter). {_PASS}.")
    return pairs


# --- other people's keys ----------------------------------------------------------------------------------------------

_KERNELS = "Frugal chooses its kernels itself (FRUGAL_KERNELS=torch turns Triton's off). Leave it out"
_OF_TORCH = {
    "foreach": _KERNELS,
    "fused": _KERNELS,
    "capturable": "a step of Frugal cannot be captured in a CUDA graph. Leave it out",
    "differentiable": "a step of Frugal cannot be differentiated. Leave it out",
    "maximize": "it is not supported; negate the loss instead",
    "amsgrad": "Frugal keeps no maximum of the second moments. Leave it out",
    "nesterov": "state_full='sgdm' is torch.optim.SGD without Nesterov's momentum. Leave it out",
    "dampening": "state_full='sgdm' is torch.optim.SGD without dampening. Leave it out",
    "torch_adam": "it says which AdamW DeepSpeed takes. Leave it out",
}
"""Off, these mean nothing here; on, the sentence says why they cannot be."""
_OF_OTHERS = {
    "rank": "Frugal has no fixed rank; density is the share of a matrix with state: rank 128 of 512 is density=0.25",
    "update_proj_gap": "it is called update_gap here",
    "proj_type": "it is called side here, with the same values",
    "proj_side": "it is called side here",
}
_DECOUPLED = "there is no L2 penalty like Adam's; Frugal's weight decay is AdamW's. Leave it out, or set weight_decay=0"
_UNBIASED = "moments are always corrected for their bias. Leave it out"
_PRECISE = "moments are fp32, as the masters are, or moments='8bit'. Leave it out"
_AS_HERE = {
    "decoupled_weight_decay": _DECOUPLED,
    "weight_decouple": _DECOUPLED,
    "adam_w_mode": _DECOUPLED,
    "adamw_mode": _DECOUPLED,
    "bias_correction": _UNBIASED,
    "correct_bias": _UNBIASED,
    "fp32_optimizer_states": _PRECISE,
}
"""On, these say what is done here; off, the sentence says why it cannot be."""
_CLIP = (
    'an optimizer does not clip. In a DeepSpeed config say "gradient_clipping", in TrainingArguments max_grad_norm, in '
    "a loop torch.nn.utils.clip_grad_norm_ before step()"
)
_ONE_BIT = "it belongs to DeepSpeed's 1-bit optimizers. Leave it out"
_LAMB = "it belongs to DeepSpeed's Lamb. Leave it out"
_AS_ARGUMENTS = {
    "max_grad_norm": _CLIP,
    "freeze_step": _ONE_BIT,
    "cuda_aware": _ONE_BIT,
    "comm_backend_name": _ONE_BIT,
    "max_coeff": _LAMB,
    "min_coeff": _LAMB,
    "set_grad_none": "zero_grad() does that. Leave it out",
    "scale": "it is called projected_lr_scale here",
    "learning_rate": "it is called lr here",
    "wd": "it is called weight_decay here",
    "beta1": "give both as betas=(beta1, beta2)",
    "beta2": "give both as betas=(beta1, beta2)",
}
"""In a group these may be the program's own notes."""


def without_foreign(
    options: dict[str, Any], known: Iterable[str], where: str = "Frugal", weight_decay: Any = 0.0
) -> dict[str, Any]:
    """Arguments without those of others that mean what is done anyway.

    Raises:
        ValueError: a sentence for each of those that mean something else, or nothing, here: neither ``known`` nor a
            name that one of the known had earlier.
    """
    said = [
        f"{where}({key}={options[key]!r}): {why}."
        for key, why in {**_OF_TORCH, **_OF_OTHERS, **_AS_ARGUMENTS}.items()
        if key in options and not (key in _OF_TORCH and not options[key])
    ]
    said += _not_as_here(where, {**options, "weight_decay": weight_decay})
    foreign = {*_OF_TORCH, *_OF_OTHERS, *_AS_ARGUMENTS, *_AS_HERE}
    mine = {key: value for key, value in options.items() if key not in foreign}
    unknown = unknown_keys((key for key in mine if key not in OLD_NAMES), known)
    said += [f"{where}: {unknown}"] if unknown else []
    if said:
        raise ValueError(" ".join(said))
    return mine


def _not_as_here(where: str, options: Mapping[str, Any]) -> list[str]:
    idle = () if options.get("weight_decay") else (_DECOUPLED,)
    return [
        f"{where}: {key}=False: {why}."
        for key, why in _AS_HERE.items()
        if options.get(key) is False and why not in idle
    ]


def check_group_keys(group: dict[str, Any]) -> None:
    """Groups may carry keys of their own (schedulers' ``initial_lr`` and ``max_momentum``, timm's ``lr_scale``), which
    mean nothing here. What would change the step elsewhere, or looks like a misspelled key, must not pass silently.
    """
    for key, why in {**_OF_TORCH, **_OF_OTHERS}.items():
        if group.get(key) and why != _KERNELS:
            raise ValueError(f"Parameter group: {key}={group[key]!r}: {why}.")
    if said := _not_as_here("Parameter group", group):
        raise ValueError(" ".join(said))
    known = (*HYPERPARAMETERS, "projected")
    for key in group:
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if key not in known and close and not _words(key) > _words(close[0]):
            raise ValueError(f"Parameter group: unknown key {key!r}. Did you mean {close[0]!r}?")


def _words(key: str) -> set[str]:
    """With one more of them than a known key it is another name: ``max_momentum``."""
    return {word for word in key.split("_") if word}


def check_unique(originals: Sequence[ParamSpec]) -> None:
    """ValueError, naming it, if two parameters have the same name."""
    seen: set[str] = set()
    for original in originals:
        if original.name in seen:
            raise ValueError(
                f"Two parameters are called {original.name!r}. Names must be unique: they identify the state."
            )
        seen.add(original.name)


# --- as they come back from a saved state ----------------------------------------------------------

Names = Sequence[Sequence[str] | None]
"""By group the names of its parameters; None where an engine has put other tensors in their place."""

NAMES = "param_names"
"""Torch's key for them in a saved group."""


@dataclass(frozen=True)
class Saved:
    """The groups of a saved state, checked against those of this program.

    ``numbers``: for every parameter of this program, in order, its number in the saved state. ``moved``: a
    parameter that stands elsewhere than then, "" if there is none. ``replaced``: what to say about hyperparameters.
    """

    groups: list[dict[str, Any]]
    numbers: list[int]
    moved: str
    replaced: str


def read_groups(saved: Sequence[Mapping[str, Any]], present: Sequence[Mapping[str, Any]], names: Names) -> Saved:
    """ValueError, naming what differs, if these are groups of another optimizer or other parameters."""
    for group in saved:
        if "projection" not in group or "density" not in group:
            raise ValueError(
                "The loaded state was saved by another optimizer: its groups have no projection and density. Frugal's "
                "moments are of another shape; keep the weights and start with a new optimizer."
            )
    then = [group.get(NAMES) for group in saved]
    if None not in then and None not in names:
        _check_names(then, names)
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in present]:
        raise ValueError(
            f"The loaded state has {_sizes(saved)}, this optimizer {_sizes(present)}. Build the same model with the "
            "same groups, or load with frugal_dist.checkpoint, which goes by names."
        )
    numbers, moved = [], ""
    for group, old, new in zip(saved, then, names, strict=True):
        by_name = dict(zip(old, group["params"], strict=True)) if old and new else {}
        order = [by_name[name] for name in new or ()] if by_name else list(group["params"])
        if order != list(group["params"]):
            moved = moved or next(b for a, b in zip(old or (), new or (), strict=True) if a != b)
        numbers += order
    groups = [
        {**{key: now[key] for key in HYPERPARAMETERS if key in now}, **saved_group(group, now)}
        for group, now in zip(saved, present, strict=True)
    ]
    for number, group in enumerate(groups):
        try:
            config_from(group)
        except ValueError as error:
            raise ValueError(f"Group {number} of the loaded state: {error}") from error
    return Saved(groups, numbers, moved, _replaced(groups, present))


def _check_names(then: Sequence[Any], now: Names) -> None:
    before = {name: number for number, group in enumerate(then) for name in group}
    after = {name: number for number, group in enumerate(now) for name in group or ()}
    gone, new = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
    if gone or new:
        parts = [f"{what} {', '.join(some[:3])}" for what, some in (("only there:", gone), ("only here:", new)) if some]
        raise ValueError(
            f"The loaded state is of other parameters; {'; '.join(parts)}. Names identify the state: build the model "
            "as it was saved."
        )
    for name, group in after.items():
        if before[name] != group:
            raise ValueError(
                f"{name} was in group {before[name]} when the state was saved, it is in group {group} now. Build the "
                "groups as they were, or load with frugal_dist.checkpoint, which goes by names."
            )


def _sizes(groups: Sequence[Mapping[str, Any]]) -> str:
    sizes = [len(group["params"]) for group in groups]
    return f"{len(sizes)} groups of {', '.join(map(str, sizes))} parameters"


def _replaced(saved: Sequence[Mapping[str, Any]], present: Sequence[Mapping[str, Any]]) -> str:
    changes: dict[str, None] = {}
    for then, now in zip(saved, present, strict=True):
        for key in HYPERPARAMETERS:
            if key in now and key not in moved_by_schedules(then) and python_value(then[key]) != python_value(now[key]):
                bound = " (fixed by the state)" if TAKEN_UP[key] == NEVER else ""
                changes[f"{key}={then[key]!r} instead of {now[key]!r}{bound}"] = None
    if not changes:
        return ""
    return (
        "load_state_dict() goes on with the hyperparameters of the saved run, as torch's optimizers do: "
        f"{'; '.join(changes)}. What is not fixed can be set in optimizer.param_groups after loading; "
        "frugal_dist.checkpoint.load keeps this program's."
    )


def moved_by_schedules(group: Mapping[str, Any]) -> tuple[str, ...]:
    """Hyperparameters that learning-rate schedules change while training; cyclic ones leave a mark in the group."""
    return ("lr", "betas", "momentum") if "base_momentum" in group else ("lr",)
