"""Files of a checkpoint: one tensor file per rank and an index, complete or not there at all. Nothing in it is code.

Rank files are torch.save archives read with ``weights_only=True``, memory-mapped, so that a rank reads only the pieces
it needs. The index is JSON. A folder is written under another name and renamed when every rank has finished.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frugal_dist.sharding.tile import Tile, overlap

FORMAT = "frugal_dist checkpoint"
VERSION = 1
INDEX = "index.json"
Piece = tuple[str, Tile]


def rank_file(rank: int) -> str:
    """Name of the file that rank wrote."""
    return f"rank{rank:05d}.pt"


def write_rank(folder: Path, rank: int, pieces: Mapping[str, Tensor], record: Any) -> int:
    """Write one rank's file and flush it to disk; returns its size in bytes."""
    path = folder / rank_file(rank)
    with path.open("wb") as file:
        torch.save({"pieces": dict(pieces), "record": record}, file)
        file.flush()
        os.fsync(file.fileno())
    return path.stat().st_size


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Write the index, the last file of a checkpoint."""
    with (folder / INDEX).open("w") as file:
        json.dump({"format": FORMAT, "version": VERSION, **index}, file)
        file.flush()
        os.fsync(file.fileno())


def publish(working: Path, final: Path) -> None:
    """Give a complete folder its name; an older one of the same name is replaced."""
    if final.exists():
        retired = final.with_name(final.name + ".old")
        shutil.rmtree(retired, ignore_errors=True)
        final.rename(retired)
        working.rename(final)
        shutil.rmtree(retired, ignore_errors=True)
    else:
        working.rename(final)
    handle = os.open(final.parent, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def complete_folder(path: Path) -> Path:
    """``path``, or what it replaced if the job was killed between the two renames of ``publish``."""
    old = path.with_name(path.name + ".old")
    return old if old.exists() and not path.exists() else path


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a complete checkpoint. ValueError naming the file if it is missing, foreign or damaged."""
    path = folder / INDEX
    if not path.exists():
        raise ValueError(f"{path} does not exist: {folder} is not a frugal_dist checkpoint, or was never finished.")
    try:
        index: dict[str, Any] = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if index.get("format") != FORMAT or index.get("version") != VERSION:
        raise ValueError(
            f"{path}: format {index.get('format')!r} version {index.get('version')!r}, expected {FORMAT!r} 1."
        )
    for name, size in index["files"].items():
        found = (folder / name).stat().st_size if (folder / name).exists() else None
        if found != size:
            raise ValueError(f"{folder / name} is damaged: {found} bytes, {size} were written.")
    return index


@dataclass
class Reader:
    """Reads rectangles of named tensors out of the files of all ranks."""

    folder: Path
    index: dict[str, Any]

    def __post_init__(self) -> None:
        """Note which file holds which rectangles of each tensor."""
        self._open: dict[str, dict[str, Any]] = {}
        self._where: dict[str, list[tuple[Tile, str, str]]] = {}
        for file, entries in self.index["pieces"].items():
            for key, name, rows, cols in entries:
                self._where.setdefault(name, []).append((Tile(tuple(rows), tuple(cols)), file, key))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The saved shape of a tensor, None if it is not in the checkpoint."""
        shape = self.index["shapes"].get(name)
        return None if shape is None else tuple(shape)

    def fill(self, name: str, shape: Sequence[int], area: Tile, target: Tensor) -> None:
        """Copy a rectangle of a saved tensor into ``target``. ValueError if it is not all there."""
        if self.shape(name) != tuple(shape):
            raise ValueError(
                f"{self.folder}: {name} was saved with shape {self.shape(name)}, now it has {tuple(shape)}."
            )
        missing = area.numel
        for held, file, key in self._where[name]:
            common = overlap(held, area)
            if common is not None:
                target[common.within(area)] = self._piece(file, key)[common.within(held)].to(
                    target.device, target.dtype
                )
                missing -= common.numel
        if missing:
            raise ValueError(f"{self.folder}: {missing} elements of {name} are missing.")

    def record(self, rank: int) -> Any:
        """What this rank wrote beside its tensors; rank 0's if there were fewer ranks."""
        name = rank_file(rank)
        return self._load(name if name in self.index["files"] else rank_file(0))["record"]

    def _piece(self, file: str, key: str) -> Tensor:
        piece: Tensor = self._load(file)["pieces"][key]
        return piece

    def _load(self, file: str) -> dict[str, Any]:
        if file not in self._open:
            path = self.folder / file
            try:
                self._open[file] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except Exception as error:  # torch raises many kinds for a broken archive
                raise ValueError(f"{path} cannot be read: {error}") from error
        return self._open[file]
