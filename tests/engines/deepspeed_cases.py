"""A small odd LLaMA under DeepSpeed: the cases, and one run of a case on the ranks that are there."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

STEPS, GAP, ROWS, LENGTH, VOCAB = 7, 3, 12, 8, 97


def small_llama(dtype: torch.dtype = torch.float32, layers: int = 2) -> nn.Module:
    """Odd sizes and grouped key-value heads, the same weights everywhere."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=101, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, max_position_embeddings=32, attn_implementation="eager", tie_word_embeddings=False,
        use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def batch(step: int) -> Tensor:
    """The global batch of a step: ROWS rows, the same for every number of ranks."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def reference(options: dict[str, Any], dtype: torch.dtype = torch.float32, clip: float = 0.0) -> dict[str, Tensor]:
    """One process, plain PyTorch."""
    from frugal_dist import Frugal, split_parameters

    model = small_llama(dtype)
    optimizer = Frugal(split_parameters(model), process_group=None, **options)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def config_of(options: dict[str, Any], zero: dict[str, Any], ranks: int, **more: Any) -> dict[str, Any]:
    """A DeepSpeed JSON config with Frugal as its optimizer."""
    return {
        "train_micro_batch_size_per_gpu": ROWS // ranks,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "Frugal", "params": copy.deepcopy(options)},
        "zero_optimization": zero,
        **more,
    }


def full_weights(engine: Any) -> dict[str, Tensor]:
    """The fp32 weights of every parameter, whatever the stage."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, param in engine.module.named_parameters():
        value = safe_get_full_fp32_param(param) if _has_master(param) else None
        found[name] = (param.detach() if value is None else value).clone().float()
    return found


def _has_master(param: nn.Parameter) -> bool:
    return hasattr(param, "ds_id") or getattr(param, "_hp_mapping", None) is not None or hasattr(param, "_dp_group")


def run(config: dict[str, Any], zero_init: bool = False, steps: int = STEPS, model: nn.Module | None = None) -> Any:
    """Train; returns the engine."""
    import deepspeed

    if model is None and zero_init:
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = small_llama()
        _copy_into(model)
    model = model or small_llama()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    train(engine, range(steps))
    return engine


def train(engine: Any, steps: Any) -> None:
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share = ROWS // ranks
    for step in steps:
        tokens = batch(step)[rank * share : (rank + 1) * share].to(engine.device)
        engine.backward(loss_of(engine, tokens))
        engine.step()


def _copy_into(model: nn.Module) -> None:
    """zero.Init partitions while it builds; give the result the common weights."""
    import deepspeed

    weights = small_llama().state_dict()
    for name, param in model.named_parameters():
        with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
            param.data.copy_(weights[name])
