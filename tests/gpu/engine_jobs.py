"""``torchrun ... engine_jobs.py DEVICE FOLDER JOB ...``: one rank of small trainings on every engine.

Each rank writes what a job found, or its traceback, to ``FOLDER/JOB.RANK.json``.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from frugal_dist import Frugal, split_parameters, step_in_backward

STEPS, ROWS, WIDTH = 8, 8, 48
OPTIONS: dict[str, Any] = {
    "lr": 1e-3, "density": 0.25, "update_gap": 3, "state_free": "sgd", "eps": 1e-3, "on_refresh": "project",
}  # fmt: skip
PROJECTIONS = ("svd", "columns", "randk")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 80), nn.Linear(80, WIDTH)

    def forward(self, x: Tensor | None = None, labels: Tensor | None = None) -> dict[str, Tensor]:
        assert x is not None and labels is not None
        found = self.second(torch.tanh(self.first(x)))
        return {"loss": (found - labels.to(found.dtype)).float().square().mean(), "logits": found}


def fresh(device: torch.device) -> Model:
    torch.manual_seed(0)
    return Model().to(device)


def batch(step: int, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The same on every rank: so are the gradients of any number of them."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, WIDTH, generator=generator).to(device, dtype)
    return {"x": x, "labels": x.roll(1, 1)}


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> list[float]:
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batch(step, device))["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def whole(model: nn.Module) -> Tensor:
    parts = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([part.detach().flatten().float() for part in parts])


def alone(device: torch.device, projection: str) -> Tensor:
    model = fresh(device)
    loop(model, Frugal(split_parameters(model), projection=projection, process_group=None, **OPTIONS), device)
    return whole(model)


def as_one_process(
    wrap: Callable[[Model], nn.Module], released: bool = False
) -> Callable[[torch.device], dict[str, Any]]:
    """The largest difference of any weight to one process, by projection. ``released``: backward steps."""

    def job(device: torch.device) -> dict[str, Any]:
        found = {}
        for projection in PROJECTIONS:
            model = wrap(fresh(device))
            named = getattr(model, "module", model)
            optimizer = Frugal(split_parameters(named), projection=projection, **OPTIONS)
            if released:
                step_in_backward(named, optimizer)
            loop(model, optimizer, device)
            found[projection] = float((whole(named) - alone(device, projection)).abs().max())
        return {"difference": found}

    return job


def ddp(model: Model) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: Model) -> nn.Module:
    for layer in (model.first, model.second, model):
        fully_shard(layer)
    return model


def zero(stage: int, precision: str, **more: Any) -> Callable[[torch.device], dict[str, Any]]:
    """Losses under DeepSpeed, and where the state lies."""

    def job(device: torch.device) -> dict[str, Any]:
        import deepspeed

        import frugal_dist  # noqa: F401  (makes "Frugal" known)

        options = {**OPTIONS, "state_free": "sign", "projection": "svd"}
        config = {
            "train_micro_batch_size_per_gpu": ROWS,
            "zero_optimization": {"stage": stage, **more},
            "optimizer": {"type": "Frugal", "params": options},
            **({} if precision == "fp32" else {precision: {"enabled": True}}),
        }
        model = fresh(device)
        engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.named_parameters())
        dtype, losses = next(engine.module.parameters()).dtype, []
        for step in range(4 * STEPS):  # with fp16 the first ones overflow until the loss scale fits
            loss = engine(**batch(step, device, dtype))["loss"]
            engine.backward(loss)
            engine.step()
            losses.append(float(loss))
        places = {v.device.type for s in engine.basic_optimizer.state.values() for v in s.values() if v.dim()}
        engine.destroy()
        return {"losses": losses, "places": sorted(places)}

    return job


def accelerate(device: torch.device) -> dict[str, Any]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device.type == "cpu")
    model = fresh(device)
    prepared, optimizer = accelerator.prepare(model, Frugal(split_parameters(model), projection="svd", **OPTIONS))
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = prepared(**batch(step, device))["loss"]
        accelerator.backward(loss)
        optimizer.step()
        losses.append(float(loss))
    return {"losses": losses, "difference": {"svd": float((whole(model) - alone(device, "svd")).abs().max())}}


def trainer(device: torch.device) -> dict[str, Any]:
    import tempfile

    from transformers import Trainer, TrainingArguments

    from frugal_dist.integrations.transformers import FrugalCallback, optimizer_cls_and_kwargs

    rows = [{key: value[0] for key, value in batch(step, torch.device("cpu")).items()} for step in range(64)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=2 * STEPS, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
            logging_steps=1, save_strategy="no", use_cpu=device.type == "cpu", disable_tqdm=True,
            remove_unused_columns=False,
        )  # fmt: skip
        chosen = optimizer_cls_and_kwargs(arguments, projection="svd", density=0.25, update_gap=4)
        found = Trainer(
            fresh(device), arguments, train_dataset=rows, optimizer_cls_and_kwargs=chosen, callbacks=[FrugalCallback()]
        )
        found.train()
    return {"losses": [entry["loss"] for entry in found.state.log_history if "loss" in entry]}


JOBS: dict[str, Callable[[torch.device], dict[str, Any]]] = {
    "DDP": as_one_process(ddp),
    "FSDP2": as_one_process(sharded),
    "FSDP2 released": as_one_process(sharded, released=True),
    **{f"ZeRO-{stage} {kind}": zero(stage, kind) for stage in (1, 2, 3) for kind in ("bf16", "fp16")},
    "ZeRO-2 fp32": zero(2, "fp32"),
    "ZeRO-2 offload": zero(2, "bf16", offload_optimizer={"device": "cpu"}),
    "Accelerate": accelerate,
    "Trainer": trainer,
}


def main(kind: str, folder: str, *jobs: str) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # as many set for their models: no step may use it
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    for name in jobs:
        try:
            # Nor this. Weights in bf16 that it keeps would be those before all steps.
            with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
                found = JOBS[name](device)
        except Exception:  # the other jobs shall run
            found = {"error": traceback.format_exc()}
        Path(folder, f"{name}.{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
