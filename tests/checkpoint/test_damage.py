"""Files that are missing, cut off, changed, mixed or foreign: all ranks name the file, and nothing is changed."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from copy import deepcopy as copy_of
from pathlib import Path
from typing import Any

import pytest
import torch
from places import MODEL, PLACES, Ended, Place, ended, identical, load_and_train, start
from storages import Held
from torch import distributed
from two_rank_runs import CASE, PLACE, load_refused, refused, saved

from frugal_dist import checkpoint
from frugal_dist.checkpoint import DamagedError, disk, reader, tensors
from frugal_dist.checkpoint.disk import checksum
from frugal_dist.checkpoint.index import sealed

TENSORS, EXTRA, INDEX = "rank00001.safetensors", "rank00002.extra.pt", "index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("good") / "saved")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same run one step later: every file has the same size."""
    return saved(tmp_path_factory.mktemp("other") / "saved", steps=5)


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "copy")


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def set_in_index(path: Path, **changes: object) -> None:
    """With a right checksum, as a faulty writer would leave it."""
    plain = {**json.loads(path.read_text()), **changes}
    del plain["crc32"]
    path.write_bytes(sealed(plain))


def without_checksum(path: Path) -> None:
    """As the first version of the format was."""
    plain = {**json.loads(path.read_text()), "version": 1}
    del plain["crc32"]
    path.write_text(json.dumps(plain))


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "tensors missing": (TENSORS, Path.unlink, "is missing"),
    "tensors cut off": (TENSORS, cut_off, "is damaged: it has"),
    "tensors emptied": (TENSORS, lambda path: path.write_bytes(b""), "is damaged: it has 0 bytes"),
    "a changed bit": (TENSORS, flip_a_bit, "its bytes are not those that were written"),
    "tensors are a folder": (TENSORS, replace_by_a_folder, "no ordinary file"),
    "tensors are a pipe": (TENSORS, replace_by_a_pipe, "no ordinary file"),
    "extra is a folder": (EXTRA, replace_by_a_folder, "no ordinary file"),
    "extra is a pipe": (EXTRA, replace_by_a_pipe, "no ordinary file"),
    "index is a folder": (INDEX, replace_by_a_folder, "no ordinary file"),
    "index is a pipe": (INDEX, replace_by_a_pipe, "no ordinary file"),
    "index nested deeply": (INDEX, lambda path: path.write_text("[" * 200_000), "nested too deeply"),
    "a digit of the index": (
        INDEX, lambda path: path.write_text(path.read_text().replace('"lr": 0', '"lr": 4', 1)), "not those that were"
    ),
    "index without checksum": (
        INDEX, lambda path: path.write_text(re.sub(', "crc32": "[0-9a-f]{8}"}$', "}", path.read_text())), "checksum"
    ),
    "index that says it is old": (INDEX, lambda path: set_in_index(path, version=1), "checksum"),
    "extra missing": (EXTRA, Path.unlink, "is missing"),
    "extra cut off": (EXTRA, cut_off, "is damaged: it has"),
    "extra changed": (EXTRA, flip_a_bit, "is damaged|cannot be read"),
    "index missing": (INDEX, Path.unlink, "does not exist"),
    "index cut off": (INDEX, cut_off, "is damaged"),
    "index emptied": (INDEX, lambda path: path.write_bytes(b""), "is damaged"),
    "index not text": (INDEX, lambda path: path.write_bytes(b"\xff\xfe\x00"), "is damaged"),
    "index of another program": (INDEX, lambda path: path.write_text('{"weight_map": {}}'), "is not the index"),
    "index of a later version": (INDEX, lambda path: set_in_index(path, version=99), "version 99"),
    "index without files": (INDEX, lambda path: set_in_index(path, files=None), "is damaged"),
    "index with files elsewhere": (
        INDEX, lambda path: set_in_index(path, files={"../../etc/passwd": {"bytes": 1, "crc32": 1}}), "is damaged"
    ),
    "index without pieces": (
        INDEX, lambda path: set_in_index(path, pieces={TENSORS: []}), "elements of .* are in no file"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_named(what: str, copy: Path) -> None:
    file, damage, words = DAMAGES[what]
    damage(copy / file)
    error = load_refused(copy)
    assert isinstance(error, DamagedError)
    assert str(copy / file) in str(error)
    assert re.search(words, str(error))


def first(table: dict[str, Any]) -> dict[str, Any]:
    value: dict[str, Any] = next(iter(table.values()))
    return value


def in_options(key: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda plain: plain["groups"][0]["options"].update({key: value})


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "groups are no tables": lambda plain: plain.update(groups=[1, 2]),
    "groups are text": lambda plain: plain.update(groups="ab"),
    "a rate is text": in_options("lr", "fast"),
    "a rate is a table": in_options("lr", {"x": 1}),
    "betas are one number": in_options("betas", [0.9]),
    "an option is unknown": lambda plain: (
        in_options("projectiom", plain["groups"][0]["options"].pop("projection"))(plain)
    ),
    "parameters among the options": in_options("params", "w"),
    "members are numbers": lambda plain: plain["groups"][0].update(members=[1]),
    "no groups": lambda plain: plain.pop("groups"),
    "no depends_on": lambda plain: first(plain["matrices"]).pop("depends_on"),
    "clocks are a list": lambda plain: first(plain["matrices"]).update(clocks=[1, 2]),
    "a clock is missing": lambda plain: first(plain["matrices"])["clocks"].pop("updates"),
    "a clock is negative": lambda plain: first(plain["matrices"])["clocks"].update(updates=-1),
    "a clock is a fraction": lambda plain: first(plain["regular"])["clocks"].update(step=1.5),
    "a clock is text": lambda plain: first(plain["regular"])["clocks"].update(step="4"),
    "a clock is true": lambda plain: first(plain["regular"])["clocks"].update(step=True),
    "parameters are a list": lambda plain: plain.update(parameters=[1]),
    "a parameter of another shape": lambda plain: next(iter(plain["parameters"].values())).append(2),
    "a tensor of three dims": lambda plain: next(iter(plain["tensors"].values())).append(2),
    "a size is negative": lambda plain: first(plain["files"]).update(bytes=-1),
    "a size is infinite": lambda plain: first(plain["files"]).update(bytes=float("inf")),
    "a size is missing": lambda plain: first(plain["files"]).pop("bytes"),
    "ranks are more": lambda plain: plain.update(ranks=10**12),
    "ranks are fewer": lambda plain: plain.update(ranks=2),
    "ranks are text": lambda plain: plain.update(ranks="3"),
    "a file is not listed": lambda plain: plain["files"].pop(TENSORS),
    "a piece beyond its tensor": lambda plain: plain["pieces"][TENSORS][0].__setitem__(2, 10**6),
    "a piece backwards": lambda plain: plain["pieces"][TENSORS][0].__setitem__(1, 10**6),
    "a piece of nothing": lambda plain: plain["pieces"][TENSORS][0].__setitem__(0, "weight/none"),
    "a piece without bounds": lambda plain: plain["pieces"][TENSORS].append(["weight/none"]),
    "a piece twice": lambda plain: plain["pieces"][TENSORS].append(plain["pieces"][TENSORS][0]),
    "the id is a number": lambda plain: plain.update(identity=7),
    "the model's configuration is a list": lambda plain: plain.update(model_config=[]),
}  # fmt: skip


@pytest.mark.parametrize("old", [False, True], ids=["now", "format 1"])
def test_every_value_of_an_index_is_looked_at(old: bool, good: Path, tmp_path: Path) -> None:
    """Also where no checksum tells: before anything has changed, for the whole program and for SavedWeights."""
    content = json.loads((good / INDEX).read_text())
    copies = {}
    for what, change in WRONG.items():
        folder = shutil.copytree(good, tmp_path / what.replace(" ", "_"))
        plain = copy_of(content)
        change(plain)
        plain.pop("crc32")
        (folder / INDEX).write_bytes(json.dumps({**plain, "version": 1}).encode() if old else sealed(plain))
        copies[what] = folder

    def load_all(held: Held) -> None:
        for folder in copies.values():
            with pytest.raises(DamagedError, match=re.escape(str(folder / INDEX))):
                checkpoint.load(folder, MODEL, held.optimizer)
        raise DamagedError("all of them")

    assert str(refused(load_all)[0]) == "all of them"
    for folder in copies.values():
        with pytest.raises(DamagedError, match=re.escape(str(folder / INDEX))):
            checkpoint.SavedWeights(folder)


def test_checkpoints_of_the_first_format_still_load(copy: Path) -> None:
    """Their index has no checksum."""
    want = load_and_train(PLACE, CASE, torch.float64, copy, 4)
    without_checksum(copy / INDEX)
    assert identical(load_and_train(PLACE, CASE, torch.float64, copy, 4), want)


BROKEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "no extra": lambda record: record.pop("extra"),
    "extra is a list": lambda record: record.update(extra=[1]),
    "no generators": lambda record: record.update(rng={}),
    "a generator of another kind": lambda record: record["rng"].update(torch=torch.zeros(3)),
    "a generator cut off": lambda record: record["rng"].update(python=(3, (1, 2), None)),
    "the engine's counts are text": lambda record: record.update(engine="none"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_a_rank_wrote_is_looked_at(what: str, copy: Path) -> None:
    """Even if size and checksum are right."""
    record = torch.load(copy / EXTRA, weights_only=True)
    BROKEN[what](record)
    torch.save(record, copy / EXTRA)
    write_checksum(copy, EXTRA)
    error = load_refused(copy)
    assert isinstance(error, DamagedError)
    assert str(copy / EXTRA) in str(error)


def write_checksum(folder: Path, file: str) -> None:
    files = json.loads((folder / INDEX).read_text())["files"]
    files[file] = {"bytes": (folder / file).stat().st_size, "crc32": checksum(folder / file)}
    set_in_index(folder / INDEX, files=files)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("file", [TENSORS, EXTRA, INDEX])
def test_files_of_two_checkpoints_do_not_pass_for_one(file: str, verify: bool, copy: Path, other: Path) -> None:
    """Sizes and names agree, and without checksums only the checkpoint's id tells them apart."""
    assert (other / TENSORS).stat().st_size == (copy / TENSORS).stat().st_size
    shutil.copy(other / file, copy / file)
    error = load_refused(copy, verify=verify)
    assert isinstance(error, DamagedError)
    assert re.search(r"belongs to another checkpoint|is damaged", str(error))
    assert str(copy) in str(error)


def test_ranks_that_see_different_checkpoints_are_told(copy: Path, other: Path) -> None:
    """Folders that are local to each machine, left from different moments."""

    def load(held: Held) -> None:
        checkpoint.load(other if distributed.get_rank() == 2 else copy, MODEL, held.optimizer)

    assert "rank 0 and rank 2 see different checkpoints" in str(refused(load)[0])


@pytest.mark.parametrize("what", ["nothing", "a file", "an empty folder", "a folder of checkpoints"])
def test_what_is_no_checkpoint(what: str, good: Path, tmp_path: Path) -> None:
    path = tmp_path / "thing"
    if what == "a file":
        path.write_text("hello")
    elif what != "nothing":
        path.mkdir()
    if what == "a folder of checkpoints":
        shutil.copytree(good, path / "step_000004")
        (path / "latest").write_text("step_000004\n")
    error = load_refused(path)
    assert isinstance(error, DamagedError)
    assert str(path) in str(error)
    assert ("load_latest" in str(error)) is (what == "a folder of checkpoints")


# --- while another process saves ----------------------------------------------------------------------


class Replaced:
    """A checkpoint to which another job saves at one moment of a load: after ``moment`` files were opened."""

    def __init__(self, folder: Path, by: Path, moment: int, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.by, self.left = folder, by, moment
        self.open = disk.opened
        for module in (tensors, reader, disk):
            patch.setattr(module, "opened", self.opened)

    def opened(self, path: Path) -> Any:
        if self.left == 0:
            shutil.rmtree(self.folder)
            if self.by.exists():
                shutil.copytree(self.by, self.folder)
        self.left -= 1
        return self.open(path)


@pytest.mark.parametrize("by", ["another", "nothing"])
@pytest.mark.parametrize("verify", [True, False])
def test_two_checkpoints_are_never_mixed(
    by: str, verify: bool, good: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the folder is replaced during a load by one process, it is one of the two, or refused in time."""
    alone = PLACES["one process"]
    after = other if by == "another" else tmp_path / "nothing"
    want = {4: loaded_alone(alone, good), 5: loaded_alone(alone, other)}
    outcomes: list[Any] = []
    for moment in range(40):
        folder = shutil.copytree(good, tmp_path / str(moment))
        held = start(alone, CASE, torch.float64, zeros=True)
        with monkeypatch.context() as patch:
            replaced = Replaced(folder, after, moment, patch)
            outcomes.append(outcome_of(lambda: checkpoint.load(folder, MODEL, held.optimizer, verify=verify)))  # noqa: B023
        if isinstance(outcomes[-1], str):
            assert str(folder) in outcomes[-1]
            assert not moment or "was replaced or removed by another process" in outcomes[-1]
            assert all(not weight.any() for weight in held.full().values()), "something was changed"
        else:
            assert identical([ended(held)], [want[outcomes[-1]["step"]]])
        if replaced.left >= 0:
            break
    assert outcomes[-1]["step"] == 4, "the last one was not disturbed"
    assert any(isinstance(outcome, str) for outcome in outcomes)


def outcome_of(load: Callable[[], dict[str, Any]]) -> dict[str, Any] | str:
    try:
        return load()
    except checkpoint.CheckpointError as error:
        return str(error)


def loaded_alone(place: Place, folder: Path) -> Ended:
    held = start(place, CASE, torch.float64, zeros=True)
    checkpoint.load(folder, MODEL, held.optimizer)
    return ended(held)


def test_saved_weights_keep_what_they_have_opened(copy: Path, other: Path) -> None:
    """An export or an evaluation may read for minutes."""
    whole = {verify: checkpoint.SavedWeights(copy, verify=verify) for verify in (True, False)}
    before = {name: checkpoint.SavedWeights(copy)[name] for name in whole[True].shapes}
    shutil.rmtree(copy)
    shutil.copytree(other, copy)
    after = checkpoint.SavedWeights(copy)
    for weights in whole.values():
        assert all(torch.equal(weights[name], value) for name, value in before.items())
    assert any(not torch.equal(after[name], value) for name, value in before.items())


class Bomb:
    """Pickled by a foe: calls mkdir when it is loaded by someone who trusts it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("how", ["plain pickle", "torch archive"])
def test_nothing_in_a_checkpoint_executes_code(how: str, copy: Path, tmp_path: Path) -> None:
    """Even if the foe has set size and checksum right."""
    path, index = copy / EXTRA, copy / INDEX
    identity = json.loads(index.read_text())["identity"]
    record = {"checkpoint": identity, "extra": {"x": Bomb(tmp_path / "gone off")}, "engine": {}, "rng": {}}
    if how == "plain pickle":
        path.write_bytes(pickle.dumps(record))
    else:
        torch.save(record, path)
    write_checksum(copy, EXTRA)
    error = load_refused(copy)
    assert isinstance(error, DamagedError)
    assert str(path) in str(error)
    assert not (tmp_path / "gone off").exists()
    if how == "torch archive":
        torch.load(path, weights_only=False)  # it would have
        assert (tmp_path / "gone off").exists()
