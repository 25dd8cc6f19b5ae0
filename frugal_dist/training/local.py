"""Local text: which files a pattern means, of what kind they are, and whether they can be read."""

from __future__ import annotations

import codecs
import gzip
import json
from collections.abc import Callable, Sequence
from glob import glob
from pathlib import Path

KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
"""The builder in `datasets` that reads such files."""
_PACKED = (".gz", ".zst", ".bz2", ".xz")


def kind_of(path: Path) -> str | None:
    """The builder for a file, by its name; None for other files."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in _PACKED]
    return KINDS.get(suffixes[-1]) if suffixes else None


def find_files(pattern: str, key: str) -> list[Path]:
    """The files of a name, folder or pattern, sorted. ValueError, naming the recipe's key, if there are none."""
    path = Path(pattern)
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file() and kind_of(file)]
    else:
        found = [Path(name) for name in glob(pattern, recursive=True) if Path(name).is_file()]
    if not found:
        raise ValueError(f"{key} is {pattern!r}, where there are no files ({', '.join(KINDS)}, also packed).")
    return sorted(found)


def common_kind(files: Sequence[Path], key: str) -> str:
    """The builder for these files. ValueError, naming one that is of no kind or of another."""
    kinds = {kind_of(file): file for file in files}
    if None in kinds:
        raise ValueError(f"{key}: {kinds[None]} is none of {', '.join(KINDS)}; narrow the pattern.")
    if len(kinds) > 1:
        raise ValueError(f"{key}: {' and '.join(map(str, kinds.values()))} are of different kinds; name one kind.")
    return str(next(iter(kinds)))


def check_files(files: Sequence[Path]) -> None:
    """ValueError, naming the file, if one is empty or its beginning cannot be read."""
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty; remove it or fetch it again.")
        if file.suffix not in _PACKED and _starts(file).startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError(f"{file} is UTF-16, as some programs save; convert it to UTF-8: iconv -f UTF-16 -t UTF-8.")
        try:
            _CHECKS.get(kind_of(file) or "", _readable)(file)
        except Exception as error:  # gzip, json, UTF-8 and pyarrow each have their own
            raise ValueError(f"{file} is damaged or not what its name says: {error}; fetch it again.") from error


def _starts(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(4)


def _readable(file: Path) -> None:
    _first_line(file)


def _json_line(file: Path) -> None:
    line = _first_line(file)
    if line is not None and line.strip().startswith(b"{") and kind_of(file) == "json" and line.endswith(b"\n"):
        try:
            json.loads(line.rstrip())
        except ValueError as error:
            raise ValueError(f"line 1: no JSON: {error}") from error


def _first_line(file: Path) -> bytes | None:
    """None if the file is packed in a way that only `datasets` unpacks."""
    if file.suffix == ".gz":
        with gzip.open(file) as unpacked:
            return unpacked.readline(1 << 20)
    if file.suffix in _PACKED:
        return None
    with file.open("rb") as plain:
        return plain.readline(1 << 20)


def _footer(file: Path) -> None:
    from pyarrow import parquet

    parquet.read_metadata(file)


_CHECKS: dict[str, Callable[[Path], None]] = {"text": _readable, "json": _json_line, "parquet": _footer}
