"""Frugal for the Trainer of transformers without DeepSpeed: on one process, under DDP and under FSDP2.

    from frugal_dist.integrations.transformers import FrugalCallback, optimizer_cls_and_kwargs

    trainer = Trainer(
        model,
        args,
        ...,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, density=0.25),
        callbacks=[FrugalCallback()],
    )

With DeepSpeed ``import frugal_dist`` and ``"type": "Frugal"`` in the DeepSpeed config are enough.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

from frugal_dist import checkpoint, engines
from frugal_dist.checkpoint.extra import load_schedule
from frugal_dist.checkpoint.portable_copy import FOLDER, is_beside, load_beside, save_beside, stands_in
from frugal_dist.config import FrugalConfig
from frugal_dist.engines import hooks
from frugal_dist.integrations.step_in_backward import step_in_backward
from frugal_dist.notices import notice
from frugal_dist.optimizer import Frugal
from frugal_dist.parameters.split import split_parameters
from frugal_dist.sharding.collectives import gather_objects, ranks_of, speaks
from frugal_dist.update.rules import STATE_FULL

if TYPE_CHECKING:

    class TrainerCallback:
        """Theirs has no type hints."""

else:
    try:
        from transformers import TrainerCallback
    except ImportError:  # to be imported, not used, without transformers
        TrainerCallback = object

# --- building the optimizer -------------------------------------------------------------------------------------------


def optimizer_cls_and_kwargs(
    args: Any = None, *, project: Sequence[str] | None = None, skip: Sequence[str] | None = None, **options: Any
) -> tuple[type[FrugalForModel], dict[str, Any]]:
    """The Trainer's argument of the same name.

    Args:
        args: TrainingArguments, which give lr, weight_decay and, for AdamW, betas and eps where ``options`` do not.
            They are read when the Trainer builds the optimizer: a search or a script may change them until then.
            None: Frugal's defaults.
        project: name patterns as in ``split_parameters``.
        skip: the same for what is not projected.
        **options: other arguments of ``Frugal``, and ``no_decay``: without it weight decay applies to all parameters,
            as in torch.

    Raises:
        ValueError: if the DeepSpeed config of ``args`` has an optimizer: the Trainer would use that one.
    """
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    if deepspeed is not None and "optimizer" in deepspeed.config:
        kind = deepspeed.config["optimizer"].get("type")
        raise ValueError(
            f'The DeepSpeed config has an "optimizer" ({kind}), so the Trainer would ignore optimizer_cls_and_kwargs. '
            'Leave out one of the two; "optimizer": {"type": "Frugal", "params": {...}} needs nothing else.'
        )
    return FrugalForModel, {"args": args, "project": project, "skip": skip, **options}


class FrugalForModel:
    """What the Trainer calls an optimizer factory: it gets the model, so that modules and names decide."""

    def __init__(self, *given: Any, **options: Any) -> None:
        if given or options:
            raise ValueError(
                "This version of transformers gives parameters without names to optimizer_cls_and_kwargs, not the "
                "model. Update transformers, or pass Trainer(optimizers=(Frugal(split_parameters(model)), None))."
            )

    def __call__(
        self,
        model: nn.Module,
        *,
        args: Any,
        project: Sequence[str] | None,
        skip: Sequence[str] | None,
        no_decay: Sequence[str] | None = None,
        **options: Any,
    ) -> Frugal:
        """Build the optimizer with what ``args`` say now."""
        arguments = {**_from_arguments(args, options.get("state_full", FrugalConfig.state_full)), **options}
        optimizer = Frugal(split_parameters(model, project, skip, no_decay), **arguments)
        optimizer.saved_elsewhere = not _saves_state(args)
        return optimizer


def _saves_state(args: Any) -> bool:
    """Whether the Trainer will save the optimizer's state."""
    return args is None or not (args.save_only_model or str(getattr(args.save_strategy, "value", "")) == "no")


