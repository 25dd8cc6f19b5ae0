"""A sound checkpoint of another model or of other hyperparameters: what differs is listed, and "refresh" goes on."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import GAP, MATRICES, REGULAR, Case, gradients, weights
from places import MODEL, PLACES, start
from storages import Held, Named, replicas
from threads import run_ranks
from two_rank_runs import CASE, PLACE, load_refused, refused, saved

from frugal_dist import Frugal, checkpoint
from frugal_dist.checkpoint import MismatchError

ALONE = PLACES["one process"]


def changed(**more: Any) -> Case:
    """The usual case with other hyperparameters."""
    fields = {key: more.pop(key) for key in ("projection", "side", "densities") if key in more}
    return replace(CASE, more=tuple(more.items()), **fields)


CHANGES: dict[str, tuple[Case, Case, list[str]]] = {
    "density": (CASE, replace(CASE, densities=(0.5, 0.6, 0.1, 1.0)), ["density 0.25 -> 0.5"]),
    "projection": (CASE, changed(projection="columns"), ["projection 'svd' -> 'columns'"]),
    "side": (CASE, changed(side="right"), ["side 'left' -> 'right'"]),
    "rule": (CASE, changed(state_full="lion"), ["state_full 'adamw' -> 'lion'"]),
    "seed of columns": (changed(projection="columns"), changed(projection="columns", seed=7), ["seed 0 -> 7"]),
    "order of blocks": (
        changed(projection="blockwise"),
        changed(projection="blockwise", block_order="descending"),
        ["block_order 'random' -> 'descending'"],
    ),
    "two at once": (
        CASE,
        replace(changed(state_full="sgdm"), densities=(0.5, 0.6, 0.1, 1.0)),
        ["density 0.25 -> 0.5", "state_full 'adamw' -> 'sgdm'"],
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_changed_hyperparameters_are_listed(what: str, tmp_path: Path) -> None:
    before, after, listed = CHANGES[what]
    error = load_refused(saved(tmp_path / "saved", before), after)
    assert isinstance(error, MismatchError)
    assert str(tmp_path / "saved") in str(error)
    assert 'on_mismatch="refresh"' in str(error)
    for text in listed:
        assert text in str(error)


def depends_on(case: Case) -> dict[str, tuple[Any, ...]]:
    """What the state of each matrix depends on."""
    found = {}
    for group in case.groups():
        for name in group["params"]:
            if name in MATRICES:
                tall = MATRICES[name][-2] >= MATRICES[name][-1]
                side = case.side if case.side != "std" else "right" if tall else "left"
                found[name] = (group["density"], case.projection, side, case.more)
    return found


@pytest.mark.parametrize("what", CHANGES)
def test_refresh_keeps_the_weights_and_starts_with_a_fresh_subspace(what: str, tmp_path: Path) -> None:
    """After a whole number of periods the continued run is one that starts now, from the loaded weights."""
    before, after, listed = CHANGES[what]
    folder, steps = saved(tmp_path / "saved", before, steps=2 * GAP), gradients(torch.float64, 10)[2 * GAP :]
    then, now = depends_on(before), depends_on(after)
    anew = [name for name in MATRICES if then[name] != now[name]]
    assert anew

    def body(rank: int) -> tuple[Named, Named, list[int]]:
        held = start(PLACE, after, torch.float64, zeros=True)
        checkpoint.load(folder, MODEL, held.optimizer, on_mismatch="refresh")
        loaded = held.full()
        for grads in steps:
            held.step(grads)
        _, inputs = held.optimizer.everything()
        return loaded, held.full(), [mat.state.counter("updates") for mat in inputs.mats]

    with pytest.warns(UserWarning, match="start with fresh state: .*" + re.escape(listed[0])):
        found = run_ranks(PLACE.ranks, body)
    expected = ALONE.build(found[0][0], after.groups(), {**after.options, "process_group": None})
    for grads in steps:
        expected.step(grads)
    want = expected.full()
    for _, ended, counts in found:
        assert counts == [10] * len(counts), "updates stay counted"
        for name in MATRICES:
            same = float((ended[name] - want[name]).abs().max()) <= 1e-10
            assert same == (name in anew), f"{name} should {'start anew' if name in anew else 'go on'}"
        for name in REGULAR:
            same = torch.equal(ended[name], want[name])
            assert same == (before.options.get("state_full") != after.options.get("state_full")), name


def test_refresh_starts_anew_only_where_something_changed(tmp_path: Path) -> None:
    """The other matrices go on bit for bit."""
    folder = tmp_path / "saved"
    given = weights()

    def groups(density: float) -> list[dict[str, Any]]:
        rest = [name for name in MATRICES if name not in ("tall", "row")]
        return [
            {"params": ["tall"], "projected": True, "density": density},
            {"params": rest, "projected": True, "density": 0.5, "state_free": "sgd"},
            {"params": ["row", *REGULAR], "projected": False},
        ]

    options = {"projection": "svd", "update_gap": GAP, "lr": 1e-2, "process_group": None}
    held = replicas(given, groups(0.25), options)
    for grads in gradients(torch.float64, 8)[:4]:
        held.step(grads)
    checkpoint.save(folder, MODEL, held.optimizer)
    other = replicas(given, groups(0.5), options)
    with pytest.warns(UserWarning, match=r"start with fresh state: density 0\.25 -> 0\.5 \(tall\)"):
        checkpoint.load(folder, MODEL, other.optimizer, on_mismatch="refresh")
    for grads in gradients(torch.float64, 8)[4:]:
        held.step(grads)
        other.step(grads)
    mine, theirs = other.full(), held.full()
    assert {name for name in given if not torch.equal(mine[name], theirs[name])} == {"tall"}


# --- what does not matter ---------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["seed", "block_order"])
def test_what_the_state_does_not_depend_on_may_change(key: str, tmp_path: Path) -> None:
    """An svd basis comes from gradients: neither the seed nor the order of blocks plays a part."""
    folder = saved(tmp_path / "saved")
    value = {"seed": 3, "block_order": "mirror"}[key]
    case = changed(**{key: value})

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run_ranks(PLACE.ranks, lambda rank: checkpoint.load(folder, MODEL, start(PLACE, case, torch.float64).optimizer))
    assert [f"-> {value!r}. The new ones hold" in str(warning.message) for warning in told] == [True]


def test_a_changed_weight_decay_is_told_and_holds(tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved")
    held = start(ALONE, changed(weight_decay=0.5), torch.float64)
    with pytest.warns(UserWarning, match=r"weight_decay 0\.1 -> 0\.5.*The new ones hold"):
        checkpoint.load(folder, MODEL, held.optimizer)
    assert held.optimizer.param_groups[0]["weight_decay"] == 0.5


def test_a_torch_that_draws_other_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The selection of columns is drawn, not saved: with another torch the state would be that of other columns."""
    from frugal_dist.checkpoint import compare, writing

    columns = changed(projection="columns")
    folder, bases = saved(tmp_path / "columns", columns), saved(tmp_path / "svd")
    monkeypatch.setattr(compare, "fingerprint_of_draws", lambda: writing.fingerprint_of_draws() + 1)
    assert "torch draws other random numbers" in str(load_refused(folder, columns))
    run_ranks(PLACE.ranks, lambda rank: checkpoint.load(bases, MODEL, start(PLACE, CASE, torch.float64).optimizer))


