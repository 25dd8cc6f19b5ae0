"""The highest memory of a training step, measured, against what ``frugal-dist plan`` says.

    python benchmarks/peak_memory.py                                # LLaMA-60M, 256 tokens, whatever device there is
    python benchmarks/peak_memory.py --size 130M --tokens 512 --only svd
    python benchmarks/peak_memory.py --size 3B --tokens 64 --resident --only 24gb    # large models on a CPU

Every row is a recipe that a run of ``frugal-dist pretrain --engine single`` trains: three steps of two micro-batches,
of one where gradients are released, with a refresh in the first and the third. On CUDA the peak is the caching
allocator's; on a CPU that of torch's allocator, by its profiler, which sees temporaries inside of operators as well.
What libraries allocate by themselves (LAPACK, oneDNN) is in neither. ``--resident`` is what Linux says of the whole
process, beyond what it had before the model: the profiler's own records of a large model's steps fill gigabytes.
MALLOC_MMAP_THRESHOLD_=65536 gives memory back as soon as it is free.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from frugal_dist.planner import LLAMA_SHAPES
from frugal_dist.training.distributed.place import find_dist_env
from frugal_dist.training.engines import build_engine
from frugal_dist.training.models import build_model
from frugal_dist.training.plan import plan_recipe
from frugal_dist.training.recipe import Recipe, read_recipe

sys.path.insert(0, str(Path(__file__).parent))
from step_time import machine

STEPS = 3
MIB = 2**20
BF16 = ("--weights", "bf16", "--optimizer.options.rounding")
COLUMNS = ("--optimizer.options.projection", "columns")
RELEASED = ("--release_gradients", "true", "--batch", "1")
"""Gradients of micro-batches would have to add up."""
CODED = ("--optimizer.options.moments", "8bit")
ROWS: dict[str, tuple[str, ...]] = {
    "AdamW": ("--optimizer.name", "adamw"),
    "AdamW, bf16, remainders": ("--optimizer.name", "adamw", *BF16, "remainder"),
    "GaLore": ("--optimizer.name", "galore"),
    "Frugal svd": (),
    "Frugal columns": COLUMNS,
    "Frugal columns, bf16, remainders": (*COLUMNS, *BF16, "remainder"),
    "Frugal columns, bf16, stochastic": (*COLUMNS, *BF16, "stochastic"),
    "Frugal svd, bf16, remainders": (*BF16, "remainder"),
    "Frugal svd, bf16, stochastic": (*BF16, "stochastic"),
    "Frugal columns, released": (*COLUMNS, *RELEASED),
    "Frugal columns, 8-bit": (*COLUMNS, *CODED),
    "Frugal columns, bf16, stochastic, 8-bit, released": (*COLUMNS, *BF16, "stochastic", *CODED, *RELEASED),
    "as llama_7b_24gb": (*COLUMNS, *BF16, "stochastic", *CODED, *RELEASED, "--model.checkpointing", "true"),
}


def recipe_of(size: str, tokens: int, changes: tuple[str, ...]) -> Recipe:
    """The papers' setup at this size, and a refresh every second step."""
    plain = ("--model.llama", size, "--engine", "single", "--batch", "2", "--micro_batch", "1", "--length", str(tokens))
    return read_recipe("llama_60m", [*plain, "--optimizer.options.update_gap", "2", *changes])


def planned(recipe: Recipe) -> int:
    """Bytes at the peak on the device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: int = json.loads(plan_recipe(recipe, None, 1, as_json=True))["memory"]["this"]["peak"]
    return found


def measured(recipe: Recipe, device: torch.device, resident: bool) -> int:
    """Bytes at the peak of the steps: all that is alive, weights included."""
    empty = of_process("VmRSS")
    model = build_model(recipe.model, LLAMA_SHAPES[str(recipe.model.llama)].vocab, recipe.length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about how little is projected
        engine = build_engine(model, recipe, lambda step: 1.0, find_dist_env({}))
    rows = torch.randint(1, 1000, (recipe.batch, recipe.length + 1))
    gc.collect()
    before = sum(weight.numel() * weight.element_size() for weight in model.parameters())

    def steps() -> None:
        for _ in range(STEPS):
            engine.train_step(rows)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        steps()
        return torch.cuda.max_memory_allocated()
    if resident:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        steps()
        return of_process("VmHWM") - empty
    return before + highest(steps)


def of_process(key: str) -> int:
    """Bytes that Linux has under this key; 0 elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), 0)


def highest(run: Callable[[], None]) -> int:
    """By how much torch's CPU allocator held at most more than at first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    results: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = [(one.start_ns(), one.nbytes()) for one in results.events() if one.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        held += change
        most = max(most, held)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="60M", choices=LLAMA_SHAPES)
    parser.add_argument("--tokens", type=int, default=256, help="of the sequence in a step (default 256)")
    parser.add_argument("--resident", action="store_true", help="by the memory of the process, on Linux")
    parser.add_argument("--only", default="", help="rows with these words in their names")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(machine(device)))
    print(f"LLaMA-{arguments.size}, {arguments.tokens} tokens, {STEPS} steps; MiB\n")
    print("| optimizer | measured | planned | off |\n|---|---:|---:|---:|")
    if arguments.resident:
        measured(recipe_of("9M", 16, ROWS["as llama_7b_24gb"]), device, resident=True)  # what libraries load at first
    for name, changes in ROWS.items():
        if arguments.only not in name:
            continue
        recipe = recipe_of(arguments.size, arguments.tokens, changes)
        peak, plan = measured(recipe, device, arguments.resident), planned(recipe)
        print(f"| {name} | {peak / MIB:,.0f} | {plan / MIB:,.0f} | {plan / peak - 1:+.1%} |", flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
