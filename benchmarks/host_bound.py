"""How much of a step is Python: the step of many tiny matrices against fused AdamW's, and calls per matrix.

    python benchmarks/host_bound.py [PROJECTION ...]

On a GPU the host must be done with a matrix before the device is. Tiny matrices show what the host takes: they cost the
device nothing. One thread, CPU time, contenders in turns, medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from types import FrameType

import torch

import frugal_dist
from frugal_dist import Frugal

PACKAGE = str(Path(frugal_dist.__file__).parent)
CONTENDERS = ("density 0", "columns", "rows", "randk", "blockwise", "svd")


def tiny(matrices: int, size: int) -> list[tuple[str, torch.nn.Parameter]]:
    """Named matrices with gradients."""
    torch.manual_seed(0)
    named = [(f"layers.{i}.weight", torch.nn.Parameter(torch.randn(size, size))) for i in range(matrices)]
    for _, weight in named:
        weight.grad = torch.randn(size, size)
    return named


def build(name: str, matrices: int, size: int) -> torch.optim.Optimizer:
    """One contender, between two refreshes."""
    named = tiny(matrices, size)
    if name == "fused AdamW":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW([weight for _, weight in named], fused=True)
    else:
        options = {"projection": "columns", "density": 0.0} if name == "density 0" else {"projection": name}
        groups = [{"params": named, "projected": True}]
        optimizer = Frugal(groups, update_gap=10**9, process_group=None, **options)  # type: ignore[arg-type]
    for _ in range(3):
        optimizer.step()
    return optimizer


def calls_of(optimizer: torch.optim.Optimizer) -> int:
    """Calls of the package's Python functions in one step."""
    calls = 0

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    sys.setprofile(count)
    optimizer.step()
    sys.setprofile(None)
    return calls


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("projections", nargs="*", default=list(CONTENDERS), metavar="PROJECTION")
    parser.add_argument("--matrices", type=int, default=168, help="168: a LLaMA of 1B")
    parser.add_argument("--size", type=int, default=16, help="rows and columns of each")
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    names = ["fused AdamW", *arguments.projections]
    optimizers = {name: build(name, arguments.matrices, arguments.size) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name, optimizer in optimizers.items():
            begin = time.process_time()
            optimizer.step()
            times[name].append(time.process_time() - begin)
    base = statistics.median(times["fused AdamW"])
    print("| | µs per matrix | × fused AdamW | calls per matrix |\n|---|---:|---:|---:|")
    for name, optimizer in optimizers.items():
        middle, calls = statistics.median(times[name]), calls_of(optimizer) / arguments.matrices
        print(f"| {name} | {1e6 * middle / arguments.matrices:.1f} | {middle / base:.1f} | {calls:.1f} |")


if __name__ == "__main__":
    main()
