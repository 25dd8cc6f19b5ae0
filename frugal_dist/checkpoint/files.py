"""The folder of a checkpoint: two files per rank and an index, complete or not there at all. Nothing in it is code.

    index.json              which file holds which rectangle of which tensor; counts, hyperparameters, sizes, checksums
    rank00000.safetensors   rectangles of weights and state
    rank00000.extra.pt      the rank's own: ``extra``, RNG states; read with ``weights_only=True``

A folder is written under a hidden name and renamed when every rank has finished. Every file carries the checkpoint's
id, so that files of two checkpoints cannot pass for one.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from frugal_dist.checkpoint.errors import CheckpointError, DamagedError
from frugal_dist.checkpoint.tensors import Output, Written
from frugal_dist.sharding.tile import Tile

FORMAT = "frugal_dist checkpoint"
VERSION = 1
INDEX = "index.json"
_OURS = re.compile(r"^(index\.json|rank\d{5,}\.(safetensors|extra\.pt))$")


def tensor_file(rank: int) -> str:
    """The tensors that a rank wrote."""
    return f"rank{rank:05d}.safetensors"


def extra_file(rank: int) -> str:
    """What else a rank wrote."""
    return f"rank{rank:05d}.extra.pt"


@dataclass(frozen=True)
class Index:
    """What a checkpoint holds and what must fit when it is loaded.

    identity        random; every file of the checkpoint carries it.
    ranks           how many wrote it.
    draws           fingerprint of the random selections that this torch makes.
    files           size and checksum of every file.
    tensors         the whole shape of every tensor, as two dims.
    pieces          for every tensor file its rectangles: tensor, rows, columns.
    parameters      the shape of every parameter.
    buffers         the shape of every persistent buffer of the model.
    matrices        for every projected matrix its counts and the hyperparameters its state depends on.
    regular         the same for every regular parameter.
    groups          names of the parameters of each group, and the group's hyperparameters.
    model_config    the model's own configuration, if it has one that can be written as JSON.
    """

    identity: str
    ranks: int
    draws: int
    files: dict[str, Written]
    tensors: dict[str, tuple[int, int]]
    pieces: dict[str, list[tuple[str, Tile]]]
    parameters: dict[str, list[int]]
    buffers: dict[str, list[int]]
    matrices: dict[str, dict[str, dict[str, Any]]]
    regular: dict[str, dict[str, dict[str, Any]]]
    groups: list[dict[str, Any]] = field(default_factory=list)
    model_config: dict[str, Any] | None = None

    def to_json(self) -> str:
        """The text of the index file."""
        plain = {
            **vars(self),
            "files": {name: asdict(written) for name, written in self.files.items()},
            "pieces": {
                file: [[name, *tile.rows, *tile.cols] for name, tile in pieces] for file, pieces in self.pieces.items()
            },
        }
        return json.dumps({"format": FORMAT, "version": VERSION, **plain}, allow_nan=True)


def index_from(plain: dict[str, Any]) -> Index:
    """The index from its JSON. KeyError, TypeError or ValueError if it is not one."""
    files = {str(name): Written(int(entry["bytes"]), int(entry["crc32"])) for name, entry in plain["files"].items()}
    if not all(_OURS.match(name) for name in files):
        raise ValueError("it lists files that no checkpoint has")
    pieces = {
        file: [(str(name), Tile((r0, r1), (c0, c1))) for name, r0, r1, c0, c1 in entries]
        for file, entries in plain["pieces"].items()
    }
    if not pieces.keys() <= files.keys():
        raise ValueError("it lists pieces of files that it does not list")
    tensors = {str(name): (int(shape[0]), int(shape[1])) for name, shape in plain["tensors"].items()}
    return Index(
        identity=str(plain["identity"]),
        ranks=int(plain["ranks"]),
        draws=int(plain["draws"]),
        files=files,
        tensors=tensors,
        pieces=pieces,
        parameters=dict(plain["parameters"]),
        buffers=dict(plain["buffers"]),
        matrices=dict(plain["matrices"]),
        regular=dict(plain["regular"]),
        groups=list(plain["groups"]),
        model_config=plain["model_config"],
    )


def piece_key(name: str, area: Tile) -> str:
    """The name of a rectangle in its file."""
    return f"{name}[{area.rows[0]}:{area.rows[1]},{area.cols[0]}:{area.cols[1]}]"


# --- writing ----------------------------------------------------------------------------------------


def serialized(record: Mapping[str, Any]) -> bytes:
    """What goes into an extra file. CheckpointError, naming the key, if it could not be read back safely."""
    found, problem = _safely_dumped(record)
    if problem:
        extra = record["extra"]
        culprits = [f"extra[{name!r}]" for name in extra if _safely_dumped(extra[name])[1]]
        where = culprits[0] if culprits else "the engine's schedule"
        raise CheckpointError(
            f"{where} cannot be saved: it must be numbers, text, tensors, or lists, tuples and dicts of them, so that "
            f"loading executes no code (torch.load with weights_only=True). {problem.splitlines()[0]}"
        )
    return found


def _safely_dumped(value: Any) -> tuple[bytes, str]:
    try:
        torch.save(value, buffer := io.BytesIO())
        torch.load(io.BytesIO(buffer.getvalue()), map_location="cpu", weights_only=True)
    except Exception as error:  # pickle and weights_only refuse with many kinds
        return b"", str(error) or type(error).__name__
    return buffer.getvalue(), ""


def write_bytes(path: Path, data: bytes) -> Written:
    """Write a file and flush it to disk."""
    with Output(path) as output:
        output.write(data)
        return output.finish()


def working_folder(final: Path, token: str) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return final.with_name(f".{final.name}.partial-{token}")


def prepare(final: Path, working: Path) -> None:
    """Make the working folder; clear away what killed jobs left of the same checkpoint. Never deletes foreign files."""
    foreign = [] if not final.exists() else _foreign(final)
    if foreign:
        raise CheckpointError(
            f"{final} exists and is no checkpoint: it holds {', '.join(foreign[:3])}. It is not replaced; choose "
            "another name."
        )
    final.parent.mkdir(parents=True, exist_ok=True)
    clear_stale(final.parent, re.escape(final.name))
    working.mkdir()


def _foreign(folder: Path) -> list[str]:
    if not folder.is_dir():
        return ["a file"]
    return sorted(entry.name for entry in folder.iterdir() if not _OURS.match(entry.name))


def clear_stale(parent: Path, name_pattern: str) -> None:
    """Remove unfinished and half-deleted folders whose checkpoint's name fits."""
    stale = re.compile(rf"^\.{name_pattern}\.(partial-[0-9a-f]+|deleted)$")
    for entry in list(parent.iterdir()):
        if stale.match(entry.name):
            shutil.rmtree(entry, ignore_errors=True)


