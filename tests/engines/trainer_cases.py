"""Jobs with the Trainer of transformers."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from pathlib import Path
from typing import Any

import deepspeed_cases as cases
import hf_cases
import torch
from deepspeed_cases import Weights
from hf_cases import BATCH, MIDDLE, OPTIONS, STEPS

PARTS = 2
"""Micro-batches of a rank's step."""
FROM_ARGUMENTS = ("lr", "weight_decay", "betas", "eps")
FSDP = {"version": 2, "transformer_layer_cls_to_wrap": hf_cases.BLOCKS, "state_dict_type": "SHARDED_STATE_DICT"}


def deepspeed_config(stage: int, projection: str = "svd", **more: Any) -> dict[str, Any]:
    """All that the Trainer can fill in is "auto"."""
    own = {key: value for key, value in OPTIONS.items() if key not in FROM_ARGUMENTS}
    params = {**own, **dict.fromkeys(FROM_ARGUMENTS, "auto"), "projection": projection}
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "optimizer": {"type": "Frugal", "params": params},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        **more,
    }


def client_config(stage: int, **more: Any) -> dict[str, Any]:
    """Without an optimizer: the Trainer's own is used."""
    config = deepspeed_config(stage, **more)
    del config["optimizer"]
    return config


OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
CONFIGS: dict[str, dict[str, Any]] = {
    "ZeRO-2": deepspeed_config(2),
    "ZeRO-3": deepspeed_config(3),
    "ZeRO-2, client": client_config(2),
    "ZeRO-3, client": client_config(3),
    "ZeRO-3, from_pretrained": deepspeed_config(3),
    "ZeRO-3, from_pretrained, client": client_config(3),
    "ZeRO-2, offload, client": client_config(2, **OFFLOAD, zero_force_ds_cpu_optimizer=False),
}


def arguments(folder: Path, way: str, **more: Any) -> Any:
    import transformers

    import frugal_dist  # noqa: F401  (all that DeepSpeed's JSON needs)

    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    engine: dict[str, Any] = {"deepspeed": CONFIGS[way]} if way in CONFIGS else {}
    if way.startswith("FSDP2"):
        kind = "FULL_STATE_DICT" if "FULL" in way else "SHARDED_STATE_DICT"
        engine = {"fsdp": True, "fsdp_config": {**FSDP, "state_dict_type": kind}}
    given = {
        "output_dir": str(folder), "per_device_train_batch_size": BATCH // ranks // PARTS,
        "gradient_accumulation_steps": PARTS, "max_steps": STEPS,
        "learning_rate": OPTIONS["lr"], "weight_decay": OPTIONS["weight_decay"], "adam_epsilon": OPTIONS["eps"],
        "max_grad_norm": 1.0, "lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": MIDDLE, "seed": 5,
        "use_cpu": True, "report_to": [], "logging_strategy": "no", "disable_tqdm": True, **engine, **more,
    }  # fmt: skip
    return transformers.TrainingArguments(**given)


