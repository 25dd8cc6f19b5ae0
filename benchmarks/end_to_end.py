"""Tokens per second of a whole training with Frugal against AdamW: a recipe's model, batch and update_gap.

    python benchmarks/end_to_end.py                                        # LLaMA-60M, 512 sequences of 256 tokens
    torchrun --nproc-per-node 2 benchmarks/end_to_end.py                   # DDP
    python benchmarks/end_to_end.py --real-batch 8                         # and whole steps at a smaller batch

A step of the recipe takes minutes on a CPU, so it is put together from parts that take turns in one run: forward and
backward of one micro-batch, the optimizer's step, and what a refresh takes beyond it, of which each step bears 1/gap:

    time = (micro-batches in a batch) x (forward and backward) + step + refresh / gap

A micro-batch is taken to cost the same whatever the optimizer: all of them train the same model. ``--real-batch`` also
measures whole steps (without refreshes), as a check.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from frugal_dist import Frugal, split_parameters
from frugal_dist.planner import LLAMA_SHAPES

sys.path.insert(0, str(Path(__file__).parent))
from step_time import CLOCKS, interleave, machine

FRUGAL: dict[str, dict[str, Any]] = {
    "columns": {"projection": "columns"},
    "svd": {"projection": "svd"},
    "svd, subspace": {"projection": "svd", "svd_method": "subspace"},
}
REFRESHING = ("svd", "svd, subspace")
NEVER = 10**9


class Bench:
    """One model, whose parameters all optimizers share, and the parts of a step.

    ``losses(model, rows)``: of every token.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        device: torch.device,
        model: nn.Module,
        losses: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    ) -> None:
        self.arguments, self.device, self.losses = arguments, device, losses
        self.vocab = LLAMA_SHAPES[arguments.size].vocab
        self.plain = model.to(device)
        self.ranks = int(os.environ.get("WORLD_SIZE", "1"))
        self.model: Any = self.plain if self.ranks == 1 else nn.parallel.DistributedDataParallel(self.plain)
        shape = (arguments.micro, arguments.length + 1)
        self.rows = torch.randint(self.vocab, shape, device=device)

    def micro_batch(self, last: bool = True) -> None:
        """Forward and backward; the ranks exchange gradients only in the last of a batch."""
        quiet = nullcontext() if last or self.ranks == 1 else self.model.no_sync()
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.arguments.precision == "bf16")
        with quiet, half:
            loss = self.losses(self.model, self.rows).mean()
            loss.backward()  # type: ignore[no-untyped-call]

    def adamw(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.plain.parameters(), lr=1e-6, weight_decay=0.0, fused=True)

    def frugal(self, name: str, gap: int, **more: Any) -> torch.optim.Optimizer:
        options = {"density": 0.25, **FRUGAL.get(name, {}), **more}
        return Frugal(split_parameters(self.plain), lr=1e-6, update_gap=gap, **options)

    def whole_step(self, optimizer: torch.optim.Optimizer, batch: int) -> Callable[[], None]:
        """A step of ``batch`` sequences over all ranks."""
        count = max(1, batch // (self.arguments.micro * self.ranks))

        def step() -> None:
            optimizer.zero_grad()
            for number in range(count):
                self.micro_batch(last=number == count - 1)
            optimizer.step()

        return step


def measure(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    from frugal_dist.training.models import build_llama, token_losses

    torch.manual_seed(0)
    llama = build_llama(arguments.size, LLAMA_SHAPES[arguments.size].vocab, arguments.length)
    bench = Bench(arguments, device, llama, token_losses)
    bench.micro_batch()
    optimizers = {"AdamW": bench.adamw(), **{name: bench.frugal(name, NEVER) for name in FRUGAL}}
    for optimizer in optimizers.values():
        optimizer.step()
    refreshing = {f"{name}: refresh": bench.frugal(name, 1).step for name in REFRESHING}
    parts: dict[str, Callable[[], Any]] = {"micro-batch": bench.micro_batch}
    if bench.ranks > 1:
        parts["micro-batch, not exchanged"] = lambda: bench.micro_batch(last=False)
    parts |= {name: optimizer.step for name, optimizer in optimizers.items()}
    parts |= dict(refreshing)
    # Ranks start each part together, so that nobody's waiting is measured in another part.
    before = dist.barrier if bench.ranks > 1 else None
    times = interleave(parts, arguments.rounds, arguments.warmup, device, arguments.clock, before)
    found = {name: statistics.median(values) for name, values in times.items()}
    result = {"parts": found, "tokens_per_second": composed(arguments, bench.ranks, found)}
    if arguments.real_batch:
        steps = {name: bench.whole_step(o, arguments.real_batch) for name, o in optimizers.items()}
        times = interleave(dict(steps), arguments.rounds, 1, device, arguments.clock, before)
        rows = max(arguments.real_batch, arguments.micro * bench.ranks)
        medians = {name: statistics.median(values) for name, values in times.items()}
        result["real"] = {name: 1e3 * rows * arguments.length / value for name, value in medians.items()}
    return result


def composed(
    arguments: argparse.Namespace, ranks: int, parts: dict[str, float], names: Sequence[str] = ("AdamW", *FRUGAL)
) -> dict[str, float]:
    """Tokens per second at the recipe's batch and update_gap."""
    count = max(1, arguments.batch // (arguments.micro * ranks))
    alone = parts.get("micro-batch, not exchanged", parts["micro-batch"])
    work = (count - 1) * alone + parts["micro-batch"]
    found = {}
    for name in names:
        refresh = parts.get(f"{name}: refresh", parts[name]) - parts[name]
        found[name] = 1e3 * arguments.batch * arguments.length / (work + parts[name] + refresh / arguments.gap)
    return found


def tables(arguments: argparse.Namespace, result: dict[str, Any]) -> str:
    lines = ["| part | ms |", "|---|---:|", *(f"| {name} | {value:.1f} |" for name, value in result["parts"].items())]
    for key, title in (("tokens_per_second", f"batch {arguments.batch}, T = {arguments.gap}"), ("real", "whole steps")):
        if key in result:
            base = result[key]["AdamW"]
            lines += ["", f"| {title} | tokens/s | × AdamW |", "|---|---:|---:|"]
            lines += [f"| {name} | {value:.1f} | {value / base:.4f} |" for name, value in result[key].items()]
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="60M", choices=LLAMA_SHAPES)
    parser.add_argument("--batch", type=int, default=512, help="sequences per step over all ranks")
    parser.add_argument("--micro", type=int, default=4, help="sequences in a micro-batch")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--gap", type=int, default=200, help="update_gap")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"], help="bf16: autocast, as the recipes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--real-batch", type=int, default=0, help="also time whole steps of so many sequences")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: on a busy machine, with --threads 1")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    result = {"machine": machine(device), "ranks": ranks, **measure(arguments, device)}
    if not ranks > 1 or dist.get_rank() == 0:
        about = result["machine"]
        print(
            f"{about['device']}, {ranks} ranks of {about['threads']} threads ({arguments.clock} time), torch", end=" "
        )
        print(f"{about['torch']}; LLaMA-{arguments.size}, {arguments.precision}\n\n{tables(arguments, result)}")
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
