"""FRUGAL in the Trainer of transformers, without DeepSpeed: two arguments more than with AdamW.

    python examples/hf_trainer.py
    torchrun --nproc-per-node 2 examples/hf_trainer.py      # DDP

Needs: pip install '.[train]'
"""

from pydoc_data.topics import topics

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from frugal_dist import checkpoint
from frugal_dist.integrations.transformers import FrugalCallback, optimizer_cls_and_kwargs

LENGTH = 64
text = torch.tensor(list("".join(topics.values()).encode()))  # bytes: a vocabulary of 256, no tokenizer
rows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH).tolist()
dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})

set_seed(0)
shape = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4}
config = LlamaConfig(vocab_size=256, **shape)
args = TrainingArguments(
    output_dir="runs/hf_trainer",
    max_steps=40,
    per_device_train_batch_size=16,
    learning_rate=3e-3,
    lr_scheduler_type="cosine",
    warmup_steps=4,
    logging_steps=10,
    save_steps=20,
    report_to="none",
)
trainer = Trainer(
    LlamaForCausalLM(config),
    args,
    train_dataset=dataset,
    optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, density=0.25, update_gap=20),  # lr, betas, ... are args'
    callbacks=[FrugalCallback()],
)
trainer.train()  # resume_from_checkpoint=True resumes from the last one
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.3f}, at the end loss {losses[-1]:.3f}")
print(checkpoint.unwrap(trainer.optimizer).summary())