def trainer(folder: Path, way: str, options: dict[str, Any] | None = None, **more: Any) -> Any:
    """``way``: "plain" (one process, DDP), "FSDP2" or a DeepSpeed config. ``more`` goes to TrainingArguments."""
    import transformers

    from frugal_dist.integrations.transformers import FrugalCallback, optimizer_cls_and_kwargs

    class InOrder(transformers.Trainer):
        """Takes the rows as they come, so that plain PyTorch can do the same."""

        def _get_train_sampler(self, *given: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    own = {key: value for key, value in OPTIONS.items() if key not in FROM_ARGUMENTS} | {"projection": "svd"}
    watch = more.pop("callbacks", [FrugalCallback])
    args = arguments(folder, way, **more)
    if way.startswith("FSDP2") and args.device:  # asking for the device makes Accelerate's state
        hf_cases.allow_fsdp()
    kept = {} if "optimizer" in CONFIGS.get(way, {}) else optimizer_cls_and_kwargs(args, **{**own, **(options or {})})
    given = {"optimizer_cls_and_kwargs": kept} if kept else {}
    model = _pretrained(folder) if "from_pretrained" in way else cases.small_llama()
    return InOrder(model, args, train_dataset=hf_cases.Rows(), callbacks=watch, **given)


def _pretrained(folder: Path) -> Any:
    """Loaded while a ZeRO-3 config is alive: partitioned from the start."""
    import transformers

    saved = folder / "pretrained"
    if torch.distributed.get_rank() == 0:
        cases.small_llama().save_pretrained(saved)
    torch.distributed.barrier()
    model = transformers.LlamaForCausalLM.from_pretrained(saved, attn_implementation="eager")
    assert all(param.numel() == 0 for param in model.parameters())
    return model


def weights_of(one: Any) -> Weights:
    """The whole fp32 weights of a Trainer's model. Collective."""
    engine = getattr(one, "deepspeed", None)
    if engine is not None:
        return cases.full_weights(engine)
    return hf_cases.whole(one.accelerator.unwrap_model(one.model))


def train_and_resume(folder: Path, way: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train, then again from the checkpoint in the middle with spoiled weights: do both end alike?"""
    hf_cases.reset()
    one = trainer(folder, way, options)
    one.train()
    found = weights_of(one)
    base = hf_cases.innermost(one.optimizer)
    moments = sum(v.numel() for store in base.state.values() for k, v in store.items() if "exp_avg" in k)
    hf_cases.reset()
    other = trainer(folder, way, options)
    hf_cases.spoil(other.model)
    other.train(resume_from_checkpoint=str(folder / f"checkpoint-{MIDDLE}"))
    resumed = weights_of(other)
    hf_cases.reset()
    return {
        "optimizer": type(base).__name__,
        "steps": other.state.global_step,
        "apart": hf_cases.apart(found),
        "differing": hf_cases.differing(resumed, found),
        "moments": moments,
    }


# --- on other ranks ---------------------------------------------------------------------------------------------------

Legs = dict[str, tuple[str, str, dict[str, Any]]]
"""By a name: the engine that saves, the one that loads, and options of Frugal."""


def _portably(folder: Path, way: str, options: dict[str, Any], **more: Any) -> Any:
    from frugal_dist.integrations.transformers import FrugalCallback

    hf_cases.reset()
    watch = [FrugalCallback(portable=True)]
    logged = {"logging_strategy": "steps", "logging_steps": 1}
    if way in CONFIGS and "optimizer" in CONFIGS[way]:
        config = copy.deepcopy(CONFIGS[way])
        config["optimizer"]["params"] |= options
        more = {"deepspeed": config, **more}
    return trainer(folder, way, options, callbacks=watch, **logged, **more)


def _curve(one: Any) -> list[float]:
    return [entry["loss"] for entry in one.state.log_history if "loss" in entry]


def save_portably(folder: Path, legs: Legs) -> dict[str, list[float]]:
    """Train each leg to the end and save in the middle; the losses. Rank 0 writes down the weights at the end."""
    found = {}
    for name, (way, _, options) in legs.items():
        one = _portably(folder / name, way, options)
        one.train()
        found[name], weights = _curve(one), weights_of(one)
        if torch.distributed.get_rank() == 0:
            torch.save(weights, folder / name / "end.pt")
    hf_cases.reset()
    return found


def resume_portably(folder: Path, legs: Legs) -> dict[str, tuple[list[float], float]]:
    """Go on from the middle on these ranks, from spoiled weights: the losses, and how far the weights end apart."""
    found = {}
    ranks = torch.distributed.get_world_size()
    for name, (_, way, options) in legs.items():
        other = _portably(folder / name / f"on {ranks}", way, options)
        hf_cases.spoil(other.model)
        other.train(resume_from_checkpoint=str(folder / name / f"checkpoint-{MIDDLE}"))
        weights, want = weights_of(other), torch.load(folder / name / "end.pt")
        found[name] = _curve(other), max(float((weights[key] - want[key]).abs().max()) for key in want)
    hf_cases.reset()
    return found


def resume_with_other_rows(folder: Path, way: str) -> tuple[list[str], list[str]]:
    """Save portably, resume with twice the rows: what is warned of, and what is said on stderr."""
    _portably(folder, way, {}, max_steps=MIDDLE).train()
    other = _portably(folder, way, {}, gradient_accumulation_steps=2 * PARTS)
    err = io.StringIO()
    with warnings.catch_warnings(record=True) as found, contextlib.redirect_stderr(err):
        warnings.simplefilter("always")
        other.train(resume_from_checkpoint=str(folder / f"checkpoint-{MIDDLE}"))
    hf_cases.reset()
    said = [line for line in err.getvalue().splitlines() if line.startswith("frugal_dist: resumed")]
    return [str(one.message) for one in found if "rows" in str(one.message)], said


# --- what is refused --------------------------------------------------------------------------------------------------


def _given(folder: Path, way: str, given: dict[str, Any], **more: Any) -> Any:
    """A Trainer that gets its optimizer in another way."""
    import transformers

    from frugal_dist.integrations.transformers import FrugalCallback

    args = arguments(folder, way, **more)
    return transformers.Trainer(
        cases.small_llama(), args, train_dataset=hf_cases.Rows(), callbacks=[FrugalCallback()], **given
    )


def _finished() -> Any:
    from frugal_dist import Frugal, split_parameters

    return Frugal(split_parameters(cases.small_llama()), **OPTIONS)


def _json_and_kwargs(folder: Path) -> Any:
    from frugal_dist.integrations.transformers import optimizer_cls_and_kwargs

    return optimizer_cls_and_kwargs(arguments(folder, "ZeRO-2"), density=0.5)


def _full_state_dict(folder: Path, **more: Any) -> Any:
    config = {**FSDP, "state_dict_type": "FULL_STATE_DICT"}
    return trainer(folder, "FSDP2", fsdp_config=config, max_steps=1, **more).train()


def _forced_offload(folder: Path) -> Any:
    return trainer(folder, "ZeRO-2, client", deepspeed=client_config(2, **OFFLOAD)).train()


def _without_factories(folder: Path) -> Any:
    """How the Trainer builds optimizers where it knows no factories."""
    from frugal_dist.integrations.transformers import optimizer_cls_and_kwargs

    kind, options = optimizer_cls_and_kwargs()
    return kind([{"params": []}], **options)


def _twice(folder: Path) -> Any:
    """Training goes on with the same optimizer, built with what the arguments said at first."""
    one = trainer(folder, "plain", {"shard_state": True}, max_steps=2)
    one.args.weight_decay = 0.125
    one.train()
    assert hf_cases.innermost(one.optimizer).param_groups[0]["weight_decay"] == 0.125
    before = weights_of(one)
    one.train()
    assert hf_cases.differing(weights_of(one), before)


RELEASED: dict[str, Any] = {"max_grad_norm": 0.0, "gradient_accumulation_steps": 1, "save_strategy": "no"}


def released(folder: Path, way: str) -> list[str]:
    """The weights that differ between training with and without released gradients."""
    from frugal_dist.integrations.transformers import FrugalCallback

    found = []
    for release in (False, True):
        hf_cases.reset()
        one = trainer(folder / str(release), way, callbacks=[FrugalCallback(release)], **RELEASED)
        one.train()
        found.append(weights_of(one))
    return hf_cases.differing(*found)


def _released(folder: Path, **more: Any) -> Any:
    from frugal_dist.integrations.transformers import FrugalCallback

    return trainer(folder, "plain", callbacks=[FrugalCallback(release_gradients=True)], **{**RELEASED, **more}).train()


TROUBLES: dict[str, Any] = {
    "no factories": _without_factories,
    "train() twice": _twice,
    "parts, nobody saves them": lambda folder: trainer(
        folder, "plain", {"shard_state": True}, callbacks=[], max_steps=1
    ).train(),
    "parts, nothing is saved": lambda folder: trainer(
        folder, "plain", {"shard_state": True}, callbacks=[], max_steps=1, save_strategy="no"
    ).train(),
    "FULL_STATE_DICT": _full_state_dict,
    "FULL_STATE_DICT, only the model is saved": lambda folder: _full_state_dict(folder, save_only_model=True),
    "JSON and kwargs": _json_and_kwargs,
    "optimizers= under DeepSpeed": lambda folder: _given(folder, "ZeRO-2, client", {"optimizers": (_finished(), None)}),
    "optimizers= under DDP": lambda folder: _given(folder, "plain", {"optimizers": (_finished(), None)}, max_steps=1),
    "another optimizer": lambda folder: _given(folder, "plain", {}, max_steps=1).train(),
    "another JSON optimizer": lambda folder: _given(
        folder, "ZeRO-2, client", {}, deepspeed=client_config(2, optimizer={"type": "AdamW", "params": {}})
    ).train(),
    "forced offload": _forced_offload,
    "released": _released,
    "released, clipped": lambda folder: _released(folder, max_grad_norm=1.0),
    "released, accumulated": lambda folder: _released(folder, gradient_accumulation_steps=2),
}


def trouble(folder: Path, name: str) -> str:
    """The message, "" if there is no error."""
    hf_cases.reset()
    return hf_cases.message_of(lambda: TROUBLES[name](folder))


def told(folder: Path) -> tuple[list[str], str]:
    """What is warned of, and what stands on stderr, while the Trainer trains two steps under ``without_auto``."""
    hf_cases.reset()
    err = io.StringIO()
    with warnings.catch_warnings(record=True) as found, contextlib.redirect_stderr(err):
        warnings.simplefilter("always")
        more: dict[str, Any] = {"deepspeed": without_auto(2), "adam_epsilon": 1e-8}
        trainer(folder, "ZeRO-2", max_steps=2, save_strategy="no", **more).train()
    said = [line for line in err.getvalue().splitlines() if line.startswith("frugal_dist")]
    return [str(one.message) for one in found if "leaves out" in str(one.message)], "\n".join(said)


def without_auto(stage: int) -> dict[str, Any]:
    """A config that says nothing of what the Trainer could fill in."""
    config = deepspeed_config(stage)
    params = {key: value for key, value in config["optimizer"]["params"].items() if value != "auto"}
    return {**config, "optimizer": {"type": "Frugal", "params": params}}


def moved_checkpoints(folder: Path) -> list[str]:
    """With parts saved by the callback: resume a moved checkpoint, then without the parts, then with another run's."""
    sharing = {"shard_state": True}
    here, there, other = folder / "here", folder / "there", folder / "other"

    def run(root: Path, checkpoint: Path | None = None, **more: Any) -> Any:
        hf_cases.reset()
        one = trainer(root, "plain", sharing, **more)
        one.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return weights_of(one)

    def move(old: Path, new: Path) -> None:
        if torch.distributed.get_rank() == 0:
            old.rename(new)
        torch.distributed.barrier()

    want = run(here)
    run(other, learning_rate=2e-3, max_steps=MIDDLE)
    moved = there / f"checkpoint-{MIDDLE}"
    there.mkdir(exist_ok=True)
    move(here / moved.name, moved)
    differing = hf_cases.differing(run(folder / "empty", moved), want)
    move(moved / "frugal", there / "frugal")
    found = [hf_cases.message_of(lambda: run(folder / "empty", moved))]
    move(other / moved.name / "frugal", moved / "frugal")
    found.append(hf_cases.message_of(lambda: run(folder / "empty", moved)))
    hf_cases.reset()
    return [*found, *differing]
