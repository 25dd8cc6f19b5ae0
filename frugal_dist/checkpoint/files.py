"""The folder of a checkpoint: two files per rank and an index, complete or not there at all. Nothing in it is code.

    index.json              which file holds which rectangle of which tensor; counts, hyperparameters, sizes, checksums
                            of the other files and, at its end, of itself
    rank00000.safetensors   rectangles of weights and state
    rank00000.extra.pt      the rank's own: ``extra``, RNG states; read with ``weights_only=True``

A folder is written under a hidden name and renamed when every rank has finished. Every file carries the checkpoint's
id, so that files of two checkpoints cannot pass for one.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from frugal_dist.checkpoint.errors import CheckpointError, DamagedError
from frugal_dist.checkpoint.index import INDEX, OURS, Index, NotOurs, index_from
from frugal_dist.checkpoint.opening import MissingError, read_bytes
from frugal_dist.checkpoint.tensors import Output, Written

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


def place_of(path: Path) -> Path:
    """Where a checkpoint of this name lies: a link leads there, and stays when the checkpoint is replaced."""
    return Path(os.path.realpath(path)) if path.is_symlink() else Path(os.path.abspath(path))


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
    place_of(final.parent).mkdir(parents=True, exist_ok=True)  # what a link leads to may still have to be made
    clear_stale(final.parent, re.escape(final.name))
    working.mkdir()


def _foreign(folder: Path) -> list[str]:
    if not folder.is_dir():
        return ["a file"]
    return sorted(entry.name for entry in folder.iterdir() if not OURS.match(entry.name))


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
        _clear(retired)
        final.rename(retired)
    working.rename(final)
    flush_folder(final.parent)
    _clear(retired)


def _clear(leftover: Path) -> None:
    """Make room, whatever lies there; what a link leads to stays."""
    if leftover.is_symlink() or leftover.is_file():
        leftover.unlink()
    else:
        shutil.rmtree(leftover, ignore_errors=True)


def remove(folder: Path) -> None:
    """Delete a checkpoint; killed half-way, nothing that looks like one is left."""
    place = place_of(folder)
    doomed = place.with_name(f".{place.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    for present in (place, _retired(place)):
        if present.exists():
            present.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
    if folder.is_symlink():
        folder.unlink()


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
    if path.exists():
        return path
    retired = _retired(place_of(path))
    return retired if retired.exists() and not path.exists() else path


def read_index(folder: Path) -> Index:
    """The index of a complete checkpoint. DamagedError naming the file if it is missing, foreign or damaged."""
    path = folder / INDEX
    try:
        return index_from(read_bytes(path))
    except MissingError as error:
        raise MissingError(f"{path} does not exist: {_what_is(folder)}") from error
    except NotOurs as error:
        raise DamagedError(f"{path} {error}") from error
    except CheckpointError:
        raise
    except ValueError as error:  # not UTF-8, not JSON, or not what an index says
        raise DamagedError(f"{path} is damaged: {error}") from error


def _what_is(folder: Path) -> str:
    if not folder.exists():
        return "there is no such folder."
    if (folder / "latest").exists():
        return f"{folder} is a folder of checkpoints; use load_latest, or load one of them."
    return f"{folder} is not a frugal_dist checkpoint, or was never finished."


def read_extra(path: Path, identity: str) -> dict[str, Any]:
    """What ``serialized`` made. Executes nothing."""
    data = io.BytesIO(read_bytes(path))
    try:
        found: Any = torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken archive
        raise DamagedError(f"{path} is damaged: it cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("checkpoint") != identity:
        raise DamagedError(f"{path} belongs to another checkpoint than {path.parent / INDEX}.")
    for key in ("extra", "engine", "rng"):
        if not isinstance(found.get(key), dict):
            raise DamagedError(f"{path} is damaged: {key} is no table.")
    return found
