"""The plan of a run: what every rank holds, computes and sends. It asks the code that does it, rank by rank, on meta
tensors: no memory, no ranks, no GPU.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from frugal_dist.optimizer import BUCKET_BYTES, Frugal
from frugal_dist.planner.layouts import EngineLayout
from frugal_dist.planner.totals import ITEM, papers_bytes, state_of_ranks
from frugal_dist.planner.traffic import RefreshPlan, common_refresh, plan_refresh, plan_step, step_buckets
from frugal_dist.projection.numerics import compute_dtype
from frugal_dist.projection.registry import PROJECTIONS
from frugal_dist.sharding.collectives import Ranks
from frugal_dist.sharding.placement import refresh_cost
from frugal_dist.sharding.redistribution import Redistribution
from frugal_dist.sharding.shard import LocalShard, ParamSpec
from frugal_dist.sharding.table import Matrix, Table, group_owners, number_blocks
from frugal_dist.sharding.tile import Layout, holders
from frugal_dist.step.inputs import SLICE, StepInputs, ensure_state, step_inputs
from frugal_dist.step.runtime import LocalMatrix, Runtime, basis_route
from frugal_dist.step.state import BASES, FREE, MatrixState
from frugal_dist.update.eightbit import CODE
from frugal_dist.update.moment_storage import CUDA_SLICE
from frugal_dist.update.remainder import REMAINDER, keeps_remainders
from frugal_dist.update.rules import STATE_FREE, STATE_FULL, every_key
from frugal_dist.update.stochastic_rounding import rounds_stochastically


@dataclass
class RankPlan:
    """One rank, in bytes. ``parameters`` and ``gradients``: elements, of the latter those that are there at the same
    time. ``step_calls`` counts collectives, ``step_sent`` is what this rank sends. ``selected``: which
    entries randk selects, about; not part of the state, as they can be drawn again. ``remainders``: of all weights.
    """

    rank: int
    parameters: int = 0
    gradients: int = 0
    moments: int = 0
    bases: int = 0
    regular: int = 0
    counters: int = 0
    remainders: int = 0
    selected: int = 0
    step_sent: int = 0
    step_calls: Counter[str] = field(default_factory=Counter)
    refresh: RefreshPlan = field(default_factory=RefreshPlan)

    @property
    def state(self) -> int:
        """All optimizer state."""
        return self.moments + self.bases + self.regular + self.counters + self.remainders


@dataclass
class Plan:
    """A run: some ranks in full (``ranked``), and what is known of all of them.

    ``states``: optimizer state of every rank in bytes. ``owned`` and ``refresh_work``: how many refreshes each rank
    owns, and their work. ``papers``: state in bytes as the papers count it, see ``papers_bytes``. ``solver``: an
    estimate of what the owner of a matrix takes at most for its basis, beside its gradient; ``solver_on_host``: the
    same, where it is always computed on the CPU. ``gradient``: of the largest matrix with a basis. ``working``: an
    estimate of what a step takes at most for copies and buffers. ``released``: steps are taken in backward passes.
    """

    engine: str
    ranks: int
    ranked: list[RankPlan] = field(default_factory=list)
    states: list[int] = field(default_factory=list)
    owned: list[int] = field(default_factory=list)
    refresh_work: list[float] = field(default_factory=list)
    papers: int = 0
    solver: int = 0
    solver_on_host: int = 0
    gradient: int = 0
    layouts: Counter[str] = field(default_factory=Counter)
    released: bool = False
    working: int = 0

    @property
    def worst(self) -> RankPlan:
        """The rank with the most state."""
        return max(self.ranked, key=lambda one: one.state)


@dataclass(frozen=True)
class _Storage:
    """A rank's parts as empty tensors."""

    originals: Sequence[ParamSpec]
    groups: Sequence[dict[str, Any]]
    parts: Sequence[LocalShard]
    weights: Sequence[Tensor]
    shares_replicas: bool

    def call(self) -> Sequence[int]:
        return range(len(self.originals))

    def complete_gradients(self, ranks: Ranks) -> None:
        """They are complete."""

    def moves_elsewhere(self) -> bool:
        return False

    def part(self, i: int) -> LocalShard:
        return self.parts[i]

    def frozen(self, i: int) -> bool:
        return not self.weights[i].requires_grad

    def param(self, i: int) -> Tensor:
        return self.weights[i]

    def options(self, i: int) -> dict[str, Any]:
        return self.groups[self.originals[i].group]

    def tensors(self, i: int) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        return self.weights[i], self.weights[i].detach(), None, self.frozen(i)


