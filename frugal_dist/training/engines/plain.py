"""torch's own engines: one process, DDP, FSDP2."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from frugal_dist import checkpoint
from frugal_dist.integrations.step_in_backward import step_in_backward
from frugal_dist.optimizer import Frugal
from frugal_dist.training.distributed.place import DistEnv
from frugal_dist.training.engines import collectives
from frugal_dist.training.engines.protocol import (
    Losses,
    Schedule,
    count_adamw_bytes,
    count_state_kinds,
)
from frugal_dist.training.models import token_losses
from frugal_dist.training.optimizers import build_optimizer
from frugal_dist.training.recipe import Recipe, check_released_share
from frugal_dist.training.schedule import jump

_CPU = torch.device("cpu")
Sync = Callable[[nn.Module, bool], AbstractContextManager[None]]
"""Whether the backward pass in this context exchanges gradients."""
NORM_MEMORY = 0.98
"""How much of the mean stays at every step: it reaches back about 50 steps."""
FIRST_NORMS = 10
"""So many norms make a mean to compare with."""


@dataclass
class SpikeGuard:
    """Which steps are not taken: no finite gradient, or one that is far larger than those before.

    ``factor``: a norm above so many times the mean of those before is a spike; 0: nothing is.

    Norms that are the same on all ranks give the same answers on all ranks.
    """

    factor: float
    mean: float = 0.0
    count: int = 0

    def passes(self, norm: float) -> bool:
        """Whether to take this step; what passes is remembered."""
        if not math.isfinite(norm):
            return False
        if self.factor and self.count >= FIRST_NORMS and norm > self.factor * self.mean:
            return False
        share = max(1.0 - NORM_MEMORY, 1.0 / (self.count + 1))
        self.mean += share * (norm - self.mean)
        self.count += 1
        return True

    def state_dict(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Resume; a checkpoint of another engine holds nothing of it."""
        self.mean, self.count = float(state.get("mean", 0.0)), int(state.get("count", 0))


