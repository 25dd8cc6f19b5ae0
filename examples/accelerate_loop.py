"""FRUGAL with Accelerate: the optimizer is built as ever and prepared as ever.

    python examples/accelerate_loop.py
    accelerate launch --num_processes 2 examples/accelerate_loop.py     # DDP; FSDP2 and DeepSpeed: `accelerate config`

Needs: pip install '.[train]'
"""

from pydoc_data.topics import topics

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from frugal_dist import Frugal, checkpoint, split_parameters

STEPS, BATCH, LENGTH = 40, 16, 64
text = torch.tensor(list("".join(topics.values()).encode()))  # bytes: a vocabulary of 256, no tokenizer
rows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)

set_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=2)
shape = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4}
config = LlamaConfig(vocab_size=256, **shape)
model = LlamaForCausalLM(config)
optimizer = Frugal(split_parameters(model), lr=3e-3, density=0.25, update_gap=20)
loader = DataLoader(rows, batch_size=BATCH // 2, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

step = 0
for batch in loader:
    with accelerator.accumulate(model):
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients:
        step += 1
        if step == 1 or step % 20 == 0:
            accelerator.print(f"step {step}: loss {loss.item():.3f}", flush=True)
        if step == STEPS:
            break

accelerator.save_state("runs/accelerate_loop")  # load_state resumes bit for bit
accelerator.print(checkpoint.unwrap(optimizer).summary())
accelerator.end_training()
