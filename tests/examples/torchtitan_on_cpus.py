"""Runs a script with torchtitan's Trainer, which wants an accelerator, on CPUs: python torchtitan_on_cpus.py SCRIPT."""

from __future__ import annotations

import runpy
import sys
from types import SimpleNamespace

import torch
from torch.distributed.fsdp import FSDPModule
from torchtitan.tools import utils

ASKED = {
    "current_device": lambda: 0,
    "get_device_name": str,
    "get_device_properties": lambda _: SimpleNamespace(total_memory=2**34),
    "memory_stats": lambda _: {},
    "empty_cache": lambda: None,
    "reset_peak_memory_stats": lambda: None,
}
"""What it asks of an accelerator, and torch.cpu does not answer."""


def divide_by(module: FSDPModule, factor: float) -> None:
    """torchtitan asks for sums, as a factor of 1, by an operation that gloo does not have."""
    assert factor == 1
    module.set_force_sum_reduction_for_comms(True)


utils.device_type = "cpu"  # the rest of torchtitan copies both when it is imported
utils.device_module = SimpleNamespace(**{**vars(torch.cpu), **ASKED})
FSDPModule.set_gradient_divide_factor = divide_by  # type: ignore[method-assign]
runpy.run_path(sys.argv[1], run_name="__main__")
