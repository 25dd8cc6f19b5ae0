"""All update rules by their names."""

from __future__ import annotations

from frugal_dist.update.adamw import ADAMW
from frugal_dist.update.definition import StateFree, StateFull
from frugal_dist.update.lines import NORMALIZED, NORMALIZED_COLUMNS, RACS, SCALED, SINKHORN, SOFTSIGN
from frugal_dist.update.matrices import MUON, NORMALIZED_MOMENTUM
from frugal_dist.update.moment_storage import SCALE
from frugal_dist.update.momentum import LION, SGDM
from frugal_dist.update.state_free import NONE, SGD, SIGN

STATE_FULL: dict[str, StateFull] = {
    one.name: one
    for one in (
        ADAMW,
        LION,
        SGDM,
        MUON,
        NORMALIZED_MOMENTUM,
    )
}
STATE_FREE: dict[str, StateFree] = {
    one.name: one
    for one in (
        SIGN,
        SGD,
        NONE,
        SOFTSIGN,
        NORMALIZED,
        NORMALIZED_COLUMNS,
        SINKHORN,
        SCALED,
        RACS,
    )
}


def every_moment() -> tuple[str, ...]:
    """The names of all rules' moments: state may be of another rule than today's."""
    return tuple(dict.fromkeys(name for rule in STATE_FULL.values() for name in rule.names))


def every_key() -> tuple[str, ...]:
    """The keys of all that is kept of moments, in any form."""
    return (*every_moment(), *(name + SCALE for name in every_moment()))
