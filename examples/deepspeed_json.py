"""FRUGAL under DeepSpeed ZeRO-2: the optimizer is a line of the JSON beside this file.

    torchrun --nproc-per-node 2 examples/deepspeed_json.py
    deepspeed --num_gpus 2 examples/deepspeed_json.py           # the same by DeepSpeed's own launcher

One rank per GPU; without GPUs the ranks share the CPU. Needs: pip install '.[train,deepspeed]'
"""

from pathlib import Path
from pydoc_data.topics import topics

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import frugal_dist

STEPS, LENGTH = 40, 64
TEXT = torch.tensor(list("".join(topics.values()).encode()))  # bytes: a vocabulary of 256, no tokenizer

deepspeed.init_distributed()
torch.manual_seed(0)
shape = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4}
config = LlamaConfig(vocab_size=256, **shape)
model = LlamaForCausalLM(config)
# Nothing of frugal_dist is called: its import made "type": "Frugal" known to DeepSpeed.
engine, optimizer, _, _ = deepspeed.initialize(
    model=model, model_parameters=model.parameters(), config=str(Path(__file__).with_suffix(".json"))
)
rank, ranks = engine.global_rank, engine.world_size

for step in range(1, STEPS + 1):
    starts = torch.randint(
        len(TEXT) - LENGTH, (engine.train_batch_size(),), generator=torch.Generator().manual_seed(step)
    )
    mine = torch.stack([TEXT[start : start + LENGTH] for start in starts[rank::ranks]]).to(engine.device)
    loss = engine(input_ids=mine, labels=mine).loss
    engine.backward(loss)
    engine.step()
    if rank == 0 and (step == 1 or step % 20 == 0):
        print(f"step {step}: loss {loss.item():.3f}", flush=True)

engine.save_checkpoint("runs/deepspeed_json")  # the same ZeRO stage and number of ranks
frugal_dist.checkpoint.save_step("runs/deepspeed_any", STEPS, engine, optimizer)  # any other engine and number, too
print(f"rank {rank}: {frugal_dist.checkpoint.unwrap(optimizer).summary()}")
torch.distributed.destroy_process_group()
