"""Which kind of device DeepSpeed is to use."""

from __future__ import annotations

import os

import torch


def settle_accelerator() -> None:
    """Before DeepSpeed is imported: the CPU where this process sees no GPU, unless DS_ACCELERATOR says otherwise.

    Left alone, DeepSpeed tries all that it knows, and warns. This must not come from the host that a launch starts on:
    a login node has no GPU, but the nodes that train do.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