def _sharded_by_transformers(model: Any) -> bool:
    """While it was loaded (DistributedConfig): the Trainer refuses to save the state of its optimizer, or resume it."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


def _from_arguments(args: Any, state_full: str) -> dict[str, Any]:
    if args is None:
        return {}
    options = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if state_full in STATE_FULL and STATE_FULL[state_full].is_adamw:
        options |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return options


# --- watching over it -------------------------------------------------------------------------------------------------


class FrugalCallback(TrainerCallback):
    """Sees to it that Frugal trains and that all of its state is saved.

    Where the Trainer would save rank 0's part (DDP with ``shard_state=True``) a portable checkpoint goes to the folder
    "frugal" in each of the Trainer's, and is loaded when one of them is resumed.

    Args:
        release_gradients: ``frugal_dist.step_in_backward``, on one process and under FSDP2, with ``max_grad_norm=0``
            and on one process without ``gradient_accumulation_steps``.
        portable: write that folder in any case, beside what the Trainer saves, so that a checkpoint is resumed on any
            engine and number of ranks. It takes the room of weights and state once more. A model that was loaded with a
            ``DistributedConfig`` resumes by it, where the Trainer itself wants ``save_only_model=True``.

    Raises:
        ValueError: on all ranks, if another optimizer is in Frugal's place, or a checkpoint does not fit.
    """

    def __init__(self, release_gradients: bool = False, portable: bool = False) -> None:
        self._releases = release_gradients
        self._portable = portable
        self._divided = False
        _take_part_in_loading()

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what the Trainer would drop in silence."""
        _take_part_in_loading()
        if kwargs.get("optimizer") is not None and engines.replaces_given_optimizers():
            raise ValueError(
                "Under DeepSpeed the Trainer throws away what it gets as optimizers=(...) and trains with AdamW. Put "
                '"optimizer": {"type": "Frugal", "params": {...}} into the DeepSpeed config, or use '
                "optimizer_cls_and_kwargs=."
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the optimizer, and find out what it takes to save it. Collective."""
        frugal = _frugal_in(kwargs["optimizer"])
        if self._releases:
            step_in_backward(kwargs["model"], frugal)
        partly = engines.keeps_rank_zero_only(frugal)
        replicas = partly and not engines.is_sharded(frugal)
        if replicas or (partly and self._portable):
            frugal.saved_elsewhere = True
        if replicas:
            _check_loaded(frugal)
        self._divided = replicas and frugal.is_divided()
        if (self._divided or self._portable) and state.is_hyper_param_search:
            raise ValueError(
                "A hyperparameter search cannot be saved with shard_state=True or portable=True: leave it out."
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the state of all ranks. Collective."""
        if self._divided or (self._portable and (_saves_state(args) or _sharded_by_transformers(kwargs["model"]))):
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            frugal, schedule = _frugal_in(kwargs["optimizer"]), kwargs["lr_scheduler"].state_dict()
            rows = _rows_of_a_step(args, kwargs["model"])
            save_beside(folder, kwargs["model"], frugal, {"schedule": schedule, "rows": rows})


def _rows_of_a_step(args: Any, model: Any) -> int:
    """Of all ranks together; 0 where some of them may have the same rows."""
    if _sharded_by_transformers(model) or getattr(args, "parallelism_config", None) is not None:
        return 0
    return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)


def _compare_rows(then: int, now: int) -> None:
    """Another number is often an oversight: fewer ranks with the same arguments."""
    if then and now and then != now and speaks():
        notice(
            f"A step of the run that saved this checkpoint had {then} rows, a step of this one has {now}: ranks x "
            "per_device_train_batch_size x gradient_accumulation_steps. Set the last two to keep the product the same."
        )