# --- another model ----------------------------------------------------------------------------------


def without(name: str) -> Callable[[Named], Named]:
    return lambda given: {key: value for key, value in given.items() if key != name}


OTHERS: dict[str, tuple[Callable[[Named], Named], str]] = {
    "one matrix less": (without("tall"), "only in the checkpoint: tall"),
    "one norm less": (without("norm"), "only in the checkpoint: norm"),
    "one more": (lambda given: {**given, "new": torch.zeros(4, 4)}, "only in this run: new"),
    "another name": (
        lambda given: {**without("tall")(given), "high tower": given["tall"]},
        "only in the checkpoint: tall; only in this run: high tower",
    ),
    "a wider matrix": (lambda given: {**given, "tall": torch.zeros(24, 17)}, "tall was (24, 16), is (24, 17)"),
    "a longer norm": (lambda given: {**given, "norm": torch.zeros(12)}, "norm was (11,), is (12,)"),
    "more experts": (
        lambda given: {**given, "experts": torch.zeros(4, 10, 6)},
        "experts was (3, 10, 6), is (4, 10, 6)",
    ),
    "turned around": (lambda given: {**given, "tall": torch.zeros(16, 24)}, "tall was (24, 16), is (16, 24)"),
}


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the usual case; nobody changes it."""
    return saved(tmp_path_factory.mktemp("usual") / "saved")


@pytest.mark.parametrize("on_mismatch", ["error", "refresh"])
@pytest.mark.parametrize("what", OTHERS)
def test_another_model_is_described(what: str, on_mismatch: str, usual: Path) -> None:
    change, words = OTHERS[what]
    given = change({name: weight.clone() for name, weight in weights().items()})
    regular = [name for name in given if name in REGULAR]
    groups = [
        {"params": [name for name in given if name not in REGULAR], "projected": True, "density": 1.0},
        {"params": regular, "projected": False},
    ]
    held = replicas(given, groups, {"projection": "columns", "process_group": None})
    with pytest.raises(MismatchError) as caught:
        checkpoint.load(usual, MODEL, held.optimizer, on_mismatch)
    assert words in str(caught.value)
    assert all(torch.equal(value, given[name]) for name, value in held.full().items()), "nothing may be changed"


def test_many_differences_are_counted(usual: Path) -> None:
    names = [f"layer{i}.weight" for i in range(40)]
    optimizer = Frugal([(name, torch.nn.Parameter(torch.zeros(8, 8))) for name in names], process_group=None)
    with pytest.raises(MismatchError, match=r"only in the checkpoint: .* and 6 more; only in this run: .* and 35 more"):
        checkpoint.load(usual, MODEL, optimizer)


@pytest.mark.parametrize("to", ["regular", "projected"])
@pytest.mark.parametrize("name", ["tall", "experts"])
def test_another_choice_of_what_is_projected(name: str, to: str, tmp_path: Path) -> None:
    """A matrix or a stack that becomes regular, or the other way round: weights fit, state does not."""
    given = weights()
    options = {"projection": "columns", "density": 1.0, "process_group": None, "update_gap": GAP}
    small, large = set(MATRICES) - {name}, set(MATRICES)
    before, after = (large, small) if to == "regular" else (small, large)
    held = replicas(given, before, options)
    for grads in gradients(torch.float64, 4):
        held.step(grads)
    checkpoint.save(tmp_path / "saved", MODEL, held.optimizer)
    other = replicas({key: torch.zeros_like(value) for key, value in given.items()}, after, options)
    with pytest.raises(MismatchError, match=f"not {to} -> {to}"):
        checkpoint.load(tmp_path / "saved", MODEL, other.optimizer)
    with pytest.warns(UserWarning, match="start with fresh state"):
        checkpoint.load(tmp_path / "saved", MODEL, other.optimizer, on_mismatch="refresh")
    mine, theirs = other.full(), held.full()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    other.step(gradients(torch.float64, 5)[4])
    held.step(gradients(torch.float64, 5)[4])
    mine, theirs = other.full(), held.full()
    kept = [key for key in theirs if torch.equal(mine[key], theirs[key])]
    assert set(theirs) - set(kept) <= {name, *(f"{name}[{e}]" for e in range(3))}


def test_an_optimizer_without_frugal(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="SGD does not contain a Frugal"):
        checkpoint.save(tmp_path / "saved", MODEL, optimizer)
    with pytest.raises(ValueError, match="on_mismatch='ignore' is not known"):
        refused(lambda held: _load_with(held, tmp_path))


def _load_with(held: Held, folder: Path) -> None:
    checkpoint.load(folder, MODEL, held.optimizer, "ignore")