def publish(working: Path, final: Path) -> None:
    """Give a complete folder its name; an older one of the same name is replaced. Killed anywhere, one is loadable."""
    flush_folder(working)
    retired = _retired(final)
    if final.exists():
        shutil.rmtree(retired, ignore_errors=True)
        final.rename(retired)
    working.rename(final)
    flush_folder(final.parent)
    shutil.rmtree(retired, ignore_errors=True)


def remove(folder: Path) -> None:
    """Delete a checkpoint; killed half-way, nothing that looks like one is left."""
    doomed = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    for present in (folder, _retired(folder)):
        if present.exists():
            present.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _retired(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def flush_folder(folder: Path) -> None:
    """Names reach the disk too; some file systems cannot, and need not."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# --- reading ----------------------------------------------------------------------------------------


def complete_folder(path: Path) -> Path:
    """``path``, or what it replaced if the job was killed between the two renames of ``publish``."""
    retired = _retired(path)
    return retired if retired.exists() and not path.exists() else path


def read_index(folder: Path) -> Index:
    """The index of a complete checkpoint. DamagedError naming the file if it is missing, foreign or damaged."""
    path = folder / INDEX
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedError(f"{path} does not exist: {_what_is(folder)}") from error
    except ValueError as error:  # not UTF-8, not JSON
        raise DamagedError(f"{path} is damaged: {error}") from error
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise DamagedError(f"{path} is not the index of a frugal_dist checkpoint.")
    if plain.get("version") != VERSION:
        raise DamagedError(
            f"{path} has version {plain.get('version')!r} of the format; this frugal_dist reads {VERSION}."
        )
    try:
        return index_from(plain)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DamagedError(f"{path} is damaged: {type(error).__name__} {error}") from error


def _what_is(folder: Path) -> str:
    if not folder.exists():
        return "there is no such folder."
    if (folder / "latest").exists():
        return f"{folder} is a folder of checkpoints; use load_latest, or load one of them."
    return f"{folder} is not a frugal_dist checkpoint, or was never finished."


def read_extra(path: Path, identity: str) -> dict[str, Any]:
    """What ``serialized`` made. Executes nothing."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds for a broken archive
        raise DamagedError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("checkpoint") != identity:
        raise DamagedError(f"{path} belongs to another checkpoint than {path.parent / INDEX}.")
    return cast("dict[str, Any]", found)
