"""Packed token files and the batches drawn from them.

A token file is documents one after the other, each followed by the separator, as little-endian uint16, read through
a memory map. A sequence of length L is the row `tokens[i * L : i * L + L + 1]`: its last token is only a target.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKEN_TYPE = np.dtype("<u2")
_CHUNK = 512  # documents encoded together: enough to use all cores, little enough for a smooth progress bar

Tokens = npt.NDArray[np.uint16]
Rows = npt.NDArray[np.int64]


def write_tokens(path: Path, documents: Iterable[str], tokenizer: Tokenizer, separator: int) -> int:
    """Encode documents into a token file and return its length. The file appears only when it is complete."""
    if tokenizer.get_vocab_size() > np.iinfo(TOKEN_TYPE).max + 1:
        raise ValueError(f"the vocabulary has {tokenizer.get_vocab_size()} tokens; a uint16 token file holds 65,536.")
    unfinished = path.with_name(path.name + ".unfinished")
    count = 0
    with unfinished.open("wb") as file:
        for chunk in _chunks(documents, _CHUNK):
            for encoding in tokenizer.encode_batch(chunk):
                ids = np.array([*encoding.ids, separator], dtype=TOKEN_TYPE)
                file.write(ids.tobytes())
                count += len(ids)
    os.replace(unfinished, path)
    return count


def read_tokens(path: Path) -> Tokens:
    """A token file as a read-only array that is not loaded into memory."""
    if not path.is_file() or path.stat().st_size < TOKEN_TYPE.itemsize:
        raise ValueError(f"{path} is missing or empty; run `frugal-dist demo prepare` to make it.")
    return np.memmap(path, dtype=TOKEN_TYPE, mode="r")


class TokenRows:
    """The sequences of a token file by number."""

    def __init__(self, tokens: Tokens, length: int) -> None:
        self.tokens = tokens
        self.length = length
        self.count = (len(tokens) - 1) // length
        if self.count < 1:
            raise ValueError(f"sequence_length is {length}, but the text has only {len(tokens)} tokens.")

    def take(self, numbers: Iterable[int]) -> Rows:
        """The rows of these numbers, each one token longer than the sequence."""
        starts = [number * self.length for number in numbers]
        return np.stack([self.tokens[start : start + self.length + 1].astype(np.int64) for start in starts])


class Batches:
    """Shuffled training batches: batch i is a function of (seed, i) alone, whatever the number of ranks."""

    def __init__(self, rows: TokenRows, batch_size: int, seed: int) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed

    def numbers(self, index: int) -> list[int]:
        """Which rows make up batch `index`. Every epoch goes through all rows in an order of its own."""
        first = index * self.batch_size
        places = (divmod(place, self.rows.count) for place in range(first, first + self.batch_size))
        return [int(_order(self.seed, epoch, self.rows.count)[position]) for epoch, position in places]

    def share(self, index: int, rank: int, world: int) -> Rows:
        """The part of batch `index` that this rank trains on."""
        if self.batch_size % world:
            raise ValueError(f"batch size {self.batch_size} cannot be shared equally by {world} ranks.")
        part = self.batch_size // world
        return self.rows.take(self.numbers(index)[rank * part : (rank + 1) * part])


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """The order of rows in one epoch. Two are kept, since a batch may straddle the end of an epoch."""
    # RandomState, because numpy promises that its stream never changes: a resumed run must see the same batches.
    return np.random.RandomState([seed, epoch]).permutation(count)


def _chunks(documents: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(documents)
    while chunk := list(islice(iterator, size)):
        yield chunk
