"""Imported once by the process that forks the ranks: what takes seconds to import, also what is imported late."""

from __future__ import annotations

import importlib
import logging

import deepspeed
from deepspeed.accelerator import get_accelerator

for module in (
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._dynamo",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
):
    importlib.import_module(module)

deepspeed.utils.logger.setLevel(logging.ERROR)
get_accelerator().create_op_builder("ShareMemCommBuilder").load()
