"""A tiny pretrained encoder, and texts whose class their words tell."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

FILL = [f"word{number}" for number in range(24)]
TELLING = {"dull": ["bad", "worse", "poor"], "fine": ["good", "better", "great"]}
GLUE_README = """---
configs:
{configs}---
"""
CONFIG = """- config_name: {task}
  data_files:
  - split: train
    path: {task}/train-*
  - split: {split}
    path: {task}/{split}-*
"""


def write_encoder(folder: Path, kind: str = "bert", **changes: Any) -> Path:
    """Random weights and a tokenizer that knows every word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILL, *(word for told in TELLING.values() for word in told)]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if kind == "bert" else ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_input_names=inputs
    ).save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    types = 2 if kind == "bert" else 1
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(words),
        max_position_embeddings=40,
        type_vocab_size=types,
        pad_token_id=0,
        **size,
        **changes,
    )
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


def sentences(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts of different lengths with labels."""
    drawn = random.Random(seed)
    rows = []
    for _ in range(count):
        label = drawn.choice(list(TELLING))
        words = [drawn.choice(FILL) for _ in range(drawn.randrange(1, 12))]
        words.insert(drawn.randrange(len(words) + 1), drawn.choice(TELLING[label]))
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_glue(folder: Path, train: int = 40, validation: int = 13) -> Path:
    """All tasks as the hub's repository has them: a folder of parquet files each, named in the README."""
    import pyarrow
    from pyarrow import parquet

    from frugal_dist.training.finetune.glue import TASKS

    configs = ""
    for name, task in TASKS.items():
        (folder / name).mkdir(parents=True)
        for split, count, seed in (("train", train, 1), (task.validation, validation, 2)):
            rows = sentences(count, seed)
            numbers = [list(TELLING).index(row["label"]) for row in rows]
            columns: dict[str, Any] = {column: [row["text"] for row in rows] for column in task.columns}
            columns["label"] = [4.5 * number for number in numbers] if task.regression else numbers
            columns["idx"] = list(range(count))
            parquet.write_table(pyarrow.table(columns), folder / name / f"{split}-00000-of-00001.parquet")
        configs += CONFIG.format(task=name, split=task.validation)
    (folder / "README.md").write_text(GLUE_README.format(configs=configs))
    return folder
