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
    "fira": {"projection": "svd", "on_refresh": "keep", "state_free": "scaled", "growth_limit": 1.01},
    "apollo": {"projection": "gaussian", "on_refresh": "keep", "combine": "scale", "growth_limit": 1.01},
    "apollo_mini": {
        "density": 1e-6,
        "projection": "gaussian",
        "on_refresh": "keep",
        "combine": "scale_matrix",
        "growth_limit": 1.01,
        "projected_lr_scale": 128**0.5,
    },
    "scale": {"density": 0.0, "projection": "columns", "state_free": "normalized"},
    "sinkgd": {"density": 0.0, "projection": "columns", "state_free": "sinkhorn"},
    "racs": {
        "density": 0.0,
        "projection": "columns",
        "state_free": "racs",
        "growth_limit": 1.01,
        "projected_lr_scale": 0.05,
    },
    "muon": {"density": 1.0, "projection": "columns", "on_refresh": "keep", "state_full": "muon", "momentum": 0.95},
    "frugal_dct": {"projection": "dct"},
}
OptimizerName = Literal[
    "frugal", "galore", "badam", "signsgd", "adamw", "fira", "apollo", "apollo_mini", "scale", "sinkgd", "racs", "muon",
    "frugal_dct",
]  # fmt: skip
TuningName = Literal[OptimizerName, "lora"]
LORA = "lora"
BEHIND = {LORA: "adamw"}
"""Names that fine-tuning has beyond those, and the preset behind them."""
_REST = ("state_free", "combine", "growth_limit")
_DECIDED: dict[str, tuple[str, ...]] = {
    "frugal": (),
    "galore": ("projection", "on_refresh", *_REST),
    "badam": ("projection", "state_full", *_REST),
    "signsgd": ("projection", "density", *_REST),
    "adamw": ("projection", "density", "on_refresh", "state_full", *_REST),
    "fira": ("projection", "on_refresh", *_REST),
    "apollo": ("projection", "on_refresh", *_REST),
    "apollo_mini": ("projection", "density", "on_refresh", *_REST),
    "scale": ("projection", "density", *_REST),
    "sinkgd": ("projection", "density", *_REST),
    "racs": ("projection", "density", *_REST),
    "muon": ("projection", "density", "on_refresh", "state_full", "momentum", *_REST),
    "frugal_dct": ("projection",),
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
    **{
        f"frugal-{projection}": ("frugal", {"projection": projection})
        for projection, one in PROJECTIONS.items()
        if one.orthonormal
    },
    "frugal-rho0": ("signsgd", {}),
}
"""Short for a name and options: FRUGAL with its projection, and "nothing with state", which is signSGD."""


def preset(name: str, **changes: Any) -> dict[str, Any]:
    """Keyword arguments for ``Frugal`` that make it one of ``PRESETS``: GaLore, Fira, APOLLO, AdamW, ...

    ``FrugalConfig`` has the sources.

    Args:
        name: a key of ``PRESETS``.
        **changes: arguments of ``Frugal`` that take the place of the preset's, or are added to them.

    Raises:
        ValueError: for a name that is not in ``PRESETS``. ``Frugal`` judges the changes.

    >>> preset("galore", density=0.5)["state_free"]
    'none'
    """
    check_choice("preset", name, PRESETS)
    return {**PRESETS[name], **renamed(changes)}
