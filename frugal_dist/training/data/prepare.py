"""Any text to token files, once: `frugal-dist data prepare`.

The text is read as a stream and encoded in parts, by several processes. Finished parts stay: started again, only the
others are made. `datasets` would encode as fast, but copies the text to its cache first, and starts each process's
share again from its beginning.

OUT/parts/requested         fingerprint of the settings and the text
OUT/parts/tokenizer.json    what the processes encode with
OUT/parts/train/00012.train token files, one per half of the split
OUT/parts/train/00012.validation
OUT/parts/train/00012.json  written last: how many tokens, and where reading resumes after this part
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from glob import glob
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from frugal_dist.checkpoint.disk import whole_file
from frugal_dist.training.data.c4_and_hub import Documents, open_documents
from frugal_dist.training.data.local_or_hub import settle_source
from frugal_dist.training.data.prepared import (
    FORMAT,
    TOKEN_TYPES,
    PreparedData,
    read_description,
    token_type,
    write_description,
)
from frugal_dist.training.data.text_files import MEND, find_damage
from frugal_dist.training.data.tokenizer import SEPARATOR, Encoder, read_encoder, train_tokenizer
from frugal_dist.training.recipe import Data

PARTS, TOKENIZER = "parts", "tokenizer.json"
HALVES = ("train", "validation")
_TOGETHER = 64  # documents encoded at once


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What to prepare: see ``frugal-dist data prepare --help``."""

    source: str
    out: Path
    tokenizer: str
    name: str | None = None
    column: str = "text"
    split: str = "train"
    validation_split: str | None = None
    validation_share: float = 0.01
    documents: Literal["line", "paragraph", "file"] = "line"
    workers: int = 1
    part_documents: int = 10_000
    validation_path: str | None = field(default=None, repr=False)  # the fingerprint knows the repr of those above
    skip_bad: bool = field(default=False, repr=False)


def prepare(wanted: Preparation) -> PreparedData:
    """Make train.bin, validation.bin, tokenizer.json and prepared.json in a folder, unless it holds just these.

    Raises ValueError, naming what is missing, damaged or contradictory; finished parts stay for the next time.
    """
    try:
        _check(wanted)
        encoder = read_encoder(wanted.tokenizer)
        texts = _open(wanted)
        requested = _fingerprint(wanted, encoder, texts)
        there = read_description(wanted.out)
        if there is not None and (there.format, there.requested) == (FORMAT, requested):
            print(f"Data is ready: {there.train_tokens:,} training tokens in {wanted.out}")
            return there
        if there is not None:
            raise ValueError(
                f"--out {wanted.out} holds other data, from {there.source}, or the source has changed since. Name "
                "another folder, or remove this one."
            )
        with _troubles_of_disks(wanted.out):
            made = _make(wanted, encoder, texts, requested)
    except ValueError as error:
        raise ValueError(_with_flags(str(error))) from error
    print(
        f"Prepared {made.train_tokens:,} training and {made.validation_tokens:,} validation tokens ({made.dtype}) in "
        f"{wanted.out}"
    )
    return made


_FLAGS = {
    "path": "SOURCE", "column": "--column", "tokenizer": "--tokenizer", "validation_path": "--validation-path",
    "split": "--split", "validation_split": "--validation-split", "name": "--name", "documents": "--documents",
}  # fmt: skip


def _with_flags(text: str) -> str:
    """What is said of a recipe's keys, of this command's flags."""
    flagged = re.sub(r"\bdata\.(\w+)", lambda key: _FLAGS.get(key.group(1), key.group(0)), text)
    return flagged.replace("`frugal-dist data prepare --skip-bad`", "--skip-bad")


