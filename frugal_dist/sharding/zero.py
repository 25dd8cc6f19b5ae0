"""Storage under DeepSpeed ZeRO. The only reader of DeepSpeed's internals."""

from __future__ import annotations

import sys

from torch import Tensor


def full_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape in the user's model; under zero.Init the tensor itself is empty."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def name_of(tensor: Tensor) -> str | None:
    """DeepSpeed notes the names of a model's parameters before it builds the optimizer."""
    debug = sys.modules.get("deepspeed.utils.debug")
    return None if debug is None else debug.param_names.get(tensor)