def _check_loaded(frugal: Frugal) -> None:
    """ValueError on all ranks if the Trainer has given some of them rank 0's part."""
    parts = any("@rank" in key for store in frugal.state.values() for key in store)
    if any(gather_objects(ranks_of("auto"), parts)):
        raise ValueError(
            "The Trainer's checkpoint holds rank 0's part of the optimizer state, and the rest is not in its folder "
            f'"{FOLDER}". If it is there, another checkpoint was saved in its place since: resume with the ranks '
            "that saved that."
        )


# --- loading what was saved beside ------------------------------------------------------------------------------------

Method = Callable[..., Any]


def _take_part_in_loading() -> None:
    """From now on a Trainer loads what was saved beside its own checkpoint, where it cannot load that itself."""
    module = sys.modules.get("transformers.trainer")
    if module is not None:
        hooks.wrap(module.Trainer, "_load_from_checkpoint", _load_weights)
        hooks.wrap(module.Trainer, "_load_optimizer_and_scheduler", _load_state)
        hooks.wrap(module, "deepspeed_load_checkpoint", _load_engine)


def _load_weights(inner: Method) -> Method:
    """Before there is an optimizer, and under FSDP when it is prepared: weights that will come with the state."""

    def load(trainer: Any, checkpoint: str, model: Any = None) -> Any:
        return None if _stands_in(trainer, Path(checkpoint)) else inner(trainer, checkpoint, model)

    return load


def _load_state(inner: Method) -> Method:
    def load(trainer: Any, checkpoint: str | None) -> Any:
        if checkpoint is None or not _stands_in(trainer, Path(checkpoint)):
            return inner(trainer, checkpoint)
        extra = _LOADED.pop(trainer.model_wrapped, None)
        extra = extra or load_beside(Path(checkpoint), trainer.model_wrapped, _frugal_in(trainer.optimizer))
        _compare_rows(extra.get("rows", 0), _rows_of_a_step(trainer.args, trainer.model))
        return _load_schedule(trainer.lr_scheduler, extra["schedule"], checkpoint)

    return load


def _load_engine(inner: Method) -> Method:
    """Weights and state, also where the best model is loaded at the end."""

    def load(engine: Any, checkpoint: str, *args: Any, **kwargs: Any) -> Any:
        if not _is_ours(engine.optimizer) or not stands_in(Path(checkpoint), engine, engine.optimizer):
            return inner(engine, checkpoint, *args, **kwargs)
        _LOADED[engine] = load_beside(Path(checkpoint), engine, engine.optimizer)
        return None

    return load


_LOADED: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()
"""What came with weights and state, by DeepSpeed's engine."""


def _stands_in(trainer: Any, folder: Path) -> bool:
    """Collective. Without an engine the weights are loaded before there is an optimizer: then always, where it can."""
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return is_beside(folder)
    return _is_ours(trainer.optimizer) and stands_in(folder, trainer.model_wrapped, trainer.optimizer)


def _load_schedule(scheduler: Any, saved: dict[str, Any], checkpoint: str) -> None:
    """ValueError for a schedule of another kind: a DeepSpeed config may have its own."""
    if saved.keys() != scheduler.state_dict().keys():
        raise ValueError(
            f"{checkpoint} was saved with a learning-rate schedule of another kind: it kept {', '.join(saved)}, that "
            f"of this run keeps {', '.join(scheduler.state_dict())}. Use the same, in the arguments or the DeepSpeed "
            "config."
        )
    load_schedule(scheduler, saved)


def _is_ours(optimizer: Any) -> bool:
    try:
        checkpoint.unwrap(optimizer)
    except ValueError:
        return False
    return True


def _frugal_in(optimizer: Any) -> Frugal:
    try:
        return checkpoint.unwrap(optimizer)
    except ValueError:
        pass
    inner = optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    raise ValueError(
        f"The Trainer trains with {type(inner).__name__}, not with Frugal. Without DeepSpeed pass "
        "optimizer_cls_and_kwargs=; with DeepSpeed put "
        '"optimizer": {"type": "Frugal", "params": {...}} into its config.'
    )
