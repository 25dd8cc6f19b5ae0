"""The DeepSpeed engine behind what a training loop asks for, and its JSON."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from frugal_dist import checkpoint
from frugal_dist.integrations.build_locks import prefer_own_ninja, wait_for_builds
from frugal_dist.optimizer import Frugal
from frugal_dist.planner import MOMENT_BYTES
from frugal_dist.planner.zero import offloads
from frugal_dist.training.distributed.place import settle_accelerator
from frugal_dist.training.distributed.process import tell
from frugal_dist.training.distributed.ranks import waiting
from frugal_dist.training.engines import collectives
from frugal_dist.training.engines.protocol import (
    Losses,
    Schedule,
    count_state_kinds,
)
from frugal_dist.training.models import token_losses
from frugal_dist.training.optimizers import frugal_options
from frugal_dist.training.recipe import Recipe
from frugal_dist.training.recipe.spelling import ZERO
from frugal_dist.training.schedule import jump


class DeepSpeedEngine:
    """The DeepSpeed engine for a model and the settings of a DeepSpeed JSON.

    ``optimizer``: builds it, instead of what the JSON says.
    """

    def __init__(
        self,
        model: nn.Module,
        config: dict[str, Any],
        schedule: Schedule,
        losses: Losses = token_losses,
        optimizer: Callable[[nn.Module], Frugal] | None = None,
    ) -> None:
        settle_accelerator()
        prefer_own_ninja()
        wait_for_builds(tell)
        import deepspeed

        # On a CPU this builds or loads DeepSpeed's operation.
        with waiting("DeepSpeed to compile or load its C++ operation, or for other ranks in it"):
            deepspeed.init_distributed()
        self.world = self.shares = distributed.get_world_size()
        self.rank = self.share = distributed.get_rank()
        ours = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=schedule)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        built: dict[str, Any] = {}
        if optimizer is not None:
            built["optimizer"] = optimizer(model)
            config = {key: value for key, value in config.items() if key != "optimizer"}
        if _can_partition(config.get("zero_optimization", {})):
            _partition(model, config)
        with waiting("DeepSpeed to build its engine, or for other ranks in it", speaks=self.rank == 0):
            self._engine, _, _, self._schedule = deepspeed.initialize(
                model=model, model_parameters=parameters, config=config, lr_scheduler=ours, **built
            )
        self._function, self._told = losses, collectives.Told(self._engine.device)

    def train_step(self, rows: Tensor, targets: float | None = None) -> Tensor:
        """One optimizer step, in as many micro-batches as the JSON asks for."""
        self._engine.train()
        parts = collectives.sendable(rows, self._engine.device).split(self._engine.train_micro_batch_size_per_gpu())
        mean = torch.zeros((), device=self._engine.device)
        for part in parts:
            losses = self._function(self._engine, part.to(self._engine.device, non_blocking=True))
            # DeepSpeed divides by the number of micro-batches.
            loss = losses.mean() if targets is None else losses.sum() * (len(parts) / targets)
            self._engine.backward(loss)
            self._engine.step()
            mean += loss.detach() / len(parts)
        return mean

    def losses(self, rows: Tensor) -> Tensor:
        """The loss of every target, without gradient."""
        return self.outputs(self._function, rows)

    @torch.no_grad()
    def outputs(self, function: Losses, rows: Tensor) -> Tensor:
        """What a function makes of the model and these rows, without gradient."""
        self._engine.eval()
        return function(self._engine, rows.to(self._engine.device))

    def total(self, values: list[float]) -> list[float]:
        """Each value summed over the ranks, in double precision."""
        return collectives.total(values, self._engine.device)

    def any_told(self, me: bool) -> bool:
        """Whether any rank was told so; on a GPU by the call before."""
        return self._told.anyone(me)

    def state_kinds(self) -> dict[str, int]:
        """This rank's bytes by kind."""
        return count_state_kinds(self._engine.basic_optimizer)

    def adamw_bytes(self) -> int:
        """What AdamW's state would take on this rank, of fp32 masters: whole at stage 0, else an equal part."""
        trained = [one for one in self._engine.module.parameters() if one.requires_grad]
        elements = sum(int(getattr(one, "ds_numel", one.numel())) for one in trained)
        return math.ceil(MOMENT_BYTES * elements / (self.world if self._engine.zero_optimization_stage() else 1))

    def refresh_figures(self) -> list[float]:
        """This rank's sums of the refreshes since the last call."""
        sums: list[float] = self._engine.basic_optimizer.take_refresh_figures()
        return sums

    def learning_rate(self) -> float:
        """The rate of the next step."""
        return float(self._engine.get_lr()[0])

    def gradient_norm(self) -> float:
        """The norm of the last step's gradient, before clipping; NaN if DeepSpeed did not compute one."""
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def skipped_steps(self) -> int:
        """Steps whose gradient overflowed."""
        return int(self._engine.skipped_steps)

    def save(self, root: Path, step: int, extra: dict[str, Any], **options: Any) -> bool:
        """Write a portable checkpoint, from which any engine can resume."""
        return checkpoint.save_step(root, step, self._engine, self._engine.optimizer, extra, **options)

    def resume(self, root: Path) -> tuple[int, dict[str, Any]] | None:
        """Load the latest portable checkpoint, whichever engine wrote it."""
        resumed = checkpoint.load_latest(root, self._engine, self._engine.optimizer, on_damaged="previous")
        if resumed is not None:
            jump(self._schedule, resumed[0] - self.skipped_steps())  # DeepSpeed's schedules stand still then
        return resumed


