"""The data of a recipe: training batches, validation and vocabulary, from whichever kind of source it names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from frugal_dist.training.data.batches import Batches, DocumentRows, SequenceRows, Source, TokenRows, Tokens
from frugal_dist.training.data.c4_and_hub import open_documents
from frugal_dist.training.data.prepared import PreparedData, check_tokens, open_prepared
from frugal_dist.training.data.streams import LANES, Reading, Stream, check_enough, choose_lanes, first_rows
from frugal_dist.training.data.tokenizer import Encoder, read_encoder
from frugal_dist.training.recipe import Recipe
from frugal_dist.training.validation import ROWS_AT_ONCE, Validation

VALIDATION_SEED = 42  # of the papers' code: all runs are measured on the same text
COUNTED_BYTES = 32 << 20
"""Local text up to this size is read through before training, to see whether it is enough."""


@dataclass(frozen=True)
class OpenData:
    """What a training needs of its data. ``separator``: the token that ends documents."""

    batches: Source
    validation: Validation
    vocab_size: int
    separator: int


def open_data(recipe: Recipe, world: int) -> OpenData:
    """Open the data of a recipe for ``world`` ranks.

    Raises ValueError, naming file and key, for what is missing, damaged, of another vocabulary, or too little.
    """
    return _KINDS[recipe.data.kind](recipe, world)


def _open_tokens(recipe: Recipe, world: int) -> OpenData:
    if recipe.data.path is None:
        raise ValueError("data.path is not set; name the folder that `frugal-dist data prepare` made.")
    folder = Path(recipe.data.path)
    data, train, held_back = open_prepared(folder)
    check_tokens(folder / "train.bin", train, data.train_tokens, data.vocab_size)
    check_tokens(folder / "validation.bin", held_back, data.validation_tokens, data.vocab_size)
    rows = _rows(recipe, train, data)
    if recipe.batch % world:
        raise ValueError(
            f"batch is {recipe.batch}, which {world} ranks cannot share equally: use a multiple of {world}."
        )
    passes = recipe.steps * recipe.batch / rows.count
    if passes > recipe.data.epochs:
        raise ValueError(
            f"{recipe.steps} steps of {recipe.batch} sequences go {passes:.2f} times through the {rows.count:,} "
            f"sequences in {recipe.data.path}, but data.epochs is {recipe.data.epochs:g}. Raise it, or lower steps."
        )
    validation = _validation(recipe, _rows(recipe, held_back, data))
    return OpenData(Batches(rows, recipe.batch, recipe.seed), validation, data.vocab_size, data.separator)


def _validation(recipe: Recipe, rows: SequenceRows) -> Validation:
    """No more rows at once than in training, whose memory is known to be enough."""
    return Validation(rows, recipe.evaluation_tokens, min(ROWS_AT_ONCE, recipe.micro_batch or ROWS_AT_ONCE))


def _rows(recipe: Recipe, tokens: Tokens, data: PreparedData) -> SequenceRows:
    if recipe.data.rows == "packed":
        return TokenRows(tokens, recipe.length)
    return DocumentRows(tokens, recipe.length, data.separator)


def _open_stream(recipe: Recipe, world: int) -> OpenData:
    data = recipe.data
    encoder = read_encoder(data.tokenizer)
    _check_vocabulary(recipe, encoder)
    packed = data.rows == "packed"
    texts = open_documents(data)
    # Where every file is a document, there are no more of them to be divided.
    most = min(LANES, len(texts.files)) if data.kind == "files" and data.documents == "file" else LANES
    lanes = choose_lanes(data.streams, recipe.batch, world, most)
    block = max(1, data.shuffle_buffer // lanes)
    reading = Reading(texts, encoder, recipe.length, packed, block, recipe.seed, data.epochs)
    if texts.local_bytes is not None and texts.local_bytes <= COUNTED_BYTES:
        check_enough(reading, lanes, recipe.steps * recipe.batch // lanes)
    held_back = Reading(
        open_documents(data, validation=True), encoder, recipe.length, packed, data.shuffle_buffer, VALIDATION_SEED, 1.0
    )
    validation = _validation(recipe, first_rows(held_back, recipe.evaluation_tokens))
    batches = Stream(reading, recipe.batch, lanes, data.streams is not None, data.workers)
    return OpenData(batches, validation, encoder.vocab_size, encoder.separator)


def _check_vocabulary(recipe: Recipe, encoder: Encoder) -> None:
    """Before any text is fetched."""
    size = recipe.model.vocab_size
    if size is not None and size < encoder.vocab_size:
        raise ValueError(
            f"model.vocab_size is {size}, but the tokenizer {recipe.data.tokenizer} has {encoder.vocab_size} tokens. "
            "Raise it, or name another data.tokenizer."
        )


_KINDS: dict[str, Callable[[Recipe, int], OpenData]] = {
    "tokens": _open_tokens,
    "c4": _open_stream,
    "hub": _open_stream,
    "files": _open_stream,
}