def make_plan(
    optimizer: Frugal,
    engine: EngineLayout,
    ranks: int,
    bucket_bytes: int = BUCKET_BYTES,
    shown: Sequence[int] = (),
    units: Sequence[Collection[str]] = (),
    narrow: bool = False,
) -> Plan:
    """Plan for ``optimizer`` (its parameters may be on the meta device) under ``engine`` on ``ranks`` ranks.

    ``shown``: the ranks to look at in full, beside the one with the most state; all if empty. ``units``: names of the
    parameters that are stepped together inside of backward passes; none: all are in one step afterwards. The weights
    are taken to be fp32, as masters are, or bf16 if they are ``narrow`` or have remainders.
    """
    originals, groups = optimizer.originals, optimizer.param_groups
    parts = [engine.parts(originals, rank, ranks) for rank in range(ranks)]
    table = _table(originals, parts)
    asked = optimizer.shard_state
    share = (asked if isinstance(asked, bool) else engine.shares) and ranks > 1

    crossings: dict[
        int, Redistribution
    ] = {}  # of basis matrices, which are the same for all ranks and take long to find

    def runtime_of(rank: int) -> tuple[Runtime, StepInputs]:
        storage = _Storage(
            originals, groups, parts[rank], _tensors(originals, groups, parts[rank], narrow), engine.shares
        )
        group = None if ranks == 1 else "planned"
        runtime = Runtime(Ranks(group, rank, ranks), storage, originals, table, share, bucket_bytes)
        runtime.routes.update({i: crossing.route(rank, i) for i, crossing in crossings.items()})
        state: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        inputs = step_inputs(runtime, state)
        ensure_state(runtime, inputs)
        if not crossings:
            crossings.update(
                {i: Redistribution(table.matrices[i].storage, r.layout) for i, r in runtime.routes.items()}
            )
        for mat in inputs.mats:
            if not mat.empty:  # as after the first refresh
                mat.state.set_counter("refreshes", 1)
                mat.state.set_counter("size", mat.size)
        return runtime, inputs

    plan = Plan(engine.name, ranks, released=bool(units))
    runtime, inputs = runtime_of(0)
    _plan_all(plan, runtime, inputs, parts)
    plan.working = _working_bytes(inputs, units)
    calls = _calls(runtime, inputs, units)
    buckets, common = step_buckets(runtime, calls), common_refresh(runtime, calls)
    most = plan.states.index(max(plan.states))
    for rank in sorted({*shown, most}) if shown else range(ranks):
        runtime, inputs = runtime_of(rank)
        rank_plan = _rank_plan(runtime, inputs, units)
        rank_plan.step_calls, rank_plan.step_sent = plan_step(runtime, inputs.mats, buckets)
        rank_plan.refresh = plan_refresh(runtime, inputs.mats, common)
        plan.ranked.append(rank_plan)
    return plan


def _plan_all(plan: Plan, runtime: Runtime, inputs: StepInputs, parts: Sequence[Sequence[LocalShard]]) -> None:
    """What one rank knows of all."""
    _note_layouts(plan, runtime, inputs)
    plan.states, plan.papers = state_of_ranks(runtime, inputs, parts), papers_bytes(inputs)
    plan.owned, plan.refresh_work = [0] * plan.ranks, [0.0] * plan.ranks
    for mat in inputs.mats:
        if mat.family == "basis":
            if mat.chooses and not mat.numbered:
                plan.owned[mat.matrix.owner] += 1
                plan.refresh_work[mat.matrix.owner] += refresh_cost(mat.matrix.rows, mat.matrix.cols)
            _note_solver(plan, mat)


def _working_bytes(inputs: StepInputs, units: Sequence[Collection[str]]) -> int:
    """Of the largest copies that are there at once, in fp32: of regular parameters those of one call together. 8-bit
    moments become numbers, and codes again, a slice at a time.
    """
    narrow = [one for one in inputs.regular if one.weight.dtype != compute_dtype(one.weight.dtype)]
    calls = units or [{one.name for one in narrow}]
    low = max(sum(one.weight.numel() for one in narrow if one.name in call) for call in calls)
    copies = (_copies(mat) * max(map(prod, mat.shapes), default=0) for mat in inputs.mats)
    return ITEM * max(2 * min(SLICE, low), *copies, 0) + _as_numbers(inputs)


def _copies(mat: LocalMatrix) -> int:
    """How many tensors of its size a matrix' step makes: fp32 weight and gradient of low-precision ones, and what is
    added to the weights, where no kernel computes it entry by entry.
    """
    config, low = mat.config, mat.weight_dtype != mat.dtype
    if mat.family == "basis" and not mat.empty:  # the rest, which becomes its direction, and a step in low precision
        return 2 + 2 * low
    chosen, free = PROJECTIONS[config.projection], STATE_FREE[config.state_free]
    complete = chosen.family == "blocks" or config.density == 1.0
    known = len(chosen.lines(mat.side)) == 1 or chosen.index_bytes > 0
    stepped = STATE_FULL[config.state_full].has_kernel and known and not complete and not config.form.blocky
    fused = free.has_kernel and (config.density == 0.0 or stepped)
    rounds_again = mat.decay != 0.0 or rounds_stochastically(config, mat.weight_dtype)
    copied = low and (keeps_remainders(config) or (rounds_again and not fused))
    return 2 * copied + (not fused and not complete and free.direction is not None)


def _as_numbers(inputs: StepInputs) -> int:
    """Two moments of a slice on a GPU, and as many entries four times while they are quantized, without a kernel."""
    states = [*(mat.state for mat in inputs.mats), *(one.state for one in inputs.regular)]
    coded = (value.numel() for state in states for value in state.store.values() if value.dtype == CODE)
    return 6 * ITEM * min(CUDA_SLICE, max(coded, default=0))


