"""Jobs about checkpoints of DeepSpeed engines: save, go on, load into a fresh engine, go on, compare every bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed_cases as cases
import torch
from torch import Tensor, nn

from frugal_dist import checkpoint

Groups = Callable[[nn.Module], list[dict[str, Any]]]
SCHEDULE = {"scheduler": {"type": "WarmupLR", "params": cases.WARMUP}}
OPTIONS = {**cases.SIGNS, "lr": 1e-3}
"""Sign rules and the usual eps: nothing hides a difference."""


def config(setting: str, options: dict[str, Any]) -> dict[str, Any]:
    chosen = cases.SETTINGS[setting]
    ranks = torch.distributed.get_world_size()
    return cases.config_of({**OPTIONS, **options}, chosen.zero, ranks, **chosen.more, **SCHEDULE)


def start(setting: str, options: dict[str, Any], fresh: bool = False, groups: Groups | None = None) -> Any:
    """``fresh``: with other weights than everybody else's, which loading must replace."""
    model = cases.small_llama()
    if fresh:
        with torch.no_grad():
            for param in model.parameters():
                param.add_(0.01)
    given = {"model_parameters": groups(model)} if groups else {}
    return cases.start(config(setting, options), model, **given)


def everything(engine: Any) -> dict[str, Tensor]:
    """The fp32 weights, the model's own weights, the whole optimizer state of this rank, and the learning rates."""
    found = {f"weight {name}": value for name, value in cases.full_weights(engine).items()}
    found |= {f"model {name}": value for name, value in cases.model_weights(engine).items()}
    optimizer = engine.basic_optimizer
    for number, store in enumerate(optimizer.state.values()):
        found |= {f"state {number} {key}": value.clone() for key, value in store.items()}
    found["learning rates"] = torch.tensor([group["lr"] for group in optimizer.param_groups])
    return found


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names that are missing or differ in dtype, shape or any bit."""
    names = sorted(one.keys() | other.keys())
    return [name for name in names if name not in one or name not in other or not _equal(one[name], other[name])]


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def resumed(
    setting: str, options: dict[str, Any], folder: Path, stops: tuple[int, ...], groups: Groups | None = None
) -> list[str]:
    """What differs between an uninterrupted run and those that were resumed after ``stops`` steps. Collective."""
    engine = start(setting, options, groups=groups)
    for step in range(cases.STEPS):
        if step in stops:
            engine.save_checkpoint(str(folder), tag=f"after{step}")
        cases.train(engine, [step])
    want = everything(engine)
    engine.destroy()
    problems = []
    for stop in stops:
        engine = start(setting, options, fresh=True, groups=groups)
        if stop == stops[0]:
            cases.train(engine, [50])  # loading into an engine that has already trained something else
        engine.load_checkpoint(str(folder), tag=f"after{stop}")
        cases.train(engine, range(stop, cases.STEPS))
        problems += [f"after {stop}: {name}" for name in different(want, everything(engine))]
        engine.destroy()
    return problems


def loaded_after_an_evaluation(folder: Path) -> tuple[float, float, float]:
    """Losses under ZeRO-3: at a save, after more steps, and after loading. The evaluations leave parameters whole."""
    engine = start("3", cases.PROJECTIONS["columns"])
    tokens = cases.batch(9)
    losses = []
    for _ in range(2):
        cases.train(engine, range(2))
        losses.append(_evaluated(engine, tokens))
        if len(losses) == 1:
            checkpoint.save(folder, engine, engine.optimizer)
    checkpoint.load(folder, engine, engine.optimizer)
    losses.append(_evaluated(engine, tokens))
    engine.destroy()
    return losses[0], losses[1], losses[2]


@torch.no_grad()
def _evaluated(engine: Any, tokens: Tensor) -> float:
    engine.eval()
    loss = float(cases.loss_of(engine, tokens.to(engine.device)))
    engine.train()
    return loss


def saved_where_the_user_counts(folder: Path) -> list[str]:
    """What the user reads who saves after each step, then between backward and step, without managed accumulation."""
    ranks = torch.distributed.get_world_size()
    more = {"managed_gradient_accumulation": False, "gradient_accumulation_steps": 2}
    engine = cases.start(cases.config_of(cases.PROJECTIONS["columns"], {"stage": 2}, 2 * ranks, **more))
    told = []
    for step in range(3):
        for tokens in cases.batch(step).chunk(ranks)[torch.distributed.get_rank()].chunk(2):
            engine.backward(cases.loss_of(engine, tokens.to(engine.device)))
        if step < 2:
            engine.step()
        try:
            checkpoint.save(folder / str(step), engine, engine.optimizer)
            told.append("")
        except checkpoint.CheckpointError as error:
            told.append(str(error))
    engine.destroy()
    return told


def saved(setting: str, options: dict[str, Any], folder: Path) -> str:
    """Two steps, then a checkpoint; the digest of the weights in it."""
    engine = start(setting, options)
    cases.train(engine, range(2))
    engine.save_checkpoint(str(folder))
    weights = cases.digest(cases.full_weights(engine))
    engine.destroy()
    return weights


def refused_elsewhere(setting: str, options: dict[str, Any], folder: Path) -> str:
    """Load what another number of ranks saved: what does the user read?"""
    engine = start(setting, options)
    try:
        engine.load_checkpoint(str(folder))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        engine.destroy()
    return ""


def continued_elsewhere(setting: str, options: dict[str, Any], folder: Path) -> tuple[str, set[int]]:
    """The digest of the weights as loaded, and how often every matrix was updated after one more step."""
    engine = start(setting, options, fresh=True)
    engine.load_checkpoint(str(folder))
    weights = cases.digest(cases.full_weights(engine))
    cases.train(engine, [2])
    counts = {int(store["updates"]) for store in engine.basic_optimizer.state.values() if "updates" in store}
    engine.destroy()
    return weights, counts


def refused_to_save(setting: str, options: dict[str, Any], folder: Path) -> str:
    engine = start(setting, options)
    cases.train(engine, range(2))
    try:
        engine.save_checkpoint(str(folder))
    except ValueError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


def moved_away_and_back(setting: str, options: dict[str, Any]) -> list[str]:
    """What differs between a run and one whose states are offloaded and reloaded after steps 1 to 3. Collective."""
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as Kinds

    runs = []
    for moved in (False, True):
        engine = start(setting, options)
        for step in range(5):
            cases.train(engine, [step])
            if moved and step in (1, 2, 3):
                include = {1: None, 2: [Kinds.optim_states], 3: [Kinds.hp_params, Kinds.lp_params]}[step]
                engine.offload_states(include=include, pin_memory=False)
                away = set(engine.optimizer.offloaded_states)
                assert away >= set(include or Kinds) - {Kinds.contiguous_grad_buffer}
                engine.reload_states()
                assert not engine.optimizer.offloaded_states
        runs.append(everything(engine))
        engine.destroy()
    return different(*runs)


def from_adamw(setting: str, folder: Path) -> tuple[str, list[str], set[int]]:
    """AdamW's checkpoint, loaded with Frugal in the JSON: what the user reads, then with the weights alone what differs
    from them, and how often every matrix was updated in one more step.
    """
    adamw = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    engine = cases.start({**config(setting, {}), "optimizer": adamw})
    cases.train(engine, range(2))
    engine.save_checkpoint(str(folder))
    want = cases.model_weights(engine)
    engine.destroy()
    told = refused_elsewhere(setting, cases.PROJECTIONS["columns"], folder)
    engine = start(setting, cases.PROJECTIONS["columns"], fresh=True)
    engine.load_checkpoint(str(folder), load_optimizer_states=False, load_lr_scheduler_states=False)
    changed = different(want, cases.model_weights(engine))
    half = cases.SETTINGS[setting].half or torch.float32
    changed += different(want, {name: value.to(half) for name, value in cases.full_weights(engine).items()})
    cases.train(engine, [2])
    counts = {int(v) for s in engine.basic_optimizer.state.values() for k, v in s.items() if k.endswith("updates")}
    engine.destroy()
    return told, changed, counts
