"""Training batches from streamed text, resumable at the exact position.

The text is divided into a fixed number of lanes, whatever the number of ranks: a batch takes equally many rows from
each, and a rank reads the lanes of its part of the batch. Where there are more ranks than lanes, several read the same
lane and take different rows of it. Batches are therefore the same on every number of ranks, and a run may resume with
another one. A lane reads its documents in blocks, shuffles each block, and makes rows
of them. Its position is where the current block began and how many rows were taken since: to resume means to read a
block again, not storing it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from frugal_dist.training.data.batches import IGNORED, MemoryRows, Row, cut_or_padded
from frugal_dist.training.data.c4_and_hub import Documents
from frugal_dist.training.data.tokenizer import Encoder

LANES = 8  # at most, where neither the recipe nor a checkpoint says how many
_TOGETHER = 64  # documents encoded at once


@dataclass(frozen=True)
class Position:
    """Where a lane is. ``source``: of the stream at the beginning of the block; ``carry``: tokens of blocks before."""

    epoch: int = 0
    block: int = 0
    taken: int = 0
    source: dict[str, Any] | None = None
    carry: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reading:
    """How lanes read. ``block``: documents that are shuffled with each other; ``packed``: else a row per document."""

    documents: Documents
    encoder: Encoder
    length: int
    packed: bool
    block: int
    seed: int
    passes: float


class Lane:
    """One of ``lanes`` equal parts of a text, as rows."""

    def __init__(self, reading: Reading, number: int, lanes: int) -> None:
        self.reading = reading
        self.number = number
        self.lanes = lanes

    def rows(self, position: Position, passes: float | None = None) -> Iterator[tuple[Row, Position]]:
        """Rows from a position on, each with the position after it, until the passes through the text are over.

        Raises ValueError if the text cannot be read, or the lane has none.
        """
        passes = self.reading.passes if passes is None else passes
        while position.epoch < passes:
            stream = self._open(position)
            examples = iter(stream)
            while texts := self.reading.documents.take(examples, self.reading.block)[0]:
                carry: list[int] = list(position.carry)
                for number, row in enumerate(self._rows_of_block(texts, position, carry), start=1):
                    if number > position.taken:
                        position = replace(position, taken=number)
                        yield row, position
                # A copy that holds plain numbers and text only, as checkpoints do.
                position = Position(position.epoch, position.block + 1, 0, stream.state_dict(), tuple(carry))
            if position.block == 0:
                raise ValueError(
                    f"{self.reading.documents.label} has too few documents to divide it into {self.lanes} streams, "
                    f"of which number {self.number} is empty. Lower data.streams."
                )
            position = Position(epoch=position.epoch + 1, carry=position.carry)

    def _open(self, position: Position) -> Any:
        reading = self.reading
        stream = reading.documents.part(reading.seed, position.epoch, self.number, self.lanes)
        if position.source is not None:
            stream.load_state_dict(position.source)
        return stream

    def _rows_of_block(self, texts: list[str], position: Position, carry: list[int]) -> Iterator[Row]:
        """The rows of a block, shuffled. At their end ``carry`` holds the tokens that were left over."""
        seeds = [self.reading.seed, self.number, position.epoch, position.block]
        order = np.random.RandomState(seeds).permutation(len(texts))  # whose stream numpy promises not to change
        for first in range(0, len(texts), _TOGETHER):
            chunk = [texts[number] for number in order[first : first + _TOGETHER]]
            for document in self.reading.encoder.encode([text for text in chunk if text.strip()]):
                if self.reading.packed:
                    yield from _packed(carry, document, self.reading.length)
                else:
                    yield cut_or_padded(document, self.reading.length)


def _packed(carry: list[int], document: list[int], length: int) -> Iterator[Row]:
    """Add a document to the carry and take full rows off; each begins with the last token of the one before."""
    carry.extend(document)
    start = 0
    while len(carry) - start > length:
        yield np.array(carry[start : start + length + 1], dtype=np.int64)
        start += length
    del carry[:start]


Taken = tuple[list[Row], Position]


class Stream:
    """Training batches from lanes, read ahead in threads: tokenizers and parsers run outside Python's lock."""

    full = False

    def __init__(self, reading: Reading, batch_size: int, lanes: int, lanes_are_given: bool, workers: int) -> None:
        self.reading = reading
        self.batch_size = batch_size
        self.length = reading.length
        self.lanes = lanes
        self._given = lanes_are_given
        self._positions = {number: Position() for number in range(lanes)}
        self._iterators: dict[int, Iterator[tuple[Row, Position]]] = {}
        self._ahead: dict[int, Future[Taken]] = {}
        self._index = 0
        self._threads = ThreadPoolExecutor(max(1, workers), thread_name_prefix="read-ahead")

    def share(self, index: int, rank: int, world: int) -> Row:
        """The rows of batch `index` on this rank. A stream only goes forward, by one batch each time."""
        if index != self._index:
            raise ValueError(f"a stream that is at batch {self._index} was asked for batch {index}.")
        mine, cut = self._mine(rank, world)
        if not self._ahead:
            self._read_ahead(mine)
        by_lane = {number: self._ahead.pop(number).result() for number in mine}
        for number, (_, position) in by_lane.items():
            self._positions[number] = position
        self._index += 1
        self._read_ahead(mine)
        return np.stack([row for rows, _ in by_lane.values() for row in rows][cut])

    def _mine(self, rank: int, world: int) -> tuple[range, slice]:
        """The lanes of a rank, and its part of their rows."""
        _check_shares(self.batch_size, world, self.lanes)
        of_lane, of_rank = self.batch_size // self.lanes, self.batch_size // world
        first, end = rank * of_rank, (rank + 1) * of_rank
        lanes = range(first // of_lane, -(-end // of_lane))
        return lanes, slice(first - lanes.start * of_lane, end - lanes.start * of_lane)

    def _read_ahead(self, mine: range) -> None:
        for number in mine:
            if number not in self._iterators:
                self._iterators[number] = Lane(self.reading, number, self.lanes).rows(self._positions[number])
            self._ahead[number] = self._threads.submit(self._take, number)

    def _take(self, number: int) -> Taken:
        wanted = self.batch_size // self.lanes
        pairs = list(islice(self._iterators[number], wanted))
        if len(pairs) < wanted:
            raise ValueError(
                f"{self.reading.documents.label}: stream {number} of {self.lanes} has no more text at batch "
                f"{self._index}, but data.epochs is {self.reading.passes:g}. Raise it, or lower steps."
            )
        return [row for row, _ in pairs], pairs[-1][1]

    def state_dict(self) -> dict[str, Any]:
        """Positions of the lanes that this rank reads; of all, before it reads any."""
        mine = {str(number): asdict(self._positions[number]) for number in self._iterators or self._positions}
        return {
            "index": self._index,
            "lanes": self.lanes,
            "block": self.reading.block,
            "settings": _settings(self.reading),
            "positions": mine,
        }

    def load_state_dict(self, states: list[dict[str, Any]], index: int) -> None:
        """Resume where the ranks that saved were, on any number of ranks.

        Lanes and blocks stay as the run was begun with. Raises ValueError if the checkpoint is of a run on other data,
        or other keys of the recipe have changed on which the rows depend.
        """
        if not states or any(state.get("index") != index for state in states):
            raise ValueError(
                f"the checkpoint of step {index} has no position in {self.reading.documents.label}: the run was begun "
                "on other data. Use the recipe it was begun with, or another folder."
            )
        lanes = int(states[0]["lanes"])
        if self._given and lanes != self.lanes:
            raise ValueError(f"data.streams is {self.lanes}, but the run was begun with {lanes}. Set it to {lanes}.")
        for key, value in _settings(self.reading).items():
            if states[0]["settings"][key] != value:
                raise ValueError(
                    f"{key} is {value}, but the run was begun with {states[0]['settings'][key]}: its position in the "
                    "text would mean another text. Set it back, or begin in another folder."
                )
        if self.batch_size % lanes:
            raise ValueError(
                f"batch is {self.batch_size}, but the run was begun with {lanes} streams of text, from which a batch "
                f"takes equally many sequences. Use a multiple of {lanes}, or begin in another folder."
            )
        positions = {int(number): value for state in states for number, value in state["positions"].items()}
        self.lanes = lanes
        self.reading = replace(self.reading, block=int(states[0]["block"]))
        self._index = index
        self._positions = {
            number: Position(**{**value, "carry": tuple(value["carry"])}) for number, value in positions.items()
        }

    def close(self) -> None:
        """Stop reading ahead; a thread that waits for the network is left to it."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _settings(reading: Reading) -> dict[str, Any]:
    """The keys of the recipe on which the rows after a position depend."""
    return {
        "seed": reading.seed,
        "length": reading.length,
        "data.rows": "packed" if reading.packed else "truncated",
        "the size of data.tokenizer": reading.encoder.vocab_size,
    }


def choose_lanes(given: int | None, batch: int, world: int, most: int = LANES) -> int:
    """How many lanes: the recipe's, or up to ``most`` if the batch can be divided so. Ranks do not change it.

    Raises ValueError, naming batch or data.streams, if ranks or lanes cannot share a batch equally.
    """
    lanes = given if given is not None else max(n for n in range(1, max(most, 1) + 1) if batch % n == 0)
    _check_shares(batch, world, lanes)
    return lanes


def _check_shares(batch: int, world: int, lanes: int) -> None:
    if batch % world:
        raise ValueError(f"batch is {batch}, which {world} ranks cannot share equally; change it or their number.")
    if lanes < 1 or batch % lanes:
        raise ValueError(f"data.streams is {lanes}: it must divide the batch of {batch}.")


def check_enough(reading: Reading, lanes: int, needed: int) -> None:
    """ValueError if a lane has too little text for ``needed`` rows. Reads and encodes all of it, once."""
    for number in range(lanes):
        sequences = sum(1 for _ in islice(Lane(reading, number, lanes).rows(Position(), passes=1), needed))
        if sequences * reading.passes < needed:
            raise ValueError(
                f"{reading.documents.label}: the steps need {needed:,} sequences of each of {lanes} streams, but "
                f"stream {number} has {sequences:,}: {needed / max(sequences, 1):.2f} passes, but data.epochs is "
                f"{reading.passes:g}. Raise it, or lower steps or data.streams."
            )


def first_rows(reading: Reading, tokens: int) -> MemoryRows:
    """Rows from the beginning of a text, in memory, until they have so many targets or the text is over."""
    rows: list[Row] = []
    seen = 0
    for row, _ in Lane(reading, 0, 1).rows(Position(), passes=1):
        rows.append(row)
        seen += int((row[1:] != IGNORED).sum())
        if seen >= tokens:
            break
    if not rows:
        raise ValueError(
            f"{reading.documents.label} is too short for one sequence of {reading.length} tokens; lower length."
        )
    return MemoryRows(np.stack(rows).astype(np.int32), reading.length, reading.packed)