def make_tokenizer(wanted: Preparation, vocab_size: int) -> None:
    """Train a byte-level BPE tokenizer on the beginning of a text and write it to a folder, as transformers reads it.

    Raises ValueError, naming what is missing or damaged, and for a folder that is not empty.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        _check(wanted)
        if wanted.out.is_dir() and any(wanted.out.iterdir()):
            raise ValueError(f"--out {wanted.out} is not empty; name another folder.")
        documents = _open(wanted)["train"]
        examples = iter(documents.part(None, 0, 0, 1))
        chunks = iter(lambda: documents.take(examples, 1000), ([], 0))
        tokenizer = train_tokenizer((text for texts, _ in chunks for text in texts), vocab_size)
    except ValueError as error:
        raise ValueError(_with_flags(str(error)).replace("vocab_size is", "--vocab-size is")) from error
    with _troubles_of_disks(wanted.out):
        fast: Any = PreTrainedTokenizerFast  # transformers' own hints are incomplete
        fast(tokenizer_object=tokenizer, eos_token=SEPARATOR, bos_token=SEPARATOR).save_pretrained(wanted.out)
    print(f"A tokenizer of {tokenizer.get_vocab_size():,} tokens in {wanted.out}")


def _check(wanted: Preparation) -> None:
    for key in ("workers", "part_documents"):
        if getattr(wanted, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')} is {getattr(wanted, key)}; it must be at least 1.")
    if wanted.validation_split is not None and wanted.validation_path is not None:
        raise ValueError("--validation-split and --validation-path: give one of them.")
    existing = next(path for path in (wanted.out, *wanted.out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"--out {wanted.out}: {existing} is a file; name a folder, which will be made.")
    if wanted.validation_split is None and wanted.validation_path is None and not 0 < wanted.validation_share < 1:
        raise ValueError(f"--validation-share is {wanted.validation_share}; it must be between 0 and 1.")


def _open(wanted: Preparation) -> dict[str, Documents]:
    """The text to read by the name of its parts' folder."""
    data = Data(
        kind=_kind_of(wanted.source),
        path=wanted.source,
        name=wanted.name,
        column=wanted.column,
        split=wanted.split,
        documents=wanted.documents,
    )
    documents = {"train": open_documents(data, skip=wanted.skip_bad)}
    if wanted.validation_split is not None:
        documents["validation"] = open_documents(replace(data, split=wanted.validation_split), skip=wanted.skip_bad)
    if wanted.validation_path is not None:
        held_back = replace(data, kind=_kind_of(wanted.validation_path), validation_path=wanted.validation_path)
        validation = held_back.kind == "files"
        if not validation:  # a dataset of its own, of which the same split is meant
            settle_source(wanted.validation_path, "data.validation_path")
            held_back = replace(held_back, path=wanted.validation_path)
        documents["validation"] = open_documents(held_back, validation, skip=wanted.skip_bad)
    return documents


def _kind_of(source: str) -> Literal["files", "hub"]:
    like_the_hub = (Path(source) / "README.md").is_file()
    return "files" if glob(source) and not like_the_hub else "hub"


def _fingerprint(wanted: Preparation, encoder: Encoder, texts: dict[str, Documents]) -> str:
    """Of all that the result depends on: parts of other settings, or of files that have changed, are of no use."""
    files = [
        (str(file), file.stat().st_size, file.stat().st_mtime_ns) for text in texts.values() for file in text.files
    ]
    settings = replace(wanted, out=Path(), workers=1, tokenizer="")
    more = [[wanted.validation_path, wanted.skip_bad]] if wanted.validation_path or wanted.skip_bad else []
    content = json.dumps([FORMAT, repr(settings), encoder.tokenizer.to_str(), encoder.separator, files, *more])
    return hashlib.sha256(content.encode()).hexdigest()


def _make(wanted: Preparation, encoder: Encoder, texts: dict[str, Documents], requested: str) -> PreparedData:
    folder = wanted.out / PARTS
    settings = folder / "requested"
    if folder.exists() and (not settings.is_file() or settings.read_text() != requested):
        print(f"Parts in {folder} are of other settings, or the text has changed: they are made again.")
        shutil.rmtree(folder)
    if settings.is_file():
        print(f"Going on with the parts in {folder}")
    else:
        folder.mkdir(parents=True)
        _write(folder / TOKENIZER, encoder.tokenizer.to_str())
        _write(settings, requested)
    dtype = token_type(encoder.vocab_size)
    files: dict[str, list[Path]] = {half: [] for half in HALVES}
    counts = dict.fromkeys(HALVES, 0)
    for name, documents in texts.items():
        share = float(name == "validation") if "validation" in texts else wanted.validation_share
        job = EncodingJob(folder / name, requested, encoder.separator, dtype, share)
        skipped = 0
        for part in _parts(job, documents, wanted):
            skipped += part.skipped
            for half in HALVES:
                files[half].append(job.folder / f"{part.number:05d}.{half}")
                counts[half] += part.tokens[half]
        if skipped:
            where = find_damage(documents.files, wanted.column).removesuffix(f" {MEND}.")
            print(f"Left out {skipped:,} document{'s' * (skipped > 1)}: {where or documents.label}")
    for half in HALVES:
        if not counts[half]:
            raise ValueError(
                f"{texts.get(half, texts['train']).label} has too few documents: none is left for {half}. "
                f"Change --validation-share ({wanted.validation_share}) or add text."
            )
        with whole_file(wanted.out / f"{half}.bin") as whole:
            for file in files[half]:
                with file.open("rb") as part_file:
                    shutil.copyfileobj(part_file, whole, 1 << 24)
    shutil.copyfile(folder / TOKENIZER, wanted.out / TOKENIZER)
    made = PreparedData(
        format=FORMAT,
        requested=requested,
        source=texts["train"].label,
        vocab_size=encoder.vocab_size,
        dtype=dtype,
        separator=encoder.separator,
        train_tokens=counts["train"],
        validation_tokens=counts["validation"],
    )
    write_description(wanted.out, made)
    shutil.rmtree(folder)
    return made


