"""Saving goes wrong: all ranks are told alike, the previous checkpoint stays, nothing is left, training goes on."""

from __future__ import annotations

import shutil
import threading
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import gradients
from disks import disk_that_fills_up, disk_that_turns_read_only
from places import MODEL, Ended, identical, load_and_train, train_and_save
from selection import mostly_heavy
from storages import Held
from threads import run_ranks
from torch import distributed
from two_rank_runs import CASE, PLACE, STEPS, refused, saved, trained

from frugal_dist import checkpoint
from frugal_dist.checkpoint import CheckpointError, StorageError, tensors, writing


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def sound(folder: Path) -> bool:
    """Loads, and continues as the run that was never interrupted."""
    return identical(load_and_train(PLACE, CASE, torch.float64, folder, 4), uninterrupted())


@cache
def uninterrupted() -> list[Ended]:
    return train_and_save(PLACE, CASE, torch.float64, {})


TROUBLES = {"full": "No space left on device", "read-only": "Read-only file system"}


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("target", ["the same", "another"])
def test_the_disk_gives_trouble(trouble: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is there already; the next one does not fit or may not be written."""
    disks = {
        "full": lambda: disk_that_fills_up(tmp_path / "disk", monkeypatch, room=60_000),
        "read-only": lambda: disk_that_turns_read_only(tmp_path / "disk", monkeypatch),
    }
    with disks[trouble]() as (disk, break_it):
        first = saved(disk / "first")
        before = names_in(first)
        break_it()
        there = set(names_in(disk))
        second = first if target == "the same" else disk / "second"
        (error, *_) = refused(lambda held: checkpoint.save(second, MODEL, held.optimizer))
        assert isinstance(error, StorageError)
        assert TROUBLES[trouble] in str(error)
        assert str(disk) in str(error)
        assert set(names_in(disk)) == there, "something was left over"
        assert names_in(first) == before
        monkeypatch.undo()
        assert sound(first)


@pytest.mark.parametrize("how", ["save", "save_step"])
def test_training_goes_on_if_it_should(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = uninterrupted()

    def save(folder: Path, held: Held) -> bool:
        if how == "save":
            return checkpoint.save(folder / "one", MODEL, held.optimizer, on_error="warn")
        return checkpoint.save_step(folder, 4, MODEL, held.optimizer, on_error="warn")

    with disk_that_fills_up(tmp_path / "disk", monkeypatch, room=10_000) as (disk, fill_up):
        fill_up()

        def body(rank: int) -> tuple[bool, Any]:
            held = trained()
            worked = save(disk, held)
            for grads in gradients(torch.float64, STEPS)[4:]:
                held.step(grads)
            return worked, held.full()

        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = run_ranks(PLACE.ranks, body)
    assert [worked for worked, _ in found] == [False, False, False]
    assert [str(warning.message) for warning in told if "was not written, training goes on" in str(warning.message)]
    assert sum("was not written" in str(warning.message) for warning in told) == 1, "one rank is enough"
    for (_, weights), one in zip(found, whole, strict=True):
        assert all(torch.equal(weights[name], one.weights[name]) for name in weights)


def test_mistakes_of_the_program_are_raised_in_any_case(tmp_path: Path) -> None:
    """on_error="warn" is for disks."""
    with pytest.raises(CheckpointError, match=r"extra\['x'\] cannot be saved"):
        run_ranks(
            PLACE.ranks,
            lambda rank: checkpoint.save(
                tmp_path / "saved", MODEL, trained(steps=1).optimizer, {"x": object}, on_error="warn"
            ),
        )
    assert names_in(tmp_path) == []


class Unwritable:
    """Pickles well, but only code could bring it back."""


@pytest.mark.parametrize("value", [Unwritable(), lambda: 0, threading.Lock()], ids=["object", "function", "lock"])
def test_extra_that_could_not_be_read_back_is_refused_at_once(value: object, tmp_path: Path) -> None:
    def save(held: Held) -> None:
        mine = value if distributed.get_rank() == 1 else 1
        checkpoint.save(tmp_path / "saved", MODEL, held.optimizer, {"good": [1, "a", torch.ones(2)], "bad": mine})

    (error, *_) = refused(save)
    assert "rank 1: extra['bad'] cannot be saved" in str(error)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("extra", [[1, 2], [], "text", 7, [("a", 1)]], ids=repr)
def test_extra_is_a_dict(extra: Any, tmp_path: Path) -> None:
    (error, *_) = refused(lambda held: checkpoint.save(tmp_path / "saved", MODEL, held.optimizer, extra))
    assert f"extra must be a dict, not {type(extra).__name__}" in str(error)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("error", [RuntimeError("of CUDA"), MemoryError(), KeyError("x"), OSError(5, "I/O", "a/file")])
def test_a_rank_that_fails_takes_all_along(
    error: Exception, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it raises: the others must not wait for it."""
    write = tensors.write_tensors

    def failing(path: Path, *arguments: Any) -> Any:
        if path.name == f"rank{rank:05d}.safetensors":
            raise error
        return write(path, *arguments)

    monkeypatch.setattr(writing, "write_tensors", failing)
    (told, *_) = refused(lambda held: checkpoint.save(tmp_path / "saved", MODEL, held.optimizer))
    assert f"rank {rank}: " in str(told)
    assert isinstance(told, StorageError) == isinstance(error, OSError)
    assert names_in(tmp_path) == []


def test_a_folder_that_not_all_ranks_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each machine has a disk of its own at that path."""
    real = writing.working_folder

    def elsewhere(final: Path, token: str) -> Path:
        return tmp_path / "another disk" / "x" if distributed.get_rank() == 2 else real(final, token)

    monkeypatch.setattr(writing, "working_folder", elsewhere)
    monkeypatch.setattr(writing, "PATIENCE", 0.3)
    (error, *_) = refused(lambda held: checkpoint.save(tmp_path / "saved", MODEL, held.optimizer))
    assert isinstance(error, StorageError)
    assert "rank 2: " in str(error)
    assert "all ranks share" in str(error)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("what", ["a folder with other things", "a file"])
def test_what_is_no_checkpoint_is_never_replaced(what: str, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    if what == "a file":
        path.write_text("thesis")
    else:
        path.mkdir()
        (path / "thesis.tex").write_text("thesis")
        (path / "index.json").write_text("{}")
    (error, *_) = refused(lambda held: checkpoint.save(path, MODEL, held.optimizer))
    assert "is no checkpoint" in str(error)
    assert str(path) in str(error)
    assert (path if what == "a file" else path / "thesis.tex").read_text() == "thesis"
    assert names_in(tmp_path) == ["precious"]


# --- links ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", mostly_heavy(["an empty folder", "a checkpoint", "nothing yet"], ["a checkpoint"]))
def test_a_link_is_written_through(target: str, tmp_path: Path) -> None:
    """The checkpoint lies on a larger disk, again and again; a job that was killed half-way left its old one there."""
    real, link = tmp_path / "scratch" / "saved", tmp_path / "here" / "saved"
    link.parent.mkdir()
    link.symlink_to(real)
    if target != "nothing yet":
        real.mkdir(parents=True)
    if target == "a checkpoint":
        saved(real, steps=2)
    for _ in range(2):
        saved(link)
        assert link.is_symlink()
        assert names_in(link.parent) == names_in(real.parent) == ["saved"]
        assert sound(link)
    (real.parent / ".saved.old").symlink_to(tmp_path)  # whoever made it: it is in the way
    saved(link)
    (real.parent / ".saved.old").write_text("a file")
    saved(link)
    assert names_in(real.parent) == ["saved"]
    shutil.move(real, real.parent / ".saved.old")
    assert sound(link)
    assert checkpoint.SavedWeights(link).shapes


def test_what_a_link_leads_to_is_never_replaced_if_it_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("thesis")
    (tmp_path / "saved").symlink_to(tmp_path / "home")
    (error, *_) = refused(lambda held: checkpoint.save(tmp_path / "saved", MODEL, held.optimizer))
    assert "is no checkpoint" in str(error)
    assert names_in(tmp_path / "home") == ["thesis.tex"]


def test_an_empty_folder_and_a_damaged_checkpoint_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert sound(saved(tmp_path / "empty"))
    (tmp_path / "empty" / "index.json").write_text("cut o")
    assert sound(saved(tmp_path / "empty"))


def test_what_killed_jobs_left_is_cleared_away(tmp_path: Path) -> None:
    for name in (".saved.partial-0123456789abcdef", ".saved.deleted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank00000.safetensors").write_bytes(b"half")
    (tmp_path / ".other.partial-0123456789abcdef").mkdir()
    saved(tmp_path / "saved")
    assert names_in(tmp_path) == [".other.partial-0123456789abcdef", "saved"]


def test_a_job_killed_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    """The old checkpoint has given up its name, the new one does not have it yet."""
    folder = saved(tmp_path / "saved")
    shutil.move(folder, tmp_path / ".saved.old")
    assert sound(folder)
    saved(folder, steps=4)
    assert names_in(tmp_path) == ["saved"]
    assert sound(folder)
