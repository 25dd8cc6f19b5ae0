"""What state depends on, and what becomes of hyperparameters that change in ``param_groups`` while training.

``config.TAKEN_UP`` says when a change is taken up. What state depends on cannot change under it: the step is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from frugal_dist.config import NEVER, NOW, TAKEN_UP, FrugalConfig, config_from, for_regular
from frugal_dist.projection.blocks import active_count
from frugal_dist.projection.registry import depends_on as projection_depends_on
from frugal_dist.projection.registry import family, selection_size
from frugal_dist.sharding.shard import ParamSpec
from frugal_dist.step.runtime import LocalMatrix, LocalParameter
from frugal_dist.update.rules import STATE_FREE, STATE_FULL

WATCHED = (*(key for key, when in TAKEN_UP.items() if when != NOW), "state_free")
"""state_free: some of its rules decide where a matrix computes, and so where its state lies."""
Seen = tuple[dict[str, Any], FrugalConfig]
"""The watched values of a group as they stood in it, and its configuration."""


def depends_on(config: FrugalConfig) -> tuple[str, ...]:
    """The hyperparameters without which the state of a projected matrix means something else."""
    return ("projection", "density", "state_full", *projection_depends_on(config))


def matrix_options(mat: LocalMatrix) -> dict[str, Any]:
    """What must not change if the state of a matrix is to be kept."""
    options = {key: getattr(mat.config, key) for key in depends_on(mat.config)}
    if "side" in options:
        options["side"] = mat.side
    if mat.config.keeps:
        options["keeps"] = ", ".join(mat.config.keeps)
    if mat.family == "blocks":
        options["position"] = f"{mat.matrix.block} of {mat.matrix.blocks} blocks"
    return options


def regular_options(one: LocalParameter) -> dict[str, Any]:
    """The same for a regular parameter."""
    return {"state_full": one.config.state_full}


# --- while training ---------------------------------------------------------------------------------------------------


def seen(group: Mapping[str, Any]) -> Seen:
    """A group's settings, to be compared with later ones."""
    return {key: group.get(key) for key in WATCHED}, config_from(group)


def follow_cycles(groups: Sequence[dict[str, Any]], defaults: dict[str, Any]) -> None:
    """OneCycleLR and CyclicLR cycle betas or else momentum, as ``defaults`` has them: take it to groups of other rules.

    They leave "base_momentum" in the groups.
    """
    for group in groups:
        if "base_momentum" not in group or group["state_full"] not in STATE_FULL:
            continue
        cycles = STATE_FULL[group["state_full"]].cycles
        if cycles == "momentum" and "betas" in defaults:
            group["momentum"] = group["betas"][0]
        elif cycles == "betas" and "betas" not in defaults:
            group["betas"] = (group["momentum"], group["betas"][1])


def follow_replaced(groups: list[dict[str, Any]], shown: Sequence[dict[str, Any]]) -> None:
    """Take up groups that others have put in the place of ours, with the same tensors.

    The usual SAM does so when it loads (``self.base_optimizer.param_groups = self.param_groups``), and Lightning's
    BaseFinetuning when it resumes: schedulers then set the learning rates of those groups, not of ours.
    """
    known = {id(group) for group in groups}
    others = [group for group in shown if id(group) not in known and group["params"]]
    if not others:
        return
    places = {tuple(map(id, group["params"])): number for number, group in enumerate(groups)}
    for group in others:
        number = places.get(tuple(map(id, group["params"])))
        if number is not None:
            groups[number] = group


def settle(groups: Sequence[Mapping[str, Any]], originals: Sequence[ParamSpec], before: dict[int, Seen]) -> None:
    """Take up what changed in ``groups`` since ``before``, and note groups that have state from now on.

    ValueError, naming group and key, for a change that the state does not survive. Looks at nothing but settings: all
    ranks change them alike, so all raise alike.
    """
    for number, group in enumerate(groups):
        if number in before and before[number][0] == {key: group.get(key) for key in WATCHED}:
            continue
        now = seen(group)
        if number in before:
            members = [original for original in originals if original.group == number]
            _refuse(number, before[number][1], now[1], any(original.projected for original in members))
            check_sizes(now[1], members)
        before[number] = now


@contextmanager
def as_made(groups: Sequence[dict[str, Any]], before: Mapping[int, Seen]) -> Iterator[None]:
    """While state is looked at to be saved: groups with what it was made with, should a change wait to be refused."""
    changed: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for number, (values, config) in before.items():
        group = groups[number]
        fixed = {key: value for key, value in values.items() if key in _fixed(config, projected=True) and key in group}
        changed.append((group, {key: group[key] for key in fixed}))
        group.update(fixed)
    try:
        yield
    finally:
        for group, present in changed:
            group.update(present)


def _fixed(config: FrugalConfig, projected: bool) -> set[str]:
    """What cannot change under the state of a group."""
    if not projected:
        return {"state_full", "moments"}
    others = ("moments", "compute_layout", "combine", "growth_limit")
    return {key for key in (*depends_on(config), *others) if TAKEN_UP[key] == NEVER}


def _refuse(number: int, before: FrugalConfig, now: FrugalConfig, projected: bool) -> None:
    lines = [STATE_FREE[config.state_free].lines for config in (before, now)]
    tied = {"state_free"} if projected and lines != [None, None] else set()
    for key in _fixed(before, projected) | tied:
        then, here = getattr(before, key), getattr(now, key)
        if then != here:
            raise ValueError(
                f"param_groups[{number}]: {key} was changed from {then!r} to {here!r} while training, but the state "
                f"was made with {then!r}. Set it back; for other settings build a new optimizer, to which "
                'frugal_dist.checkpoint.load(..., on_mismatch="refresh") brings weights and what state still fits.'
            )


def check_sizes(config: FrugalConfig, members: Sequence[ParamSpec]) -> None:
    """ValueError, naming the parameter, if a group's settings leave nothing of one of its matrices state-full, or its
    rule cannot update one of its regular parameters.
    """
    regular = [original for original in members if not original.projected]
    if regular and not STATE_FULL[for_regular(config).state_full].elementwise:
        raise ValueError(
            f"{regular[0].name} is not projected, and state_full={config.state_full!r} updates whole matrices. Give it "
            "a group with another state_full."
        )
    projected = [original for original in members if original.projected and original.stack]  # an empty one: no matrices
    if family(config) == "blocks" and projected:
        active_count(config, sum(original.stack for original in projected))
        return
    for original in projected:
        selection_size(config, original.name, *original.matrix_shape)
