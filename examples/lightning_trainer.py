"""FRUGAL in Lightning's Trainer: configure_optimizers returns it, nothing else is needed.

    python examples/lightning_trainer.py            # one process
    python examples/lightning_trainer.py ddp        # two ranks
    python examples/lightning_trainer.py fsdp2      # two ranks, weights divided, too

What is saved on several ranks: docs/lightning.md. Needs: pip install '.[examples]'
"""

import sys
from pydoc_data.topics import topics
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from frugal_dist import Frugal, split_parameters

STEPS, BATCH, LENGTH = 40, 16, 64
STRATEGIES: dict[str, Any] = {
    "auto": "auto",
    "ddp": "ddp",
    "fsdp2": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),  # its defaults divide nothing
}


class Model(lightning.LightningModule):
    """A small byte-level LLaMA."""

    def __init__(self) -> None:
        super().__init__()
        shape = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=256, **shape)
        self.llama = LlamaForCausalLM(config)

    def configure_model(self) -> None:
        """For FSDP2, whose strategy has made a mesh: divide the weights, once."""
        if self.device_mesh is None or isinstance(self.llama, torch.distributed.fsdp.FSDPModule):
            return
        for block in self.llama.model.layers:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.llama, mesh=self.device_mesh["data_parallel"])

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
name = sys.argv[1] if len(sys.argv) > 1 else "auto"
ranks = 1 if name == "auto" else 2
trainer = lightning.Trainer(
    max_steps=STEPS, strategy=STRATEGIES[name], devices=ranks, gradient_clip_val=1.0, logger=False,
    default_root_dir="runs/lightning", enable_progress_bar=False,
)  # fmt: skip
model = Model()
trainer.fit(model, DataLoader(rows, batch_size=BATCH // ranks, shuffle=True))  # ckpt_path=... resumes
print(model.optimizers().optimizer.summary())
