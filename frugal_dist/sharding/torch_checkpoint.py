"""torch.distributed.checkpoint: whether it asks for the state, and what its options do to state on all ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

_PACKAGE = "torch.distributed.checkpoint"
_MODULE = f"{_PACKAGE}.state_dict"
_LOSING = ("full_state_dict", "flatten_optimizer_state_dict")
"""The first gathers DTensors and keeps the rest as rank 0 has it; the second drops, when loading, keys that only
``state_dict`` knows.
"""


def is_asking() -> bool:
    """Whether it is the caller, somewhere up the stack."""
    return any(name == _PACKAGE or name.startswith(f"{_PACKAGE}.") for _, name in _callers())


def losing_option() -> str:
    """The option by which the running call would lose other ranks' parts, "" if none: the caller is up the stack."""
    for frame, name in _callers():
        if name == _MODULE:
            info = frame.f_locals.get("info")
            given = [option for option in _LOSING if getattr(info, option, False)]
            if given:
                return given[0]
    return ""


def _callers() -> Iterator[tuple[FrameType, str]]:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield frame, str(frame.f_globals.get("__name__"))
        frame = frame.f_back
