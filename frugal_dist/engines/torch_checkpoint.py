"""torch.distributed.checkpoint: whether it asks for the state, and what its options do to state on all ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

_PACKAGE = "torch.distributed.checkpoint"
_MODULE = f"{_PACKAGE}.state_dict"
_FLATTEN = "flatten_optimizer_state_dict"
_LOSING = ("full_state_dict", _FLATTEN)
"""The first gathers DTensors and keeps the rest as rank 0 has it; the second drops, when loading, keys that only
``state_dict`` knows.
"""


def is_asking() -> bool:
    """Whether it is the caller, somewhere up the stack."""
    return any(name == _PACKAGE or name.startswith(f"{_PACKAGE}.") for _, name in _callers())


def does_without_names() -> bool:
    """Whether it is the caller, and has names of its own: it would keep the list of a group once per parameter.

    When it flattens (torchtitan does) it asks at loading for every key of the groups, and this list is one of them.
    """
    return is_asking() and _FLATTEN not in _given()


def losing_option() -> str:
    """The option by which the running call would lose other ranks' parts, "" if none."""
    return next(iter(_given()), "")


def _given() -> list[str]:
    """Which of the options were given to the call that is running further up the stack."""
    for frame, name in _callers():
        info = frame.f_locals.get("info") if name == _MODULE else None
        given = [option for option in _LOSING if getattr(info, option, False)]
        if given:
            return given
    return []


def _callers() -> Iterator[tuple[FrameType, str]]:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield frame, str(frame.f_globals.get("__name__"))
        frame = frame.f_back
