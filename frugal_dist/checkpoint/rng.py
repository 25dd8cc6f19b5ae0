"""States of the random number generators that a training draws from, so that dropout continues exactly."""

from __future__ import annotations

import hashlib
import random
import sys
from typing import Any

import torch

State = dict[str, Any]


def rng_state() -> State:
    """Of torch (CPU and this rank's GPU), Python, and NumPy's global generator if it is loaded."""
    found: State = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if _has_cuda():
        found["cuda"] = torch.cuda.get_rng_state()
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state()
        found["numpy"] = (kind, keys.tolist(), *rest)
    return found


def set_rng_state(state: State) -> None:
    """Continue where ``rng_state`` was taken. What it does not hold is left alone."""
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in state and _has_cuda():
        torch.cuda.set_rng_state(state["cuda"])
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and "numpy" in state:
        numpy.random.set_state(tuple(state["numpy"]))


def check_rng_state(state: State) -> None:
    """Whether generators take it, tried on others than the program's. Raises whatever they raise."""
    torch.Generator().set_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.Random().setstate((version, tuple(numbers), gauss))
    if "cuda" in state and not (isinstance(state["cuda"], torch.Tensor) and state["cuda"].dtype == torch.uint8):
        raise TypeError("cuda is no state of a generator")
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and "numpy" in state:
        numpy.random.RandomState().set_state(tuple(state["numpy"]))


def reseed(state: State, rank: int) -> None:
    """For a rank that the checkpoint has no state of: streams of its own, the same whenever it is loaded."""
    digest = hashlib.sha256(state["torch"].numpy().tobytes() + rank.to_bytes(8, "little")).digest()
    seed = int.from_bytes(digest[:4], "little")
    torch.manual_seed(seed)
    random.seed(seed)
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)


def _has_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()
