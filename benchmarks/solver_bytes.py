"""What computing a basis takes of memory, beside what `frugal-dist plan` estimates. One method a process.

    python benchmarks/solver_bytes.py exact 4096 1376

Measured is by how much the process' peak grows over the memory that it has once the gradient is there; set
MALLOC_MMAP_THRESHOLD_=65536 to leave out what glibc keeps of freed memory.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from frugal_dist.planner.solver import solver_bytes
from frugal_dist.projection.basis import Basis, exact_svd, random_basis
from frugal_dist.projection.subspace import gram_svd, subspace_svd

MIB = 2**20
METHODS: dict[str, Callable[[Tensor, str, int], Basis]] = {
    "exact": exact_svd,
    "subspace": lambda grad, side, r: subspace_svd(grad, side, r, None, seed=0, name="w", refresh=0),
    "gram64": gram_svd,
    "random": lambda grad, side, r: random_basis(*grad.shape, side, r, seed=0, name="w", refresh=0, dtype=grad.dtype),
}


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute one basis and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("rows", type=int)
    parser.add_argument("cols", type=int)
    parser.add_argument("--density", type=float, default=0.25)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows, cols = options.rows, options.cols
    side, r = "right" if rows >= cols else "left", round(options.density * min(rows, cols))
    METHODS[options.method](torch.randn(64, 64), side, 8)  # libraries take memory when they are first used
    grad = torch.randn(rows, cols)
    before = resident()
    METHODS[options.method](grad, side, r)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    estimate = solver_bytes(options.method, rows, cols, side, r)
    name = f"{options.method}, {rows}x{cols}, r = {r}"
    print(f"{name}: estimated {estimate / MIB:.1f} MiB, measured {(peak - before) / MIB:.1f} MiB")


if __name__ == "__main__":
    main()
