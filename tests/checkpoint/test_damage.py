"""Files that are missing, cut off, changed, mixed or foreign: all ranks name the file, and nothing is changed."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from doubles import load_refused, refused, saved
from places import MODEL
from storages import Held
from torch import distributed

from frugal_dist import checkpoint
from frugal_dist.checkpoint import DamagedError
from frugal_dist.checkpoint.tensors import checksum

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
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "tensors missing": (TENSORS, Path.unlink, "is missing"),
    "tensors cut off": (TENSORS, cut_off, "is damaged: it has"),
    "tensors emptied": (TENSORS, lambda path: path.write_bytes(b""), "is damaged: it has 0 bytes"),
    "a changed bit": (TENSORS, flip_a_bit, "its bytes are not those that were written"),
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
    files = json.loads(index.read_text())["files"]
    files[EXTRA] = {"bytes": path.stat().st_size, "crc32": checksum(path)}
    set_in_index(index, files=files)
    error = load_refused(copy)
    assert isinstance(error, DamagedError)
    assert str(path) in str(error)
    assert not (tmp_path / "gone off").exists()
    if how == "torch archive":
        torch.load(path, weights_only=False)  # it would have
        assert (tmp_path / "gone off").exists()
