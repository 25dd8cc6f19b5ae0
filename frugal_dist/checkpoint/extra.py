"""What a rank saves beside its tensors: the caller's ``extra``, states of random number generators, schedules.

Learning-rate schedules count parameter groups, and engines differ in those: DeepSpeed's JSON makes one group,
``split_parameters`` several. Rates and whatever else schedulers keep in the groups come along by parameter name; here
it is about the schedulers' own lists.
"""

from __future__ import annotations

import hashlib
import io
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from frugal_dist.checkpoint.disk import read_bytes
from frugal_dist.checkpoint.errors import CheckpointError, DamagedError, MismatchError
from frugal_dist.checkpoint.index import INDEX

State = dict[str, Any]


def serialized(record: Mapping[str, Any]) -> bytes:
    """What goes into an extra file. CheckpointError, naming the key, if it could not be read back safely."""
    dumped, problem = _safely_dumped(record)
    if problem:
        extra = record["extra"]
        culprits = [f"extra[{name!r}]" for name in extra if _safely_dumped(extra[name])[1]]
        where = culprits[0] if culprits else "the engine's schedule"
        raise CheckpointError(
            f"{where} cannot be saved: it must be numbers, text, tensors, or lists, tuples and dicts of them, so that "
            f"loading executes no code (torch.load with weights_only=True). {problem.splitlines()[0]}"
        )
    return dumped


def _safely_dumped(value: Any) -> tuple[bytes, str]:
    try:
        torch.save(value, buffer := io.BytesIO())
        torch.load(io.BytesIO(buffer.getvalue()), map_location="cpu", weights_only=True)
    except Exception as error:  # pickle and weights_only refuse with many kinds
        return b"", str(error) or type(error).__name__
    return buffer.getvalue(), ""


def read_extra(path: Path, identity: str) -> dict[str, Any]:
    """What ``serialized`` made. Executes nothing."""
    data = io.BytesIO(read_bytes(path))
    try:
        record: Any = torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken archive
        raise DamagedError(f"{path} is damaged: it cannot be read: {error}") from error
    if not isinstance(record, dict) or record.get("checkpoint") != identity:
        raise DamagedError(f"{path} belongs to another checkpoint than {path.parent / INDEX}.")
    for key in ("extra", "engine", "rng"):
        if not isinstance(record.get(key), dict):
            raise DamagedError(f"{path} is damaged: {key} is no table.")
    return record


# --- random number generators that a training draws from, so that dropout continues exactly -------


def rng_state() -> State:
    """Of torch (CPU and this rank's GPU), Python, and NumPy's global generator if it is loaded."""
    states: State = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if _has_cuda():
        states["cuda"] = torch.cuda.get_rng_state()
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state()
        states["numpy"] = (kind, keys.tolist(), *rest)
    return states


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


# --- learning-rate schedules ----------------------------------------------------------------------


def load_schedule(scheduler: Any, state: dict[str, Any]) -> None:
    """``scheduler.load_state_dict(state)``, where ``state`` may be of another number of parameter groups.

    Args:
        scheduler: of ``torch.optim.lr_scheduler``, or one with its ``state_dict`` and ``load_state_dict``.
        state: what ``scheduler.state_dict()`` gave when it was saved.

    Raises:
        MismatchError: (a ValueError) if the groups had different values then: which group gets which cannot be told.
    """
    scheduler.load_state_dict(fitted(state, scheduler.state_dict()))


def fitted(state: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """``state`` with one entry for every group of ``like`` in each list that has one for every group."""
    return {key: _fit(key, value, like.get(key)) for key, value in state.items()}


def _fit(key: str, value: Any, like: Any) -> Any:
    if isinstance(value, dict) and isinstance(like, dict):
        return fitted(value, like)
    if not isinstance(value, (list, tuple)) or not isinstance(like, (list, tuple)):
        return value
    if len(value) == len(like):
        return type(value)(_fit(key, mine, theirs) for mine, theirs in zip(value, like, strict=True))
    if any(entry != value[0] for entry in value):
        raise MismatchError(
            f"The learning-rate schedule was saved with {len(value)} parameter groups of different {key} ({value}), "
            f"now there are {len(like)}. Build the optimizer with the same groups."
        )
    return type(value)(value[:1]) * len(like)
