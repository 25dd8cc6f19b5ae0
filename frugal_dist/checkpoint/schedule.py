"""Learning-rate schedules from one engine to another: their state counts parameter groups, and engines differ in those.

DeepSpeed's JSON makes one group, ``split_parameters`` several. Rates and whatever else schedulers keep in the groups
come along by parameter name; this is about the schedulers' own lists.
"""

from __future__ import annotations

from typing import Any

from frugal_dist.checkpoint.errors import MismatchError


def load_schedule(scheduler: Any, state: dict[str, Any]) -> None:
    """``scheduler.load_state_dict(state)``, where ``state`` may be of another number of parameter groups.

    MismatchError if the groups had different values then: which group gets which cannot be told.
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
