"""A small odd LLaMA under DeepSpeed: the settings, one run of a setting, and the same run on one process."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

STEPS, GAP, ROWS, LENGTH, VOCAB = 7, 3, 12, 8, 97
LR = 1e-2
Weights = dict[str, Tensor]

SMOOTH = {"lr": LR, "density": 0.25, "update_gap": GAP, "state_free": "sgd", "eps": 1e-3, "weight_decay": 0.01}
"""Rounding stays rounding: no signs, and an eps that keeps small gradients from becoming full steps."""

SMALL_LR = 1e-4
SIGNS = {**SMOOTH, "lr": SMALL_LR, "state_free": "sign", "eps": 1e-8}
"""A flipped sign is a jump of 2 lr. With a large lr it would change the next gradients, and thousands would follow."""

WARMUP = {"warmup_min_lr": 1e-3, "warmup_max_lr": 2e-2, "warmup_num_steps": 4, "warmup_type": "linear"}


@dataclass(frozen=True)
class Setting:
    """One way to run DeepSpeed. ``accumulated_in``: in what DeepSpeed adds up half-precision gradients."""

    zero: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)
    zero_init: bool = False
    half: torch.dtype | None = None
    accumulated_in: torch.dtype | None = None


BF16 = {"bf16": {"enabled": True}}
CPU = {"offload_optimizer": {"device": "cpu"}}
SETTINGS = {
    "0": Setting({"stage": 0}),
    "1": Setting({"stage": 1}),
    "2": Setting({"stage": 2}),
    "3": Setting({"stage": 3, "stage3_param_persistence_threshold": 0}),
    "3, sub-groups": Setting({"stage": 3, "sub_group_size": 12000}),
    "3, zero.Init": Setting({"stage": 3}, zero_init=True),
    "1, offload": Setting({"stage": 1, **CPU}),
    "2, offload": Setting({"stage": 2, **CPU}),
    "3, offload": Setting({"stage": 3, **CPU}),
    "2, plain reduce": Setting({"stage": 2, "contiguous_gradients": False, "reduce_scatter": False}),
    "2, overlap": Setting({"stage": 2, "overlap_comm": True}),
    "3, overlap": Setting({"stage": 3, "overlap_comm": True, "reduce_bucket_size": 20000}),
    "BF16_Optimizer": Setting(
        {"stage": 1}, {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}, False, torch.bfloat16, torch.bfloat16
    ),
    "0, bf16": Setting({"stage": 0}, BF16, False, torch.bfloat16, torch.bfloat16),
    "1, bf16": Setting({"stage": 1}, BF16, False, torch.bfloat16, torch.bfloat16),
    "2, bf16": Setting({"stage": 2}, BF16, False, torch.bfloat16, torch.bfloat16),
    "3, bf16": Setting({"stage": 3}, BF16, False, torch.bfloat16, torch.bfloat16),
}
PROJECTIONS: dict[str, dict[str, Any]] = {
    "svd std": {"projection": "svd"},
    "svd right": {"projection": "svd", "side": "right"},
    "svd left": {"projection": "svd", "side": "left"},
    "random": {"projection": "random"},
    "dct": {"projection": "dct"},
    "sinkgd": {"projection": "columns", "density": 0.0, "state_free": "sinkhorn"},
    "columns": {"projection": "columns"},
    "rows": {"projection": "rows"},
    "randk": {"projection": "randk"},
    "blockwise": {"projection": "blockwise"},
}


def small_llama(dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """Odd sizes and grouped key-value heads, the same weights everywhere."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {
        "hidden_size": 48, "intermediate_size": 101, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCAB, **changes,
    }  # fmt: skip
    config = LlamaConfig(
        **sizes, max_position_embeddings=32, attn_implementation="eager", tie_word_embeddings=False, use_cache=False
    )
    return LlamaForCausalLM(config).to(dtype)


