"""Reads rectangles of named tensors out of the files of all ranks. Needs neither the ranks nor the optimizer."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frugal_dist.checkpoint.disk import MissingError, checksum_of, opened
from frugal_dist.checkpoint.errors import CheckpointError, DamagedError, MismatchError
from frugal_dist.checkpoint.extra import read_extra
from frugal_dist.checkpoint.files import complete_folder, read_index
from frugal_dist.checkpoint.index import INDEX, Index, extra_file, piece_key
from frugal_dist.checkpoint.tensors import TensorFile
from frugal_dist.sharding.tile import Tile, overlap

LOOKS = 3
"""How often an index is looked for: between the two renames of a save it is under neither name for a moment."""


class Reader:
    """An open checkpoint. DamagedError, naming the file, if it is none.

    Files are known by the checkpoint's id, and what was opened is kept: a checkpoint that takes this one's place
    meanwhile is not mixed with it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.folder, self.index = _find_index(path)
        self._open: dict[str, TensorFile] = {}

    def check_files(self, share: int = 0, shares: int = 1, contents: bool = True) -> None:
        """A fair share of the files: is each there, whole, and (``contents``) unchanged?"""
        by_size = sorted(self.index.files.items(), key=lambda entry: (-entry[1].bytes, entry[0]))
        for name, written in by_size[share::shares]:
            path = self.folder / name
            with self._unless_replaced():
                with opened(path) as file:
                    size = os.fstat(file.fileno()).st_size
                    if size != written.bytes:
                        raise DamagedError(f"{path} is damaged: it has {size} bytes, {written.bytes} were written.")
                    changed = contents and checksum_of(file) != written.crc32
                self._check_identity(name)
                if changed:
                    raise DamagedError(f"{path} is damaged: its bytes are not those that were written.")

    def _check_identity(self, name: str) -> None:
        """Tell a file of another checkpoint from a broken one."""
        if name.endswith(".pt"):
            read_extra(self.folder / name, self.index.identity)
        else:
            self._file(name)

    @contextmanager
    def _unless_replaced(self) -> Iterator[None]:
        """A file that is not this checkpoint's is no damage if the whole checkpoint has gone from its place."""
        try:
            yield
        except DamagedError as error:
            if _identity_at(self._path) == self.index.identity:
                raise
            raise CheckpointError(
                f"{self.folder} was replaced or removed by another process while it was being read. Load it again."
            ) from error

    def shape(self, name: str) -> tuple[int, int] | None:
        """The saved shape of a tensor as two dims, None if it is not in the checkpoint."""
        return self.index.tensors.get(name)

    def find(self, name: str, shape: tuple[int, int], area: Tile) -> list[tuple[Tile, str]]:
        """The pieces that cover a rectangle, each with its file. Opens the files and checks what they say.

        MismatchError for another shape, DamagedError if the rectangle is not all there.
        """
        saved = self.shape(name)
        if saved is None:
            raise MismatchError(f"{self.folder}: there is no {name}.")
        if saved != shape:
            raise MismatchError(f"{self.folder}: {name} was saved with shape {saved}, now it has {shape}.")
        pieces, missing = [], area.numel
        for held, file in self._near(name, area):
            common = overlap(held, area)
            if common is not None:
                self._check_piece(name, held, file)
                pieces.append((held, file))
                missing -= common.numel
        if missing > 0:
            raise DamagedError(f"{self.folder / INDEX}: {missing} elements of {name} are in no file.")
        return pieces

    def fill(self, name: str, shape: tuple[int, int], area: Tile, target: Tensor) -> None:
        """Copy a rectangle of a saved tensor into ``target``, whatever its device and dtype."""
        for held, file in self.find(name, shape, area):
            common = overlap(held, area)
            assert common is not None
            piece = self._file(file).tensor(piece_key(name, held))[common.within(held)]
            with torch.inference_mode(target.is_inference()):  # buffers made in it can be written in it only
                target[common.within(area)].copy_(piece)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which a tensor was saved."""
        shape = self.index.tensors[name]
        held, file = self.find(name, shape, Tile((0, shape[0]), (0, shape[1])))[0]
        return self._file(file).dtype(piece_key(name, held))

    def whole(self, name: str) -> Tensor:
        """A saved tensor, put together, as two dims."""
        shape = self.shape(name)
        if shape is None:
            raise MismatchError(f"{self.folder}: there is no {name}.")
        area = Tile((0, shape[0]), (0, shape[1]))
        target = torch.empty(shape, dtype=self.dtype(name), device="cpu")
        self.fill(name, shape, area, target)
        return target

    def record(self, rank: int) -> tuple[dict[str, Any], bool]:
        """What this rank wrote beside its tensors, or rank 0 if there were fewer; and whether it is its own."""
        with self._unless_replaced():
            return read_extra(self.extra_path(rank), self.index.identity), extra_file(rank) in self.index.files

    def extra_path(self, rank: int) -> Path:
        """The file that this rank wrote beside its tensors, or rank 0's if there were fewer."""
        own = extra_file(rank)
        return self.folder / (own if own in self.index.files else extra_file(0))

    @cached_property
    def _where(self) -> dict[str, list[tuple[Tile, str]]]:
        by_name: dict[str, list[tuple[Tile, str]]] = {}
        for file, pieces in self.index.pieces.items():
            for name, area in pieces:
                by_name.setdefault(name, []).append((area, file))
        for held in by_name.values():
            held.sort()
        return by_name

    def _near(self, name: str, area: Tile) -> list[tuple[Tile, str]]:
        """All pieces that may overlap an area. One row can be in thousands of pieces; elsewhere they are few."""
        pieces = self._where.get(name, [])
        if self.index.tensors[name][0] > 1:
            return pieces
        first = bisect_right(pieces, area.cols[0], key=lambda piece: piece[0].cols[0]) - 1
        last = bisect_left(pieces, area.cols[1], key=lambda piece: piece[0].cols[0])
        return pieces[max(first, 0) : last]

    def _check_piece(self, name: str, held: Tile, file: str) -> None:
        key, tensors = piece_key(name, held), self._file(file)
        if key not in tensors or tensors.shape(key) != (held.height, held.width):
            raise DamagedError(f"{tensors.path} does not hold {key}, as {self.folder / INDEX} says.")

    def _file(self, name: str) -> TensorFile:
        if name not in self._open:
            with self._unless_replaced():
                file = TensorFile(self.folder / name)
                if file.metadata.get("checkpoint") != self.index.identity:
                    raise DamagedError(f"{file.path} belongs to another checkpoint than {self.folder / INDEX}.")
            self._open[name] = file
        return self._open[name]


def _find_index(path: Path) -> tuple[Path, Index]:
    for look in range(LOOKS):
        folder = complete_folder(path)
        try:
            return folder, read_index(folder)
        except MissingError:
            if look == LOOKS - 1:
                raise
    raise AssertionError


def _identity_at(path: Path) -> str | None:
    """The id of the checkpoint that lies there now; None if it is none."""
    try:
        return _find_index(path)[1].identity
    except CheckpointError:
        return None
