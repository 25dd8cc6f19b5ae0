"""Token files and the batches drawn from them.

A token file is documents one after the other, each followed by the separator, as little-endian uint16 or uint32, read
through a memory map.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from frugal_dist.training.data.rows import Row, SequenceRows, TokenRows, Tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Batches", "Source", "TokenRows", "Tokens", "check_tokens", "read_tokens", "token_type", "write_tokens"]

TOKEN_TYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_CHUNK = 512  # documents encoded together: enough to use all cores, little enough for a smooth progress bar
_SCANNED = 1 << 24  # tokens checked together
_SAMPLES = 64  # scans of a file that is too long to be checked as a whole


def token_type(vocab_size: int) -> str:
    """The name of the smallest type that holds this vocabulary."""
    return "uint16" if vocab_size <= np.iinfo(TOKEN_TYPES["uint16"]).max + 1 else "uint32"


def write_tokens(path: Path, documents: Iterable[str], tokenizer: Tokenizer, separator: int) -> int:
    """Encode documents into a token file and return its length. The file appears only when it is complete."""
    kind = TOKEN_TYPES[token_type(tokenizer.get_vocab_size())]
    unfinished = path.with_name(path.name + ".unfinished")
    count = 0
    with unfinished.open("wb") as file:
        for chunk in _chunks(documents, _CHUNK):
            for encoding in tokenizer.encode_batch(chunk):
                ids = np.array([*encoding.ids, separator], dtype=kind)
                file.write(ids.tobytes())
                count += len(ids)
    os.replace(unfinished, path)
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


class Source(Protocol):
    """Where training batches come from; all ranks ask for the same batches in the same order."""

    batch_size: int
    length: int
    full: bool
    """No row is padded and no share can fail on a single rank: ranks need not tell each other about a batch."""

    def share(self, index: int, rank: int, world: int) -> Row:
        """The rows of batch `index` that this rank trains on."""

    def state_dict(self) -> dict[str, Any]:
        """This rank's position after the last batch that was asked for; empty if the index says it all."""

    def load_state_dict(self, states: list[dict[str, Any]], index: int) -> None:
        """Go on with batch `index`. ``states``: what ``state_dict`` gave on each rank that saved."""

    def close(self) -> None:
        """Stop reading ahead."""


class Batches:
    """Shuffled training batches: batch i is a function of (seed, i) alone, whatever the number of ranks."""

    def __init__(self, rows: SequenceRows, batch_size: int, seed: int) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.length = rows.length
        self.full = rows.full
        self.seed = seed

    def numbers(self, index: int) -> list[int]:
        """Which rows make up batch `index`. Every epoch goes through all rows in an order of its own."""
        first = index * self.batch_size
        places = (divmod(place, self.rows.count) for place in range(first, first + self.batch_size))
        return [int(_order(self.seed, epoch, self.rows.count)[position]) for epoch, position in places]

    def share(self, index: int, rank: int, world: int) -> Row:
        """The part of batch `index` that this rank trains on."""
        if self.batch_size % world:
            raise ValueError(f"batch size {self.batch_size} cannot be shared equally by {world} ranks.")
        part = self.batch_size // world
        return self.rows.take(self.numbers(index)[rank * part : (rank + 1) * part])

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, states: list[dict[str, Any]], index: int) -> None:
        """Nothing to do: the index says it all."""

    def close(self) -> None:
        """Nothing to do."""


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """The order of rows in one epoch. Two are kept, since a batch may straddle the end of an epoch."""
    # RandomState, because numpy promises that its stream never changes: a resumed run must see the same batches.
    return np.random.RandomState([seed, epoch]).permutation(count)


def _chunks(documents: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(documents)
    while chunk := list(islice(iterator, size)):
        yield chunk
