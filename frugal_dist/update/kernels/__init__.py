"""Fused kernels for the steps that are bound by memory, and the choice between them and plain torch.

A kernel does what a pure function of ``update`` does, for many matrices, in one pass over weights and gradients:
``jobs`` (what there is to do), ``native`` (C++ for CPU tensors), ``launch`` (which go together in a Triton kernel),
``tables`` (what is sent to the GPU), ``fused`` (the Triton kernels). ``native`` and ``launch`` are called
alike, whichever ``fused_for`` gives: ``Launches``, ``kind_of``, ``sign_step_``, ``sign_steps_``, ``sign_step_above_``,
``step_codes_``, ``round_``.

The environment variable FRUGAL_KERNELS decides: "auto" (Triton on CUDA tensors where triton can be imported, C++ on CPU
tensors where there is a compiler), "torch" (neither), "triton" or "native" (ValueError where it cannot be had). Under
Triton's interpreter (TRITON_INTERPRET=1) "triton" takes CPU tensors as well: that is how those kernels are tested.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from frugal_dist.config import FrugalConfig, check_choice
from frugal_dist.notices import notice
from frugal_dist.update.kernels.jobs import TileUpdate

VARIABLE = "FRUGAL_KERNELS"


KINDS = {"launch": "triton", "native": "native"}
CHOICES = ("auto", "torch", "triton", "native")


def chosen() -> str:
    """What FRUGAL_KERNELS says. Raises ValueError for a value it does not have, and for kernels that cannot be had."""
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        check_choice(VARIABLE, choice, CHOICES)
    if choice == "triton" and _load() is None:
        raise ValueError(f"{VARIABLE}=triton, but triton cannot be imported. Install it, or use {VARIABLE}=auto.")
    if choice == "native" and _native() is None:
        raise ValueError(f"{VARIABLE}=native, but the C++ kernel cannot be built here. Use {VARIABLE}=auto or torch.")
    return choice


def fused_for(weight: Tensor) -> ModuleType | None:
    """The module whose kernels run on this tensor's device, None: torch's operations. Raises as ``chosen``."""
    choice, device = chosen(), weight.device.type
    if choice == "torch":
        return None
    # The interpreter copies arguments to the host, but not what addresses in a table point to.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if choice == "triton" or (choice == "auto" and device == "cuda"):
        module = _load() if device == ("cpu" if interpreted else "cuda") else None
        return module if module is None or choice == "triton" or _runs(module, weight.device) else None
    return _native() if device == "cpu" else None


def kind_for(weight: Tensor) -> str:
    """What steps on this tensor's device. Replicas on ranks that differ would drift apart."""
    module = fused_for(weight)
    return "torch" if module is None else KINDS[module.__name__.rpartition(".")[2]]


@cache
def _runs(module: ModuleType, device: torch.device) -> bool:
    """Whether a kernel can be built and started: that takes a C compiler and Python's headers, which may be missing."""
    try:
        one = torch.ones((1, 1), dtype=torch.float32, device=device)
        launches = module.Launches()
        launches.take(TileUpdate(one, one.clone(), None, (), 1, 0.0, FrugalConfig()))
        launches.finish()
        module.round_(one.bfloat16(), one, torch.zeros(1, dtype=torch.int64, device=device), (0, 0))
    except Exception as error:  # whatever it is: torch's own operations always work
        notice(
            f"Triton kernels do not run on {device} ({error}): steps use torch's own operations, several passes each."
        )
        return False
    return True


@cache
def _load() -> ModuleType | None:
    try:
        return importlib.import_module("frugal_dist.update.kernels.launch")
    except ImportError as error:
        notice(f"triton cannot be imported ({error}): steps on CUDA use torch's own operations, several passes each.")
        return None


@cache
def _native() -> ModuleType | None:
    from frugal_dist.update.kernels import native

    try:
        native.library()
    except (OSError, RuntimeError) as error:
        notice(f"The C++ kernel for CPU tensors cannot be built ({error}): steps use torch's own operations.")
        return None
    return native
