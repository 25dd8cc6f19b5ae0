"""Text to token files: the folder that a training run reads, made once and reused."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from frugal_dist.training.data.corpora import demo_corpus
from frugal_dist.training.data.tokenizer import load_tokenizer, separator_id, train_tokenizer
from frugal_dist.training.data.tokens import Tokens, read_tokens, token_type, write_tokens

FORMAT = 2  # raise it when the same settings would give other files
_DESCRIPTION = "prepared.json"


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


def prepare_demo(folder: Path, *, source: str = "auto", vocab_size: int = 4096) -> PreparedData:
    """Make tokenizer and token files from the demo text, unless the folder already holds just these."""
    found = read_description(folder)
    if found and (found.format, found.requested, found.vocab_size) == (FORMAT, source, vocab_size):
        print(f"Data is ready: {found.source}, {found.train_tokens:,} training tokens in {folder}")
        return found
    corpus = demo_corpus(source)
    print(f"Preparing {corpus.source}: {len(corpus.train):,} training documents ...", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _DESCRIPTION).unlink(missing_ok=True)
    tokenizer = train_tokenizer(corpus.train, vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    # Little text may not fill the vocabulary; a file saved and read again is what training will see.
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    separator = separator_id(tokenizer)
    counts = [
        write_tokens(folder / f"{name}.bin", _progress(documents, name), tokenizer, separator)
        for name, documents in (("train", corpus.train), ("validation", corpus.validation))
    ]
    made = PreparedData(
        format=FORMAT,
        requested=source,
        source=corpus.source,
        vocab_size=vocab_size,
        dtype=token_type(tokenizer.get_vocab_size()),
        separator=separator,
        train_tokens=counts[0],
        validation_tokens=counts[1],
    )
    write_description(folder, made)
    print(f"Prepared {made.train_tokens:,} training and {made.validation_tokens:,} validation tokens in {folder}")
    return made


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
        return PreparedData(**json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_description(folder: Path, data: PreparedData) -> None:
    """Written last and in one move: a folder that has it is complete."""
    unfinished = folder / (_DESCRIPTION + ".unfinished")
    unfinished.write_text(json.dumps(asdict(data), indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / _DESCRIPTION)


def _progress(documents: Sequence[str], name: str) -> tqdm[str]:
    return tqdm(documents, desc=f"Encoding {name}", unit=" documents", mininterval=0.5, leave=False)
