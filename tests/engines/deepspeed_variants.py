"""Runs under DeepSpeed that differ from the table: parameter groups, frozen weights, clipping, unusual shapes ..."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed_cases as cases
import torch
from deepspeed_cases import SMOOTH, VOCAB, WARMUP, Difference
from torch import Tensor, nn

from frugal_dist import checkpoint
from frugal_dist.sharding.tile import Layout

LIMIT = 2e-5
"""Of what rounding may do to a weight under smooth rules; under a sign rule more is a flip."""


@dataclass(frozen=True)
class Variant:
    """``path``: how the optimizer comes in. ``more``: into the config. ``layout``: what must be true of the layout of
    the only matrix, or the case is not what its name says. The rest as for ``cases.reference``.
    """

    options: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    build: Callable[[], nn.Module] = cases.small_llama
    groups: Callable[[nn.Module], Any] | None = None
    path: str = "JSON"
    clip: float = 0.0
    accumulate: int = 1
    schedule: Callable[[Any], Any] | None = None
    layout: Callable[[Layout], bool] | None = None
    before: Callable[[nn.Module, int], None] | None = None


class Odd(nn.Module):
    """An embedding, one matrix of any shape on top of it, a vector and a head."""

    def __init__(self, rows: int, cols: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed_tokens = nn.Embedding(VOCAB, cols)
        self.matrix = nn.Linear(cols, rows, bias=False)
        self.scale = nn.Parameter(torch.ones(rows))
        self.lm_head = nn.Linear(rows, VOCAB, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        from transformers.modeling_outputs import CausalLMOutput

        logits = self.lm_head(self.matrix(self.embed_tokens(input_ids)) * self.scale)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss)


def some_rank_holds_nothing(layout: Layout) -> bool:
    return any(not tiles for tiles in layout)


def a_row_lies_on_three_ranks(layout: Layout) -> bool:
    rows = Counter(row for tiles in layout for row in {row for tile in tiles for row in range(*tile.rows)})
    return max(rows.values()) >= 3


def tiny() -> nn.Module:
    return Odd(3, 3)


def broad() -> nn.Module:
    return Odd(2, 401)


def frozen() -> nn.Module:
    model = cases.small_llama()
    for name, param in model.named_parameters():
        param.requires_grad = not ("layers.0.mlp" in name or "embed" in name or name.endswith("input_layernorm.weight"))
    return model


def only_matrices() -> nn.Module:
    """As beside adapters: all regular parameters are frozen."""
    model = cases.small_llama()
    for name, param in model.named_parameters():
        param.requires_grad = "proj" in name
    return model


def only_regular() -> nn.Module:
    model = cases.small_llama()
    for name, param in model.named_parameters():
        param.requires_grad = "proj" not in name
    return model


def freeze_for_a_while(model: nn.Module, step: int) -> None:
    """Layer 0 is frozen in the first step and in steps 2 and 3, of which 3 refreshes; the head in step 5."""
    for name, param in model.named_parameters():
        if "layers.0." in name:
            param.requires_grad_(step not in (0, 2, 3))
        if "lm_head" in name:
            param.requires_grad_(step != 5)


def unfreeze_late(model: nn.Module, step: int) -> None:
    if step == 3:
        model.requires_grad_(True)


class Gated(nn.Module):
    """Blocks whose branch starts at zero (ReZero, LayerScale): in the first step only the gates have a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed_tokens = nn.Embedding(VOCAB, 9)
        self.up_proj = nn.Linear(9, 13, bias=False)
        self.down_proj = nn.Linear(13, 9, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))
        self.lm_head = nn.Linear(9, VOCAB, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        from transformers.modeling_outputs import CausalLMOutput

        hidden = self.embed_tokens(input_ids)
        hidden = hidden + self.gate * self.down_proj(torch.tanh(self.up_proj(hidden)))
        logits = self.lm_head(hidden)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss)


def split(model: nn.Module) -> list[dict[str, Any]]:
    from frugal_dist import split_parameters

    return split_parameters(model)


