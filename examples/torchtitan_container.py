"""FRUGAL in torchtitan 0.3: a container of optimizers that knows it, in torchtitan's Trainer, which saves and resumes.

    torchrun --nproc-per-node 2 examples/torchtitan_container.py

For GPUs, as torchtitan is. Needs: pip install . torchtitan==0.3.0, in an environment of its own (docs/fsdp2.md)
"""

from dataclasses import dataclass
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import model_registry
from torchtitan.tools.logging import init_logger
from torchtitan.trainer import Trainer

from frugal_dist import Frugal


class Container(OptimizersContainer):
    """torchtitan's, but "Frugal" is a name, too. The parameters' names decide which are projected."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """As torchtitan's; each container has to have its own."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Any:
        return Frugal if name == "Frugal" else OptimizersContainer._resolve_optimizer_factory(name)


class Batches(BaseDataLoader):
    """Pieces of Python's help texts as bytes, which need no tokenizer."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """Nothing to set."""

    def __init__(self, config: Config, *, dp_rank: int, seq_len: int, local_batch_size: int, **_: Any) -> None:
        self.rank, self.size, self.drawn = dp_rank, local_batch_size, 0
        self.pieces = torch.tensor(list("".join(topics.values()).encode())).unfold(0, seq_len + 1, 1)

    def __iter__(self) -> Any:
        while True:
            self.drawn += 1
            random = torch.Generator().manual_seed(1000 * self.drawn + self.rank)
            rows = self.pieces[torch.randint(len(self.pieces), (self.size,), generator=random)]
            yield {"input": rows[:, :-1]}, rows[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.drawn = state_dict["drawn"]


init_logger()
vars(dist).setdefault("set_timeout", dist.distributed_c10d._set_pg_timeout)  # torchtitan 0.3 is ahead of torch 2.13
spec = model_registry("debugmodel")
for layer in spec.model.layers:
    layer.attention.inner_attention = ScaledDotProductAttention.Config()
frugal = ParamGroupConfig(pattern=".*", optimizer_name="Frugal", optimizer_kwargs={"lr": 3e-3, "update_gap": 12})
trainer = Trainer.Config(
    model_spec=spec, tokenizer=SimpleNamespace(build=lambda **_: None), dataloader=Batches.Config(),
    optimizer=Container.Config(param_groups=[frugal]), lr_scheduler=LRSchedulersContainer.Config(warmup_steps=4),
    loss=CrossEntropyLoss.Config(), training=TrainingConfig(seq_len=32, steps=30, disable_cuda_graphs=True),
    parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),  # the default is ahead of torch 2.13, too
    checkpoint=CheckpointManager.Config(enable=True, interval=20, last_save_model_only=False), dump_folder="runs/titan",
).build()  # fmt: skip
trainer.train()
trainer.close()
print(trainer.optimizers.optimizers[0].summary())