def batch(step: int) -> Tensor:
    """The global batch of a step: ROWS rows, the same for every number of ranks."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


# --- one process -----------------------------------------------------------------------------------------------------


def reference(
    options: dict[str, Any],
    parts: int = 1,
    half: torch.dtype | None = None,
    accumulated_in: torch.dtype | None = None,
    rounded_otherwise: bool = False,
    clip: float = 0.0,
    model: Callable[[], nn.Module] = small_llama,
    groups: Callable[[nn.Module], Any] | None = None,
    schedule: Callable[[Any], Any] | None = None,
    before: Callable[[nn.Module, int], None] | None = None,
) -> Weights:
    """Plain PyTorch. ``parts``: in how many micro-batches a step's gradient is computed, as ranks do.

    ``half``: forward and backward in half precision on copies of fp32 weights, whose gradients are added up in
    ``accumulated_in``. ``rounded_otherwise``: sums in the other order, and every fp32 weight a millionth larger after
    a step: how far rounding alone can lead. ``groups``: the parameter groups of a model, ``schedule``: the scheduler
    of an optimizer.
    ``before`` is called before each step, with the model and the step.
    """
    from frugal_dist import Frugal, split_parameters

    worker = model()
    for param in worker.parameters() if half else ():  # not the buffers: DeepSpeed leaves them alone too
        param.data = param.data.to(half)
    master = copy.deepcopy(worker).float() if half else worker
    optimizer = Frugal((groups or split_parameters)(master), process_group=None, **options)
    scheduler = schedule(optimizer) if schedule else None
    pairs = list(zip(master.parameters(), worker.parameters(), strict=True))
    for step in range(STEPS):
        for one in {worker, master} if before else ():
            before(one, step)
        chunks = batch(step).chunk(parts)
        sums = _gradients(worker, chunks[::-1] if rounded_otherwise else chunks, accumulated_in)
        for (high, _), grad in zip(pairs, sums, strict=True):
            high.grad = None if grad is None else grad.float()
        if clip:
            torch.nn.utils.clip_grad_norm_(master.parameters(), clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        with torch.no_grad():
            for high, low in pairs:
                if rounded_otherwise:
                    high.mul_(1 + 1e-6)  # a few of all weights are rounded to another number in half precision
                low.copy_(high)
    return {name: param.detach().clone() for name, param in master.named_parameters()}


def _gradients(model: nn.Module, parts: Iterable[Tensor], dtype: torch.dtype | None) -> list[Tensor | None]:
    parts = list(parts)
    sums: list[Tensor | None] = [None for _ in model.parameters()]
    for part in parts:
        model.zero_grad()
        loss_of(model, part).backward()
        for i, param in enumerate(model.parameters()):
            if param.grad is not None:
                share = param.grad.to(dtype or param.dtype) / len(parts)
                previous = sums[i]
                sums[i] = share if previous is None else previous + share
    model.zero_grad()
    return sums


# --- DeepSpeed -------------------------------------------------------------------------------------------------------


def config_of(options: dict[str, Any], zero: dict[str, Any], ranks: int, **more: Any) -> dict[str, Any]:
    """A DeepSpeed JSON config with Frugal as its optimizer."""
    return {
        "train_micro_batch_size_per_gpu": ROWS // ranks,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "Frugal", "params": copy.deepcopy(options)},
        "zero_optimization": copy.deepcopy(zero),
        **copy.deepcopy(more),
    }


def start(config: dict[str, Any], model: nn.Module | None = None, zero_init: bool = False, **given: Any) -> Any:
    """The engine; ``given`` goes to deepspeed.initialize."""
    import deepspeed

    import frugal_dist  # noqa: F401  (all that a user's script needs)

    if model is None and zero_init:
        small_llama()  # imports what must not be imported while zero.Init has torch's functions replaced
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = small_llama()
        _copy_into(model)
    model = model or small_llama()
    if not given:
        given = {"model_parameters": model.parameters()}
    engine, *_ = deepspeed.initialize(model=model, config=config, **given)
    return engine


def train(engine: Any, steps: Iterable[int]) -> None:
    """The global batches of ``steps``, in as many micro-batches as the engine accumulates."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for step in steps:
        for tokens in batch(step).chunk(ranks)[rank].chunk(engine.gradient_accumulation_steps()):
            engine.backward(loss_of(engine, tokens.to(engine.device)))
            engine.step()


def full_weights(engine: Any) -> Weights:
    """The fp32 weights of every parameter, whatever the stage. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    clones = _stage0_clones(engine)
    for name, param in engine.module.named_parameters():
        if param in clones:
            value = clones[param]
        elif hasattr(param, "ds_id") or hasattr(param, "_hp_mapping"):
            value = safe_get_full_fp32_param(param)
        else:
            value = None
        found[name] = (param.detach() if value is None else value.detach()).clone().float()
    return found


def model_weights(engine: Any) -> Weights:
    """What the next forward pass uses. Collective."""
    import deepspeed

    found = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param], enabled=hasattr(param, "ds_id")):
            found[name] = param.detach().clone()
    return found


def digest(weights: Weights) -> str:
    """Equal for equal bits: what a job can send home instead of tensors."""
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in weights.values())).hexdigest()


def _stage0_clones(engine: Any) -> dict[Tensor, Tensor]:
    """Stage 0 in half precision keeps fp32 clones of the trainable parameters."""
    if not hasattr(engine.optimizer, "fp32_groups"):
        return {}
    pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return {low: high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}


def _copy_into(model: nn.Module) -> None:
    """zero.Init partitions while it builds; give the result the common weights."""
    import deepspeed

    weights = small_llama().state_dict()
    for name, param in model.named_parameters():
        with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
            param.data.copy_(weights[name])


# --- comparing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Between a run and one process: the largest of any weight, and how many entries are off by a full step."""

    largest: float
    mean: float
    flips: int
    entries: int


def difference_to(found: Weights, want: Weights, lr: float = LR) -> Difference:
    assert list(found) == list(want)
    apart = torch.cat([(found[name] - want[name]).abs().flatten() for name in want])
    flips = int((apart > lr).sum())
    return Difference(float(apart.max()), float(apart.mean()), flips, apart.numel())


@lru_cache(maxsize=64)
def _cached_reference(key: str) -> Weights:
    options, arguments = eval(key, {"torch": torch})
    return reference(options, **arguments)


def equivalence(setting: str, projection: str, signs: bool = False) -> tuple[Difference, float]:
    """A job: train under a setting; how far from one process? The model must hold the rounded weights, on all ranks.

    The second number, of half precision: the mean difference of one process from itself when it rounds otherwise.
    """
    ranks = torch.distributed.get_world_size()
    options = {**(SIGNS if signs else SMOOTH), **PROJECTIONS[projection]}
    chosen = SETTINGS[setting]
    engine = start(config_of(options, chosen.zero, ranks, **chosen.more), zero_init=chosen.zero_init)
    train(engine, range(STEPS))
    found, used = full_weights(engine), model_weights(engine)
    engine.destroy()
    for name, value in used.items():
        assert torch.equal(value, found[name].to(value.dtype)), f"{name}: the model's weights are not the optimizer's"
    parts = ranks if signs or chosen.half else 1
    arguments = {"parts": parts, "half": chosen.half, "accumulated_in": chosen.accumulated_in}
    want, lr = _cached_reference(repr((options, arguments))), float(options["lr"])
    spread = 0.0
    if chosen.half:
        otherwise = _cached_reference(repr((options, {**arguments, "rounded_otherwise": True})))
        spread = difference_to(otherwise, want, lr).mean
    return difference_to(found, want, lr), spread
