"""Which line or row of local text cannot be read: looked for once reading has failed, for the message."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from frugal_dist.training.local import kind_of

LOOKED_AT = 2 << 30
"""Bytes that are looked at; other ranks wait meanwhile."""
Found = Iterator[tuple[int, str, int]]
"""Of every line or row: its number, what is wrong with it ("" if nothing), bytes read."""


@dataclass(frozen=True)
class Damage:
    """Where, such as "a.jsonl, line 7", and what is wrong there."""

    place: str
    trouble: str


def find_damage(files: Sequence[Path], column: str) -> Damage | None:
    """The first damaged place; None if none is found.

    ``column``: where rows must have text. Packed files other than .gz are not looked into.
    """
    left = LOOKED_AT
    for file in files:
        number, (look, what) = 0, _LOOKS.get(kind_of(file) or "", (_nothing, ""))
        try:
            for number, trouble, size in look(file, column):
                if trouble:
                    return Damage(f"{file}, {what} {number}", trouble)
                left -= size
                if left < 0:
                    return None
        except Exception as error:  # of gzip and pyarrow
            return Damage(f"{file}, after {what} {number}", str(error).rstrip("."))
    return None


def _lines(file: Path) -> Iterator[bytes]:
    with cast(BinaryIO, gzip.open(file)) if file.suffix == ".gz" else file.open("rb") as opened:
        yield from opened


def _unpacked(file: Path) -> bool:
    return file.suffix in (".gz", ".txt", ".json", ".jsonl")


def _text(file: Path, column: str) -> Found:
    for number, line in enumerate(_lines(file) if _unpacked(file) else (), start=1):
        yield number, _not_utf8(line), len(line)


def _json(file: Path, column: str) -> Found:
    """Of files with an object a line."""
    for number, line in enumerate(_lines(file) if _unpacked(file) else (), start=1):
        if number == 1 and not _is_ours(line, column):
            return
        yield number, _not_utf8(line) or _no_row(line, column), len(line)


def _is_ours(line: bytes, column: str) -> bool:
    """By its first line: a folder may hold files of other columns, or with one object or list over many lines."""
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and column in row


def _not_utf8(line: bytes) -> str:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"no UTF-8: {error.reason} {line[error.start : error.start + 1]!r} in column {error.start + 1}"
    return ""


def _no_row(line: bytes, column: str) -> str:
    if not line.strip():
        return ""
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"no JSON: {error}"
    return no_text(row.get(column), column) if isinstance(row, dict) else "no JSON object"


def no_text(value: object, column: str) -> str:
    """What is wrong with the value of a row's column, "" for text."""
    if isinstance(value, str):
        return ""
    return f"column {column!r} holds {'null' if value is None else type(value).__name__} where text should be"


def _parquet(file: Path, column: str) -> Found:
    from pyarrow import parquet

    number, opened = 0, parquet.ParquetFile(file)
    if column not in opened.schema_arrow.names:
        return
    for batch in opened.iter_batches(columns=[column]):
        for value in batch.column(0).to_pylist():
            number += 1
            yield number, no_text(value, column), len(str(value))


def _nothing(file: Path, column: str) -> Found:
    return iter(())


_LOOKS: dict[str, tuple[Callable[[Path, str], Found], str]] = {
    "text": (_text, "line"),
    "json": (_json, "line"),
    "parquet": (_parquet, "row"),
}
