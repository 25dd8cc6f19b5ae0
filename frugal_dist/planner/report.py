"""A plan in words and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from frugal_dist.planner.engines import EngineLayout
from frugal_dist.planner.plan import Plan, RankPlan
from frugal_dist.planner.shapes import LlamaShape
from frugal_dist.planner.totals import ITEM
from frugal_dist.planner.zero import Zero, buffer_bytes, gradient_bytes

MIB = 2**20
GPUS = {
    "h100": 80e9, "h200": 141e9, "a100": 80e9, "a100-40": 40e9, "l40s": 48e9, "a10g": 24e9, "v100": 32e9,
    "rtx4090": 24e9, "mi300x": 192e9,
}  # fmt: skip
"""Memory of a GPU in bytes, by the makers' data sheets."""


@dataclass(frozen=True)
class Setting:
    """What of a run decides about memory beside the optimizer. ``tokens``: of a micro-batch on one rank.

    ``note``: what else is to be said about the run. ``zero``: the DeepSpeed settings, None for torch's engines.
    """

    title: str
    shape: LlamaShape
    parameters: int
    precision: str
    tokens: int
    checkpointing: bool
    note: str = ""
    zero: Zero | None = None


@dataclass(frozen=True)
class Row:
    """Bytes of one kind on a rank; ``host``: in the machine's memory, not on the GPU."""

    name: str
    size: int
    host: bool = False


def model_rows(engine: EngineLayout, plan: Plan, rank: RankPlan, setting: Setting) -> list[Row]:
    """Weights, their fp32 masters, gradients, and buffers of the engine, on one rank: what engines document. Estimates.

    torch's engines keep fp32 weights and cast on the way; DeepSpeed keeps a low-precision copy, and fp32 masters of the
    rank's part.
    """
    everything, part = setting.parameters, rank.parameters
    held = part if engine.cuts_weights else everything
    zero = setting.zero
    if zero is None:
        reduced = part if engine.cuts_gradients else everything
        return [Row("weights (estimate)", ITEM * held), Row("gradients (estimate)", ITEM * reduced)]
    low = ITEM if setting.precision == "fp32" else 2
    before, within = gradient_bytes(zero, low, everything, part)
    host = zero.optimizer_on_host
    gradients = [Row("gradients (estimate)", before + within, host)]
    if host and zero.stage == 1:
        gradients = [Row("gradients (estimate)", before), Row("gradients of the step (estimate)", within, host)]
    masters = 0 if zero.stage == 0 and low == ITEM else ITEM * part
    return [
        Row("weights (estimate)", low * held, zero.weights_on_host),
        Row("fp32 masters (estimate)", masters, host),
        *gradients,
        Row("buffers of DeepSpeed (estimate)", buffer_bytes(zero, low, everything) if plan.ranks > 1 else 0),
    ]


def activation_bytes(setting: Setting) -> int:
    """Activations of a micro-batch of a LLaMA-style model with a fused attention, and its logits. An estimate.

    Per token and layer 8 hidden + 4 intermediate numbers are kept for the backward pass; with checkpointing one hidden
    per layer and one whole layer. The logits are there in the precision of the model and, with their gradient, in fp32.
    """
    shape, item = setting.shape, 4 if setting.precision == "fp32" else 2
    layer = 8 * shape.hidden + 4 * shape.intermediate
    kept = shape.layers * shape.hidden + layer if setting.checkpointing else shape.layers * layer
    return setting.tokens * (item * kept + (item + 2 * ITEM) * shape.vocab)


def report(plan: Plan, baselines: Mapping[str, Plan], engine: EngineLayout, setting: Setting, gpu: str | None) -> str:
    """Everything about a plan. ``baselines``: by name the plans of other optimizers on the same engine.

    Raises ValueError for a GPU that is not known.
    """
    if gpu is not None and gpu not in GPUS:
        raise ValueError(f"gpu is {gpu!r}; choose one of {', '.join(GPUS)}.")
    return "\n".join(
        [
            f"{setting.title}: {setting.parameters / 1e6:,.1f} M parameters, {plan.engine} on {plan.ranks} "
            f"rank{'s' if plan.ranks > 1 else ''}",
            *([setting.note] if setting.note else []),
            "",
            *_memory(plan, engine, setting, gpu),
            "",
            *_state(plan, baselines),
            "",
            *_traffic(plan),
            "",
            *_layouts(plan),
        ]
    )


