"""A plan in words and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from textwrap import wrap
from typing import Any, Literal

from frugal_dist.planner.formula import MOMENT_BYTES, LlamaShape
from frugal_dist.planner.layouts import EngineLayout
from frugal_dist.planner.plan import Plan, RankPlan
from frugal_dist.planner.totals import ITEM
from frugal_dist.planner.traffic import RefreshPlan
from frugal_dist.planner.zero import Zero, buffer_bytes, gradient_bytes
from frugal_dist.presets import REFERENCE

MIB = 2**20
GPUS = {
    "h100": 80e9, "h200": 141e9, "a100": 80e9, "a100-40": 40e9, "l40s": 48e9, "a10g": 24e9, "v100": 32e9,
    "rtx4090": 24e9, "mi300x": 192e9,
}  # fmt: skip
"""Memory of a GPU in bytes, by the makers' data sheets."""
NO_BF16 = ("v100",)
"""Those that cannot compute in it."""
WIDTH = 80
"""No line of a report is longer: that is how wide terminals are."""


@dataclass(frozen=True)
class Setting:
    """What of a run decides about memory beside the optimizer. ``tokens``: of a micro-batch on one rank.

    ``added``: elements of the largest gradient that is added to another micro-batch's. ``note``: what else is to be
    said about the run. ``zero``: the DeepSpeed settings, None for torch's engines, whose
    ``weights`` are fp32 or bf16. ``advice``: what makes it fit into a GPU that is too small.
    """

    title: str
    shape: LlamaShape
    parameters: int
    precision: str
    tokens: int
    checkpointing: bool
    note: str = ""
    zero: Zero | None = None
    weights: str = "fp32"
    added: int = 0
    advice: str = ""


@dataclass(frozen=True)
class Row:
    """Bytes of one kind on a rank; ``host``: in the machine's memory, not on the GPU.

    ``during``: a forward and backward pass, a refresh or a step, if they are there then only.
    """

    name: str
    size: int
    host: bool = False
    during: Literal["", "pass", "refresh", "step"] = ""


def model_rows(engine: EngineLayout, plan: Plan, rank: RankPlan, setting: Setting) -> list[Row]:
    """Weights, their fp32 masters, gradients, and buffers of the engine, on one rank: what engines document. Estimates.

    torch's engines keep the weights as they are given and cast on the way; DeepSpeed keeps a low-precision copy, and
    fp32 masters of the rank's part.
    """
    everything, part = setting.parameters, rank.parameters
    held = part if engine.cuts_weights else everything
    zero = setting.zero
    if zero is None:
        reduced = rank.gradients if plan.released else part if engine.cuts_gradients else everything
        item = _item(setting)
        return [Row("weights (estimate)", item * held), Row("gradients (estimate)", item * reduced)]
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


def _item(setting: Setting) -> int:
    """Bytes of a weight, and of a gradient, with torch's engines."""
    return 2 if setting.weights == "bf16" else ITEM


def activation_bytes(setting: Setting) -> int:
    """Activations of a micro-batch of a LLaMA-style model with a fused attention, and its logits. An estimate.

    Per token and layer 8 hidden + 4 intermediate numbers are kept for the backward pass; with checkpointing one hidden
    per layer and one whole layer. The logits are there in the precision of the model and, with their gradient, in fp32.
    """
    shape, item = setting.shape, 4 if setting.precision == "fp32" else 2
    layer = 8 * shape.hidden + 4 * shape.intermediate
    kept = shape.layers * shape.hidden + layer if setting.checkpointing else shape.layers * layer
    return setting.tokens * (item * kept + (item + 2 * ITEM) * shape.vocab)


def check_gpu(gpu: str | None) -> None:
    """ValueError for a GPU that is not known."""
    if gpu is not None and gpu not in GPUS:
        raise ValueError(f"gpu is {gpu!r}; choose one of {', '.join(GPUS)}.")


def report(plan: Plan, baselines: Mapping[str, Plan], engine: EngineLayout, setting: Setting, gpu: str | None) -> str:
    """Everything about a plan. ``baselines``: by name the plans of other optimizers on the same engine.

    Raises ValueError for a GPU that is not known.
    """
    check_gpu(gpu)
    ranks = f"{plan.ranks} rank{'s' if plan.ranks > 1 else ''}"
    adamw = baselines.get(REFERENCE)
    verdict = _verdict(plan, adamw, engine, setting) if adamw is not None else ""
    return "\n".join(
        [
            *wrap(f"{setting.title}: {setting.parameters / 1e6:,.1f} M parameters, {plan.engine} on {ranks}", WIDTH),
            *filter(None, [setting.note]),  # it names files, which are better left in one piece
            "",
            *_memory(plan, adamw, engine, setting, gpu),
            *wrap(verdict, WIDTH),
            "",
            *_state(plan, baselines),
            "",
            *_traffic(plan),
            "",
            *_layouts(plan),
        ]
    )


