"""torch.distributed.checkpoint's ``get_optimizer_state_dict``: what its options do to state that lies on all ranks."""

from __future__ import annotations

import sys
from types import FrameType

_MODULE = "torch.distributed.checkpoint.state_dict"
_LOSING = ("full_state_dict", "flatten_optimizer_state_dict")
"""The first gathers DTensors and keeps the rest as rank 0 has it; the second drops, when loading, keys that only
``state_dict`` knows.
"""


def losing_option() -> str:
    """The option by which the running call would lose other ranks' parts, "" if none: the caller is up the stack."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == _MODULE:
            info = frame.f_locals.get("info")
            found = [option for option in _LOSING if getattr(info, option, False)]
            if found:
                return found[0]
        frame = frame.f_back
    return ""
