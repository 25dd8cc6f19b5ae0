"""Fused Triton kernels for the steps that are bound by memory, and the choice between them and plain torch.

A kernel does what a pure function of ``update`` does, for many matrices, in one pass over weights and gradients:
``jobs`` (what there is to do), ``launch`` (what goes together), ``tables`` (what is sent), ``fused`` (the kernels).

The environment variable FRUGAL_KERNELS decides: "auto" (Triton on CUDA tensors where triton can be imported), "torch"
(never), "triton" (ValueError where it cannot be imported). Under Triton's interpreter (TRITON_INTERPRET=1) "triton"
takes CPU tensors as well: that is how the kernels are tested.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from frugal_dist.config import FrugalConfig, check_choice
from frugal_dist.kernels.jobs import Job
from frugal_dist.notices import notice

VARIABLE = "FRUGAL_KERNELS"


def chosen() -> str:
    """What FRUGAL_KERNELS says. Raises ValueError for a value it does not have, and for triton where there is none."""
    choice = os.environ.get(VARIABLE, "auto")
    check_choice(VARIABLE, choice, ("auto", "torch", "triton"))
    if choice == "triton" and _load() is None:
        raise ValueError(f"{VARIABLE}=triton, but triton cannot be imported. Install it, or use {VARIABLE}=auto.")
    return choice


def fused_for(weight: Tensor) -> ModuleType | None:
    """The module ``launch`` if its kernels run on this tensor's device, else None. Raises as ``chosen``."""
    choice = chosen()
    if choice == "torch" or (choice == "auto" and not weight.is_cuda):
        return None
    # The interpreter copies arguments to the host, but not what addresses in a table point to.
    where = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    module = _load() if weight.device.type == where else None
    return module if module is None or choice == "triton" or _runs(module, weight.device) else None


def kind_for(weight: Tensor) -> str:
    """What steps on this tensor's device: "triton" or "torch". Replicas on ranks that differ would drift apart."""
    return "torch" if fused_for(weight) is None else "triton"


@cache
def _runs(module: ModuleType, device: torch.device) -> bool:
    """Whether a kernel can be built and started: that takes a C compiler and Python's headers, which may be missing."""
    try:
        one = torch.ones((1, 1), dtype=torch.float32, device=device)
        launches = module.Launches()
        launches.take(Job(one, one.clone(), None, (), 1, 0.0, FrugalConfig()))
        launches.finish()
    except Exception as error:  # whatever it is: torch's own operations always work
        notice(
            f"Triton kernels do not run on {device} ({error}): steps use torch's own operations, several passes each."
        )
        return False
    return True


@cache
def _load() -> ModuleType | None:
    try:
        return importlib.import_module("frugal_dist.kernels.launch")
    except ImportError as error:
        notice(f"triton cannot be imported ({error}): steps on CUDA use torch's own operations, several passes each.")
        return None