def _write(path: Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text.encode())


@contextmanager
def _troubles_of_disks(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kept = "Finished parts are kept: once that is mended, the same command resumes."
        advice = kept if (out / PARTS).exists() else "Name another folder."
        raise ValueError(f"--out {out} cannot be written: {error.strerror or error}. {advice}") from error


# --- parts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodingJob:
    """What every process must know. ``share``: of documents that are held back for validation."""

    folder: Path
    requested: str
    separator: int
    dtype: str
    share: float


@dataclass(frozen=True)
class EncodedPart:
    """A finished part. ``after``: the stream's position after it; ``size``: bytes of text; ``skipped``: left out."""

    number: int
    documents: int
    size: int
    tokens: dict[str, int]
    after: dict[str, Any]
    skipped: int = 0


def _parts(job: EncodingJob, documents: Documents, wanted: Preparation) -> Iterator[EncodedPart]:
    """All parts of a text, in order: those that are finished up to the first that is missing, then those it makes.

    Raises ValueError if the text cannot be read or written any further; what is finished stays.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    finished: list[EncodedPart] = []
    while (file := job.folder / f"{len(finished):05d}.json").is_file():
        finished.append(EncodedPart(**json.loads(file.read_text(encoding="utf-8"))))
    by_size = documents.files and all(file.suffix in (".txt", ".jsonl", ".json") for file in documents.files)
    unit = {"unit": "B", "unit_scale": True} if by_size else {"unit": " documents"}
    total, tokens = documents.local_bytes if by_size else None, 0
    with tqdm(desc=f"Encoding {job.folder.name}", total=total, mininterval=0.5, **unit) as bar:
        for parts in (finished, _encoded(job, documents, finished, wanted)):
            for part in parts:
                tokens += sum(part.tokens.values())
                bar.set_postfix_str(f"{tokens / 1e6:,.1f} M tokens", refresh=False)
                bar.update(part.size if by_size else part.documents)
                yield part


def _encoded(
    job: EncodingJob, documents: Documents, finished: list[EncodedPart], wanted: Preparation
) -> Iterator[EncodedPart]:
    """The parts after those that are finished. Little is read ahead, so that memory stays bounded."""
    stream = documents.part(None, 0, 0, 1)
    if finished:
        stream.load_state_dict(finished[-1].after)
    examples = iter(stream)
    read = iter(lambda: documents.take(examples, wanted.part_documents), ([], 0))
    chunks = ((number, *chunk, stream.state_dict()) for number, chunk in enumerate(read, len(finished)))
    if wanted.workers == 1:
        yield from (_encode(job, *chunk) for chunk in chunks)
        return
    # Started afresh: a fork of a process with the threads of datasets and tokenizers may hang. The processes are the
    # parallelism, also that of the tokenizer.
    start, quiet = multiprocessing.get_context("spawn"), ("TOKENIZERS_PARALLELISM", "false")
    pending: deque[Future[EncodedPart]] = deque()
    with ProcessPoolExecutor(wanted.workers, start, initializer=os.putenv, initargs=quiet) as pool:
        try:
            for chunk in chunks:
                pending.append(pool.submit(_encode, job, *chunk))
                if len(pending) >= 2 * wanted.workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@lru_cache(maxsize=1)
def _encoder(job: EncodingJob) -> Encoder:
    """Of this process; other settings make another."""
    from tokenizers import Tokenizer

    return Encoder(Tokenizer.from_file(str(job.folder.parent / TOKENIZER)), job.separator)


def _encode(job: EncodingJob, number: int, texts: list[str], skipped: int, after: dict[str, Any]) -> EncodedPart:
    """Write the files of a part."""
    encoder, dtype, tokens = _encoder(job), TOKEN_TYPES[job.dtype], {}
    halves: tuple[list[str], list[str]] = ([], [])
    for text in texts:
        if text.strip():
            halves[_held_back(text, job.share)].append(text)
    for half, kept in zip(HALVES, halves, strict=True):
        with whole_file(job.folder / f"{number:05d}.{half}") as file:
            for first in range(0, len(kept), _TOGETHER):
                for ids in encoder.encode(kept[first : first + _TOGETHER]):
                    file.write(np.array(ids, dtype=dtype).tobytes())
            tokens[half] = file.tell() // dtype.itemsize
    size = sum(len(text.encode()) for text in texts)
    part = EncodedPart(number, len(texts), size, tokens, after, skipped)
    _write(job.folder / f"{number:05d}.json", json.dumps(asdict(part)))
    return part


def _held_back(text: str, share: float) -> bool:
    """Whether a document is for validation. Its own hash decides: equal documents are never on both sides."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2**64
