"""Does a checkpoint fit the model and the hyperparameters of this run? What differs is listed, all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from frugal_dist.checkpoint.errors import MismatchError
from frugal_dist.checkpoint.reader import Reader
from frugal_dist.checkpoint.writing import fingerprint_of_draws, matrix_options, regular_options
from frugal_dist.work import Runtime
from frugal_dist.workload import Load

SHOWN = 5


def compare(runtime: Runtime, now: Load, reader: Reader, refresh: bool) -> set[str]:
    """The names of matrices and regular parameters whose state cannot be kept, if ``refresh`` allows that.

    MismatchError for another model, and without ``refresh`` for other hyperparameters that the state depends on.
    """
    _check_parameters(runtime, reader)
    changed = _changed(runtime, now, reader)
    if changed and not refresh:
        raise MismatchError(
            f"{reader.folder} was saved with other hyperparameters: {_summary(changed)}. Use the saved ones, or "
            'on_mismatch="refresh" to keep the weights and start these with fresh state.'
        )
    return set(changed)


def _check_parameters(runtime: Runtime, reader: Reader) -> None:
    then = {name: entry for name, entry in reader.index.parameters.items() if entry["projected"] is not None}
    leftover = {name: entry for name, entry in reader.index.parameters.items() if entry["projected"] is None}
    here = {original.name: original for original in runtime.originals}
    troubles = [
        _some("only in the checkpoint", sorted(set(then) - set(here)), str),
        _some("only in this run", sorted(set(here) - set(then)), lambda name: _absent(name, leftover)),
        _some(
            "of another shape",
            [name for name in here if name in then and tuple(then[name]["shape"]) != here[name].shape],
            lambda name: f"{name} was {tuple(then[name]['shape'])}, is {here[name].shape}",
        ),
    ]
    listed = "; ".join(trouble for trouble in troubles if trouble)
    if listed:
        raise MismatchError(f"{reader.folder} is of another model. Parameters {listed}.")


def _absent(name: str, leftover: dict[str, Any]) -> str:
    return f"{name} (it was not optimized then)" if name in leftover else name


def _some(title: str, names: list[str], describe: Callable[[str], str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{title}: {', '.join(describe(name) for name in names[:SHOWN])}{more}"


def _changed(runtime: Runtime, now: Load, reader: Reader) -> dict[str, list[str]]:
    """For every matrix or regular parameter what changed; those without a change are left out."""
    same_draws = reader.index.draws == fingerprint_of_draws()
    found: dict[str, list[str]] = {}
    for work in now.works:
        name = work.matrix.name
        entry = reader.index.matrices.get(name)
        if entry is None:
            found[name] = _selection(runtime.originals[work.matrix.original].shape, reader, name, "projected")
            continue
        found[name] = _differences(entry["depends_on"], matrix_options(work))
        if not same_draws and work.family != "basis":
            found[name].append("torch draws other random numbers")
    for one in now.regular:
        entry = reader.index.regular.get(one.name)
        if entry is None:
            found[one.name] = _selection(one.shape, reader, one.name, "regular")
        else:
            found[one.name] = _differences(entry["depends_on"], regular_options(one))
    return {name: differences for name, differences in found.items() if differences}


def _selection(shape: tuple[int, ...], reader: Reader, name: str, what: str) -> list[str]:
    if len(shape) == 3:
        raise MismatchError(f"{reader.folder}: {name} is {what} now, which it was not; a stack cannot change that.")
    return [f"it is {what} now"]


def _differences(then: dict[str, Any], here: dict[str, Any]) -> list[str]:
    keys = [key for key in {**then, **here} if then.get(key) != here.get(key)]
    return [f"{key} {then.get(key)!r} -> {here.get(key)!r}" for key in keys]


def _summary(changed: dict[str, list[str]]) -> str:
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