class PlainEngine:
    """Trains a model with torch alone. Weights stay in fp32 unless the recipe says otherwise; bf16 is for the forward
    and backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        schedule: Schedule,
        place: DistEnv,
        losses: Losses = token_losses,
        optimizer: Callable[[nn.Module], Frugal] | None = None,
    ) -> None:
        self.rank, self.world = place.rank, place.world
        self.share, self.shares = place.rank // recipe.tp, place.world // recipe.tp
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU
        self._told = collectives.Told(self.device)
        self._clip, self._micro = recipe.clip, recipe.micro_batch
        wrap, self._sync = WRAPPERS[recipe.engine]
        self._bf16 = recipe.precision == "bf16"
        for weight in model.parameters() if recipe.weights == "bf16" else ():  # not the buffers: positions need fp32
            weight.data = weight.data.to(torch.bfloat16)
        self._model = wrap(model, self.device, self._bf16, recipe.tp)
        self._function = losses
        self._optimizer = optimizer(self._model) if optimizer else build_optimizer(recipe.optimizer, self._model)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, schedule)
        self._released = recipe.release_gradients
        if self._released:
            step_in_backward(self._model, self._optimizer)
        self._norm, self._skipped, self._guard = math.nan, 0, SpikeGuard(recipe.spike)

    def train_step(self, rows: Tensor, targets: float | None = None) -> Tensor:
        """One optimizer step, in micro-batches whose gradients add up to the batch's."""
        self._model.train()
        self._optimizer.zero_grad(set_to_none=True)
        parts = collectives.sendable(rows, self.device).split(self._micro or len(rows))
        mean = torch.zeros((), device=self.device)
        for number, part in enumerate(parts):
            with self._sync(self._model, number == len(parts) - 1):
                losses = self._outputs(self._function, part)
                # Full rows have equally many targets.
                loss = losses.sum() / (losses.numel() // len(part) * len(rows) if targets is None else targets)
                loss.backward()
            mean += loss.detach()
        if self._released:
            self._optimizer.step()  # what backward has left; there is no norm of gradients that are gone
            self._schedule.step()
            return mean
        self._norm = self._gradient_norm()
        if self._guard.passes(self._norm):  # the same on all ranks, so they skip together
            self._optimizer.step()
        else:
            self._skipped += 1
        self._schedule.step()
        return mean

    def _gradient_norm(self) -> float:
        """The norm of the whole gradient, which is clipped to the recipe's limit if it has one."""
        on_mesh: dict[Any, list[Tensor]] = {}
        for weight in self._model.parameters():
            if weight.grad is not None:
                on_mesh.setdefault(getattr(weight, "device_mesh", None), []).append(weight)
        norms = [get_total_norm([one.grad for one in same if one.grad is not None]) for same in on_mesh.values()]
        whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
        norm = torch.linalg.vector_norm(torch.stack(whole)) if len(whole) > 1 else whole[0]
        if self._clip:  # otherwise it would multiply them all with 1
            for same in on_mesh.values():
                clip_grads_with_norm_(same, self._clip, norm)
        return float(norm)

    def _outputs(self, function: Losses, rows: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            return function(self._model, rows.to(self.device, non_blocking=True))

    def losses(self, rows: Tensor) -> Tensor:
        """The loss of every target, without gradient."""
        return self.outputs(self._function, rows)

    @torch.no_grad()
    def outputs(self, function: Losses, rows: Tensor) -> Tensor:
        """What a function makes of the model and these rows, without gradient."""
        self._model.eval()
        return self._outputs(function, collectives.sendable(rows, self.device))

    def total(self, values: list[float]) -> list[float]:
        """Each value summed over the ranks, in double precision."""
        return collectives.total(values, self.device)

    def any_told(self, me: bool) -> bool:
        """Whether any rank was told so; on a GPU by the call before."""
        return self._told.anyone(me)

    def state_kinds(self) -> dict[str, int]:
        """This rank's bytes by kind."""
        return count_state_kinds(self._optimizer)

    def adamw_bytes(self) -> int:
        """What AdamW's state would take on this rank: whole under DDP, a part under FSDP2."""
        held = (weight for group in self._optimizer.param_groups for weight in group["params"])
        return count_adamw_bytes(held)  # not the model's: FSDP2 may have left those whole after a forward pass

    def refresh_figures(self) -> list[float]:
        """This rank's sums of the refreshes since the last call."""
        return self._optimizer.take_refresh_figures()

    def learning_rate(self) -> float:
        """The rate of the next step."""
        return float(self._schedule.get_last_lr()[0])

    def gradient_norm(self) -> float:
        """The norm of the last step's gradient, before clipping."""
        return self._norm

    def skipped_steps(self) -> int:
        """Steps whose gradient was not finite, or a spike."""
        return self._skipped

    def save(self, root: Path, step: int, extra: dict[str, Any], **options: Any) -> bool:
        """Write a portable checkpoint."""
        more = {**extra, "skipped": self._skipped, "norms": self._guard.state_dict()}
        return checkpoint.save_step(root, step, self._model, self._optimizer, more, **options)

    def resume(self, root: Path) -> tuple[int, dict[str, Any]] | None:
        """Load the latest portable checkpoint, whichever engine wrote it."""
        resumed = checkpoint.load_latest(root, self._model, self._optimizer, on_damaged="previous")
        if resumed is None:
            return None
        step, extra = resumed
        jump(self._schedule, step)
        self._skipped = extra.get("skipped", 0)
        self._guard.load_state_dict(extra.get("norms", {}))
        return step, extra


def check_world(recipe: Recipe, world: int) -> None:
    """Raises ValueError if the recipe's engine cannot run on so many ranks."""
    engine = recipe.engine
    if world % recipe.tp:
        raise ValueError(f"tp is {recipe.tp}, which does not divide {world} ranks.")
    check_released_share(recipe, recipe.batch // (world // recipe.tp))
    if engine == "single" and world > 1:
        raise ValueError(f"engine single is for one process, but {world} were started. Use ddp.")
    if engine != "single" and world == 1:
        several = "start more, with torchrun, srun or mpirun (RANKS=2 bash launch/torchrun.sh ...)"
        raise ValueError(
            f"engine {engine} needs several ranks, but one was started: {several}, or use --engine single."
        )


# --- how each engine wraps a model, and skips the exchange of gradients -----------------------------------------------


def _single(model: nn.Module, device: torch.device, bf16: bool, tp: int) -> nn.Module:
    return model.to(device)


def _ddp(model: nn.Module, device: torch.device, bf16: bool, tp: int) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model.to(device), gradient_as_bucket_view=True)


def _fsdp2(model: nn.Module, device: torch.device, bf16: bool, tp: int) -> nn.Module:
    """Each block is a unit of its own: only one is whole at a time, also here, where torch moves it and cuts it.

    ``tp``: ranks that divide layers among them first.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    )
    mesh = None
    if tp > 1:
        from frugal_dist.training.engines.tensor_parallel import divide_layers, two_axes

        axes = two_axes(distributed.get_world_size(), tp, device.type)
        divide_layers(model, axes["tp"])
        mesh = axes["fsdp"]
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The units of FSDP2, beside the rest: what transformers keeps together, or the longest list of modules."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return blocks or max(lists, key=len, default=[])


def _as_it_is(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Of FSDP2: gradients that wait for the last micro-batch would be whole, and fp32, on every rank."""
    return nullcontext()


def _ddp_sync(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    return nullcontext() if last else model.no_sync()  # type: ignore[operator]


WRAPPERS: dict[str, tuple[Callable[[nn.Module, torch.device, bool, int], nn.Module], Sync]] = {
    "single": (_single, _as_it_is),
    "ddp": (_ddp, _ddp_sync),
    "fsdp2": (_fsdp2, _as_it_is),
}
