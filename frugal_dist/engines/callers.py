"""Who is calling: what other libraries do with an optimizer often stands nowhere but further up the stack."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any


def calling(kinds: tuple[type, ...]) -> Any | None:
    """The nearest object of one of ``kinds`` whose method is running further up the stack; None if there is none."""
    frame: FrameType | None = sys._getframe() if kinds else None
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, kinds):
            return caller
        frame = frame.f_back
    return None


def loaded_classes(name: str, modules: tuple[str, ...]) -> tuple[type, ...]:
    """The classes ``name`` of those ``modules`` that are loaded: what is not loaded is not used."""
    there = (sys.modules.get(module) for module in modules)
    return tuple(getattr(module, name) for module in there if hasattr(module, name))