def figures(
    plan: Plan, baselines: Mapping[str, Plan], engine: EngineLayout, setting: Setting, gpu: str | None
) -> dict[str, Any]:
    """The same for programs. All sizes in bytes, of the rank with the most state or the busiest one.

    Raises ValueError for a GPU that is not known.
    """
    check_gpu(gpu)
    memory: dict[str, dict[str, Any]] = {}
    for name, one in {"this": plan, **baselines}.items():
        rows = memory_rows(one, engine, setting)
        memory[name] = {
            "rows": [{"name": row.name.strip(), "bytes": row.size, "host": row.host} for row in rows],
            "together": total_bytes(rows),
            "peak": _peak(rows),
            "on_the_host": total_bytes(rows, host=True),
            "state_most_on_a_rank": max(one.states),
            "state_of_all_ranks": sum(one.states),
            "state_as_the_papers_count": one.papers,
        }
    busiest, refresher = _busiest(plan)
    summary: dict[str, Any] = {
        "title": setting.title,
        "engine": plan.engine,
        "ranks": plan.ranks,
        "parameters": setting.parameters,
        "precision": setting.precision,
        "tokens_of_a_micro_batch": setting.tokens,
        "notes": list(filter(None, setting.note.split("\n"))),
        "memory": memory,
        "sent_by_the_optimizer": {
            "step": {"bytes": busiest.step_sent, "collectives": dict(busiest.step_calls)},
            "refresh": {"bytes": refresher.sent, "collectives": dict(refresher.calls)},
        },
        "matrices": dict(plan.layouts),
    }
    if REFERENCE in baselines:
        summary["verdict"] = _verdict(plan, baselines[REFERENCE], engine, setting)
    if gpu is not None:
        summary["gpu"] = {"name": gpu, "bytes": int(GPUS[gpu]), "fits": _fits(memory["this"]["together"], gpu)}
        summary["gpu"]["advice"] = setting.advice
        summary["gpu"]["computes_in_it"] = not _lacks_bf16(gpu, setting)
    return summary


def _verdict(plan: Plan, adamw: Plan, engine: EngineLayout, setting: Setting) -> str:
    """Which of the two has the lower peak, their state, and why if it is AdamW.

    A refresh comes after the backward pass, whose activations are gone by then, unless gradients are released.
    """
    ours, theirs = (_peak(memory_rows(one, engine, setting)) for one in (plan, adamw))
    words = f"state is {_mib(max(plan.states))} MiB at most on a rank, AdamW's {_mib(max(adamw.states))}"
    whole = MOMENT_BYTES * (adamw.worst.parameters if engine.cuts_weights else setting.parameters)
    if setting.zero is None and whole > 1.01 * max(adamw.states):  # else padding
        words += f" as this package divides it among replicas (torch's own, which a run's messages name: {_mib(whole)})"
    peak = "The rows are not all there at the same time: the peak of a rank is"
    if ours <= theirs:
        return f"{peak} {_mib(theirs - ours)} MiB below AdamW's: {words}."
    why = "what a refresh gathers and computes with outweighs the state that is saved"
    if max(plan.states) > max(adamw.states):
        why = "a basis is whole on every rank that computes with it, while moments are cut by the number of ranks"
    return (
        f"AdamW needs less here. {peak} {_mib(ours - theirs)} MiB above AdamW's: {words}; {why}. "
        "Projection columns, rows, randk or blockwise has no bases; fewer ranks per copy (hsdp:N) help, too."
    )


def _peak(rows: Sequence[Row]) -> int:
    """On the GPU."""
    during = {
        when: total_bytes([row for row in rows if row.during == when]) for when in ("", "pass", "refresh", "step")
    }
    return during.pop("") + max(during.values())


def fits(plan: Plan, engine: EngineLayout, setting: Setting, gpu: str) -> tuple[bool, int]:
    """Whether a GPU has room for it, and a tenth left; how many bytes it needs."""
    total = total_bytes(memory_rows(plan, engine, setting))
    return _fits(total, gpu), total


def _fits(total: int, gpu: str) -> bool:
    return total < 0.9 * GPUS[gpu]


def _lacks_bf16(gpu: str, setting: Setting) -> bool:
    return setting.precision == "bf16" and gpu in NO_BF16


def memory_rows(plan: Plan, engine: EngineLayout, setting: Setting) -> list[Row]:
    """What lies on the rank with the most state; parts of the row before begin with a blank."""
    worst = plan.worst
    host = setting.zero is not None and setting.zero.optimizer_on_host
    added = _item(setting) * setting.added
    return [
        *model_rows(engine, plan, worst, setting),
        Row("optimizer state", worst.state, host),
        Row("  moments of projected matrices", worst.moments, host),
        Row("  bases", worst.bases, host),
        Row("  moments of regular parameters", worst.regular, host),
        *([Row("  remainders of bf16 weights", worst.remainders, host)] if worst.remainders else []),
        Row("  counters", worst.counters, host),
        *([Row("indices of randk's entries (estimate)", worst.selected, host)] if worst.selected else []),
        *_refresh_rows(plan, host),
        *(
            [Row("copies in the step (estimate)", plan.working, host, "" if plan.released else "step")]
            if plan.working
            else []
        ),
        *([Row("a gradient that is added to its sum (estimate)", added, during="pass")] if added else []),
        Row(f"activations of {setting.tokens:,} tokens (estimate)", activation_bytes(setting), during="pass"),
    ]


