"""``step_in_backward``: each gradient is stepped with as soon as it is there, and freed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from frugal_dist.checkpoint import unwrap


def step_in_backward(model: nn.Module, optimizer: Any) -> Callable[[], None]:
    """Let backward passes step: a gradient is used when it is complete, and freed. Then ``optimizer.step()`` ends the
    step: it steps what backward did not, and is to be called as ever, as is ``zero_grad()``.

    The weights are those of ordinary steps, bit for bit, and so are checkpoints, saved and loaded after ``step()``. On
    one process parameters are stepped one by one; under FSDP2 unit by unit, after the reduce-scatter of the unit's
    gradients. What schedulers set counts from the next backward pass on. Clipping by the norm of all gradients comes
    too late, as there are none any more, and so does a loss scale.

    With several ranks the call is the same on all of them, but not collective. A second call, for instance for another
    model, takes the place of the first.

    Args:
        model: The module that is trained, after ``fully_shard``.
        optimizer: Frugal, or what Accelerate or Lightning have made of it. It holds the hooks: they go when it goes.

    Returns:
        A function that ends it: steps are ordinary ones from then on. To be called after a ``step()``.

    Raises:
        ValueError: for DDP, DeepSpeed, loss scales, and trainers that clip by the norm of all gradients, here or at the
            first gradient; in a backward pass for a second gradient of a parameter before ``optimizer.step()``.
    """
    release = weakref.ref(unwrap(optimizer).release_through(model))

    def end() -> None:
        there = release()
        if there is not None:
            there.remove()

    return end
