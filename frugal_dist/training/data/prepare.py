"""Any text to token files, once: `frugal-dist data prepare`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from glob import glob
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from frugal_dist.training.data.documents import Documents, open_documents
from frugal_dist.training.data.hub import settle_source
from frugal_dist.training.data.local import MEND, find_damage
from frugal_dist.training.data.parts import HALVES, TOKENIZER, EncodedPart, EncodingJob, encode_parts, write_whole
from frugal_dist.training.data.prepared import FORMAT, PreparedData, read_description, token_type, write_description
from frugal_dist.training.data.tokenizer import SEPARATOR, Encoder, read_encoder, train_tokenizer
from frugal_dist.training.recipe import Data

PARTS = "parts"


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
        return _prepare(wanted)
    except ValueError as error:
        raise ValueError(_with_flags(str(error))) from error


_FLAGS = {
    "path": "SOURCE", "column": "--column", "tokenizer": "--tokenizer", "validation_path": "--validation-path",
    "split": "--split", "validation_split": "--validation-split", "name": "--name", "documents": "--documents",
}  # fmt: skip


def _with_flags(text: str) -> str:
    """What is said of a recipe's keys, of this command's flags."""
    flagged = re.sub(r"\bdata\.(\w+)", lambda key: _FLAGS.get(key.group(1), key.group(0)), text)
    return flagged.replace("`frugal-dist data prepare --skip-bad`", "--skip-bad")


def _prepare(wanted: Preparation) -> PreparedData:
    _check(wanted)
    encoder = read_encoder(wanted.tokenizer)
    texts = _open(wanted)
    requested = _fingerprint(wanted, encoder, texts)
    found = read_description(wanted.out)
    if found is not None and (found.format, found.requested) == (FORMAT, requested):
        print(f"Data is ready: {found.train_tokens:,} training tokens in {wanted.out}")
        return found
    if found is not None:
        raise ValueError(
            f"--out {wanted.out} holds other data, from {found.source}, or the source has changed since. Name another "
            "folder, or remove this one."
        )
    with _troubles_of_disks(wanted.out):
        made = _make(wanted, encoder, texts, requested)
    print(
        f"Prepared {made.train_tokens:,} training and {made.validation_tokens:,} validation tokens ({made.dtype}) in "
        f"{wanted.out}"
    )
    return made


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
        taken = documents.take_good if wanted.skip_bad else lambda some, count: (documents.take(some, count), 0)
        chunks = iter(lambda: taken(examples, 1000), ([], 0))
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
    found = {"train": open_documents(data, skip=wanted.skip_bad)}
    if wanted.validation_split is not None:
        found["validation"] = open_documents(replace(data, split=wanted.validation_split), skip=wanted.skip_bad)
    if wanted.validation_path is not None:
        held_back = replace(data, kind=_kind_of(wanted.validation_path), validation_path=wanted.validation_path)
        validation = held_back.kind == "files"
        if not validation:  # a dataset of its own, of which the same split is meant
            settle_source(wanted.validation_path, "data.validation_path")
            held_back = replace(held_back, path=wanted.validation_path)
        found["validation"] = open_documents(held_back, validation, skip=wanted.skip_bad)
    return found


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
    _begin(folder, encoder, requested)
    dtype = token_type(encoder.vocab_size)
    parts: list[tuple[Path, EncodedPart]] = []
    for name, documents in texts.items():
        share = float(name == "validation") if "validation" in texts else wanted.validation_share
        job = EncodingJob(folder / name, folder / TOKENIZER, encoder.separator, dtype, share, wanted.skip_bad)
        with _bar(name, documents) as bar:
            found = encode_parts(job, documents, wanted.part_documents, wanted.workers, bar.show)
        parts += [(job.folder, part) for part in found]
        if skipped := sum(part.skipped for part in found):
            where = find_damage(documents.files, wanted.column).removesuffix(f" {MEND}.")
            print(f"Left out {skipped:,} document{'s' * (skipped > 1)}: {where or documents.label}")
    counts = {half: sum(part.tokens[half] for _, part in parts) for half in HALVES}
    for half, count in counts.items():
        if not count:
            raise ValueError(
                f"{texts.get(half, texts['train']).label} has too few documents: none is left for {half}. "
                f"Change --validation-share ({wanted.validation_share}) or add text."
            )
        _join([place / f"{part.number:05d}.{half}" for place, part in parts], wanted.out / f"{half}.bin")
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


def _begin(folder: Path, encoder: Encoder, requested: str) -> None:
    """The folder of the parts; parts of other settings go."""
    settings = folder / "requested"
    if folder.exists() and (not settings.is_file() or settings.read_text() != requested):
        print(f"Parts in {folder} are of other settings, or the text has changed: they are made again.")
        shutil.rmtree(folder)
    if settings.is_file():
        print(f"Going on with the parts in {folder}")
        return
    folder.mkdir(parents=True)
    write_whole(folder / TOKENIZER, encoder.tokenizer.to_str().encode())
    write_whole(settings, requested.encode())


def _join(files: list[Path], path: Path) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as whole:
        for file in files:
            with file.open("rb") as part:
                shutil.copyfileobj(part, whole, 1 << 24)
        whole.flush()
        os.fsync(whole.fileno())
    os.replace(unfinished, path)


class _Progress:
    """A bar over the bytes of local files, or a count of documents where their size says nothing."""

    def __init__(self, bar: tqdm[None], by_size: bool) -> None:
        self._bar = bar
        self._by_size = by_size
        self._tokens = 0

    def show(self, part: EncodedPart) -> None:
        self._tokens += sum(part.tokens.values())
        self._bar.set_postfix_str(f"{self._tokens / 1e6:,.1f} M tokens", refresh=False)
        self._bar.update(part.size if self._by_size else part.documents)


@contextmanager
def _bar(name: str, documents: Documents) -> Iterator[_Progress]:
    plain = documents.files and all(file.suffix in (".txt", ".jsonl", ".json") for file in documents.files)
    total = documents.local_bytes if plain else None
    unit = {"unit": "B", "unit_scale": True} if total else {"unit": " documents"}
    with tqdm(desc=f"Encoding {name}", total=total, mininterval=0.5, **unit) as bar:
        yield _Progress(bar, total is not None)


@contextmanager
def _troubles_of_disks(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror or error}.{_kept(out)}") from error


def _kept(out: Path) -> str:
    if not (out / PARTS).exists():
        return " Name another folder."
    return " Finished parts are kept: once that is mended, the same command goes on."