def _memory(plan: Plan, engine: EngineLayout, setting: Setting, gpu: str | None) -> list[str]:
    worst = plan.worst
    host = setting.zero is not None and setting.zero.optimizer_on_host
    rows = [
        *model_rows(engine, plan, worst, setting),
        Row("optimizer state", worst.state, host),
        Row("  moments of projected matrices", worst.moments, host),
        Row("  bases", worst.bases, host),
        Row("  moments of regular parameters", worst.regular, host),
        Row("  counters", worst.clocks, host),
        *([Row("indices of randk's entries (estimate)", worst.selected, host)] if worst.selected else []),
        *_refresh_rows(plan, host),
        Row(f"activations of {setting.tokens:,} tokens (estimate)", activation_bytes(setting)),
    ]
    lines = _table(
        ["rank with the most state", "MiB"],
        [(row.name + (", on the host" if row.host else ""), f"{row.size / MIB:,.1f}") for row in rows],
    )
    parts = [row for row in rows if not row.name.startswith(" ")]
    total = sum(row.size for row in parts if not row.host)
    lines.append(f"Together {total / 1e9:,.2f} GB")
    if gpu is not None:
        verdict = "fits" if total < 0.9 * GPUS[gpu] else "does NOT fit"
        lines[-1] += f": {verdict} into {gpu} ({GPUS[gpu] / 1e9:.0f} GB, of which a tenth is left free)"
    if on_host := sum(row.size for row in parts if row.host):
        lines.append(f"On the host {on_host / 1e9:,.2f} GB for every rank of it")
    return lines


def _refresh_rows(plan: Plan, host: bool) -> list[Row]:
    """At most on any rank. A gradient that lies on the host is copied to the GPU, where its basis is computed."""
    solver = plan.solver + (plan.gradient if host else 0)
    rows = [
        Row("gathered gradients at a refresh", max(rank.refresh.gathered for rank in plan.ranked), host),
        Row("computing the largest basis (estimate)", solver),
        Row("drawing the largest basis (estimate)", plan.solver_on_host, host=True),
    ]
    return [row for row in rows if row.size]


def _state(plan: Plan, baselines: Mapping[str, Plan]) -> list[str]:
    rows = []
    for name, one in {"this": plan, **baselines}.items():
        sizes = (max(one.states), sum(one.states), one.papers)
        rows.append((name, *(f"{size / MIB:,.1f}" for size in sizes)))
    lines = _table(["optimizer state, MiB", "most on a rank", "all ranks", "as the papers count"], rows)
    return [*lines, "The papers count the moments of the whole model, once: no bases, no counters"]


def _traffic(plan: Plan) -> list[str]:
    busiest = max(plan.ranked, key=lambda rank: rank.step_sent)
    refresher = max((rank.refresh for rank in plan.ranked), key=lambda one: one.sent)
    lines = _table(
        ["sent by the busiest rank", "MiB", "collectives"],
        [
            ("a step", f"{busiest.step_sent / MIB:,.1f}", _calls(busiest.step_calls)),
            ("a refresh, beside the step", f"{refresher.sent / MIB:,.1f}", _calls(refresher.calls)),
        ],
    )
    owned, work = plan.owned, plan.refresh_work
    if sum(work):
        balance = max(work) * len(work) / sum(work)
        lines.append(
            f"Refreshes are owned by {sum(count > 0 for count in owned)} of {plan.ranks} ranks, {min(owned)} to "
            f"{max(owned)} matrices each; the busiest has {balance:.2f} times the mean work"
        )
    return lines


def _calls(calls: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in calls.items() if count) or "none"


def _layouts(plan: Plan) -> list[str]:
    return _table(["matrices and where they are computed", "number"], [(k, str(n)) for k, n in plan.layouts.items()])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    aligned = [
        [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in (header, rule, *rows)
    ]
    return [f"| {' | '.join(line)} |" for line in aligned]