def _note_solver(plan: Plan, mat: LocalMatrix) -> None:
    if mat.empty or not mat.chooses:
        return
    rows, cols, chosen = mat.matrix.rows, mat.matrix.cols, PROJECTIONS[mat.config.projection]
    taken = chosen.scratch(mat.config, rows, cols, mat.side, mat.size)
    if chosen.dictionary is not None:
        plan.solver = max(plan.solver, taken)
    elif chosen.from_gradient:
        plan.solver, plan.gradient = max(plan.solver, taken), max(plan.gradient, ITEM * rows * cols)
    else:
        plan.solver_on_host = max(plan.solver_on_host, taken)


def _table(originals: Sequence[ParamSpec], parts: Sequence[Sequence[LocalShard]]) -> Table:
    """As the ranks would build it together."""
    numbers = number_blocks(originals)
    projected = [(i, member) for i, o in enumerate(originals) if o.projected for member in range(o.stack)]
    owners = group_owners(originals, len(parts))
    matrices = []
    for index, (i, member) in enumerate(projected):
        original = originals[i]
        layout: Layout = tuple(mine[i].tiles(original, member) for mine in parts)
        name = original.name if original.stack == 1 else f"{original.name}[{member}]"
        block, blocks = numbers[original.name, member]
        matrices.append(Matrix(name, i, member, *original.matrix_shape, index, block, blocks, layout, owners[index]))
    return Table(tuple(matrices), tuple(i for i, original in enumerate(originals) if not original.projected))


def _tensors(
    originals: Sequence[ParamSpec], groups: Sequence[dict[str, Any]], parts: Sequence[LocalShard], narrow: bool
) -> list[Tensor]:
    """All are taken to be trained: frozen ones would have no moments."""
    low = [narrow or groups[original.group].get("rounding") == REMAINDER for original in originals]
    dtypes = [torch.bfloat16 if one else torch.float32 for one in low]
    return [
        torch.empty(part.local_shape, dtype=dtype, device="meta", requires_grad=True)
        for part, dtype in zip(parts, dtypes, strict=True)
    ]


def _calls(runtime: Runtime, inputs: StepInputs, units: Sequence[Collection[str]]) -> list[list[LocalMatrix]]:
    """The matrices of each call of a training step."""
    names = [original.name for original in runtime.originals]
    calls = [[mat for mat in inputs.mats if names[mat.matrix.original] in unit] for unit in units]
    return calls if units else [inputs.mats]


def _rank_plan(runtime: Runtime, inputs: StepInputs, units: Sequence[Collection[str]]) -> RankPlan:
    """What the rank holds."""
    sizes = {runtime.originals[i].name: runtime.storage.tensors(i)[1].numel() for i in inputs.key}
    together = max((sum(sizes[name] for name in unit) for unit in units), default=sum(sizes.values()))
    rank_plan = RankPlan(runtime.ranks.rank, parameters=sum(sizes.values()), gradients=together)
    for one in inputs.regular:
        for name, size in _sizes(one.state):
            if name == REMAINDER:
                rank_plan.remainders += size
            else:
                rank_plan.regular += size
    for mat in inputs.mats:
        for name, size in _sizes(mat.state):
            if name in BASES:
                rank_plan.bases += size
            elif name in (*every_key(), *FREE):
                rank_plan.moments += size
            elif name == REMAINDER:
                rank_plan.remainders += size
            else:
                rank_plan.counters += size
        rank_plan.selected += _selected(mat, runtime.ranks.rank)
    return rank_plan


def _selected(mat: LocalMatrix, rank: int) -> int:
    """An index for each selected entry of what the rank stores, whoever has its moments."""
    matrix = mat.matrix
    total, index_bytes = matrix.rows * matrix.cols, PROJECTIONS[mat.config.projection].index_bytes
    if not index_bytes or mat.size in (0, total):
        return 0
    return round(index_bytes * mat.size * matrix.sizes[rank] / total)


def _sizes(state: MatrixState) -> list[tuple[str, int]]:
    """(name, bytes) of the tensors in a state."""
    prefix = state.prefix
    return [
        (key[len(prefix) :], tensor.numel() * tensor.element_size())
        for key, tensor in state.store.items()
        if key.startswith(prefix)
    ]


def _note_layouts(plan: Plan, runtime: Runtime, inputs: StepInputs) -> None:
    """Which compute layouts were chosen, by the matrices' shapes."""
    for mat in inputs.mats:
        plan.layouts[f"{mat.matrix.rows}x{mat.matrix.cols}: {_kind(runtime, mat)}"] += 1


def _kind(runtime: Runtime, mat: LocalMatrix) -> str:
    if runtime.ranks.alone or mat.family != "basis":
        return "where it is stored"
    layout = basis_route(runtime, mat).layout
    if layout == mat.matrix.storage:
        return "where it is stored"
    busy = [rank for rank, tiles in enumerate(layout) if tiles]
    if len(busy) == 1 and len(holders(layout)) == 1:
        return "whole, on its owner"
    return "cut along its free dim"
