"""The folder that a training run reads: token files and what describes them, made once and reused.

A token file is documents one after the other, each followed by the separator, as little-endian uint16 or uint32, read
through a memory map.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from frugal_dist.checkpoint.disk import whole_file
from frugal_dist.training.data.batches import Tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMAT = 2  # raise it when the same settings would give other files
DESCRIPTION = "prepared.json"
TOKEN_TYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_CHUNK = 512  # documents encoded together: enough to use all cores, little enough for a smooth progress bar
_SCANNED = 1 << 24  # tokens checked together
_SAMPLES = 64  # scans of a file that is too long to be checked as a whole


@dataclass(frozen=True)
class PreparedData:
    """What lies in a folder of prepared data.

    ``requested``: the settings it was made with. ``vocab_size``: ids that occur. ``dtype``: uint16 or uint32.
    ``separator``: the id at the end of every document.
    """

    format: int
    requested: str
    source: str
    vocab_size: int
    dtype: str
    separator: int
    train_tokens: int
    validation_tokens: int


def open_prepared(folder: Path) -> tuple[PreparedData, Tokens, Tokens]:
    """The description, training tokens and validation tokens of a prepared folder."""
    data = read_description(folder)
    if data is None:
        raise ValueError(
            f"data folder {folder} is not prepared, or by another version; run `frugal-dist data prepare SOURCE --out "
            f"{folder}`, or `frugal-dist demo prepare --data {folder}` for the quickstart."
        )
    return data, read_tokens(folder / "train.bin", data.dtype), read_tokens(folder / "validation.bin", data.dtype)


def read_description(folder: Path) -> PreparedData | None:
    """The description in a folder, or None if it was never finished or another version wrote it."""
    try:
        return PreparedData(**json.loads((folder / DESCRIPTION).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_description(folder: Path, data: PreparedData) -> None:
    """Written last and in one move: a folder that has it is complete."""
    with whole_file(folder / DESCRIPTION) as file:
        file.write((json.dumps(asdict(data), indent=1) + "\n").encode())


# --- token files ------------------------------------------------------------------------------------------------------


def token_type(vocab_size: int) -> str:
    """The name of the smallest type that holds this vocabulary."""
    return "uint16" if vocab_size <= np.iinfo(TOKEN_TYPES["uint16"]).max + 1 else "uint32"


def write_tokens(path: Path, documents: Iterable[str], tokenizer: Tokenizer, separator: int) -> int:
    """Encode documents into a token file and return its length. The file appears only when it is complete."""
    kind = TOKEN_TYPES[token_type(tokenizer.get_vocab_size())]
    count = 0
    with whole_file(path) as file:
        for chunk in _chunks(documents, _CHUNK):
            for encoding in tokenizer.encode_batch(chunk):
                ids = np.array([*encoding.ids, separator], dtype=kind)
                file.write(ids.tobytes())
                count += len(ids)
    return count


def read_tokens(path: Path, kind: str = "uint16") -> Tokens:
    """A token file as a read-only array that is not loaded into memory. ValueError if it is missing, empty or cut."""
    dtype = TOKEN_TYPES[kind]
    size = path.stat().st_size if path.is_file() else 0
    if size < dtype.itemsize:
        raise ValueError(f"{path} is missing or empty; run `frugal-dist data prepare` or `demo prepare` to make it.")
    if size % dtype.itemsize:
        raise ValueError(f"{path} has {size:,} bytes, which is no whole number of {kind} tokens; prepare it again.")
    return np.memmap(path, dtype=dtype, mode="r")


def check_tokens(path: Path, tokens: Tokens, expected: int, vocab_size: int) -> None:
    """ValueError if a token file has another length than its description says, or tokens beyond its vocabulary.

    Of files with more than 2^30 tokens, 64 evenly spaced parts of 2^24 tokens are looked at.
    """
    if len(tokens) != expected:
        raise ValueError(
            f"{path} has {len(tokens):,} tokens, but prepared.json beside it says {expected:,}: one of them is of "
            "another run, or the file is damaged. Prepare the folder again."
        )
    step = max(_SCANNED, len(tokens) // _SAMPLES)
    for first in range(0, len(tokens), step):
        part = tokens[first : first + _SCANNED]
        if part.max() >= vocab_size:
            position = first + int(np.argmax(part >= vocab_size))
            raise ValueError(
                f"{path} has token {int(tokens[position])} at position {position:,}, but the vocabulary has "
                f"{vocab_size} tokens: the file is damaged or of another tokenizer. Prepare the folder again."
            )


def _chunks(documents: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(documents)
    while chunk := list(islice(iterator, size)):
        yield chunk