def several_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Four groups of different settings, norms without weight decay."""
    from frugal_dist import split_parameters

    attention, rest, regular, norms = [], [], [], []
    for group in split_parameters(model, no_decay=["*norm.weight"]):
        for name, param in group["params"]:
            if group["projected"]:
                (attention if "self_attn" in name else rest).append((name, param))
            else:
                (norms if "weight_decay" in group else regular).append((name, param))
    return [
        {"params": attention, "projected": True, "density": 0.5, "side": "left", "update_gap": 2, "lr": 5e-3},
        {"params": rest, "projected": True, "projection": "columns", "lr": 2e-3},
        {"params": regular, "projected": False, "betas": (0.8, 0.9)},
        {"params": norms, "projected": False, "weight_decay": 0.0},
    ]


def with_an_empty_group(model: nn.Module) -> list[dict[str, Any]]:
    """DeepSpeed removes empty groups from the optimizer that it is given."""
    return [{"params": [], "projected": True, "lr": 0.5}, *several_groups(model)]


def warmup(optimizer: Any) -> Any:
    from deepspeed.runtime.lr_schedules import WarmupLR

    return WarmupLR(optimizer, **WARMUP)


VARIANTS = {
    "groups of split_parameters": Variant(groups=split),
    "several groups": Variant(groups=several_groups),
    "an empty group": Variant(groups=with_an_empty_group),
    "several groups, offload": Variant(groups=several_groups, zero=cases.CPU),
    "optimizer object": Variant(groups=several_groups, path="object"),
    "optimizer callable": Variant(path="callable"),
    "frozen parameters": Variant(build=frozen),
    "frozen parameters, blockwise": Variant(build=frozen, options={"projection": "blockwise"}),
    "only matrices are trained": Variant(build=only_matrices),
    "only matrices are trained, groups": Variant(build=only_matrices, groups=split),
    "only matrices are trained, object": Variant(build=only_matrices, groups=split, path="object"),
    "only regular parameters are trained": Variant(build=only_regular),
    "only regular parameters are trained, callable": Variant(build=only_regular, path="callable"),
    "gates": Variant(build=Gated, options={"weight_decay": 0.5}, zero={"sub_group_size": 40}),
    "gates, columns": Variant(
        build=Gated, options={"projection": "columns", "weight_decay": 0.5}, zero={"sub_group_size": 40}
    ),
    "gates, blockwise": Variant(build=Gated, options={"projection": "blockwise", "density": 0.5, "weight_decay": 0.5}),
    "frozen at first": Variant(build=frozen, before=unfreeze_late),
    "frozen for a while, accumulation": Variant(before=freeze_for_a_while, accumulate=3),
    "frozen for a while, clipping": Variant(before=freeze_for_a_while, clip=0.1, more={"gradient_clipping": 0.1}),
    "frozen for a while, clipping, offload": Variant(
        before=freeze_for_a_while, clip=0.1, more={"gradient_clipping": 0.1}, zero=cases.CPU
    ),
    "split products": Variant(options={"matmul": "bf16x3"}),
    "accumulation": Variant(accumulate=3),
    "accumulation, overlap": Variant(accumulate=3, zero={"overlap_comm": True}),
    "clipping": Variant(clip=0.1, more={"gradient_clipping": 0.1}),
    "clipping by default": Variant(clip=1.0, more={"gradient_clipping": None}),
    "no_decay": Variant(options={"no_decay": ["*norm.weight", "embed_tokens.*"], "weight_decay": 0.5}),
    "schedule": Variant(schedule=warmup, more={"scheduler": {"type": "WarmupLR", "params": WARMUP}}),
    "plain reduce": Variant(zero={"contiguous_gradients": False, "reduce_scatter": False}),
    "parameter_alignment": Variant(zero={"parameter_alignment": True}),
    "small buckets": Variant(zero={"reduce_bucket_size": 3000, "allgather_bucket_size": 3000}),
    "all padding": Variant(build=tiny, groups=split, layout=some_rank_holds_nothing),
    "all padding, columns": Variant(
        build=tiny, groups=split, options={"projection": "columns", "density": 0.5}, layout=some_rank_holds_nothing
    ),
    **{
        f"rows over three ranks, {what}": Variant(
            build=broad, groups=split, options={"density": 0.5, **options}, layout=a_row_lies_on_three_ranks
        )
        for what, options in {
            "right": {"side": "right", "density": 0.0025},
            "left": {"side": "left"},
            "rows": {"projection": "rows"},
            "randk": {"projection": "randk"},
        }.items()
    },
    "staggered": Variant(options={"refresh_schedule": "staggered"}),
    "owners": Variant(options={"compute_layout": "owner"}),
    "lion": Variant(options={"state_full": "lion", "state_free": "none", "on_refresh": "keep", "lr": 1e-3}),
    "sgdm": Variant(options={"state_full": "sgdm", "on_refresh": "project"}),
    "keep": Variant(options={"on_refresh": "keep", "projection": "columns"}),
    "project": Variant(options={"on_refresh": "project"}),
}


def run(name: str, stage: int) -> Difference:
    """A job: train a variant at a stage; how far from one process?"""
    ranks = torch.distributed.get_world_size()
    variant = VARIANTS[name]
    options = {**SMOOTH, **variant.options}
    model = variant.build()
    config = cases.config_of(options, {"stage": stage, **variant.zero}, ranks, **variant.more)
    config = {key: value for key, value in config.items() if value is not None}
    config["gradient_accumulation_steps"] = variant.accumulate
    config["train_micro_batch_size_per_gpu"] = cases.ROWS // ranks // variant.accumulate
    engine = cases.start(config, model, **_given(variant, model, options, config))
    train(engine, variant.before)
    found = cases.full_weights(engine)
    if variant.layout is not None and stage > 0:
        runtime, _ = engine.basic_optimizer.everything()
        assert variant.layout(runtime.table.matrices[0].storage), runtime.table.matrices[0].storage
    engine.destroy()
    want = cases.reference(
        options,
        ranks * variant.accumulate,  # gradients add up in the same parts: a basis may turn their rounding into more
        clip=variant.clip,
        model=variant.build,
        groups=variant.groups or _by_name,
        schedule=variant.schedule,
        before=variant.before,
    )
    return cases.difference_to(found, want, LIMIT)


def train(engine: Any, before: Callable[[nn.Module, int], None] | None) -> None:
    """All steps; ``before`` each of them as for ``cases.reference``."""
    for step in range(cases.STEPS):
        if before is not None:
            before(engine.module, step)
        cases.train(engine, [step])


def frozen_for_a_while(setting: str, options: dict[str, Any]) -> tuple[Difference, bool]:
    """A job: layers are frozen and unfrozen under a setting. How far from one process, and did frozen weights stay?"""
    ranks, chosen = torch.distributed.get_world_size(), cases.SETTINGS[setting]
    options = {**SMOOTH, **options}
    engine = cases.start(cases.config_of(options, chosen.zero, ranks, **chosen.more), zero_init=chosen.zero_init)
    seen = []

    def before(model: nn.Module, step: int) -> None:
        freeze_for_a_while(model, step)
        seen.append(cases.model_weights(engine)["model.layers.0.mlp.up_proj.weight"])

    train(engine, before)
    found = cases.full_weights(engine)
    engine.destroy()
    half = {"half": chosen.half, "accumulated_in": chosen.accumulated_in}
    want = cases.reference(options, ranks if chosen.half else 1, **half, before=freeze_for_a_while)
    moved = [not torch.equal(one, other) for one, other in itertools.pairwise(seen)]
    return cases.difference_to(found, want), moved == [False, True, False, False, True, True]


def unfrozen(setting: str, folder: Path) -> tuple[str, bool, bool]:
    """What the user reads whose parameters were frozen when the engine was built, and what comes of the advice: whether
    a new engine has the saved weights, and whether the layer then trains.
    """
    ranks, chosen = torch.distributed.get_world_size(), cases.SETTINGS[setting]
    config = cases.config_of(SMOOTH, chosen.zero, ranks, **chosen.more)
    engine = cases.start(config, frozen())
    cases.train(engine, range(2))
    checkpoint.save(folder, engine, engine.optimizer)
    saved, error = cases.model_weights(engine), ""
    for param in engine.module.model.layers[0].mlp.parameters():
        param.requires_grad_(True)
    try:
        cases.train(engine, [2])
    except ValueError as told:
        error = str(told)
    engine.destroy()
    engine = cases.start(config)
    checkpoint.load(folder, engine, engine.optimizer, on_mismatch="refresh")
    loaded = cases.model_weights(engine)
    cases.train(engine, [2])
    after = cases.model_weights(engine)
    engine.destroy()
    same = all(torch.equal(saved[name], loaded[name]) for name in saved)
    return error, same, all(not torch.equal(loaded[name], after[name]) for name in after)


def _by_name(model: nn.Module) -> Any:
    return model.named_parameters()


def _given(variant: Variant, model: nn.Module, options: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    from frugal_dist import Frugal

    groups = variant.groups(model) if variant.groups else list(model.parameters())
    if variant.path == "JSON":
        return {"model_parameters": groups}
    del config["optimizer"]
    if variant.path == "object":
        return {"optimizer": Frugal(groups, **options)}
    return {"model_parameters": groups, "optimizer": lambda params: Frugal(params, **options)}
