"""Which object a method works on, when a wrapper has taken on the class of what it wraps.

The wrappers of Lightning's Trainer and of Fabric set ``self.__class__ = type(..., (wrapper, Frugal), {})`` without
``__init__``, so that isinstance() holds: a method then runs on the wrapper, reads the optimizer's attributes through
``__getattr__``, but what it sets would stay with the wrapper, and the optimizer would never know.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")

_OWNER = "_owner"


def own(optimizer: object) -> None:
    """Mark where the state lies; not by a plain reference, which would keep the state until garbage is collected."""
    optimizer.__dict__[_OWNER] = weakref.ref(optimizer)


def innermost(optimizer: T) -> T:
    """The optimizer whose state this is: ``optimizer``, or the one it shows as its own."""
    owner: Callable[[], Any] | None = getattr(optimizer, _OWNER, None)
    real = None if owner is None else owner()
    return optimizer if real is None else cast("T", real)


def on_innermost(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """The method works on the optimizer itself, whichever wrapper it is called on."""

    @functools.wraps(method)
    def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return method(innermost(self), *args, **kwargs)

    return call
