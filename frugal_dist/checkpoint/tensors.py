"""Files of named tensors in the safetensors format: a JSON header and the plain bytes. Nothing in them is code.

Written tensor by tensor, so that no more than one is copied at a time; read through a memory map, so that only the
bytes that are used come from disk. (https://github.com/huggingface/safetensors describes the format.)
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from frugal_dist.checkpoint.disk import Output, Written, opened
from frugal_dist.checkpoint.errors import CheckpointError, DamagedError

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in CODES.items()}


def write_tensors(
    path: Path,
    tensors: Sequence[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    later: Mapping[str, Callable[[], Tensor]] = MappingProxyType({}),
) -> Written:
    """Write named tensors, on whatever device they are. Equal names and dtypes without a code raise CheckpointError.

    ``later``: what is made when its turn comes, by name; its tensor only has the shape and dtype that it will have.
    """
    for key, tensor in tensors:
        if tensor.dtype not in CODES:
            raise CheckpointError(f"{key} has dtype {tensor.dtype}, which cannot be saved.")
    # Larger items first, so that every tensor is aligned to its own item size.
    ordered = sorted(tensors, key=lambda entry: -entry[1].element_size())
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for key, tensor in ordered:
        if key in header:
            raise CheckpointError(f"{key} would be written twice into {path}.")
        stop = start + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with Output(path) as output:
        output.write(len(text).to_bytes(8, "little"))
        output.write(text)
        for key, tensor in ordered:
            made = later[key]() if key in later else tensor
            host = made.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
            output.write(_bytes_of(host))
        return output.finish()


def _bytes_of(host: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor; valid as long as the tensor lives."""
    size = host.numel() * host.element_size()
    return memoryview((ctypes.c_ubyte * size).from_address(host.data_ptr())) if size else memoryview(b"")


class TensorFile:
    """A file of named tensors, opened for reading. DamagedError, naming it, if it is not one.

    Header and bytes are of one file, also if another one takes its name meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with opened(path) as file:
            self._size = os.fstat(file.fileno()).st_size
            try:
                self._start, self._header = self._read_header(file)
                metadata = self._header.pop("__metadata__", {})
                self.metadata: dict[str, str] = {str(key): str(value) for key, value in metadata.items()}
                for entry in self._header.values():
                    self._check(entry)
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
                raise DamagedError(f"{path} is damaged: its header cannot be read ({error}).") from error
            # By its open handle: by name it may be another one by now. Of mmap objects each would keep a handle open.
            handle = f"/dev/fd/{file.fileno()}"
            self._memory = torch.from_file(handle, shared=False, size=self._size, dtype=torch.uint8)

    def __contains__(self, key: str) -> bool:
        return key in self._header

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of one tensor."""
        return tuple(self._header[key]["shape"])

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of one tensor."""
        return DTYPES[self._header[key]["dtype"]]

    def tensor(self, key: str) -> Tensor:
        """A view of the mapped file, read when it is used. Writing to it does not change the file."""
        start, stop = (self._start + offset for offset in self._header[key]["data_offsets"])
        return self._memory[start:stop].view(self.dtype(key)).view(self.shape(key))

    def _read_header(self, file: BinaryIO) -> tuple[int, dict[str, Any]]:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= self._size - 8:
            raise ValueError(f"a header of {length} bytes in a file of {self._size}")
        header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("not a table")
        return 8 + length, header

    def _check(self, entry: dict[str, Any]) -> None:
        numbers = [*entry["shape"], *entry["data_offsets"]]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"an entry of shape {entry['shape']} at {entry['data_offsets']}")
        start, stop = entry["data_offsets"]
        item = DTYPES[entry["dtype"]].itemsize
        fits = start <= stop <= self._size - self._start and (self._start + start) % item == 0
        if not fits or stop - start != prod(entry["shape"]) * item:
            raise ValueError(f"an entry of shape {entry['shape']} at {start}-{stop}")
