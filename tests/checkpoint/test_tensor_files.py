"""The tensor files: what is written comes back, other programs can read it, and broken ones are named."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from frugal_dist.checkpoint.disk import checksum
from frugal_dist.checkpoint.errors import CheckpointError, DamagedError
from frugal_dist.checkpoint.tensors import CODES, TensorFile, write_tensors


def some_tensors() -> list[tuple[str, torch.Tensor]]:
    every = [(str(dtype), (torch.arange(15).view(3, 5) % 2).to(dtype)) for dtype in CODES]
    return [
        *every,
        ("nothing", torch.zeros(0, 4)),
        ("scalar", torch.tensor(2.5)),
        ("transposed", torch.arange(12.0).view(3, 4).t()),
        ("a part of a larger one", torch.arange(100.0).view(10, 10)[2:5, 3:6]),
    ]


def test_every_dtype_comes_back(tmp_path: Path) -> None:
    tensors = some_tensors()
    written = write_tensors(tmp_path / "file", tensors, {"who": "me"})
    file = TensorFile(tmp_path / "file")
    assert file.metadata == {"who": "me"}
    for key, tensor in tensors:
        assert file.dtype(key) == tensor.dtype
        assert file.shape(key) == tensor.shape
        found = file.tensor(key)
        assert found.dtype == tensor.dtype
        assert torch.equal(found.float() if tensor.dtype.is_floating_point else found,
                           tensor.float() if tensor.dtype.is_floating_point else tensor), key  # fmt: skip
    assert written.bytes == (tmp_path / "file").stat().st_size
    assert written.crc32 == checksum(tmp_path / "file") == zlib.crc32((tmp_path / "file").read_bytes())


def test_other_programs_can_read_it(tmp_path: Path) -> None:
    """The format is safetensors', to the letter: its own reader is strict about order and gaps."""
    tensors = some_tensors()
    write_tensors(tmp_path / "file.safetensors", tensors, {"who": "me"})
    found = load_file(tmp_path / "file.safetensors")
    assert found.keys() == {key for key, _ in tensors}
    assert torch.equal(found["transposed"], torch.arange(12.0).view(3, 4).t())


def test_an_empty_file_of_tensors(tmp_path: Path) -> None:
    """A rank may have nothing to write."""
    write_tensors(tmp_path / "file", [], {})
    assert "anything" not in TensorFile(tmp_path / "file")


def test_changing_a_read_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", [("x", torch.ones(4))], {})
    TensorFile(tmp_path / "file").tensor("x").zero_()
    assert torch.equal(TensorFile(tmp_path / "file").tensor("x"), torch.ones(4))


def test_a_name_twice_and_a_dtype_without_a_code(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="x would be written twice"):
        write_tensors(tmp_path / "file", [("x", torch.ones(1)), ("x", torch.ones(1))], {})
    with pytest.raises(CheckpointError, match=r"x has dtype torch\.complex128"):
        write_tensors(tmp_path / "file", [("x", torch.ones(1, dtype=torch.complex128))], {})


def header(**entry: object) -> bytes:
    text = json.dumps({"x": entry}).encode()
    return len(text).to_bytes(8, "little") + text


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BROKEN = {
    "nothing": b"",
    "too short": b"1234",
    "a header longer than the file": (1 << 40).to_bytes(8, "little") + b"{}",
    "no JSON": (8).to_bytes(8, "little") + b"notjson!",
    "no table": (2).to_bytes(8, "little") + b"[]",
    "an unknown dtype": header(**{**GOOD, "dtype": "F31"}) + bytes(8),
    "data beyond the end": header(**GOOD) + bytes(4),
    "a shape that does not fit": header(**{**GOOD, "shape": [3]}) + bytes(8),
    "ends before it starts": header(**{**GOOD, "data_offsets": [8, 0]}) + bytes(8),
    "no offsets": header(dtype="F32", shape=[2]) + bytes(8),
    "an entry that is no table": (11).to_bytes(8, "little") + b'{"x": [1]} ',
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_named(what: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(BROKEN[what])
    with pytest.raises(DamagedError, match=r"file is damaged"):
        TensorFile(tmp_path / "file")
