"""Real processes that talk to each other, and a short training on each engine."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import astuple
from importlib.util import find_spec
from pathlib import Path

from frugal_dist.training.distributed.place import LAUNCHERS
from frugal_dist.training.doctor.machine import FAIL, NOTE, OK, Finding

PATIENCE = 300
"""Seconds after which a trial counts as hung."""
STEPS, VOCABULARY, LENGTH = 20, 256, 32
DEEPSPEED = {"zero2": 2, "zero3": 3}
ENGINES = ("single", "ddp", "fsdp2", *DEEPSPEED)

_JOBS = ("SLURM_", "PMI_", "PMIX_", "OMPI_", "MPI_LOCAL", "TORCHELASTIC_")
"""How the variables of launchers begin; MPI libraries look at some that tell no rank, too."""

_MODEL = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "use_cache": False,
}
_EXCHANGE = """
import torch, torch.distributed as dist, os
cuda = torch.cuda.is_available()
if cuda: torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl" if cuda else "gloo")
device = "cuda" if cuda else "cpu"
rank, world = dist.get_rank(), dist.get_world_size()
value = torch.full((1 << 20,), float(rank + 1), device=device)
dist.all_reduce(value)
assert bool((value == world * (world + 1) / 2).all()), "all_reduce gave a wrong sum"
told = torch.full((1 << 10,), float(rank), device=device)
dist.broadcast(told, world - 1)
assert bool((told == world - 1).all()), "broadcast gave wrong values"
dist.destroy_process_group()
"""


def ranks(folder: Path) -> Iterator[Finding]:
    """Two processes that reduce and broadcast: NCCL if there are two GPUs, gloo without a GPU."""
    name, count = _backend()
    if count < 2:
        yield Finding(NOTE, "ranks", "one GPU: what passes between GPUs was not tried")
        return
    with tempfile.TemporaryDirectory() as scratch:
        script = Path(scratch) / "exchange.py"
        script.write_text(_EXCHANGE)
        trouble = _run([*_torchrun(count), str(script)], Path(scratch))
    yield Finding(FAIL, "ranks", trouble) if trouble else Finding(OK, "ranks", f"{count} ranks exchange through {name}")


def _backend() -> tuple[str, int]:
    import torch

    return ("NCCL", min(torch.cuda.device_count(), 2)) if torch.cuda.is_available() else ("gloo", 2)


def engines(folder: Path) -> Iterator[Finding]:
    """A training of 20 steps on each engine, FRUGAL with svd: the loss must fall, and be the same everywhere."""
    missing = [name for name in ("transformers", "jsonargparse", "numpy") if find_spec(name) is None]
    if missing:
        yield Finding(NOTE, "engines", f"not tried without {', '.join(missing)}: pip install 'frugal_dist[train]'")
        return
    count = _backend()[1]
    reference = None
    with tempfile.TemporaryDirectory() as scratch:
        recipe = _prepare(Path(scratch))
        for engine in ENGINES:
            if (why := _cannot(engine, count)) is not None:
                yield Finding(NOTE, f"training, {engine}", why)
                continue
            finding, loss = _train(engine, 1 if engine == "single" else count, recipe, reference)
            reference = loss if reference is None else reference
            yield finding


def _cannot(engine: str, count: int) -> str | None:
    if engine in DEEPSPEED and find_spec("deepspeed") is None:
        return "DeepSpeed is not installed: pip install 'frugal_dist[deepspeed]'"
    return "needs two GPUs" if engine in ("ddp", "fsdp2") and count < 2 else None


def _prepare(scratch: Path) -> Path:
    """A recipe, its model and its data: counting upwards, which any model learns."""
    import numpy as np

    from frugal_dist.training.data.prepared import FORMAT, PreparedData, write_description

    (scratch / "model").mkdir()
    (scratch / "model" / "config.json").write_text(json.dumps(_MODEL))
    data = scratch / "data"
    data.mkdir()
    tokens = (np.arange(40_000) % (VOCABULARY - 1) + 1).astype(np.uint16)
    tokens.tofile(data / "train.bin")
    tokens[:4_000].tofile(data / "validation.bin")
    write_description(data, PreparedData(FORMAT, "doctor", "counting", VOCABULARY, "uint16", 0, 40_000, 4_000))
    for name, stage in DEEPSPEED.items():
        (scratch / f"{name}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    recipe = {
        "model": {"path": str(scratch / "model")},
        "data": {"path": str(data)},
        "optimizer": {"lr": 1e-2, "options": {"projection": "svd", "update_gap": 10}},
        "steps": STEPS,
        "batch": 16,
        "length": LENGTH,
        "precision": "fp32",
        "evaluate_every": 0,
        "evaluation_tokens": 1024,
        "saving": {"every": 0},
    }
    path = scratch / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def _train(engine: str, count: int, recipe: Path, reference: float | None) -> tuple[Finding, float | None]:
    from frugal_dist.training.metrics.record import of_kind, read_metrics

    what, run = f"training, {engine}", recipe.parent / engine
    stage = ["--engine", "deepspeed", "--deepspeed", str(recipe.parent / f"{engine}.json")]
    changes = ["--folder", str(run), *(stage if engine in DEEPSPEED else ["--engine", engine])]
    program = ["-m", "frugal_dist.cli", "pretrain", str(recipe), *changes]
    trouble = _run([*([sys.executable] if engine == "single" else _torchrun(count)), *program], recipe.parent)
    if trouble:
        return Finding(FAIL, what, trouble), None
    first, last = (record["loss"] for record in of_kind(read_metrics(run), "validation"))
    text = f"loss {first:.2f} -> {last:.2f} in {STEPS} steps on {count} rank{'s'[: count > 1]}"
    if not last < first - 1:
        return Finding(FAIL, what, f"{text}: it does not learn"), last
    if reference is not None and not math.isclose(last, reference, rel_tol=0.05):
        return Finding(FAIL, what, f"{text}, but {reference:.2f} on one process"), last
    return Finding(OK, what, text), last


# --- processes ------------------------------------------------------------------------------------------------------


def _torchrun(count: int) -> list[str]:
    # Port 0: whichever is free.
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", *rendezvous]


def without_place(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what launchers say of ranks: the doctor may itself run inside a job."""
    told = {name for launcher in LAUNCHERS.values() for name in astuple(launcher) if isinstance(name, str)}
    told |= {"MASTER_ADDR", "MASTER_PORT"}
    return {name: value for name, value in environ.items() if name not in told and not name.startswith(_JOBS)}


def _run(command: list[str], scratch: Path) -> str:
    """Run to the end; returns nothing, or what went wrong, with the last words of the processes."""
    environment = without_place(os.environ) | {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2)),
        "PYTHONWARNINGS": "ignore",
    }
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment.get('PATH', '')}"  # ninja
    log = scratch / "trial.log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=scratch, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | str = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            code = f"no end after {PATIENCE} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
    if code == 0:
        return ""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "failed" in line] or lines
    return f"exit {code}: {telling[0] if telling else 'no output'}" if isinstance(code, int) else f"{code}"
