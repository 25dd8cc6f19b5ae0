"""Local text: which files a pattern means, of what kind they are, and whether they can be read."""

from __future__ import annotations

import codecs
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from itertools import islice
from pathlib import Path
from typing import BinaryIO, cast

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
        files = [file for file in path.rglob("*") if file.is_file() and kind_of(file)]
    else:
        files = [Path(name) for name in glob(pattern, recursive=True) if Path(name).is_file()]
    if not files:
        raise ValueError(f"{key} is {pattern!r}, where there are no files ({', '.join(KINDS)}, also packed).")
    return sorted(files)


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
            raise ValueError(f"line 1: not JSON: {error}") from error


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


# Which line or row of local text cannot be read: looked for once reading has failed, for the message.


LOOKED_AT = 2 << 30
"""Bytes that are looked at; other ranks wait meanwhile."""
_FIRST = 10
MEND = (
    "Remove that document or mend it, or name the column that holds the text in data.column; `frugal-dist data prepare "
    "--skip-bad` leaves such documents out"
)
FETCH = "Fetch the file again, or leave it out"
NAMED = 3
"""Damaged places that are named."""
Found = Iterator[tuple[int, str, int]]
"""Of every line or row: its number, what is wrong with it ("" if nothing), bytes read."""


@dataclass(frozen=True)
class Damage:
    """Where, such as "a.jsonl, line 7", and what is wrong there; ``cut``: the file cannot be read beyond it."""

    place: str
    trouble: str
    cut: bool = False


def find_damage(files: Sequence[Path], column: str) -> str:
    """Every damaged place, the first ones named and the others counted, and what to do; "" if none is found.

    ``column``: where rows must have text. Packed files other than .gz are not looked into.
    """
    named, count, cut = [], 0, False
    for damage in _damages(files, column):
        count += 1
        cut = cut or damage.cut
        if count <= NAMED:
            named.append(f"{damage.place}: {damage.trouble}")
    more = f"; and {count - NAMED:,} more" if count > NAMED else ""
    advice = [MEND, FETCH][cut]
    return f"{'; '.join(named)}{more}. {advice}." if named else ""


def _damages(files: Sequence[Path], column: str) -> Iterator[Damage]:
    left = LOOKED_AT
    for file in files:
        number, (look, what) = 0, _LOOKS.get(kind_of(file) or "", (_nothing, ""))
        try:
            for number, trouble, size in look(file, column):
                if trouble:
                    yield Damage(f"{file}, {what} {number}", trouble)
                left -= size
                if left < 0:
                    return
        except Exception as error:  # of gzip and pyarrow
            yield Damage(f"{file}, after {what} {number}", str(error).rstrip("."), cut=True)


def _lines(file: Path) -> Iterator[bytes]:
    """The lines of a file, the first without the byte order mark that some programs write."""
    with cast(BinaryIO, gzip.open(file)) if file.suffix == ".gz" else file.open("rb") as opened:
        yield from (line if number else line.removeprefix(codecs.BOM_UTF8) for number, line in enumerate(opened))


def _unpacked(file: Path) -> bool:
    return file.suffix in (".gz", ".txt", ".json", ".jsonl")


def _text(file: Path, column: str) -> Found:
    for number, line in enumerate(_lines(file) if _unpacked(file) else (), start=1):
        yield number, _not_utf8(line), len(line)


def _json(file: Path, column: str) -> Found:
    """Of files with an object a line."""
    if not _unpacked(file) or not _is_ours(file, column):
        return
    for number, line in enumerate(_lines(file), start=1):
        yield number, _bad_row(line, column), len(line)


def texts_of(files: Sequence[str], column: str) -> Iterator[dict[str, str | None]]:
    """The text of every line of files with an object a line, None for what is damaged or none."""
    for file in files:
        for line in _lines(Path(file)):
            if line.strip():
                yield {column: None if _bad_row(line, column) else json.loads(line)[column]}


def is_lines(file: Path) -> bool:
    """Whether ``texts_of`` can read it: no list over the whole file, and packed by gzip at most."""
    if not _unpacked(file):
        return False
    return next((line for line in _lines(file) if line.strip()), b"").lstrip().startswith(b"{")


def _is_ours(file: Path, column: str) -> bool:
    """By one of its first lines: a folder may hold files of other columns, or one object or list over many lines."""
    return any(_has(line, column) for line in islice(_lines(file), _FIRST))


def _has(line: bytes, column: str) -> bool:
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


def _bad_row(line: bytes, column: str) -> str:
    """What is wrong with a line that should be an object with a text; "" for such a line, and for an empty one."""
    if not line.strip():
        return ""
    if trouble := _not_utf8(line):
        return trouble
    try:
        row = json.loads(line.rstrip())
    except ValueError as error:
        return f"not JSON: {error}"
    return no_text(row.get(column), column) if isinstance(row, dict) else "not a JSON object"


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
