"""Jobs with Lightning: its Trainer and Fabric, on one process and under DDP, beside a plain loop on one process.

Lightning is imported where it is used: collecting the tests need not wait for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_cases
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from frugal_dist import Frugal, checkpoint, split_parameters, step_in_backward

OPTIONS = {"lr": 1e-2, "update_gap": 3, "density": 0.5, "state_free": "sgd", "eps": 1e-3, "weight_decay": 0.1}
ROWS, BATCH, ACCUMULATED, EPOCHS = 32, 4, 2, 2
STEPS = ROWS // BATCH // ACCUMULATED * EPOCHS
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def rows() -> Tensor:
    return torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)]
    return nn.Sequential(*layers).double()


def loss_of(model: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    return (model(batch) - batch[:, :4]).pow(2).mean()


def optimizer_for(model: nn.Module, **options: Any) -> Frugal:
    return Frugal(split_parameters(model), **{**OPTIONS, **options})


def apart(model: nn.Module, other: nn.Module) -> float:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((one - two).detach().abs().max()) for one, two in pairs)


def plain(ranks: int = 1, **options: Any) -> nn.Module:
    """The run as a loop on one process, with the batches of all ranks."""
    model = small()
    named = nn.ModuleDict({"model": model})  # columns are drawn by name
    optimizer = optimizer_for(named, process_group=None, **options)
    schedule = OneCycleLR(optimizer, 2e-2, total_steps=2 * STEPS)
    for number, batch in enumerate([*rows().split(BATCH * ranks)] * EPOCHS, 1):
        (loss_of(model, batch) / ACCUMULATED).backward()
        if number % ACCUMULATED == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model


def module_for(**options: Any) -> Any:
    """A LightningModule around the small model; automatic optimization."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = small()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return loss_of(self.model, batch)

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = optimizer_for(self, **options)
            schedule = OneCycleLR(optimizer, 2e-2, total_steps=2 * STEPS)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Module()


def released(clip: float | None) -> nn.Module:
    """The model after one epoch of a Trainer whose backward passes step."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = small()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return loss_of(self.model, batch)

        def configure_optimizers(self) -> Frugal:
            optimizer = optimizer_for(self)
            step_in_backward(self, optimizer)
            return optimizer

    module = Module()
    trainer = lightning.Trainer(max_epochs=1, gradient_clip_val=clip, **QUIET)
    trainer.fit(module, torch.utils.data.DataLoader(rows(), batch_size=BATCH))  # type: ignore[arg-type]
    return module.model


def fit(module: Any, epochs: int, devices: int = 1, batch: int = BATCH, **given: Any) -> Any:
    """The Trainer after ``epochs``, accumulating and clipping."""
    import lightning

    trainer = lightning.Trainer(
        max_epochs=epochs,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        accumulate_grad_batches=ACCUMULATED,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        **QUIET,
    )
    mine = rows()[trainer.global_rank :: devices]
    trainer.fit(module, torch.utils.data.DataLoader(mine, batch_size=batch), **given)
    return trainer


def resumed(path: Path, devices: int = 1, batch: int = BATCH, **options: Any) -> nn.Module:
    """A new module, trained to the end from a checkpoint of the Trainer."""
    module = module_for(**options)
    fit(module, EPOCHS, devices, batch, ckpt_path=str(path), weights_only=False)
    return module.model


def trainer_under_ddp(path: Path) -> dict[str, Any]:
    """The Trainer on two ranks as it comes: train, save, resume; what it warns of."""
    hf_cases.reset()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        whole = module_for()
        fit(whole, EPOCHS, devices=2)
        fit(half := module_for(), 1, devices=2).save_checkpoint(path)
    assert apart(half, whole) > 0
    return {
        "apart": apart(whole.model, plain(ranks=2)),
        "after resuming": apart(resumed(path, devices=2), whole.model),
        "told": [str(one.message) for one in told if "frugal" in str(one.message)],
        "refused": hf_cases.message_of(lambda: fit(module_for(shard_state=True), 1, devices=2)),
    }


def fabric_under_ddp(folder: Path) -> dict[str, Any]:
    """Fabric on two ranks: state is not shared as it comes, and refused where it is, unless saved by other means."""
    import lightning

    hf_cases.reset()
    fabric = lightning.Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    mine = rows()[fabric.global_rank :: 2]

    def start(**options: Any) -> tuple[Any, Any]:
        model = small()
        return fabric.setup(model, optimizer_for(model, **options))

    def train(model: Any, optimizer: Any, steps: int = 4) -> None:
        for batch in mine.split(BATCH)[:steps]:
            optimizer.zero_grad()
            fabric.backward(loss_of(model, batch))
            optimizer.step()

    model, optimizer = start()
    checkpoint.save(folder / "begin", model, optimizer)  # binds before any step
    train(model, optimizer)
    fabric.save(folder / "fabric.ckpt", {"model": model, "optimizer": optimizer})
    shared_model, shared = start(shard_state=True)
    refused = hf_cases.message_of(lambda: train(shared_model, shared))
    shared_model, shared = start(shard_state=True)
    shared.saved_elsewhere = True
    checkpoint.load(folder / "begin", shared_model, shared)
    train(shared_model, shared, 2)
    checkpoint.save(folder / "middle", shared_model, shared)
    train(shared_model, shared)
    loaded_model, loaded = start()
    fabric.load(folder / "fabric.ckpt", {"model": loaded_model, "optimizer": loaded})
    return {
        "divided": checkpoint.unwrap(optimizer).is_divided(),
        "shared": checkpoint.unwrap(shared).is_divided(),
        "loaded": apart(loaded_model, model),
        "refused": refused,
    }


def fabric_on_one_rank() -> str:
    """Rank 0's optimizer is Fabric's, and shares no state; the other rank's would."""
    import lightning

    fabric = lightning.Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    model = small()
    optimizer: Any = optimizer_for(model)
    if fabric.global_rank == 0:
        optimizer = fabric.setup_optimizers(optimizer)
    loss_of(model, rows()).backward()
    return hf_cases.message_of(optimizer.step)


def zero_redundancy() -> list[str]:
    """What torch's ZeroRedundancyOptimizer gets to hear, with and without groups that say what to project."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = small()
    groups = [{**group, "params": [tensor for _, tensor in group["params"]]} for group in split_parameters(model)]
    factory = lambda params, **options: Frugal(params, process_group=None, **options)  # noqa: E731
    return [
        hf_cases.message_of(lambda: ZeroRedundancyOptimizer(model.parameters(), optimizer_class=Frugal, lr=1e-3)),
        hf_cases.message_of(lambda: ZeroRedundancyOptimizer(groups, optimizer_class=Frugal, lr=1e-3)),
        hf_cases.message_of(lambda: ZeroRedundancyOptimizer(groups, optimizer_class=factory, lr=1e-3)),
    ]
