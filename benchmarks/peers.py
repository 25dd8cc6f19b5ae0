"""Step, refresh and state of Frugal against other optimizers that can be installed, on the Linear weights of a LLaMA.

    pip install --no-deps galore-torch apollo-torch bitsandbytes pytorch_optimizer     # or a part of them
    python benchmarks/peers.py --json peers.json --plot peers.png
    python benchmarks/peers.py --size 7B --layers 1                    # one layer of a larger model

All take turns, one step each in every round; a ratio compares two steps of the same round. A contender that is not
installed, or needs a GPU where there is none, is named with the reason. The refresh time is that of a step in which a
projector is computed, beyond an ordinary one. Peak memory is what a step allocates beyond its state, on CUDA only.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frugal_dist.planner import LLAMA_SHAPES

sys.path.insert(0, str(Path(__file__).parent))
from step_time import CLOCKS, interleave, machine, make_frugal, quartiles, time_of

Params = list[torch.nn.Parameter]
NEVER = 10**9
SLACK = 1.3
"""Gradients, weights, states and as much again of scratch as the largest step is seen to need."""


@dataclass(frozen=True)
class Contender:
    """``build(params, density, gap)`` makes the optimizer; ``refreshes``: with gap=1 each step computes projectors."""

    build: Callable[[Params, float, int], torch.optim.Optimizer]
    refreshes: bool = False
    cuda: bool = False


@dataclass
class Row:
    """One line. Milliseconds and bytes; None where it does not apply."""

    name: str
    step: float
    ratio: float
    ratio_low: float
    ratio_high: float
    state: int
    refresh: float | None = None
    peak: int | None = None


@dataclass
class Report:
    """What was measured, and what was not and why."""

    rows: list[Row] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


def _frugal(projection: str, **options: Any) -> Callable[[Params, float, int], torch.optim.Optimizer]:
    def build(params: Params, density: float, gap: int) -> torch.optim.Optimizer:
        optimizer = make_frugal(params, projection, gap, density)
        for group in optimizer.param_groups:
            group.update(options)
        return optimizer

    return build


def _low_rank_group(params: Params, density: float, gap: int, **more: Any) -> list[dict[str, Any]]:
    """Parameter groups as galore-torch and apollo-torch take them: one rank for all, that of the smaller dims."""
    rank = round(density * min(min(p.shape) for p in params))
    return [{"params": params, "rank": rank, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std", **more}]


def _galore(params: Params, density: float, gap: int) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    return GaLoreAdamW(_low_rank_group(params, density, gap), lr=1e-6, no_deprecation_warning=True)


def _apollo(params: Params, density: float, gap: int) -> torch.optim.Optimizer:
    from apollo_torch import APOLLOAdamW

    more = {"proj": "random", "scale_type": "channel"}
    return APOLLOAdamW(_low_rank_group(params, density, gap, **more), lr=1e-6, no_deprecation_warning=True)


def _fira(params: Params, density: float, gap: int) -> torch.optim.Optimizer:
    from pytorch_optimizer import Fira

    groups = _low_rank_group(params, density, gap)
    groups[0]["projection_type"] = groups[0].pop("proj_type")
    return Fira(groups, lr=1e-6)


def _bitsandbytes(params: Params, density: float, gap: int) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params, lr=1e-6)


def _torchao(params: Params, density: float, gap: int) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, lr=1e-6)


def _flashoptim(params: Params, density: float, gap: int) -> torch.optim.Optimizer:
    from flashoptim import FlashAdamW

    return FlashAdamW(params, lr=1e-6)


def _deepspeed(params: Params, density: float, gap: int) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import FusedAdam

    return FusedAdam(params, lr=1e-6)


BASE = "AdamW, fused"
CONTENDERS: dict[str, Contender] = {
    BASE: Contender(lambda p, d, g: torch.optim.AdamW(p, lr=1e-6, weight_decay=0.0, fused=True)),
    "AdamW, foreach": Contender(lambda p, d, g: torch.optim.AdamW(p, lr=1e-6, weight_decay=0.0, foreach=True)),
    "Muon (torch)": Contender(lambda p, d, g: torch.optim.Muon(p, lr=1e-6)),
    **{f"Frugal {name}": Contender(_frugal(name)) for name in ("columns", "rows", "randk", "blockwise", "signsgd")},
    "Frugal svd": Contender(_frugal("svd"), refreshes=True),
    "Frugal svd, subspace": Contender(_frugal("svd", svd_method="subspace"), refreshes=True),
    "Frugal svd, gram64": Contender(_frugal("svd", svd_method="gram64"), refreshes=True),
    "GaLore (galore-torch)": Contender(_galore, refreshes=True),
    "APOLLO (apollo-torch)": Contender(_apollo, refreshes=True),
    "Fira (pytorch_optimizer)": Contender(_fira, refreshes=True),
    "AdamW 8-bit (bitsandbytes)": Contender(_bitsandbytes, cuda=True),
    "AdamW 8-bit (torchao)": Contender(_torchao, cuda=True),
    "FlashAdamW (flashoptim)": Contender(_flashoptim, cuda=True),
    "FusedAdam (DeepSpeed)": Contender(_deepspeed, cuda=True),
}


def shapes_of(size: str, layers: int) -> list[tuple[int, int]]:
    """The Linear weights of ``layers`` layers; 0: all of the model's."""
    llama = LLAMA_SHAPES[size]
    hidden, inner = llama.hidden, llama.intermediate
    layer = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
    return layer * (layers or llama.layers)


