"""FRUGAL under FSDP2: weights, gradients and optimizer state are divided among the ranks.

    torchrun --nproc-per-node 2 examples/fsdp2.py

One rank per GPU; without GPUs the ranks share the CPU. Needs: pip install '.[train]'
"""

from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from frugal_dist import Frugal, checkpoint, split_parameters

STEPS, BATCH, LENGTH = 40, 16, 64
KIND = "cuda" if torch.cuda.is_available() else "cpu"
TEXT = torch.tensor(list("".join(topics.values()).encode()))  # bytes: a vocabulary of 256, no tokenizer

dist.init_process_group("nccl" if KIND == "cuda" else "gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
device = torch.device(KIND, rank % torch.cuda.device_count()) if KIND == "cuda" else torch.device("cpu")
if KIND == "cuda":
    torch.cuda.set_device(device)

torch.manual_seed(0)  # all ranks begin with the same weights
shape = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4}
config = LlamaConfig(vocab_size=256, **shape)
model = LlamaForCausalLM(config).to(device)
mesh = dist.init_device_mesh(KIND, (ranks,))
for block in model.model.layers:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = Frugal(split_parameters(model), lr=3e-3, density=0.25, update_gap=20)  # after fully_shard

for step in range(1, STEPS + 1):
    starts = torch.randint(len(TEXT) - LENGTH, (BATCH,), generator=torch.Generator().manual_seed(step))
    mine = torch.stack([TEXT[start : start + LENGTH] for start in starts[rank::ranks]]).to(device)
    loss = model(input_ids=mine, labels=mine).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0 and (step == 1 or step % 20 == 0):
        print(f"step {step}: loss {loss.item():.3f}", flush=True)

checkpoint.save_step("runs/fsdp2", STEPS, model, optimizer)  # all ranks; loads on any number of them
print(f"rank {rank}: {optimizer.summary()}")
dist.destroy_process_group()
