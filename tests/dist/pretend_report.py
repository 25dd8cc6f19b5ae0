"""``python tests/dist/pretend_report.py CHECKOUT OUT SECTION ...``: benchmarks/gpu_report.py on the pretended GPU.

Where the report asks CUDA for time and memory, it gets the CPU's time and invented bytes, so that all its lines run.
"""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretend_gpu import gpu, installed


class Event:
    def __init__(self, enable_timing: bool) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.time - self.time)


CALLS: dict[str, Any] = {
    "Event": Event,
    "_sleep": lambda cycles: time.sleep(min(cycles / 2e9, 0.01)),
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "memory_allocated": lambda device=None: 1000,
    "max_memory_allocated": lambda device=None: 2000,
    "reset_peak_memory_stats": lambda device=None: None,
    "mem_get_info": lambda device=None: (1 << 34, 1 << 35),
    "get_device_name": lambda device=None: "Pretended",
    "get_device_properties": lambda device=None: SimpleNamespace(total_memory=1 << 35, multi_processor_count=1),
}


def main(checkout: str, out: str, *names: str) -> int:
    sys.path[:0] = [f"{checkout}/benchmarks", checkout]
    import gpu_report
    import gpu_sections

    given = gpu_report.parse(["--device", "cuda", "--tiny", "--out", out, "--sections", *names])
    with pytest.MonkeyPatch.context() as patch, installed(), gpu():
        patch.setenv("FRUGAL_KERNELS", "torch")
        patch.setattr(gpu_sections, "has_events", lambda device: True)
        for name, call in CALLS.items():
            patch.setattr(torch.cuda, name, call)
        return int(gpu_report.measure(given, given.sections, time.time() + 600))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