def check_memory(shapes: list[tuple[int, int]], contenders: int, device: torch.device, itemsize: int) -> None:
    """Ends the program, before anything is allocated, if not all contenders' state fits at the same time."""
    elements = sum(rows * cols for rows, cols in shapes)
    needed = int(SLACK * elements * (2 * itemsize + 8 * contenders))
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    if needed > free:
        fitting = len(shapes) // 7 * free // needed
        advice = f"--layers {fitting}" if fitting else "fewer --contenders"
        raise SystemExit(f"This needs about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} are free: try {advice}.")


def make_params(shapes: list[tuple[int, int]], device: torch.device, dtype: torch.dtype) -> Params:
    torch.manual_seed(0)
    params = []
    for shape in shapes:
        params.append(torch.nn.Parameter(0.02 * torch.randn(shape, device=device, dtype=dtype)))
        params[-1].grad = torch.randn(shape, device=device, dtype=dtype)
    return params


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Tensors in the state, and in the plain objects (projectors) that some keep there."""
    found: dict[int, Tensor] = {}

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value
        elif isinstance(value, dict):
            for each in value.values():
                look(each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                look(each)
        elif hasattr(value, "__dict__"):
            look(vars(value))

    for store in optimizer.state.values():
        look(store)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def start(names: list[str], params: Params, density: float, gap: int, missing: dict[str, str]) -> dict[str, Any]:
    """The optimizers after a first step; those that cannot run are noted."""
    found = {}
    for name in names:
        if CONTENDERS[name].cuda and not params[0].is_cuda:
            missing[name] = "needs a GPU"
            continue
        try:
            found[name] = CONTENDERS[name].build(params, density, gap)
            found[name].step()
        except Exception as error:  # not installed, or its operations cannot be built here
            if name.startswith(("Frugal", BASE)):
                raise
            missing[name] = f"does not run here: {type(error).__name__}: {error}"
            found.pop(name, None)
    return found


def measure(arguments: argparse.Namespace, device: torch.device) -> Report:
    dtype, report, clock = getattr(torch, arguments.dtype), Report(), arguments.clock
    shapes = shapes_of(arguments.size, arguments.layers)
    check_memory(shapes, len(arguments.contenders), device, dtype.itemsize)
    params = make_params(shapes, device, dtype)
    optimizers = start(arguments.contenders, params, arguments.density, NEVER, report.missing)
    times = interleave({n: o.step for n, o in optimizers.items()}, arguments.rounds, arguments.warmup, device, clock)
    for name, values in times.items():
        low, middle, high = quartiles([one / base for one, base in zip(values, times[BASE], strict=True)])
        row = Row(name, statistics.median(values), middle, low, high, state_bytes(optimizers[name]))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            time_of(optimizers[name].step, device)
            row.peak = torch.cuda.max_memory_allocated(device) - before
        report.rows.append(row)
    del optimizers
    gc.collect()
    if arguments.refresh_rounds:
        again = [name for name in times if CONTENDERS[name].refreshes]
        always = start(again, params, arguments.density, 1, {})
        refreshes = interleave({n: o.step for n, o in always.items()}, arguments.refresh_rounds, 0, device, clock)
        for row in report.rows:
            if row.name in refreshes:
                row.refresh = statistics.median(refreshes[row.name]) - row.step
    return report


def table(report: Report) -> str:
    lines = ["| optimizer | step, ms | × fused AdamW | quartiles | refresh, ms | state, MB | peak beyond, MB |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for row in report.rows:
        refresh = "–" if row.refresh is None else f"{row.refresh:.0f}"
        peak = "–" if row.peak is None else f"{row.peak / 1e6:.0f}"
        spread = f"{row.ratio_low:.2f} to {row.ratio_high:.2f}"
        cells = [row.name, f"{row.step:.1f}", f"{row.ratio:.2f}", spread, refresh, f"{row.state / 1e6:.1f}", peak]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *(f"\nNot measured: {name} ({why})." for name, why in report.missing.items())])


def plot(report: Report, path: Path) -> None:
    """Step time against state, one point per optimizer."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(8, 5), layout="constrained")).subplots()
    for row in report.rows:
        axes.scatter(row.state / 1e6, row.ratio, color="C0" if row.name.startswith("Frugal") else "C1")
        axes.annotate(row.name, (row.state / 1e6, row.ratio), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(yscale="log", xlabel="optimizer state, MB", ylabel="step time, multiples of fused AdamW")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    figure.savefig(path, dpi=120)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="60M", choices=LLAMA_SHAPES)
    parser.add_argument("--layers", type=int, default=0, help="how many of its layers (0: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: on a busy machine, with --threads 1")
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--refresh-rounds", type=int, default=3, help="0: do not time refreshes")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args(argv)
    if BASE not in arguments.contenders:
        arguments.contenders.insert(0, BASE)
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    about, report = machine(device), measure(arguments, device)
    layers = arguments.layers or LLAMA_SHAPES[arguments.size].layers
    print(f"{about['device']}, {about['threads']} threads ({arguments.clock} time), torch {about['torch']}")
    shown = f"LLaMA-{arguments.size}, {layers} layers, {arguments.dtype}, density {arguments.density:g}"
    print(f"{shown}; {arguments.rounds} rounds\n\n{table(report)}")
    if arguments.json:
        shown = {key: str(value) for key, value in vars(arguments).items() if key not in ("json", "plot")}
        rows = [asdict(row) for row in report.rows]
        found = {"machine": about, "settings": shown, "rows": rows, "missing": report.missing}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    if arguments.plot:
        plot(report, arguments.plot)


if __name__ == "__main__":
    main()
