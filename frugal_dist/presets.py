"""Optimizers by name: what makes Frugal one of them, and which names recipes, comparisons and plans know."""

from __future__ import annotations

from typing import Any, Literal

from frugal_dist.config import check_choice, renamed
from frugal_dist.projection.registry import PROJECTIONS, options_of_others

PRESETS: dict[str, dict[str, Any]] = {
    "frugal": {},
    "galore": {"projection": "svd", "on_refresh": "keep", "state_free": "none", "projected_lr_scale": 0.25},
    "badam": {"projection": "blockwise", "state_free": "none"},
    "signsgd": {"density": 0.0, "projection": "columns"},
    "adamw": {"density": 1.0, "projection": "columns", "on_refresh": "keep"},
}
OptimizerName = Literal["frugal", "galore", "badam", "signsgd", "adamw"]
TuningName = Literal["frugal", "galore", "badam", "signsgd", "adamw", "lora"]
LORA = "lora"
BEHIND = {LORA: "adamw"}
"""Names that fine-tuning has beyond those, and the preset behind them."""
_DECIDED: dict[str, tuple[str, ...]] = {
    "frugal": (),
    "galore": ("projection", "on_refresh", "state_free"),
    "badam": ("projection", "state_full", "state_free"),
    "signsgd": ("projection", "density", "state_free"),
    "adamw": ("projection", "density", "on_refresh", "state_full"),
}


def _defined(name: str) -> tuple[str, ...]:
    """With a projection the options of all others are decided as well."""
    others = options_of_others(PRESETS[name]["projection"]) if "projection" in _DECIDED[name] else []
    return (*_DECIDED[name], *(key for key, _ in others))


DEFINED = {name: _defined(BEHIND.get(name, name)) for name in (*PRESETS, *BEHIND)}
"""What makes an optimizer the one of its name. A recipe's options of these names are FRUGAL's, and are left out."""
WITHOUT_RANK = tuple(name for name, fixed in DEFINED.items() if "density" in fixed)
"""They update everything, or nothing, with state: ``rank`` and ``stateful`` do not concern them."""

REFERENCE: OptimizerName = "adamw"
"""What state and memory are compared with."""
BASELINES: tuple[OptimizerName, ...] = (REFERENCE, "galore")
"""Planned beside a recipe's optimizer, with its options as far as their names allow."""

NAMED: dict[str, tuple[str, dict[str, str]]] = {
    **{f"frugal-{projection}": ("frugal", {"projection": projection}) for projection in PROJECTIONS},
    "frugal-rho0": ("signsgd", {}),
}
"""Short for a name and options: FRUGAL with its projection, and "nothing with state", which is signSGD."""


def preset(name: str, **changes: Any) -> dict[str, Any]:
    """Keyword arguments for ``Frugal`` that make it GaLore, BAdam, signSGD or AdamW.

    >>> preset("galore", density=0.5)["state_free"]
    'none'
    """
    check_choice("preset", name, PRESETS)
    return {**PRESETS[name], **renamed(changes)}
