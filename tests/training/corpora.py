"""Small text in the layouts in which real data lies, and tokenizers for it, from Python's own help texts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from frugal_dist.training.data.demo_texts import demo_corpus
from frugal_dist.training.data.tokenizer import train_tokenizer

_LENGTHS = (1500, 40, 700, 90, 15)  # in five different shards: ranks have different numbers of real tokens
C4_README = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
---
"""


def topics() -> tuple[list[str], list[str]]:
    """Training and validation documents: beginnings of the originals, short and long ones."""
    corpus = demo_corpus("topics")
    return _beginnings(corpus.train), _beginnings(corpus.validation)


def _beginnings(texts: list[str]) -> list[str]:
    return [text[: _LENGTHS[number % len(_LENGTHS)]].strip() for number, text in enumerate(texts)]


def write_c4(folder: Path, shards: int = 8, readme: bool = True) -> Path:
    """A folder laid out like C4's repository on the hub."""
    train, validation = topics()
    (folder / "en").mkdir(parents=True)
    for split, documents, count in (("train", train, shards), ("validation", validation, 1)):
        for number in range(count):
            name = f"c4-{split}.{number:05d}-of-{count:05d}.json.gz"
            with gzip.open(folder / "en" / name, "wt", encoding="utf-8", compresslevel=1) as file:
                for text in documents[number::count]:
                    row = {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://docs.python.org"}
                    file.write(json.dumps(row) + "\n")
    if readme:
        (folder / "README.md").write_text(C4_README)
    return folder


def write_jsonl(path: Path, documents: list[str], column: str = "text") -> Path:
    """A JSONL file with a document per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({column: text, "number": n}) + "\n" for n, text in enumerate(documents)))
    return path


def write_parquet(path: Path, documents: list[str], column: str = "text") -> Path:
    """A parquet file with a document per row."""
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({column: documents, "number": list(range(len(documents)))}), path)
    return path


def write_tokenizer(path: Path, vocab_size: int = 512) -> Path:
    """A tokenizer.json like the demo's."""
    train_tokenizer(topics()[0], vocab_size).save(str(path))
    return path


def write_t5_like(folder: Path, vocab_size: int = 500, sentinels: int = 10) -> Path:
    """A tokenizer folder that behaves as T5's: pads with 0, ends with </s> = 1, sentinels after all other tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "</s>", "<unk>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(topics()[0], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens([f"<extra_id_{number}>" for number in range(sentinels)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=512
    )
    fast.save_pretrained(folder)
    return folder


def write_words(path: Path, vocab_size: int) -> Path:
    """A tokenizer.json with as many words; those it does not know have the last id."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["</s>", *(f"word{number}" for number in range(vocab_size - 2)), "<unk>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path
