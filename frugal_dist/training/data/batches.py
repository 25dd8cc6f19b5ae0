"""Training batches: sequences by number, of a token file or in memory, packed or a row per document.

A packed sequence of length L is a row of L + 1 tokens: the last is only a target. A row per document has L tokens, of
which L - 1 are targets, as in the papers; positions after a short document hold IGNORED.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

IGNORED = -100
"""Stands where a row has no token: it is no target, and what the model reads there cannot matter to real tokens."""
_SCANNED = 1 << 24  # tokens looked at together

Tokens = npt.NDArray[np.unsignedinteger]
Row = npt.NDArray[np.int64]


class SequenceRows(Protocol):
    """Sequences by number."""

    length: int
    count: int
    full: bool
    """Whether no row is padded."""

    def take(self, numbers: Iterable[int]) -> Row:
        """The rows of these numbers."""

    def enough(self, tokens: int) -> int:
        """How many of the first rows have so many targets; all rows, if they have fewer."""

    def targets(self, count: int) -> int:
        """How many targets the first rows have."""


class TokenRows:
    """Packed rows of a token file: documents one after the other, cut anywhere."""

    full = True

    def __init__(self, tokens: Tokens, length: int) -> None:
        self.tokens = tokens
        self.length = length
        self.count = (len(tokens) - 1) // length
        if self.count < 1:
            raise ValueError(f"sequence_length is {length}, but the text has only {len(tokens)} tokens.")

    def take(self, numbers: Iterable[int]) -> Row:
        """The rows of these numbers, each one token longer than the sequence."""
        starts = [number * self.length for number in numbers]
        return np.stack([self.tokens[start : start + self.length + 1].astype(np.int64) for start in starts])

    def enough(self, tokens: int) -> int:
        return min(self.count, max(1, tokens // self.length))

    def targets(self, count: int) -> int:
        return count * self.length


class DocumentRows:
    """A row per document of a token file, cut or padded. A document ends with the separator, also where it is cut."""

    full = False

    def __init__(self, tokens: Tokens, length: int, separator: int) -> None:
        self.tokens = tokens
        self.length = length
        self.separator = separator
        self._ends = _positions(tokens, separator)
        self.count = len(self._ends)
        if self.count < 1:
            raise ValueError(f"the token file has no document: its separator, {separator}, is nowhere in it.")

    def take(self, numbers: Iterable[int]) -> Row:
        return np.stack([cut_or_padded(self._document(number), self.length) for number in numbers])

    def enough(self, tokens: int) -> int:
        return _enough(self._targets(), tokens)

    def targets(self, count: int) -> int:
        return int(self._targets()[:count].sum())

    def _document(self, number: int) -> Row:
        start = int(self._ends[number - 1]) + 1 if number else 0
        return self.tokens[start : int(self._ends[number]) + 1].astype(np.int64)

    def _targets(self) -> Row:
        sizes: Row = np.diff(self._ends, prepend=-1)
        return np.minimum(sizes, self.length) - 1


class MemoryRows:
    """Rows that are kept in memory."""

    def __init__(self, rows: npt.NDArray[np.int32], length: int, full: bool) -> None:
        self.length = length
        self.count = len(rows)
        self.full = full
        self._rows = rows

    def take(self, numbers: Iterable[int]) -> Row:
        return self._rows[list(numbers)].astype(np.int64)

    def enough(self, tokens: int) -> int:
        return _enough(count_targets(self._rows), tokens)

    def targets(self, count: int) -> int:
        return int(count_targets(self._rows[:count]).sum())


def cut_or_padded(document: Sequence[int] | Row, length: int) -> Row:
    """A document, its separator last, as a row of this length. What is cut keeps the separator at its end."""
    row = np.full(length, IGNORED, dtype=np.int64)
    kept = min(length, len(document))
    row[:kept] = document[:kept]
    row[kept - 1] = document[-1]
    return row


def count_targets(rows: npt.NDArray[np.signedinteger]) -> Row:
    """How many tokens of each row are predicted."""
    counts: Row = (rows[:, 1:] != IGNORED).sum(axis=1)
    return counts


def _enough(targets: Row, tokens: int) -> int:
    return min(len(targets), int(np.searchsorted(np.cumsum(targets), max(1, tokens))) + 1)


def _positions(tokens: Tokens, wanted: int) -> Row:
    """Where a token occurs; little of the file is in memory at once."""
    parts = [
        first + np.flatnonzero(tokens[first : first + _SCANNED] == wanted) for first in range(0, len(tokens), _SCANNED)
    ]
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)


# --- batches ----------------------------------------------------------------------------------------------------------


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
        """Resume with batch `index`. ``states``: what ``state_dict`` gave on each rank that saved."""

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
