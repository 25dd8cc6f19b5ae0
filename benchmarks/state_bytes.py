"""Optimizer state per rank under every ZeRO stage, Frugal's against AdamW's, counted on real DeepSpeed engines.

    python benchmarks/state_bytes.py                                # the quickstart's LLaMA, 1, 2 and 4 ranks
    python benchmarks/state_bytes.py --size 60M --ranks 2 --stages 2

Every number is the sum of the tensors in the optimizer's state after one step, on the rank that holds most; masters and
weights are not in it. Runs on the CPU; bytes do not depend on the device.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import nn

LENGTH, VOCAB = 8, 4096
FRUGAL: dict[str, dict[str, Any]] = {
    "svd": {"projection": "svd", "density": 0.25},
    "columns": {"projection": "columns", "density": 0.25},
    "randk": {"projection": "randk", "density": 0.25},
    "blockwise": {"projection": "blockwise", "density": 0.25},
    "density 0": {"projection": "columns", "density": 0.0},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    **{name: {"type": "Frugal", "params": {"lr": 1e-3, **params}} for name, params in FRUGAL.items()},
}


def state_bytes(model: nn.Module, stage: int, optimizer: str) -> int:
    """Bytes of this rank's optimizer state after one step. Collective."""
    import deepspeed

    import frugal_dist  # noqa: F401  (makes "Frugal" known)

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "optimizer": OPTIMIZERS[optimizer],
    }
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
    tokens = torch.arange(LENGTH)[None].to(engine.device)
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    stores = engine.basic_optimizer.state.values()
    found = sum(t.numel() * t.element_size() for store in stores for t in store.values() if torch.is_tensor(t))
    engine.destroy()
    return found


def _rank(rank: int, ranks: int, port: int, size: str, stages: list[int], results: Any) -> None:
    """One process: all stages and optimizers; what every rank found goes into ``results``."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {key: str(value) for key, value in place.items()} | {"DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    import deepspeed

    from frugal_dist.training.models import build_llama

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    for stage in stages:
        for optimizer in OPTIMIZERS:
            results[ranks, stage, optimizer, rank] = state_bytes(build_llama(size, VOCAB, LENGTH), stage, optimizer)


def measure(size: str, ranks: list[int], stages: list[int]) -> dict[tuple[int, int, str], int]:
    """The largest number of bytes on any rank, by (ranks, stage, optimizer)."""
    with mp.Manager() as manager:
        results = manager.dict()
        for number in ranks:
            mp.spawn(_rank, (number, _free_port(), size, stages, results), nprocs=number)
        found: dict[tuple[int, int, str], int] = {}
        for (number, stage, optimizer, _), count in results.items():
            key = (number, stage, optimizer)
            found[key] = max(count, found.get(key, 0))
    return found


def table(found: dict[tuple[int, int, str], int]) -> str:
    """In MB, with the share of AdamW's bytes under the same stage."""
    lines = [["stage", "ranks", *OPTIMIZERS]]
    for stage, number in sorted({(stage, number) for number, stage, _ in found}):
        counts = {name: found[number, stage, name] for name in OPTIMIZERS}
        cells = [f"{count / 1e6:.2f} ({count / counts['AdamW']:.0%})" for count in counts.values()]
        lines.append([str(stage), str(number), *cells])
    lines.insert(1, ["---:" for _ in lines[0]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="quick", help="a LLaMA of frugal-dist memory, or quick (5M)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], choices=range(4))
    given = parser.parse_args(arguments)
    os.environ["PYTHONWARNINGS"] = "ignore"  # the ranks': torch and DeepSpeed about each other
    print(
        f"LLaMA {given.size}, MB of optimizer state on the fullest rank (share of AdamW's); torch {torch.__version__}\n"
    )
    print(table(measure(given.size, given.ranks, given.stages)))


if __name__ == "__main__":
    sys.exit(main())