def _can_partition(zero: dict[str, Any]) -> bool:
    """At stage 3; weights on a disk are refused in better words by ``deepspeed.initialize``."""
    return zero.get("stage") == 3 and (zero.get("offload_param") or {}).get("device") != "nvme"


def _partition(model: nn.Module, config: dict[str, Any]) -> None:
    """Leave each rank its part of every weight, one weight after the other; called by all ranks.

    DeepSpeed does so itself, but only after the whole model is on the GPU.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    halves = (("bf16", torch.bfloat16), ("fp16", torch.float16))
    half = next((dtype for key, dtype in halves if config.get(key, {}).get("enabled")), None)
    for parameter in model.parameters() if half else ():  # DeepSpeed casts no weights that are partitioned
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(half)
    deepspeed.zero.Init(module=model, config_dict_or_path=copy.deepcopy(config))
    device = get_accelerator().current_device_name()
    for buffer in model.buffers():  # nor moves what they leave
        buffer.data = buffer.data.to(device)


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the DeepSpeed configuration {path}: {error.strerror}.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return config


def equal_part(share: int, limit: int | None) -> int:
    """The largest micro-batch within a limit that divides a rank's share: DeepSpeed takes equal parts only."""
    return max(size for size in range(1, min(limit or share, share) + 1) if share % size == 0)


def deepspeed_config(recipe: Recipe, world: int) -> dict[str, Any]:
    """The recipe's DeepSpeed JSON, ZeRO-2 if it names none, with optimizer, batch and precision of the recipe.

    Raises ValueError if the JSON cannot be read, or the batch cannot be shared by ``world`` ranks.
    """
    config = recipe_json(recipe)
    scaling = config.get(recipe.precision, {})  # such as the first loss scale: the JSON's
    for key in ("scheduler", "gradient_accumulation_steps", "fp16", "bf16"):
        config.pop(key, None)  # of the recipe
    share, rest = divmod(recipe.batch, world)
    if rest or not share:
        raise ValueError(
            f"batch is {recipe.batch}, which {world} ranks cannot share equally; change it or the number of ranks."
        )
    return {
        **config,
        "optimizer": {"type": "Frugal", "params": frugal_options(recipe.optimizer)},
        "train_batch_size": recipe.batch,
        "train_micro_batch_size_per_gpu": equal_part(share, recipe.micro_batch),
        "gradient_clipping": recipe.clip,
        "steps_per_print": 10**9,
        **data_types(config, recipe.precision),
        **({} if recipe.precision == "fp32" else {recipe.precision: {**scaling, "enabled": True}}),
    }


def recipe_json(recipe: Recipe) -> dict[str, Any]:
    """The DeepSpeed JSON that a recipe names, as it is. ValueError if it cannot be read.

    Where it names none, its engine may have been named by the stage ("zero3"); otherwise it is ZeRO-2.
    """
    named = recipe.deepspeed or "zero2"
    return {"zero_optimization": {"stage": ZERO[named]}} if named in ZERO else _read(Path(named))


def data_types(config: dict[str, Any], precision: str) -> dict[str, Any]:
    """The JSON's own section, with bf16 gradients of micro-batches and ranks added up in fp32, as other engines do.

    Not where the JSON says in what, nor where DeepSpeed 0.19.8 cannot (stage 0; stage 2 with its optimizer offloaded),
    nor at stage 1: it would change to an optimizer that keeps whole fp32 gradients and does not look for overflow.
    """
    own, zero = config.get("data_types", {}), config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    fits = precision == "bf16" and (stage == 3 or (stage == 2 and not offloads(zero, "optimizer")))
    section = {**({"grad_accum_dtype": "fp32"} if fits else {}), **own}
    return {"data_types": section} if section else {}
