"""The Frugal inside other optimizers: an engine's, a trainer's, a container's, or somebody's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from frugal_dist.engines.hooks import innermost
from frugal_dist.optimizer import Frugal


def unwrap(optimizer: Any) -> Frugal:
    """The one Frugal in ``optimizer``.

    Args:
        optimizer: a Frugal, or what holds one, at any depth: DeepSpeed's, Accelerate's or Lightning's wrapper, or an
            object with optimizers in its attributes, lists or dicts.

    Raises:
        ValueError: if there is none, or another optimizer beside it.
    """
    inner = optimizer
    while inner is not None and not isinstance(inner, Frugal):  # what DeepSpeed, Accelerate and Fabric call it
        inner = getattr(inner, "optimizer", None)
    if inner is not None:
        return innermost(inner)
    name, leaves = type(optimizer).__name__, list({id(leaf): leaf for leaf in _leaves(optimizer, set())}.values())
    frugals = [leaf for leaf in leaves if isinstance(leaf, Frugal)]
    if not frugals:
        raise ValueError(f"{name} does not contain a Frugal optimizer.")
    if len(leaves) > 1:
        kinds = ", ".join(type(leaf).__name__ for leaf in leaves)
        raise ValueError(
            f"{name} contains {len(leaves)} optimizers ({kinds}), but a checkpoint holds the state of one Frugal. "
            "Build one for all parameters, with groups of their own, or save each with its part of the model."
        )
    return frugals[0]


def _leaves(thing: Any, seen: set[int]) -> Iterator[Any]:
    """The optimizers in ``thing`` that contain no others."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Frugal):
        yield innermost(thing)
        return
    inside = [value for value in _contents(thing) if hasattr(value, "param_groups")]
    for value in inside:
        yield from _leaves(value, seen)
    if not inside and hasattr(thing, "param_groups"):
        yield thing


def _contents(thing: Any) -> Iterator[Any]:
    """What an object's attributes hold, by themselves or in a list, tuple or dict."""
    held = [thing] if isinstance(thing, list | tuple | Mapping) else list(getattr(thing, "__dict__", {}).values())
    for value in held:
        if isinstance(value, Mapping):
            yield from value.values()
        elif isinstance(value, list | tuple):
            yield from value
        else:
            yield value
