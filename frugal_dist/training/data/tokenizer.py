"""A small byte-level BPE tokenizer, trained on the text it will cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SEPARATOR = "<|endoftext|>"
# More text changes a small vocabulary little and costs time.
TRAINING_CHARACTERS = 8_000_000


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn `vocab_size` tokens from the documents. Every byte has a token: nothing is ever unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ValueError(f"vocab_size is {vocab_size}; a byte-level vocabulary needs more than {len(alphabet)}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=[SEPARATOR], show_progress=False
    )
    tokenizer.train_from_iterator(_limited(documents, TRAINING_CHARACTERS), trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer saved before."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


def separator_id(tokenizer: Tokenizer) -> int:
    """The token that ends a document."""
    found = tokenizer.token_to_id(SEPARATOR)
    if found is None:
        raise ValueError(f"the tokenizer has no {SEPARATOR!r}; it was not made by `frugal-dist demo prepare`.")
    return int(found)


def _limited(documents: Iterable[str], characters: int) -> Iterator[str]:
    """Documents until so many characters were given out."""
    for document in documents:
        if characters <= 0:
            return
        characters -= len(document)
        yield document
