"""How many bytes of state there are, against AdamW's, and the line that says so after the first step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from frugal_dist.config import config_from, for_regular
from frugal_dist.parameters.split import ParameterInfo
from frugal_dist.sharding.shard import ParamSpec
from frugal_dist.step.runtime import Runtime

State = Mapping[Tensor, Mapping[str, Any]]


@dataclass(frozen=True)
class StateBytes:
    """Bytes of optimizer state on one rank. ``adamw``: what torch.optim.AdamW's two moments would take there."""

    held: int
    adamw: int


def state_bytes(runtime: Runtime, state: State) -> StateBytes:
    """Of everything on this rank; AdamW's moments have the dtype of the weights that the optimizer is given."""
    storage = runtime.storage
    looked_up = [storage.tensors(i) for i in range(len(runtime.originals))]
    weights = [weight for param, weight, _, _ in looked_up if param.requires_grad]
    held = sum(_bytes(store.values()) for store in state.values())
    return StateBytes(held, 2 * _bytes(weights))


def bytes_by_name(runtime: Runtime, state: State) -> dict[str, int]:
    """What the state of each parameter takes on this rank."""
    sizes = {}
    for i, original in enumerate(runtime.originals):
        store, prefixes = state.get(runtime.storage.param(i), {}), tuple(runtime.site(i).prefixes)
        mine = [value for key, value in store.items() if key.startswith(prefixes)]
        sizes[original.name] = _bytes(mine)
    return sizes


def summary(
    infos: Sequence[ParameterInfo],
    originals: Sequence[ParamSpec],
    groups: Sequence[Mapping[str, Any]],
    size: StateBytes,
) -> str:
    """One line: what is projected, how, and what that saves on this rank."""
    projected = [info for info in infos if info.projected and not info.frozen]
    regular = [info for info in infos if not info.projected and not info.frozen]
    frozen = [info for info in infos if info.frozen]
    numbers = dict.fromkeys(original.group for original in originals if not original.projected)
    rules = dict.fromkeys(for_regular(config_from(groups[number])).state_full for number in numbers)
    by = f" ({', '.join(rules)})" if regular else ""
    share = f" ({size.held / size.adamw:.0%} of it)" if size.adamw else ""
    return (
        f"Frugal ({_settings(originals, groups)}): {_count(projected)} elements projected, {_count(regular)} "
        f"regular{by}, {_count(frozen)} frozen. Optimizer state {size.held / 1e6:,.2f} MB on this rank, AdamW's would "
        f"be {size.adamw / 1e6:,.2f} MB{share}."
    )


def _settings(originals: Sequence[ParamSpec], groups: Sequence[Mapping[str, Any]]) -> str:
    numbers = sorted({original.group for original in originals if original.projected})
    configs = [config_from(groups[number]) for number in numbers]
    return "; ".join(dict.fromkeys(f"{config.projection}, density {config.density:g}" for config in configs))


def _count(infos: Sequence[ParameterInfo]) -> str:
    elements = sum(info.numel for info in infos)
    return f"{elements / 1e6:,.2f} M" if elements >= 1e5 else f"{elements:,}"


def _bytes(values: Iterable[Any]) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
