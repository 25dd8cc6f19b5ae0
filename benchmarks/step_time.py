"""Step and refresh times of Frugal against torch's fused AdamW, on the Linear weights of a LLaMA of 60M parameters.

    python benchmarks/step_time.py                      # CPU, or CUDA where there is a GPU
    python benchmarks/step_time.py --json results.json

All contenders take turns, one step each in every round, so that whatever else the machine does hits them alike. Every
ratio compares two steps of the same round. Reported are medians, with the quartiles of the ratio.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch

from frugal_dist import PRESETS, Frugal, preset

# One layer: q, k, v, o; gate, up; down. A LLaMA of 60M has eight of them.
LAYER = [(512, 512)] * 4 + [(1376, 512)] * 2 + [(512, 1376)]
PROJECTIONS = ("columns", "rows", "randk", "randperm", "blockwise", "svd", "random", "signsgd")
CHOICES = (*PROJECTIONS, "dct", *PRESETS)
# How many times fused AdamW's time a step may take on the CPU.
GOALS = {"columns": 0.75, "rows": 0.75, "randk": 1.2, "blockwise": 1.0, "svd": 14.0, "signsgd": 0.5}


@dataclass
class Row:
    """One line of the report. Times in milliseconds; a refresh time is that of a whole step with a refresh in it."""

    name: str
    step: float
    ratio: float
    ratio_low: float
    ratio_high: float
    refresh: float | None
    goal: float | None

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return ""
        return "met" if self.ratio <= self.goal else "MISSED"


def machine(device: torch.device) -> dict[str, str]:
    """What the numbers were measured on."""
    found = {"torch": torch.__version__, "python": platform.python_version(), "threads": str(torch.get_num_threads())}
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), **found}
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {"device": model, **found}


def make_weights(layers: int, device: torch.device, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """The matrices, with gradients. All contenders share them: what a step costs does not depend on the numbers."""
    torch.manual_seed(0)
    weights = []
    for shape in LAYER * layers:
        weight = torch.nn.Parameter(0.02 * torch.randn(shape, device=device, dtype=dtype))
        weight.grad = torch.randn(shape, device=device, dtype=dtype)
        weights.append(weight)
    return weights


def make_frugal(weights: list[torch.nn.Parameter], projection: str, gap: int, density: float) -> Frugal:
    named = [(f"layers.{i}.weight", weight) for i, weight in enumerate(weights)]
    groups = [{"params": named, "projected": True}]
    settings = preset(projection) if projection in PRESETS else {"projection": projection}
    settings = {"density": density, **settings}
    return Frugal(groups, lr=1e-6, update_gap=gap, process_group=None, **settings)


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""What other programs on the machine take counts in the wall's time, not in the process' CPU time. With more than one
thread CPU time also counts threads that spin."""


def time_of(
    step: Callable[[], object],
    device: torch.device,
    clock: str = "wall",
    before: Callable[[], object] | None = None,
) -> float:
    """Milliseconds of one call, with the GPU's work in it; ``before`` is called first and not measured."""
    now = CLOCKS[clock]
    if before is not None:
        before()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = now()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (now() - start)


T = TypeVar("T")


def take_turns(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int,
    measured: Callable[[Callable[[], object]], T],
    enough: Callable[[], bool] = lambda: False,
) -> dict[str, list[T]]:
    """What every contender took in every round; the order within a round turns, so none always follows the same one.

    ``enough``: asked after each round, whether to stop early.
    """
    times: dict[str, list[T]] = {name: [] for name in contenders}
    names = list(contenders)
    for index in range(warmup + rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            found = measured(contenders[name])
            if index >= warmup:
                times[name].append(found)
        if index >= warmup and enough():
            break
    return times


def interleave(
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int,
    device: torch.device,
    clock: str = "wall",
    before: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of every contender in every round, in turns."""
    return take_turns(contenders, rounds, warmup, lambda step: time_of(step, device, clock, before))


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def measure(arguments: argparse.Namespace, device: torch.device) -> list[Row]:
    weights = make_weights(arguments.layers, device, getattr(torch, arguments.dtype))
    adamw = torch.optim.AdamW(weights, lr=1e-6, weight_decay=0.0, fused=True)
    # The first step of a run refreshes; with such a gap none of the timed ones does.
    ordinary = {p: make_frugal(weights, p, 10**9, arguments.density) for p in arguments.projections}
    steps: dict[str, Callable[[], object]] = {"fused AdamW": adamw.step}
    if arguments.deepspeed:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        # What ZeRO-Offload steps with; compiled at the first use.
        steps["DeepSpeedCPUAdam"] = DeepSpeedCPUAdam(weights, lr=1e-6, weight_decay=0.0).step
    steps |= {name: optimizer.step for name, optimizer in ordinary.items()}
    times = interleave(steps, arguments.rounds, arguments.warmup, device, arguments.clock)
    del ordinary, steps

    refresh_times: dict[str, list[float]] = {}
    if arguments.refresh_rounds:
        always = {p: make_frugal(weights, p, 1, arguments.density).step for p in arguments.projections}
        refresh_times = interleave(dict(always), arguments.refresh_rounds, 1, device, arguments.clock)

    rows = []
    base = times["fused AdamW"]
    for name, values in times.items():
        low, middle, high = quartiles([value / other for value, other in zip(values, base, strict=True)])
        refresh = statistics.median(refresh_times[name]) if name in refresh_times else None
        goal = GOALS.get(name) if device.type == "cpu" else None
        rows.append(Row(name, statistics.median(values), middle, low, high, refresh, goal))
    return rows


def table(rows: list[Row], gap: int) -> str:
    lines = [
        "| projection | step, ms | × fused AdamW | quartiles | step with refresh, ms | "
        f"mean step at T = {gap}, × | goal, × | |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    base = rows[0].step
    for row in rows:
        refresh = "–" if row.refresh is None else f"{row.refresh:.1f}"
        mean = "–" if row.refresh is None else f"{row.ratio + (row.refresh - row.step) / gap / base:.2f}"
        goal = "–" if row.goal is None else f"{row.goal:g}"
        spread = f"{row.ratio_low:.2f} to {row.ratio_high:.2f}"
        cells = [row.name, f"{row.step:.2f}", f"{row.ratio:.2f}", spread, refresh, mean, goal, row.verdict]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's choice)")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: on a busy machine, with --threads 1")
    parser.add_argument("--layers", type=int, default=8, help="layers of seven matrices (8: LLaMA-60M)")
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--gap", type=int, default=200, help="update_gap for the column of mean steps")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--refresh-rounds", type=int, default=3, help="0: do not time refreshes")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--projections", nargs="+", default=PROJECTIONS, choices=CHOICES, help="of FRUGAL, or presets")
    parser.add_argument("--deepspeed", action="store_true", help="DeepSpeedCPUAdam takes part, on the CPU")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    arguments = parser.parse_args(argv)
    if min(arguments.rounds, arguments.warmup, arguments.layers) < 1:
        parser.error("--rounds, --warmup and --layers must be at least 1")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    about = machine(device)
    shapes = f"{len(LAYER) * arguments.layers} matrices, {arguments.dtype}, density {arguments.density:g}"
    rows = measure(arguments, device)
    print(
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}; {shapes}; {arguments.rounds} rounds\n"
    )
    print(table(rows, arguments.gap))
    if arguments.json:
        report = {
            "machine": about,
            "settings": {key: str(value) for key, value in vars(arguments).items() if key != "json"},
            "rows": [asdict(row) | {"verdict": row.verdict} for row in rows],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
