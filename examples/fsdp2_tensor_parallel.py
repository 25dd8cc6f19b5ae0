"""FRUGAL on a mesh of two axes: FSDP2 over one, tensor parallelism over the other.

    torchrun --nproc-per-node 4 examples/fsdp2_tensor_parallel.py

One rank per GPU; without GPUs the ranks share the CPU. Needs: pip install '.[train]'
"""

from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

from frugal_dist import Frugal, checkpoint, split_parameters

STEPS, BATCH, LENGTH = 40, 16, 64
KIND = "cuda" if torch.cuda.is_available() else "cpu"
TEXT = torch.tensor(list("".join(topics.values()).encode()))  # bytes: a vocabulary of 256, no tokenizer
COLWISE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROWWISE = ("self_attn.o_proj", "mlp.down_proj")

dist.init_process_group("nccl" if KIND == "cuda" else "gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
device = torch.device(KIND, rank % torch.cuda.device_count()) if KIND == "cuda" else torch.device("cpu")
if KIND == "cuda":
    torch.cuda.set_device(device)

torch.manual_seed(0)  # all ranks begin with the same weights
shape = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape)).to(device)
mesh = dist.init_device_mesh(KIND, (ranks // 2, 2), mesh_dim_names=("fsdp", "tp"))
plan = {name: ColwiseParallel() for name in COLWISE} | {name: RowwiseParallel() for name in ROWWISE}
for block in model.model.layers:
    parallelize_module(block, mesh["tp"], plan)
    fully_shard(block, mesh=mesh["fsdp"])
fully_shard(model, mesh=mesh["fsdp"])
optimizer = Frugal(split_parameters(model), lr=3e-3, density=0.25, update_gap=20)  # after both

own, copies = mesh.get_local_rank("fsdp"), mesh["fsdp"].size()  # the ranks of tp have the same rows
for step in range(1, STEPS + 1):
    starts = torch.randint(len(TEXT) - LENGTH, (BATCH,), generator=torch.Generator().manual_seed(step))
    mine = torch.stack([TEXT[start : start + LENGTH] for start in starts[own::copies]]).to(device)
    loss = model(input_ids=mine, labels=mine).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0 and (step == 1 or step % 20 == 0):
        print(f"step {step}: loss {loss.item():.3f}", flush=True)

checkpoint.save_step("runs/fsdp2_tensor_parallel", STEPS, model, optimizer)  # loads on any engine and number of ranks
print(f"rank {rank}: {optimizer.summary()}")
dist.destroy_process_group()
