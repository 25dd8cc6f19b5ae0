"""FRUGAL in the Trainer of transformers with DeepSpeed ZeRO-2: an import, and the optimizer in the DeepSpeed config.

    torchrun --nproc-per-node 2 examples/hf_trainer_deepspeed.py

Needs: pip install '.[train,deepspeed]'
"""

from pydoc_data.topics import topics

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from frugal_dist import checkpoint
from frugal_dist.integrations.transformers import FrugalCallback

LENGTH = 64
DEEPSPEED = {  # or the name of a JSON file
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 2},
    "optimizer": {
        "type": "Frugal",  # known to DeepSpeed, because frugal_dist is imported
        # What says "auto" comes from TrainingArguments. Leave out what should keep its default.
        "params": {"lr": "auto", "weight_decay": "auto", "betas": "auto", "density": 0.25, "update_gap": 20},
    },
}

text = torch.tensor(list("".join(topics.values()).encode()))  # bytes: a vocabulary of 256, no tokenizer
rows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH).tolist()
dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})

set_seed(0)
args = TrainingArguments(  # before the model: at ZeRO-3 from_pretrained divides it as it is read
    output_dir="runs/hf_trainer_deepspeed",
    deepspeed=DEEPSPEED,
    use_cpu=not torch.cuda.is_available(),
    max_steps=40,
    per_device_train_batch_size=8,
    learning_rate=3e-3,  # fills in "auto" above
    lr_scheduler_type="cosine",
    warmup_steps=4,
    logging_steps=10,
    save_steps=20,
    report_to="none",
)
shape = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4}
config = LlamaConfig(vocab_size=256, **shape)
watch = FrugalCallback(portable=True)  # a copy in each checkpoint, to resume on any number of ranks
trainer = Trainer(LlamaForCausalLM(config), args, train_dataset=dataset, callbacks=[watch])
trainer.train()  # resume_from_checkpoint=True resumes from the last one
if trainer.is_world_process_zero():
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f}, at the end loss {losses[-1]:.3f}")
print(f"rank {args.process_index}: {checkpoint.unwrap(trainer.optimizer).summary()}")
torch.distributed.destroy_process_group()
