"""From parameters to the tensors and state of one step() call, and the step of the regular parameters."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frugal_dist.config import FrugalConfig, for_regular
from frugal_dist.projection.numerics import compute_dtype
from frugal_dist.projection.registry import PROJECTIONS, family, side_of
from frugal_dist.sharding.redistribution import fill_buckets
from frugal_dist.sharding.shard import ParamSpec
from frugal_dist.step.runtime import (
    LocalMatrix,
    LocalParameter,
    Runtime,
    Site,
    basis_extents,
    basis_route,
    cut_selection,
    regular_extents,
    remainders_of,
    shares_of,
    whole_selection,
)
from frugal_dist.step.state import MatrixState, bring_counters_home
from frugal_dist.update.eightbit import Packed
from frugal_dist.update.local import update_regular
from frugal_dist.update.precision import Rounded, Spans, narrow_, widened
from frugal_dist.update.remainder import REMAINDER, keeps_remainders

State = MutableMapping[Tensor, dict[str, Tensor]]
SLICE = 1 << 24
"""Elements of low-precision regular parameters that are stepped at once, in fp32."""
_NOTHING = torch.empty(0, device="cpu")


@dataclass
class StepInputs:
    """One call: its matrices and its regular parameters. ``key`` names the call."""

    key: tuple[int, ...]
    mats: list[LocalMatrix]
    regular: list[LocalParameter]
    device: torch.device

    def has_run(self) -> bool:
        """Whether any state has ever moved."""
        counts = [mat.state.counts["updates"] for mat in self.mats]
        return any(counts) or any(one.state.counts["step"] for one in self.regular)

    def has_gradient(self) -> bool:
        """Whether any local gradient is not all zeros (a NaN counts)."""
        grads = [grad for mat in self.mats for grad in mat.grads or []]
        grads += [one.grad for one in self.regular if one.grad is not None]
        return any(bool(grad.any()) for grad in grads)

    def release(self) -> None:
        """Let go of the tensors: between calls engines replace them, and gradients are freed."""
        for mat in self.mats:
            mat.weights, mat.grads = [], None
        for one in self.regular:
            one.weight, one.grad = _NOTHING, None

    def lacks_gradients(self) -> bool:
        """Whether there are parameters here, and none of them has a gradient, not even of zeros."""
        grads = [mat.grads for mat in self.mats] + [one.grad for one in self.regular]
        return bool(grads) and all(grad is None for grad in grads)


def step_inputs(runtime: Runtime, state: State, call: tuple[int, ...] | None = None) -> StepInputs:
    """Look up all tensors anew: engines replace parameters and gradients between calls. What can stay as it was stays.

    ``call``: the parameters to be stepped; None: all of them, to be looked at and not stepped.
    """
    storage, originals, sites = runtime.storage, runtime.originals, runtime.sites
    everything = call is None
    call = tuple(range(len(originals))) if call is None else call
    configs: dict[int, FrugalConfig] = {}
    mats: list[LocalMatrix] = []
    regular: list[LocalParameter] = []
    device = torch.device("cpu")
    for i in call:
        original = originals[i]
        config = configs.get(original.group)
        if config is None:
            config = configs[original.group] = runtime.config(original.group, storage.options(i))
        site = sites.get(i) or runtime.site(i)
        param, weight, grad, frozen = storage.tensors(i)
        if everything:
            weight, grad = weight.detach(), None
        elif grad is not None and (grad.layout is not torch.strided or not grad.is_floating_point()):
            raise ValueError(_bad_gradient(original, grad))
        store, device = state[param], weight.device
        if (
            store is not site.store
            or config is not site.config
            or weight.dtype is not site.dtype
            or weight.shape != site.shape
            or device != site.device
        ):
            _bind(runtime, original, site, store, config, weight)
        if site.regular is not None:
            one = site.regular
            one.weight, one.grad, one.frozen = weight, grad, frozen
            regular.append(one)
            continue
        for mat in site.mats:
            if site.direct:
                mat.weights, mat.grads = [weight], None if grad is None else [grad]
            else:
                member, tiles = mat.matrix.member, mat.tiles
                mat.weights = site.part.views(weight, original, member, tiles)
                mat.grads = None if grad is None else site.part.views(grad, original, member, tiles)
            mat.frozen = frozen
            mats.append(mat)
    return StepInputs(call, mats, regular, device)


def _bind(
    runtime: Runtime,
    original: ParamSpec,
    site: Site,
    store: dict[str, Tensor],
    config: FrugalConfig,
    weight: Tensor,
) -> None:
    """Make for a parameter what stays from call to call, after its first call or a change of settings or tensors."""
    if site.shape not in (None, weight.shape):
        raise ValueError(_resized(original, site.shape or (), weight.shape))
    if weight.dtype in _NOT_ROUNDED.get(config.rounding, ()):
        raise ValueError(_bad_rounding(original, weight.dtype, config.rounding))
    states = [one.state for one in site.mats] if site.regular is None else [site.regular.state]
    if store is not site.store:
        pairs = zip(site.prefixes, site.rows, strict=True)
        states = [MatrixState(store, prefix, runtime.counters, row) for prefix, row in pairs]
    if site.config is not None and keeps_remainders(site.config) != keeps_remainders(config):
        for state in states:
            state.forget()
    decay = config.weight_decay if original.decay else 0.0
    if not original.projected:
        settings, state = for_regular(config, original.shape), states[0]
        site.regular = LocalParameter(
            original.name, original.shape, settings, decay, state, weight, None, site.part, False
        )
    else:
        dtype, kind = compute_dtype(weight.dtype), family(config)
        site.mats = [
            LocalMatrix(
                matrix, config, decay, state, tiles, [], None, weight.device, weight.dtype, False, dtype, kind,
                side_of(config, matrix.rows, matrix.cols),
            )
            for (matrix, tiles), state in zip(site.members, states, strict=True)
        ]  # fmt: skip
    site.store, site.config = store, config
    site.shape, site.dtype, site.device = weight.shape, weight.dtype, weight.device


def _resized(original: ParamSpec, before: Sequence[int], now: Sequence[int]) -> str:
    return (
        f"{original.name} had shape {tuple(before)} at the last step and has {tuple(now)} now: its state does not fit "
        "any more. Resize parameters before the first step, or build a new optimizer afterwards."
    )


def _bad_gradient(original: ParamSpec, grad: Tensor) -> str:
    if grad.layout != torch.strided:
        return f"{original.name} has a sparse gradient; Frugal needs dense ones. Use nn.Embedding(..., sparse=False)."
    return f"{original.name} has a gradient of dtype {grad.dtype}; Frugal needs real floating point."


_NOT_ROUNDED = {"stochastic": (torch.float16,), REMAINDER: (torch.float16, torch.float32, torch.float64)}
"""Weights of which nothing is to be rounded are let through where that changes nothing."""


def _bad_rounding(original: ParamSpec, dtype: torch.dtype, rounding: str) -> str:
    others = ""
    if rounding == REMAINDER:
        others = (
            "; parameters of other dtypes may have a group with rounding='nearest'. DeepSpeed keeps fp32 masters "
            "itself, which need no remainder"
        )
    return (
        f"{original.name} is {str(dtype).removeprefix('torch.')}, but rounding={rounding!r} is made for bfloat16 "
        f"weights. Use bfloat16, or leave rounding out{others}."
    )


def ensure_state(runtime: Runtime, inputs: StepInputs) -> None:
    """Create whatever state is missing, and take what was moved or cast to where the weights are, as they are: a kernel
    would read at a wrong address. Idempotent; the shapes are those after the first refresh.

    Frozen parameters have counts and nothing else until they are unfrozen: beside adapters they are most of a model.
    """
    runtime.counters.look()
    strange = [
        mat
        for mat in inputs.mats
        if not mat.state.is_known(mat.dtype, mat.device) or (mat.state.bare and not mat.frozen)
    ]
    others = [
        one
        for one in inputs.regular
        if not one.state.is_known(compute_dtype(one.weight.dtype), one.weight.device)
        or (one.state.bare and not (one.frozen and one.grad is None))
    ]
    states = [mat.state for mat in strange] + [one.state for one in others]
    bring_counters_home(states)
    for mat in strange:
        mat.state.follow(mat.device)
        mat.state.ensure_counters()
        moments_dtype = mat.state.moments_dtype()
        later = mat.frozen and not mat.empty  # then the first refresh creates them, if there ever is one
        if moments_dtype is None and not later:
            create_state(runtime, mat)
        elif moments_dtype not in (None, mat.dtype):  # loaded, or the model was cast
            mat.state.convert(mat.dtype, mat.numbered)
        _settle_remainder(mat, mat.state.has_moments())
        mat.state.remember(mat.dtype)
    for one in others:
        one.state.follow(one.weight.device)
        if one.state.get("step") is None:
            one.state.put("step", torch.tensor(0, device="cpu"))
        moments_dtype, dtype = one.state.moments_dtype(), compute_dtype(one.weight.dtype)
        if moments_dtype is None and not (one.frozen and one.grad is None):
            create_moments(one)
        elif moments_dtype not in (None, dtype):
            one.state.convert(dtype)
        _settle_remainder(one, one.state.has_moments())
        one.state.remember(dtype, ("step",))
    for mat in inputs.mats:
        if (mat.state.counts["size"] == 0) != (mat.config.density == 0.0):
            check_density(mat)


def _settle_remainder(one: LocalMatrix | LocalParameter, steps: bool) -> None:
    """Remainders of what ``steps``, as ``rounding`` says now: without, weights are what they are rounded to."""
    if not keeps_remainders(one.config):
        one.state.put(REMAINDER, None)
    elif steps:
        remainders_of(one)


def create_moments(one: LocalParameter, device: torch.device | None = None) -> None:
    """Zero moments of a regular parameter that has none, where it is or on ``device``."""
    dtype = compute_dtype(one.weight.dtype)
    one.state.ensure_moments(one.config, regular_extents(one), dtype, device or one.weight.device)


def check_density(mat: LocalMatrix) -> None:
    """A basis projection at density 0 has no basis, and its state is another one."""
    before, now = mat.state.counter("size"), mat.config.density
    started = (
        "basis" in (PROJECTIONS[mat.config.projection].family, mat.family)
        and not mat.empty
        and mat.state.counter("refreshes")
    )
    if started and (before == 0) != (now == 0.0):
        raise ValueError(
            f"{mat.matrix.name}: a density schedule cannot go to 0 or leave it with projection="
            f"{mat.config.projection!r} (now {now:g}). Stay above 0, or build a new optimizer."
        )


def create_state(runtime: Runtime, mat: LocalMatrix) -> None:
    """Moments of zeros, and bases, for the present density."""
    if mat.family != "basis" or mat.empty:
        size = 0 if mat.empty else mat.size
        pieces = cut_selection(runtime, mat, whole_selection(mat, 0, size), runtime.ranks.rank)
        mat.state.ensure_moments(mat.config, shares_of(pieces), mat.dtype, mat.device)
        return
    plan = basis_route(runtime, mat)
    mat.state.set_counter("size", mat.size)
    mat.state.ensure_moments(mat.config, basis_extents(mat, plan, mat.size), mat.dtype, mat.device)
    if plan.tiles:
        mat.state.ensure_free(mat.config.keeps, (mat.matrix.rows, mat.matrix.cols), mat.dtype, mat.device)
        mat.state.ensure_basis(mat.side, mat.kept_shapes(mat.size), mat.basis_dtype, mat.device)


def step_regular(runtime: Runtime, inputs: StepInputs) -> None:
    """The state-full rule alone, one fused call for all parameters that share settings and count."""
    groups: dict[tuple[object, ...], list[LocalParameter]] = {}
    # An empty shard counts too, as everyone's is saved.
    moving = [one for one in inputs.regular if one.grad is not None]
    for one in moving:
        counts = one.state.counts
        counts["step"] += 1
        key = (id(one.config), one.decay, counts["step"], one.weight.dtype, one.weight.device)
        groups.setdefault(key, []).append(one)
    runtime.counters.advance([one.state for one in moving], 1)
    for members in groups.values():
        _step_group(members)


@dataclass(frozen=True)
class _Slice:
    """A stretch of a regular parameter, from ``row`` on."""

    one: LocalParameter
    row: int
    weight: Tensor
    grad: Tensor
    moments: tuple[Any, ...]
    remainder: Tensor | None = None


def _slices(one: LocalParameter, most: int) -> list[_Slice]:
    """A parameter in slices of at most about ``most`` elements."""
    assert one.grad is not None
    moments = one.state.moments(one.config, regular_extents(one))
    if one.config.form.blocky:
        return _lines(one, moments, most)
    remainders, own = remainders_of(one) or [], moments[0]
    if one.weight.numel() <= most or one.weight.dim() == 0:
        return [_Slice(one, 0, one.weight, one.grad, own, *remainders)]
    rows, number = max(1, most * len(one.weight) // one.weight.numel()), len(own)
    parts = zip(*(tensor.split(rows) for tensor in (one.weight, one.grad, *own, *remainders)), strict=True)
    return [
        _Slice(one, place * rows, weight, grad, tuple(rest[:number]), *rest[number:])
        for place, (weight, grad, *rest) in enumerate(parts)
    ]


def _lines(one: LocalParameter, moments: Sequence[tuple[Packed, ...]], most: int) -> list[_Slice]:
    """The same by whole lines of what is kept in blocks, of which there may be several pieces in a flat interval."""
    assert one.grad is not None
    tensors, slices, begin = (one.weight, one.grad, *(remainders_of(one) or [])), [], 0
    for own in moments:
        lines, width = own[0].codes.shape
        # Of the first dim: a line is one entry of it, all of it (a vector), or some of it (an interval).
        each = 1 if one.weight.dim() > 1 else width
        step = max(1, most // max(width, 1))
        for top in range(0, lines, step):
            bottom = min(top + step, lines)
            here = slice(begin + top * each, begin + bottom * each)
            few = tuple(view.rows(top, bottom) for view in own)
            weight, grad, *rest = (tensor[here] for tensor in tensors)
            slices.append(_Slice(one, here.start, weight, grad, few, *rest))
        begin += lines * each
    return slices


def _step_group(members: Sequence[LocalParameter]) -> None:
    """Low-precision parameters need fp32 copies: of bounded size at a time."""
    first = members[0]
    narrow = first.weight.dtype != compute_dtype(first.weight.dtype)
    most = SLICE if narrow else sum(one.weight.numel() for one in members)
    slices = [part for one in members for part in _slices(one, most)]
    whole = [list(range(len(slices)))]
    for bucket in fill_buckets([(part.weight.numel(),) for part in slices], most) if narrow else whole:
        _step_slices([slices[i] for i in bucket], first.state.counts["step"], first.decay, first.config, narrow)


def _step_slices(slices: Sequence[_Slice], step: int, decay: float, config: FrugalConfig, narrow: bool) -> None:
    weights = [part.weight for part in slices]
    updated = [widened(part.weight, part.remainder) for part in slices] if narrow else weights
    update_regular(updated, [part.grad for part in slices], [part.moments for part in slices], step, decay, config)
    if narrow:
        for part, wide in zip(slices, updated, strict=True):
            whose = Rounded(config, part.one.name, part.one.shape, step)
            narrow_(part.weight, wide, part.remainder, whose, _boxes(part, wide))


def _boxes(part: _Slice, wide: Tensor) -> Iterator[tuple[Spans, Tensor, Tensor]]:
    """The boxes of the whole parameter that a slice is made of."""
    here = part.one.part.rows(part.row, part.row + (len(part.weight) if part.weight.dim() else 1))
    for (box, target), (_, source) in zip(here.boxes(part.weight), here.boxes(wide), strict=True):
        yield box.spans, target, source
