"""What computing a basis takes of memory, beside what `frugal-dist plan` estimates. One method a process.

    python benchmarks/solver_bytes.py exact 4096 1376

Measured is by how much the process' peak grows over the memory that it has once the gradient is there; set
MALLOC_MMAP_THRESHOLD_=65536 to leave out what glibc keeps of freed memory.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from frugal_dist import FrugalConfig
from frugal_dist.config import CHOICES
from frugal_dist.projection import PROJECTIONS, Basis
from frugal_dist.projection.definition import Drawing

MIB = 2**20
CONFIGS = {
    **{method: FrugalConfig(svd_method=method) for method in CHOICES["svd_method"]},
    "random": FrugalConfig(projection="random"),
}


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def compute(config: FrugalConfig, grad: Tensor, side: str, r: int) -> Basis:
    """A first basis of ``grad``."""
    return PROJECTIONS[config.projection].compute(grad, Drawing(config, "w", *grad.shape, 0, side, r), None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute one basis and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=CONFIGS)
    parser.add_argument("rows", type=int)
    parser.add_argument("cols", type=int)
    parser.add_argument("--density", type=float, default=0.25)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config, rows, cols = CONFIGS[options.method], options.rows, options.cols
    side, r = "right" if rows >= cols else "left", round(options.density * min(rows, cols))
    compute(config, torch.randn(64, 64), side, 8)  # libraries take memory when they are first used
    grad = torch.randn(rows, cols)
    before = resident()
    compute(config, grad, side, r)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    estimate = PROJECTIONS[config.projection].scratch(config, rows, cols, side, r)
    name = f"{options.method}, {rows}x{cols}, r = {r}"
    print(f"{name}: estimated {estimate / MIB:.1f} MiB, measured {(peak - before) / MIB:.1f} MiB")


if __name__ == "__main__":
    main()
