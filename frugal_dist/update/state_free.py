"""State-free rules: sign, SGD, none."""

from __future__ import annotations

import torch

from frugal_dist.update.definition import StateFree

SIGN = StateFree(name="sign", direction=torch.sign, has_kernel=True)
SGD = StateFree(name="sgd", direction=lambda residual: residual)
NONE = StateFree(name="none", direction=None)