def total_bytes(rows: Sequence[Row], host: bool = False) -> int:
    """Bytes on the GPU, or in the machine's memory for every rank of it."""
    return sum(row.size for row in rows if row.host == host and not row.name.startswith(" "))


def _memory(plan: Plan, adamw: Plan | None, engine: EngineLayout, setting: Setting, gpu: str | None) -> list[str]:
    rows = memory_rows(plan, engine, setting)
    theirs = [] if adamw is None else memory_rows(adamw, engine, setting)
    sizes = {row.name: row.size for row in theirs}
    total, totals = total_bytes(rows), [total_bytes(rows), *([total_bytes(theirs)] if theirs else [])]
    lines = _table(
        ["rank with the most state", "MiB", *(["AdamW"] if theirs else [])],
        [
            *(
                (_where(row), _mib(row.size), *([_mib(sizes[row.name]) if row.name in sizes else ""] if theirs else []))
                for row in rows
            ),
            ("together", *map(_mib, totals)),
        ],
    )
    lines.append(f"Together {total / 1e9:,.2f} GB")
    if gpu is not None:
        verdict = "fits" if _fits(total, gpu) else "does NOT fit"
        lines[-1] += f": {verdict} into {gpu} ({GPUS[gpu] / 1e9:.0f} GB, of which a tenth is left free)"
        lines += wrap(setting.advice, WIDTH) if setting.advice else []
        if _lacks_bf16(gpu, setting):
            lines.append(f"{gpu} does not compute in bf16: set precision fp16 with DeepSpeed, or fp32")
    if on_host := total_bytes(rows, host=True):
        lines.append(f"On the host {on_host / 1e9:,.2f} GB for every rank of it")
    return lines


def _where(row: Row) -> str:
    return row.name + (", on the host" if row.host else "")


def _mib(size: int) -> str:
    return f"{size / MIB:,.1f}"


def _refresh_rows(plan: Plan, host: bool) -> list[Row]:
    """At most on any rank. A gradient that lies on the host is copied to the GPU, where its basis is computed. Within a
    backward pass most activations are still there.
    """
    solver = plan.solver + (plan.gradient if host else 0)
    rows = [
        Row("gathered gradients at a refresh", max(rank.refresh.gathered for rank in plan.ranked), host),
        Row("computing the largest basis (estimate)", solver),
        Row("drawing the largest basis (estimate)", plan.solver_on_host, host=True),
    ]
    return [replace(row, during="" if plan.released else "refresh") for row in rows if row.size]


def _state(plan: Plan, baselines: Mapping[str, Plan]) -> list[str]:
    rows = []
    for name, one in {"this": plan, **baselines}.items():
        sizes = (max(one.states), sum(one.states), one.papers)
        rows.append((name, *map(_mib, sizes)))
    lines = _table(["optimizer state, MiB", "most on a rank", "all ranks", "as the papers count"], rows)
    return [*lines, "The papers count the moments of the whole model, once: no bases, no counters"]


def _busiest(plan: Plan) -> tuple[RankPlan, RefreshPlan]:
    refresher = max((rank.refresh for rank in plan.ranked), key=lambda one: one.sent)
    return max(plan.ranked, key=lambda rank: rank.step_sent), refresher


def _traffic(plan: Plan) -> list[str]:
    busiest, refresher = _busiest(plan)
    lines = _table(
        ["sent by the optimizer", "MiB", "collectives"],
        [
            ("a step", _mib(busiest.step_sent), _calls(busiest.step_calls)),
            ("a refresh, beside the step", _mib(refresher.sent), _calls(refresher.calls)),
        ],
    )
    lines.append("On the busiest rank. What the engine sends, gradients and weights, is not in it")
    owned, work = plan.owned, plan.refresh_work
    if sum(work):
        balance = max(work) * len(work) / sum(work)
        lines += wrap(
            f"Refreshes are owned by {sum(count > 0 for count in owned)} of {plan.ranks} ranks, {min(owned)} to "
            f"{max(owned)} matrices each; the busiest has {balance:.2f} times the mean work",
            WIDTH,
        )
    return lines


def _calls(calls: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in calls.items() if count) or "none"


def _layouts(plan: Plan) -> list[str]:
    return _table(["matrices and where they are computed", "number"], [(k, str(n)) for k, n in plan.layouts.items()])


def _broken(row: Sequence[str], width: int) -> list[list[str]]:
    """A row as several, of which only the last cell goes on."""
    *before, last = row
    lines = wrap(last.replace(" ", "\0").replace(",\0", ", "), max(width, 20), break_long_words=False) or [""]
    first, *more = [line.replace("\0", " ") for line in lines]
    return [[*before, first], *([*([""] * len(before)), line] for line in more)]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """With a last column that is a list, it is broken after commas where the lines would get too long."""
    before = sum(max(len(line[i]) for line in (header, *rows)) + 3 for i in range(len(header) - 1))
    rows = [line for row in rows for line in _broken(row, WIDTH - before - 4)]
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
