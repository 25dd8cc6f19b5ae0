"""Size and time of checkpoints of a LLaMA of 60M parameters: frugal_dist.checkpoint against torch.save with AdamW.

    python benchmarks/checkpoint_time.py                      # 1 and 2 ranks (gloo processes on this machine)
    python benchmarks/checkpoint_time.py --json results.json

The yardstick is what a training with AdamW writes: torch.save of weights and optimizer state by one process, flushed to
disk, and torch.load of it. Frugal is saved as DDP ranks hold it: weights on each rank, state shared among them. All
contenders take turns. Reported are medians; reading comes from the page cache, as after a crash of the job alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from frugal_dist import Frugal, checkpoint

LAYER = [(512, 512)] * 4 + [(1376, 512)] * 2 + [(512, 1376)]
"""q, k, v, o; gate, up; down."""
VOCABULARY, WIDTH = 32_000, 512
PROJECTIONS = ("columns", "svd")


@dataclass
class Row:
    """One line of the report: mebibytes on disk, seconds."""

    name: str
    ranks: int
    size: float
    save: float
    load: float
    load_unverified: float | None


def make_model(layers: int, vocabulary: int, seed: int = 0) -> nn.Module:
    """The parameters of a LLaMA without its forward pass: matrices, embedding, head, norms."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Module()
    shapes = {f"layer{i}.{k}": shape for i in range(layers) for k, shape in enumerate(LAYER)}
    shapes |= {f"norm{i}": (WIDTH,) for i in range(2 * layers + 1)}
    shapes |= {"embedding": (vocabulary, WIDTH), "head": (vocabulary, WIDTH)}
    for name, shape in shapes.items():
        value = torch.empty(shape).normal_(0.0, 0.02, generator=generator)
        model.register_parameter(name.replace(".", "_"), nn.Parameter(value))
    return model


def set_gradients(model: nn.Module) -> None:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(1)
    for param in model.parameters():
        param.grad = torch.empty_like(param).normal_(generator=generator)


def make_frugal(model: nn.Module, projection: str) -> Frugal:
    """One step done, so that all state is there."""
    names = dict(model.named_parameters())
    projected = [(name, param) for name, param in names.items() if name.startswith("layer")]
    regular = [(name, param) for name, param in names.items() if not name.startswith("layer")]
    groups = [{"params": projected, "projected": True}, {"params": regular, "projected": False}]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Only .* of the parameters are projected")  # so small LLaMAs are
        optimizer = Frugal(groups, lr=1e-6, projection=projection, density=0.25)
    optimizer.step()
    return optimizer


# --- contenders: save(folder), load(folder), load without checksums -----------------------------------

Action = Callable[[Path], object]
Contender = tuple[Action, Action, Action | None]


def frugal(model: nn.Module, projection: str) -> Contender:
    optimizer = make_frugal(model, projection)

    def save(folder: Path) -> None:
        checkpoint.save(folder, model, optimizer)

    def load(folder: Path, verify: bool) -> None:
        checkpoint.load(folder, model, optimizer, verify=verify)

    return save, partial(load, verify=True), partial(load, verify=False)


def adamw(model: nn.Module) -> Contender:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    optimizer.step()

    def save(folder: Path) -> None:
        folder.mkdir()
        with (folder / "all.pt").open("wb") as file:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())

    def load(folder: Path) -> None:
        found = torch.load(folder / "all.pt", weights_only=True)
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])

    return save, load, None


def contenders(model: nn.Module, ranks: int) -> dict[str, Contender]:
    found: dict[str, Contender] = {} if ranks > 1 else {"AdamW, torch.save": adamw(model)}
    return found | {f"Frugal, {projection}": frugal(model, projection) for projection in PROJECTIONS}


# --- measuring ----------------------------------------------------------------------------------------


def seconds(action: Action, folder: Path) -> float:
    """From when all ranks begin until all have ended."""
    barrier()
    start = time.perf_counter()
    action(folder)
    barrier()
    return time.perf_counter() - start


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def size_of(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20


def measure(rank: int, ranks: int, root: Path, arguments: argparse.Namespace) -> list[Row]:
    """All contenders on so many ranks; the order turns from round to round."""
    model = make_model(arguments.layers, arguments.vocabulary)
    set_gradients(model)
    running = contenders(model, ranks)
    names, times, sizes = list(running), {name: [] for name in running}, {}  # type: ignore[var-annotated]
    for number in range(arguments.rounds + 1):  # the first is not counted
        for name in names[number % len(names) :] + names[: number % len(names)]:
            save, load, unverified = running[name]
            folder = root / name.replace(" ", "_")
            taken = [seconds(save, folder), seconds(load, folder), unverified and seconds(unverified, folder)]
            if number:
                times[name].append(taken)
            if rank == 0:
                sizes[name] = size_of(folder)
                shutil.rmtree(folder)
            barrier()
    rows = []
    for name, taken in times.items():
        saves, loads, others = zip(*taken, strict=True)
        plain = None if others[0] is None else statistics.median(others)
        size = sizes.get(name, 0.0)
        rows.append(Row(name, ranks, size, statistics.median(saves), statistics.median(loads), plain))
    return rows


def be_rank(rank: int, ranks: int, root: Path, arguments: argparse.Namespace, answer: Any) -> None:
    torch.set_num_threads(arguments.threads)
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=ranks)
    rows = measure(rank, ranks, root, arguments)
    if rank == 0:
        answer.put(rows)
    dist.destroy_process_group()


def measure_on(ranks: int, root: Path, arguments: argparse.Namespace) -> list[Row]:
    if ranks == 1:
        return measure(0, 1, root, arguments)
    answer = mp.get_context("spawn").SimpleQueue()
    mp.spawn(be_rank, (ranks, root, arguments, answer), nprocs=ranks, join=True)
    rows: list[Row] = answer.get()
    return rows


# --- report -------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    lines = [
        "| contender | ranks | MiB on disk | save, s | load, s | load without checksums, s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        plain = "–" if row.load_unverified is None else f"{row.load_unverified:.2f}"
        cells = [row.name, str(row.ranks), f"{row.size:.0f}", f"{row.save:.2f}", f"{row.load:.2f}", plain]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> str:
    cpuinfo, model = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} CPU cores, torch {torch.__version__}, Python {platform.python_version()}"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int, default=8, help="8: LLaMA-60M")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each rank")
    parser.add_argument("--folder", type=Path, help="on which disk (default: the system's folder for temporary files)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    arguments = parser.parse_args(argv)
    if min(arguments.rounds, arguments.layers, arguments.vocabulary, *arguments.ranks) < 1:
        parser.error("--rounds, --layers, --vocabulary and --ranks must be at least 1")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    rows: list[Row] = []
    for ranks in arguments.ranks:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            rows += measure_on(ranks, Path(folder), arguments)
    parameters = sum(param.numel() for param in make_model(arguments.layers, arguments.vocabulary).parameters())
    print(f"{machine()}; {parameters / 1e6:.1f} M parameters in fp32, medians of {arguments.rounds} rounds\n")
    print(table(rows))
    if arguments.json:
        report = {"machine": machine(), "parameters": parameters, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
