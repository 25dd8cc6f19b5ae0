"""FRUGAL (ICML 2025, arXiv 2411.07837) for large language models on many GPUs. Importing registers it for DeepSpeed."""

from frugal_dist import notices as notices  # before torch: it says that a training has begun

# isort: split
from frugal_dist import checkpoint, projection
from frugal_dist.config import FrugalConfig
from frugal_dist.integrations import deepspeed as _deepspeed
from frugal_dist.integrations.step_in_backward import step_in_backward
from frugal_dist.optimizer import Frugal
from frugal_dist.parameters.split import split_parameters
from frugal_dist.presets import PRESETS, preset

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "Frugal",
    "FrugalConfig",
    "checkpoint",
    "preset",
    "projection",
    "split_parameters",
    "step_in_backward",
]

_deepspeed.register(Frugal)
