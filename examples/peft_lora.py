"""LoRA and FRUGAL in one model: adapters on attention, and the MLP of the last layer trained in full.

    python examples/peft_lora.py

LoRA alone has little state, and FRUGAL nothing to save: adapters are left to AdamW. It is worth its place where whole
matrices are trained beside them (peft's modules_to_save). Needs: pip install '.[examples]'
"""

from pydoc_data.topics import topics

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from frugal_dist import Frugal, split_parameters

STEPS, BATCH, LENGTH = 40, 16, 64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXT = torch.tensor(list("".join(topics.values()).encode()))  # bytes: a vocabulary of 256, no tokenizer

torch.manual_seed(0)
shape = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4}
config = LlamaConfig(vocab_size=256, **shape)
base = LlamaForCausalLM(config)  # in earnest: AutoModelForCausalLM.from_pretrained(...)
adapters = LoraConfig(
    r=8,
    target_modules=["q_proj", "v_proj"],
    modules_to_save=[f"layers.1.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")],
)
model = get_peft_model(base, adapters).to(DEVICE)
model.print_trainable_parameters()

# A rate for the adapters (LoRA's is high), and with projected_lr_scale a lower one for the matrices.
optimizer = Frugal(split_parameters(model), lr=1e-2, projected_lr_scale=0.3, density=0.25, update_gap=20)
print(optimizer.parameter_report())

for step in range(1, STEPS + 1):
    starts = torch.randint(len(TEXT) - LENGTH, (BATCH,), generator=torch.Generator().manual_seed(step))
    rows = torch.stack([TEXT[start : start + LENGTH] for start in starts]).to(DEVICE)
    loss = model(input_ids=rows, labels=rows).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step == 1 or step % 20 == 0:
        print(f"step {step}: loss {loss.item():.3f}", flush=True)

model.save_pretrained("runs/peft_lora")  # adapters and the MLP's matrices, without the base
print(optimizer.summary())
