"""Does a checkpoint fit the model and the hyperparameters of this run? What differs is listed, all of it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from frugal_dist.checkpoint.errors import MismatchError
from frugal_dist.checkpoint.parts import WEIGHT, leftovers
from frugal_dist.checkpoint.reader import Reader
from frugal_dist.checkpoint.writing import fingerprint_of_draws
from frugal_dist.parameters.changes import matrix_options, regular_options
from frugal_dist.step.inputs import StepInputs
from frugal_dist.step.runtime import Runtime

SHOWN = 5
Anew = dict[str, list[str]]
"""Names of matrices and regular parameters whose state starts anew, with what changed; nothing for those that were
frozen then and are frozen now, on an engine that keeps no state of such parameters.
"""


Shapes = dict[str, tuple[int, ...]]


def parameters_here(runtime: Runtime, model_or_engine: Any) -> Shapes:
    """All parameters of the model, of a pipeline stage its own, whether the optimizer has them or not."""
    frozen = {one.name: one.shape for one in leftovers(runtime, model_or_engine) if one.key.startswith(WEIGHT)}
    return {original.name: original.shape for original in runtime.originals} | frozen


def compare(
    runtime: Runtime, now: StepInputs, reader: Reader, here: Shapes, known: Collection[str], refresh: bool
) -> Anew:
    """The names of matrices and regular parameters whose state starts anew, with the reason.

    ``here``: this rank's parameters; ``known``: the names of those of all stages. MismatchError for another model, and
    without ``refresh`` for other hyperparameters that the state depends on.
    """
    _check_parameters(here, known, reader)
    changed = _changed(runtime, now, reader)
    if any(changed.values()) and not refresh:
        raise MismatchError(
            f"{reader.folder} was saved with other hyperparameters: {summary(changed)}. Use the saved ones, or "
            'on_mismatch="refresh" to keep the weights and start these with fresh state.'
        )
    return changed


def _check_parameters(here: Shapes, known: Collection[str], reader: Reader) -> None:
    then = reader.index.parameters
    troubles = [
        _some("only in the checkpoint", sorted(set(then) - set(known)), str),
        _some("only in this run", sorted(set(here) - set(then)), str),
        _some(
            "of another shape",
            [name for name in here if name in then and tuple(then[name]) != here[name]],
            lambda name: f"{name} was {tuple(then[name])}, is {here[name]}",
        ),
    ]
    listed = "; ".join(trouble for trouble in troubles if trouble)
    if listed:
        alone = set(then) > set(here) == set(known) and not troubles[2]
        hint = " If these ranks are a pipeline stage, load on those of all stages: process_group=." if alone else ""
        raise MismatchError(f"{reader.folder} is of another model. Parameters {listed}.{hint}")


def _some(title: str, names: list[str], describe: Callable[[str], str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{title}: {', '.join(describe(name) for name in names[:SHOWN])}{more}"


def _changed(runtime: Runtime, now: StepInputs, reader: Reader) -> Anew:
    same_draws = reader.index.draws == fingerprint_of_draws()
    frozen = {original.name for i, original in enumerate(runtime.originals) if runtime.storage.frozen(i)}
    changes: Anew = {}
    for mat in now.mats:
        name = mat.matrix.name
        entry = reader.index.matrices.get(name)
        if entry is None:
            changes[name] = [] if mat.frozen else ["not projected -> projected"]
            continue
        differences = _differences(entry["depends_on"], matrix_options(mat))
        if not same_draws and mat.family != "basis":
            differences.append("torch draws other random numbers than then")
        if differences:
            changes[name] = differences
    for one in now.regular:
        entry = reader.index.regular.get(one.name)
        if entry is None:
            changes[one.name] = [] if one.name in frozen else ["not regular -> regular"]
        elif differences := _differences(entry["depends_on"], regular_options(one)):
            changes[one.name] = differences
    return changes


def _differences(then: dict[str, Any], here: dict[str, Any]) -> list[str]:
    keys = [key for key in {**then, **here} if then.get(key) != here.get(key)]
    return [f"{key} {then.get(key)!r} -> {here.get(key)!r}" for key in keys]


def summary(changed: Anew) -> str:
    """Each difference once, with how many it concerns."""
    concerned: dict[str, list[str]] = {}
    for name, differences in changed.items():
        for difference in differences:
            concerned.setdefault(difference, []).append(name)
    shown = sorted(concerned)[: 2 * SHOWN]
    more = [f"{len(concerned) - len(shown)} more differences"] if len(concerned) > len(shown) else []
    return "; ".join([*(f"{text} ({_who(concerned[text])})" for text in shown), *more])


def _who(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} parameters"
