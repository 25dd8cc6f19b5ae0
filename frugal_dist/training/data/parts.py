"""A text encoded in parts, by several processes. Finished parts stay: started again, only the others are made.

PARTS/tokenizer.json      what the processes encode with
PARTS/train/00012.train   token files, one per half of the split
PARTS/train/00012.validation
PARTS/train/00012.json    written last: how many tokens, and where reading goes on after this part
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from frugal_dist.training.data.documents import Documents
from frugal_dist.training.data.prepared import TOKEN_TYPES
from frugal_dist.training.data.tokenizer import Encoder

HALVES = ("train", "validation")
TOKENIZER = "tokenizer.json"
_TOGETHER = 64  # documents encoded at once


@dataclass(frozen=True)
class EncodingJob:
    """What every process must know. ``share``: of documents that are held back for validation.

    ``skip``: documents without a text are left out and counted.
    """

    folder: Path
    tokenizer: Path
    separator: int
    dtype: str
    share: float
    skip: bool = False


@dataclass(frozen=True)
class EncodedPart:
    """A finished part. ``after``: the stream's position after it; ``size``: bytes of text; ``skipped``: left out."""

    number: int
    documents: int
    size: int
    tokens: dict[str, int]
    after: dict[str, Any]
    skipped: int = 0


def encode_parts(
    job: EncodingJob, documents: Documents, per_part: int, workers: int, done: Callable[[EncodedPart], None]
) -> list[EncodedPart]:
    """Encode a text in parts of so many documents; all parts, in order. ``done`` hears of each when it is there.

    Raises ValueError if the text cannot be read or written any further; what is finished stays.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    parts = _finished(job.folder)
    for part in parts:
        done(part)
    stream = documents.part(None, 0, 0, 1)
    if parts:
        stream.load_state_dict(parts[-1].after)
    chunks = _chunks(documents, stream, per_part, len(parts), job.skip)
    for part in _in_processes(job, chunks, workers) if workers > 1 else _in_this_one(job, chunks):
        parts.append(part)
        done(part)
    return parts


Chunk = tuple[int, list[str], dict[str, Any], int]


def _chunks(documents: Documents, stream: Any, per_part: int, first: int, skip: bool) -> Iterator[Chunk]:
    examples, number = iter(stream), first
    while True:
        texts, skipped = documents.take_good(examples, per_part) if skip else (documents.take(examples, per_part), 0)
        if not texts and not skipped:
            return
        yield number, texts, stream.state_dict(), skipped
        number += 1


def _finished(folder: Path) -> list[EncodedPart]:
    """The finished parts from the first on, up to the first that is missing."""
    found: list[EncodedPart] = []
    while (file := folder / f"{len(found):05d}.json").is_file():
        found.append(EncodedPart(**json.loads(file.read_text(encoding="utf-8"))))
    return found


def _in_this_one(job: EncodingJob, chunks: Iterable[Chunk]) -> Iterator[EncodedPart]:
    encoder = _encoder(job)
    for chunk in chunks:
        yield _encode(job, encoder, *chunk)


def _in_processes(job: EncodingJob, chunks: Iterator[Chunk], workers: int) -> Iterator[EncodedPart]:
    """In order. Little is read ahead, so that memory stays bounded."""
    # Started afresh: a fork of a process with the threads of datasets and tokenizers may hang.
    context = multiprocessing.get_context("spawn")
    pending: deque[Future[EncodedPart]] = deque()
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(job,)) as pool:
        try:
            for chunk in chunks:
                pending.append(pool.submit(_encode_here, job, *chunk))
                if len(pending) >= 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_HERE: list[Encoder] = []
"""The encoder of a process that encodes parts: one, made at its start."""


def _begin(job: EncodingJob) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _HERE[:] = [_encoder(job)]


def _encode_here(job: EncodingJob, *chunk: Any) -> EncodedPart:
    return _encode(job, _HERE[0], *chunk)


def _encoder(job: EncodingJob) -> Encoder:
    from tokenizers import Tokenizer

    return Encoder(Tokenizer.from_file(str(job.tokenizer)), job.separator)


def _encode(
    job: EncodingJob, encoder: Encoder, number: int, texts: list[str], after: dict[str, Any], skipped: int
) -> EncodedPart:
    """Write the files of a part."""
    dtype = TOKEN_TYPES[job.dtype]
    halves: dict[str, list[str]] = {half: [] for half in HALVES}
    for text in texts:
        if text.strip():
            halves[HALVES[held_back(text, job.share)]].append(text)
    tokens = {}
    for half, kept in halves.items():
        ids = [
            np.array(document, dtype=dtype)
            for first in range(0, len(kept), _TOGETHER)
            for document in encoder.encode(kept[first : first + _TOGETHER])
        ]
        tokens[half] = sum(map(len, ids))
        write_whole(job.folder / f"{number:05d}.{half}", b"".join(array.tobytes() for array in ids))
    size = sum(len(text.encode()) for text in texts)
    part = EncodedPart(number, len(texts), size, tokens, after, skipped)
    write_whole(job.folder / f"{number:05d}.json", json.dumps(asdict(part)).encode())
    return part


def held_back(text: str, share: float) -> bool:
    """Whether a document is for validation. Its own hash decides: equal documents are never on both sides."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2**64


def write_whole(path: Path, content: bytes) -> None:
    """A file that is there as a whole or not at all, also after a power cut."""
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
