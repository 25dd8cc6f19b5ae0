"""``rounding="remainder"`` on every layout: the steps of fp32 masters, bit for bit, and checkpoints of all 32 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import REGULAR, Case, gradients, weights
from places import LARGE, MODEL, PLACES, Place
from storages import Held, Named
from threads import run_ranks
from torch import Tensor

from frugal_dist import checkpoint
from frugal_dist.checkpoint.parts import LOW, WEIGHT
from frugal_dist.checkpoint.reader import Reader
from frugal_dist.update.remainder import joined, split_

STEPS = 4
MATRICES = ("tall", "wide", "row", "experts")
BF16 = {place.name: place for place in (*PLACES.values(), LARGE) if not place.name.startswith("ZeRO")}
NAMES = list(BF16)
PROJECTIONS = (("svd", "std"), ("columns", "std"), ("randk", "std"), ("dct", "std"), ("svd", "full"))
EXACT = ("rounding", "remainder")


def case_of(turn: int, *more: tuple[str, str]) -> Case:
    return Case(*PROJECTIONS[turn % len(PROJECTIONS)], on_refresh="keep", more=more, names=MATRICES)


def start(place: Place, case: Case, dtype: torch.dtype) -> Held:
    given = {name: weights(torch.bfloat16)[name].to(dtype) for name in (*MATRICES, *REGULAR)}
    return place.build(given, case.groups(), case.options)


def gradient(step: int, dtype: torch.dtype) -> Named:
    return {name: gradients(torch.bfloat16)[step][name].to(dtype) for name in (*MATRICES, *REGULAR)}


def train(place: Place, case: Case, dtype: torch.dtype, folder: Path) -> Named:
    """The weights at the end, which are saved as well."""

    def body(rank: int) -> Named:
        held = start(place, case, dtype)
        for step in range(STEPS):
            held.step(gradient(step, dtype))
        checkpoint.save(folder, MODEL, held.optimizer, process_group=place.group)
        return held.full()

    return run_ranks(place.ranks, body)[0]


def carry(place: Place, case: Case, dtype: torch.dtype, source: Path, target: Path) -> None:
    """Load and save again."""

    def body(rank: int) -> None:
        held = start(place, case, dtype)
        checkpoint.load(source, MODEL, held.optimizer, process_group=place.group)
        checkpoint.save(target, MODEL, held.optimizer, process_group=place.group)

    run_ranks(place.ranks, body)


def saved(folder: Path) -> Named:
    """All 32 bits of every weight of a checkpoint."""
    reader = Reader(folder)
    found = {}
    for name in reader.index.parameters:
        weight = reader.whole(WEIGHT + name)
        low = reader.whole(LOW + name) if reader.shape(LOW + name) is not None else None
        assert (low is None) is (weight.dtype == torch.float32)
        found[name] = weight if low is None else joined(weight, low)
    return found


def nearest(exact: Tensor) -> Tensor:
    found = torch.empty_like(exact, dtype=torch.bfloat16)
    split_(found, torch.empty_like(exact, dtype=torch.int16), exact)
    return found


def same(one: Named, other: Named) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n].view(-1), other[n].view(-1)) for n in one)


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_steps_as_with_masters_and_loads_elsewhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "packed" in name:  # kernels leave its tiles to torch, but not their exact copies, which are contiguous
        monkeypatch.setenv("FRUGAL_KERNELS", "torch")
    turn = NAMES.index(name)
    place, other = BF16[name], BF16[NAMES[(turn + 3) % len(NAMES)]]
    masters = train(place, case_of(turn), torch.float32, tmp_path / "masters")
    found = train(place, case_of(turn, EXACT), torch.bfloat16, tmp_path / "found")
    assert same(found, {key: nearest(value) for key, value in masters.items()})
    assert same(saved(tmp_path / "found"), saved(tmp_path / "masters"))
    carry(other, case_of(turn, EXACT), torch.bfloat16, tmp_path / "found", tmp_path / "carried")
    assert same(saved(tmp_path / "carried"), saved(tmp_path / "masters"))


@pytest.mark.parametrize("zero", ["ZeRO-2, 4", "ZeRO-3, 3"])
def test_masters_and_remainders_take_each_others_place(zero: str, tmp_path: Path) -> None:
    """From DeepSpeed's fp32 masters to bf16 with remainders and back: no bit is lost."""
    train(PLACES[zero], case_of(0), torch.float32, tmp_path / "masters")
    carry(BF16["HSDP 2x2"], case_of(0, EXACT), torch.bfloat16, tmp_path / "masters", tmp_path / "low")
    carry(PLACES[zero], case_of(0), torch.float32, tmp_path / "low", tmp_path / "again")
    want = saved(tmp_path / "masters")
    assert same(saved(tmp_path / "low"), want) and same(saved(tmp_path / "again"), want)
    assert not same({n: w.bfloat16().float() for n, w in want.items()}, want)


