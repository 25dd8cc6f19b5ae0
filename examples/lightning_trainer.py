"""FRUGAL in Lightning's Trainer: configure_optimizers returns it, nothing else is needed.

    python examples/lightning_trainer.py

On several GPUs: lightning.Trainer(strategy="ddp"), or ModelParallelStrategy for FSDP2 (docs/lightning.md).
Needs: pip install '.[examples]'
"""

from pydoc_data.topics import topics
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from frugal_dist import Frugal, split_parameters

STEPS, BATCH, LENGTH = 40, 16, 64


class Model(lightning.LightningModule):
    """A small byte-level LLaMA."""

    def __init__(self) -> None:
        super().__init__()
        shape = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=256, **shape)
        self.llama = LlamaForCausalLM(config)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        """The loss of a batch."""
        loss = self.llama(input_ids=batch, labels=batch).loss
        if self.global_step in (0, STEPS - 1):
            print(f"step {self.global_step + 1}: loss {loss.item():.3f}", flush=True)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        """Frugal, and a schedule that moves with every step."""
        optimizer = Frugal(split_parameters(self), lr=3e-3, density=0.25, update_gap=20)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


lightning.seed_everything(0)
text = torch.tensor(list("".join(topics.values()).encode()))  # bytes: a vocabulary of 256, no tokenizer
rows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
trainer = lightning.Trainer(
    max_steps=STEPS, gradient_clip_val=1.0, default_root_dir="runs/lightning", logger=False, enable_progress_bar=False
)
model = Model()
trainer.fit(model, DataLoader(rows, batch_size=BATCH, shuffle=True))  # ckpt_path=... goes on
print(model.optimizers().optimizer.summary())
