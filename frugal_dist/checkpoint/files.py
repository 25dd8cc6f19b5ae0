"""The folder of a checkpoint: two files per rank and an index, complete or not there at all. Nothing in it is code.

    index.json              which file holds which rectangle of which tensor; counts, hyperparameters, sizes, checksums
                            of the other files and, at its end, of itself
    rank00000.safetensors   rectangles of weights and state
    rank00000.extra.pt      the rank's own: ``extra``, RNG states; read with ``weights_only=True``

A folder is written under a hidden name and renamed when every rank has finished. Every file carries the checkpoint's
id, so that files of two checkpoints cannot pass for one.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from frugal_dist.checkpoint.disk import MissingError, flush_folder, read_bytes
from frugal_dist.checkpoint.errors import CheckpointError, DamagedError
from frugal_dist.checkpoint.index import INDEX, OURS, Index, NotOurs, index_from

# --- writing ----------------------------------------------------------------------------------------


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
