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

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from frugal_dist import checkpoint, engines
from frugal_dist.config import FrugalConfig
from frugal_dist.optimizer import Frugal
from frugal_dist.parameters.split import split_parameters
from frugal_dist.release import step_in_backward
from frugal_dist.sharding.collectives import gather_objects, ranks_of
from frugal_dist.step.replicas import fingerprint
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
    """The Trainer's argument of the same name. ``options`` are Frugal's; what is missing comes from TrainingArguments.

    Those give lr, weight_decay and, for AdamW, betas and eps, read when the Trainer builds the optimizer: a search or a
    script may change them until then. ``project`` and ``skip`` are those of split_parameters.
    Weight decay applies to all parameters, as in torch, unless ``no_decay`` lists patterns.

    Raises ValueError if the DeepSpeed config of ``args`` has an optimizer: the Trainer would use that one.
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
        found = {**_from_arguments(args, options.get("state_full", FrugalConfig.state_full)), **options}
        optimizer = Frugal(split_parameters(model, project, skip, no_decay), **found)
        optimizer.saved_elsewhere = not _saves_state(args)
        return optimizer


def _saves_state(args: Any) -> bool:
    """Whether the Trainer will save the optimizer's state."""
    return args is None or not (args.save_only_model or str(getattr(args.save_strategy, "value", "")) == "no")


def _from_arguments(args: Any, state_full: str) -> dict[str, Any]:
    if args is None:
        return {}
    found = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if state_full in STATE_FULL and STATE_FULL[state_full].is_adamw:
        found |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return found


# --- watching over it -------------------------------------------------------------------------------------------------

FOLDER = "frugal"


class FrugalCallback(TrainerCallback):
    """Sees to it that Frugal trains and, where the Trainer would save rank 0's part of the state, that all is saved.

    That is under DDP with ``shard_state=True``: a portable checkpoint goes to the folder "frugal" in each of the
    Trainer's, and is loaded when one of them is resumed. It is looked for where ``args.resume_from_checkpoint`` says,
    else where this run saves.

    Args:
        release_gradients: ``frugal_dist.step_in_backward``, on one process and under FSDP2, with ``max_grad_norm=0``
            and on one process without ``gradient_accumulation_steps``.

    Raises ValueError on all ranks if another optimizer is in Frugal's place, or a checkpoint does not fit.
    """

    def __init__(self, release_gradients: bool = False) -> None:
        self._releases = release_gradients
        self._divided = False

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what the Trainer would drop in silence."""
        if kwargs.get("optimizer") is not None and engines.replaces_given_optimizers():
            raise ValueError(
                "Under DeepSpeed the Trainer throws away what it gets as optimizers=(...) and trains with AdamW. Put "
                '"optimizer": {"type": "Frugal", "params": {...}} into the DeepSpeed config, or use '
                "optimizer_cls_and_kwargs=."
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the optimizer, and bring back what an earlier ``on_save`` saved. Collective."""
        frugal = _frugal_in(kwargs["optimizer"])
        if self._releases:
            step_in_backward(kwargs["model"], frugal)
        sharded = any(hasattr(tensor, "device_mesh") for group in frugal.param_groups for tensor in group["params"])
        self._divided = False
        if sharded or not engines.keeps_rank_zero_only(frugal):
            return
        frugal.saved_elsewhere = True
        if state.global_step:
            _resume(args, state, kwargs["model"], frugal)
        self._divided = frugal.is_divided()
        if self._divided and state.is_hyper_param_search:
            raise ValueError("A hyperparameter search cannot be saved with shard_state=True: leave it out.")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the state of all ranks. Collective."""
        if self._divided:
            model = kwargs["model"]
            extra = {"weights": _weights(model)}
            checkpoint.save(_own_folder(args, state) / FOLDER, model, _frugal_in(kwargs["optimizer"]), extra)


def _own_folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _resume(args: Any, state: Any, model: nn.Module, frugal: Frugal) -> None:
    """Load the portable checkpoint if there is one. The Trainer gave every rank rank 0's part: forget that first."""
    given = args.resume_from_checkpoint
    folder = (Path(given) if isinstance(given, str) else _own_folder(args, state)) / FOLDER
    loaded_parts = any("@rank" in key for store in frugal.state.values() for key in store)
    answers = gather_objects(ranks_of("auto"), (folder.is_dir(), loaded_parts))
    if not any(parts for _, parts in answers):  # complete as it is
        return
    if not any(there for there, _ in answers):
        raise ValueError(
            f"The Trainer's checkpoint holds rank 0's part of the optimizer state; the rest is not at {folder}. If the "
            "checkpoint was moved, say where it is: TrainingArguments(resume_from_checkpoint=...)."
        )
    frugal.load_state_dict({**frugal.state_dict(), "state": {}})
    mine = _weights(model)
    saved = checkpoint.load(folder, model, frugal, rng=False)["weights"]  # the Trainer restores the generators itself
    if any(gather_objects(ranks_of("auto"), saved != mine)):
        raise ValueError(
            f"{folder} belongs to other weights than those the Trainer resumed. Say which checkpoint is meant: "
            "TrainingArguments(resume_from_checkpoint=...)."
        )


def _weights(model: nn.Module) -> list[int]:
    """A fingerprint of every trained parameter."""
    return [int(fingerprint(param.detach())) for param in model.parameters() if param.requires_grad]


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
