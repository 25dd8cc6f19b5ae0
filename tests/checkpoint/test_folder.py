"""A folder of checkpoints: which is the latest, which stay, and what happens when the latest is damaged."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import gradients
from places import MODEL, PLACES, start
from storages import Held
from threads import run_ranks
from two_rank_runs import CASE, PLACE, refused, trained

from frugal_dist import checkpoint
from frugal_dist.checkpoint import DamagedError, MismatchError
from frugal_dist.checkpoint.folder import superseded

ALONE = PLACES["one process"]


def alone(steps: int = 0) -> Held:
    held = start(ALONE, CASE, torch.float64)
    for grads in gradients(torch.float64, 8)[:steps]:
        held.step(grads)
    return held


def folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir())


def save(root: Path, *steps: int, **options: Any) -> Held:
    held = alone(1)
    for step in steps:
        assert checkpoint.save_step(root, step, MODEL, held.optimizer, {"step": step}, **options)
    return held


def test_the_latest_is_loaded_with_its_step_and_extra(tmp_path: Path) -> None:
    """On three ranks, each with an extra of its own."""
    root = tmp_path / "run"

    def body(rank: int) -> tuple[Any, bool]:
        held = trained(steps=0)
        assert checkpoint.load_latest(root, MODEL, held.optimizer) is None, "there is nothing yet"
        for step, grads in enumerate(gradients(torch.float64, 4), start=1):
            held.step(grads)
            checkpoint.save_step(root, step, MODEL, held.optimizer, {"mine": 10 * step + rank}, keep_last=2)
        other = start(PLACE, CASE, torch.float64, zeros=True)
        found = checkpoint.load_latest(root, MODEL, other.optimizer)
        mine, theirs = held.full(), other.full()
        return found, all(torch.equal(mine[name], theirs[name]) for name in mine)

    assert run_ranks(PLACE.ranks, body) == [((4, {"mine": 40 + rank}), True) for rank in range(PLACE.ranks)]
    assert folders(root) == ["step_000003", "step_000004"]
    assert checkpoint.latest(root) == root / "step_000004"


def test_nothing_there(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "no such folder") is None
    assert checkpoint.load_latest(tmp_path / "no such folder", MODEL, alone().optimizer) is None


def test_a_file_is_no_folder_of_checkpoints(tmp_path: Path) -> None:
    """Nor "none yet": the run would begin anew, and fail at its first save."""
    (tmp_path / "run").write_text("notes")
    with pytest.raises(checkpoint.CheckpointError, match="run is a file"):
        checkpoint.load_latest(tmp_path / "run", MODEL, alone().optimizer)


def test_what_lies_in_the_place_of_latest_is_named(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    with pytest.raises(checkpoint.StorageError, match="/latest: Is a directory"):
        save(tmp_path, 1)


# --- which stay -------------------------------------------------------------------------------------

STEPS = list(range(100, 1001, 100))


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (1, None, [1000]),
        (3, None, [800, 900, 1000]),
        (100, None, STEPS),
        (None, None, STEPS),
        (None, 300, STEPS),
        (1, 300, [300, 600, 900, 1000]),
        (2, 500, [500, 900, 1000]),
        (2, 7, [700, 900, 1000]),
    ],
)
def test_which_checkpoints_stay(keep_last: int | None, keep_every: int | None, kept: list[int]) -> None:
    gone = superseded(STEPS, 1000, keep_last, keep_every)
    assert sorted(set(STEPS) - set(gone)) == kept


def test_after_going_back_the_newer_ones_neither_count_nor_go() -> None:
    """A run that restarted from step 500 has just saved step 600."""
    assert superseded(STEPS, 600, 2, None) == [100, 200, 300, 400]


def test_old_checkpoints_go_as_new_ones_come(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, 5, keep_last=2, keep_every=3)
    assert folders(tmp_path) == ["step_000003", "step_000004", "step_000005"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "step_one").mkdir()
    save(tmp_path, 1234567, keep_last=1, keep_every=3)
    assert folders(tmp_path) == ["notes", "step_000003", "step_1234567", "step_one"]


def test_what_killed_jobs_left_goes_too(tmp_path: Path) -> None:
    for name in (".step_000001.partial-00aa", ".step_000002.deleted", ".other.partial-00aa"):
        (tmp_path / name).mkdir()
    save(tmp_path, 3)
    assert folders(tmp_path) == [".other.partial-00aa", "step_000003"]


def test_folders_and_checkpoints_may_be_links(tmp_path: Path) -> None:
    """A checkpoint that was moved to a larger disk is loaded there, and goes from there when its time has come."""
    (tmp_path / "run").symlink_to(tmp_path / "scratch")  # which the first save makes
    save(tmp_path / "run", 1, 2)
    (tmp_path / "scratch" / "step_000002").rename(tmp_path / "moved")
    (tmp_path / "run" / "step_000002").symlink_to(tmp_path / "moved")
    assert checkpoint.load_latest(tmp_path / "run", MODEL, alone().optimizer) == (2, {"step": 2})
    save(tmp_path / "run", 3, keep_last=1)
    assert folders(tmp_path / "run") == ["step_000003"]
    assert folders(tmp_path) == ["run", "scratch"]


@pytest.mark.parametrize("options", [{"keep_last": 0}, {"keep_every": 0}, {"keep_last": -1}])
def test_numbers_that_make_no_sense(options: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.* must be at least 1"):
        save(tmp_path, 1, **options)


def test_a_step_is_saved_again(tmp_path: Path) -> None:
    save(tmp_path, 5)
    held = alone(3)
    checkpoint.save_step(tmp_path, 5, MODEL, held.optimizer, {"again": True})
    other = alone()
    assert checkpoint.load_latest(tmp_path, MODEL, other.optimizer) == (5, {"again": True})
    assert all(torch.equal(value, held.full()[name]) for name, value in other.full().items())


# --- latest -----------------------------------------------------------------------------------------


def test_latest_is_followed_even_if_there_are_newer_ones(tmp_path: Path) -> None:
    """A newer one was written, but the job was killed before it became the latest; or the user went back by hand."""
    save(tmp_path, 1, 2, 3)
    (tmp_path / "latest").write_text("step_000002\n")
    assert checkpoint.load_latest(tmp_path, MODEL, alone().optimizer) == (2, {"step": 2})


@pytest.mark.parametrize("content", [None, "a pipe", b"", b"\xff\xfe", b"step_two\n", b"step_" + b"9" * 5000])
def test_without_a_readable_latest_the_newest_is_taken(content: bytes | str | None, tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "latest").unlink()
    if isinstance(content, bytes):
        (tmp_path / "latest").write_bytes(content)
    elif content is not None:
        os.mkfifo(tmp_path / "latest")
    assert checkpoint.load_latest(tmp_path, MODEL, alone().optimizer) == (2, {"step": 2})


def damage(folder: Path, how: str) -> None:
    if how == "a file cut off":
        os.truncate(folder / "rank00000.safetensors", 1000)
    elif how == "the index missing":
        (folder / "index.json").unlink()
    elif how == "a digit of the index":
        text = (folder / "index.json").read_text()
        (folder / "index.json").write_text(text.replace('"updates": 1', '"updates": 2'))
    else:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


@pytest.mark.parametrize(
    "how", ["a file cut off", "the index missing", "the whole folder missing", "a digit of the index"]
)
def test_a_damaged_latest_is_reported_and_the_one_before_is_named(how: str, tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    damage(tmp_path / "step_000003", how)
    with pytest.raises(DamagedError) as caught:
        checkpoint.load_latest(tmp_path, MODEL, alone().optimizer)
    assert "step_000003" in str(caught.value)
    assert f"The one before is {tmp_path / 'step_000002'}" in str(caught.value)
    assert 'on_damaged="previous"' in str(caught.value)
    held = alone()
    assert checkpoint.load(tmp_path / "step_000002", MODEL, held.optimizer) == {"step": 2}


def test_the_one_before_is_taken_if_that_is_wanted(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    damage(tmp_path / "step_000003", "a digit of the index")
    damage(tmp_path / "step_000002", "the index missing")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = checkpoint.load_latest(tmp_path, MODEL, alone().optimizer, on_damaged="previous")
    assert found == (1, {"step": 1})
    (words,) = [str(warning.message) for warning in told]
    assert "step_000003" in words
    assert f"Going back to {tmp_path / 'step_000001'}" in words


def test_nothing_sound_is_left(tmp_path: Path) -> None:
    save(tmp_path, 1)
    damage(tmp_path / "step_000001", "a file cut off")
    with pytest.raises(DamagedError, match=r"rank00000\.safetensors is damaged"):
        checkpoint.load_latest(tmp_path, MODEL, alone().optimizer, on_damaged="previous")


def test_all_ranks_go_back_together(tmp_path: Path) -> None:
    """The damaged file is looked at by one of them."""

    def body(rank: int) -> Any:
        held = trained(steps=1)
        for step in (1, 2):
            checkpoint.save_step(tmp_path, step, MODEL, held.optimizer, {"rank": rank})
        if rank == 0:
            damage(tmp_path / "step_000002", "a file cut off")
        torch.distributed.barrier()
        return checkpoint.load_latest(tmp_path, MODEL, held.optimizer, on_damaged="previous")

    with pytest.warns(UserWarning, match="Going back"):
        assert run_ranks(PLACE.ranks, body) == [(1, {"rank": rank}) for rank in range(PLACE.ranks)]


def test_another_model_is_no_damage(tmp_path: Path) -> None:
    """Going back would not help, and would hide a mistake."""
    save(tmp_path, 1, 2)
    case = type(CASE)("columns", "std", on_refresh="keep")
    held = start(ALONE, case, torch.float64)
    with pytest.raises(MismatchError, match="step_000002 was saved with other hyperparameters"):
        checkpoint.load_latest(tmp_path, MODEL, held.optimizer, on_damaged="previous")


def test_a_folder_of_checkpoints_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "run", 1)
    (error, *_) = refused(lambda held: checkpoint.load(tmp_path / "run", MODEL, held.optimizer))
    assert "use load_latest" in str(error)
    (error, *_) = refused(lambda held: checkpoint.save(tmp_path / "run", MODEL, held.optimizer))
    assert "is no checkpoint" in str(error)