def test_state_that_starts_anew_keeps_the_weights_exact(tmp_path: Path) -> None:
    """Another density: fresh moments, and no refresh before the next save."""
    place = BF16["Shard(0), 4"]
    train(place, case_of(0, EXACT), torch.bfloat16, tmp_path / "found")

    def body(rank: int) -> None:
        case = Case("svd", "left", "keep", more=(EXACT,), names=MATRICES)
        held = start(place, case, torch.bfloat16)
        checkpoint.load(tmp_path / "found", MODEL, held.optimizer, on_mismatch="refresh")
        checkpoint.save(tmp_path / "anew", MODEL, held.optimizer)

    run_ranks(place.ranks, body)
    assert same(saved(tmp_path / "anew"), saved(tmp_path / "found"))


def test_one_file_per_rank(tmp_path: Path) -> None:
    """``state_dict`` of each rank, into an optimizer that begins with its weights."""
    place, case = BF16["FSDP2 2 x TP 2, packed layers"], case_of(1, EXACT)

    def body(rank: int) -> tuple[Named, Named]:
        held = start(place, case, torch.bfloat16)
        for step in range(3):
            held.step(gradient(step, torch.bfloat16))
        state, middle = held.optimizer.state_dict(), held.full()
        again = place.build(middle, case.groups(), case.options)
        again.optimizer.load_state_dict(state)
        for step in range(3, 5):
            held.step(gradient(step, torch.bfloat16))
            again.step(gradient(step, torch.bfloat16))
        assert f"remainder@rank{rank}of4" in state["state"][0]
        for name, run in (("held", held), ("again", again)):
            checkpoint.save(tmp_path / name, MODEL, run.optimizer)
        return held.full(), again.full()

    for one, other in run_ranks(place.ranks, body):
        assert same(one, other)
    assert same(saved(tmp_path / "held"), saved(tmp_path / "again"))


def test_replicas_whose_remainders_differ_are_made_equal() -> None:
    """At the next refresh, though their weights are still the same."""
    place, case = BF16["DDP, shared state, 3"], case_of(1, EXACT)

    def body(rank: int) -> list[Tensor]:
        held = start(place, case, torch.bfloat16)
        for step in range(4):  # refreshes at 0 and 3
            if step == 3 and rank == 2:
                for store in held.optimizer.state.values():
                    for key, value in store.items():
                        if key.endswith("remainder") and value.dim() == 2:
                            value.zero_()
            held.step(gradient(step, torch.bfloat16))
        _, inputs = held.optimizer.everything()
        return [joined(mat.weights[0], mat.state.store[mat.state.prefix + "remainder"]) for mat in inputs.mats]

    with pytest.warns(UserWarning, match="the replicas on ranks .* had different weights"):
        first, *others = run_ranks(place.ranks, body)
    assert all(torch.equal(one, two) for other in others for one, two in zip(first, other, strict=True))
