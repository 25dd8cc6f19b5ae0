"""What an update rule is: all that the rest of the package has to know of one, in one object.

A new rule is a file that makes a ``StateFull`` or a ``StateFree``, and its line in ``rules``. Nothing else compares its
name.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from frugal_dist.projection.basis import Basis, carry_first

Tensors = Sequence[Tensor]


class RuleSettings(Protocol):
    """What rules read of a ``FrugalConfig``, which stands above them and asks the registry for its choices."""

    @property
    def beta_pair(self) -> tuple[float, float]: ...

    @property
    def eps(self) -> float: ...

    @property
    def momentum(self) -> float: ...


Update = Callable[[Tensors, Tensors, Sequence[Tensors], int, float, float, RuleSettings], None]
"""``update(params, grads, moments, step, lr, weight_decay, config)``, in place, on lists of equally typed tensors.

It moves ``params`` by ``-lr * U``; give it zeros to get the update itself. ``moments`` holds one list for each moment,
``step`` counts from 1 since the last reset and is common to all tensors of the call. Weight decay is decoupled and
comes first (FRUGAL, Algorithm 1).
"""


@dataclass(frozen=True)
class Moment:
    """A tensor of R's shape that a rule keeps, under ``name`` in the state; zeros at first and after a reset.

    ``carry(moment, old, new)``: what becomes of it in a new basis, with ``on_refresh="project"``. ``signed``: which
    values 8-bit codes of it stand for, those on both sides of 0, or none below it; None: it cannot be kept in 8 bits.
    """

    name: str
    carry: Callable[[Tensor, Basis, Basis], Tensor] = carry_first
    signed: bool | None = None


@dataclass(frozen=True, kw_only=True)
class StateFull:
    """A rule of the state-full part and of the regular parameters.

    betas        what ``betas=None`` means.
    cycles       the hyperparameter that schedules which cycle momentum change: "betas" (the first) or "momentum".
    is_adamw     whether it takes the betas and eps that a program has for the AdamW it would use otherwise.
    elementwise  whether each entry is updated by itself; if not, R is computed whole, by the owner of its matrix, and
                 selected coordinates, which may be cut anywhere, are refused.
    regular      the rule that regular parameters take in place of one that is not elementwise; none: they are refused.
    has_kernel   whether ``kernels`` do it, together with a state-free rule that has one.
    correction   (step, settings): what the update is multiplied with beyond its moments, as AdamW's bias correction is.
    names        of the moments.
    """

    name: str
    moments: tuple[Moment, ...]
    update: Update
    betas: tuple[float, float] = (0.9, 0.999)
    cycles: str = "betas"
    is_adamw: bool = False
    elementwise: bool = True
    regular: str = ""
    has_kernel: bool = False
    correction: Callable[[int, RuleSettings], float] = lambda step, config: 1.0
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(moment.name for moment in self.moments))


@dataclass(frozen=True, kw_only=True)
class StateFree:
    """A rule of the rest. ``has_kernel`` as of state-full rules.

    direction    turns a residual into the step's direction, entry by entry, in a new tensor or the same; None: there is
                 no step, or ``lines`` say which.
    lines        (residual, part): the same by norms of lines or of all, see ``lines``; such rules compute where bases
                 do, and ask for sums over what lies elsewhere.
    free_side    the side whose cuts leave those lines whole, where there is no basis (density 0).
    scaled       whether the direction is multiplied with how R's update changes its norms: needs a density above 0.
    averages     (direction, state, settings): the same with what it keeps of all gradients, tensors named ``keeps``;
                 then the matrix is whole where it computes.
    keeps        of ``step.state.FREE``.
    """

    name: str
    direction: Callable[[Tensor], Tensor] | None
    lines: Callable[..., Generator[Tensor, Tensor, Tensor]] | None = None
    free_side: str = "right"
    scaled: bool = False
    averages: Callable[[Tensor, Sequence[Tensor], RuleSettings], Tensor] | None = None
    keeps: tuple[str, ...] = ()
    has_kernel: bool = False


def decay_(params: Tensors, lr: float, decay: float) -> None:
    """Decoupled weight decay."""
    if decay != 0.0:
        torch._foreach_mul_(list(params), 1.0 - lr * decay)
