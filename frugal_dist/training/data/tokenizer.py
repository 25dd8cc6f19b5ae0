"""From text to tokens, with any fast tokenizer: a folder, a tokenizer.json, a name on the Hugging Face hub, or a small
byte-level BPE trained on the text it will cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from frugal_dist.training.data.local_or_hub import OFFLINE, settle_source

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SEPARATOR = "<|endoftext|>"
# More text changes a small vocabulary little and costs time.
TRAINING_CHARACTERS = 8_000_000
_SEPARATORS = (SEPARATOR, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]")
_NAMES = {
    "pad_token": ("<pad>", "[PAD]", "<|pad|>"),
    "unk_token": ("<unk>", "[UNK]", "<|unk|>"),
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", "[CLS]"),
}
"""What special tokens are usually called; a tokenizer.json does not say what they are for."""


class Encoder:
    """Documents to ids, each with the separator at its end.

    ``vocab_size``: ids that occur in text. Special tokens after the last ordinary one do not count: T5's 100 sentinels
    do not, so models of 32,000 fit its 32,100.
    """

    def __init__(self, tokenizer: Tokenizer, separator: int) -> None:
        self.tokenizer = tokenizer
        self.separator = separator
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Text that looks like a special token is text: neither ids beyond the vocabulary nor false ends of documents.
        tokenizer.encode_special_tokens = True
        self.vocab_size = ids_in_text(tokenizer, separator)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, followed by the separator."""
        encodings = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [[*encoding.ids, self.separator] for encoding in encodings]


def ids_in_text(tokenizer: Tokenizer, separator: int | None) -> int:
    """One more than the largest id of text and of the end of documents."""
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    kept = set() if separator is None else {separator}
    return 1 + max({*tokenizer.get_vocab().values()} - special | kept, default=-1)


def special_tokens(tokenizer: Tokenizer, separator: int | None = None) -> dict[str, str]:
    """Names of the special tokens of a tokenizer.json, for transformers. ``separator``: what ends documents, if known.

    The rest goes by the names that such tokens usually have.
    """
    end = None if separator is None else tokenizer.id_to_token(separator)
    tokens = {} if end is None else {"eos_token": end}
    for key, names in _NAMES.items() if tokens else {"eos_token": _SEPARATORS, **_NAMES}.items():
        known = [name for name in names if tokenizer.token_to_id(name) is not None]
        tokens |= {key: known[0]} if known else {}
    return tokens


def read_encoder(name: str | None) -> Encoder:
    """The tokenizer of this name. Raises ValueError that says what could not be had and how to get it."""
    if name is None:
        raise ValueError("data.tokenizer is not set: give a folder, a tokenizer.json, or a hub name such as t5-base.")
    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    if path.is_file() or (path.is_dir() and not (path / "tokenizer_config.json").is_file()):
        tokenizer = _from_file(file)
        return Encoder(tokenizer, _separator_of_file(tokenizer, file))
    return _from_transformers(name)


def _from_file(file: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"data.tokenizer: {file} is no tokenizer that can be read: {error}.") from error


def _separator_of_file(tokenizer: Tokenizer, file: Path) -> int:
    ids = [tokenizer.token_to_id(token) for token in _SEPARATORS]
    known = [number for number in ids if number is not None]
    if not known:
        raise ValueError(
            f"data.tokenizer: {file} has none of {', '.join(_SEPARATORS)} to end documents with. Give a folder whose "
            "tokenizer_config.json names the eos_token."
        )
    return int(known[0])


def _from_transformers(name: str) -> Encoder:
    settle_source(name, "data.tokenizer")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # OSError, ValueError, and those of the hub's and the tokenizers' libraries
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"data.tokenizer is {name!r}, which could not be had: {reason} {OFFLINE}.") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"data.tokenizer: {name} has no fast tokenizer (tokenizer.json); save one beside it.")
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if separator is None:
        raise ValueError(f"data.tokenizer: {name} names no eos_token, which ends documents; set it in its config.")
    return Encoder(tokenizer.backend_tokenizer, int(separator))


# --- one of its own ---------------------------------------------------------------------------------------------------


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
    separator = tokenizer.token_to_id(SEPARATOR)
    if separator is None:
        raise ValueError(f"the tokenizer has no {SEPARATOR!r}; it was not made by `frugal-dist demo prepare`.")
    return int(separator)


def _limited(documents: Iterable[str], characters: int) -> Iterator[str]:
    """Documents until so many characters were given out."""
    for document in documents:
        if characters <= 0:
            return
        characters -= len(document)
        yield document
