"""`frugal-dist plan`: a recipe's bytes and collectives on any number of ranks, without running it."""

from __future__ import annotations

import warnings

from torch import nn

from frugal_dist.optimizer import Frugal
from frugal_dist.parameters import split_parameters
from frugal_dist.planner.engines import EngineLayout, engine_layout
from frugal_dist.planner.plan import Plan, make_plan
from frugal_dist.planner.report import Setting, report
from frugal_dist.planner.shapes import LLAMA_SHAPES
from frugal_dist.training.optimizers import frugal_options
from frugal_dist.training.recipe import Optimizer, Recipe, check_recipe

ALL, SPREAD = 64, 5
"""Up to ``ALL`` ranks each is planned; of more so many from the first to the last, where embedding and head may lie."""


def plan_recipe(recipe: Recipe, engine: str, ranks: int, gpu: str | None = None) -> str:
    """The report. Raises ValueError for an engine, GPU or number of ranks that makes no sense."""
    check_recipe(recipe)
    if ranks < 1 or (engine == "single" and ranks > 1):
        raise ValueError(
            f"ranks is {ranks}; engine {engine} needs {'exactly 1' if engine == 'single' else 'at least 1'}."
        )
    layout, model = engine_layout(engine), meta_model(recipe)
    plan = plan_model(model, recipe.optimizer, layout, ranks)
    others = {name: Optimizer(name=name) for name in ("adamw", "galore") if name != recipe.optimizer.name}
    baselines = {name: plan_model(model, other, layout, ranks) for name, other in others.items()}
    share = recipe.micro_batch or max(1, recipe.batch // ranks)
    setting = Setting(
        title=f"{recipe.folder.rpartition('/')[2]} with {recipe.optimizer.name}",
        shape=LLAMA_SHAPES[str(recipe.model.llama)],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        precision=recipe.precision,
        tokens=share * recipe.length,
        checkpointing=recipe.model.checkpointing,
    )
    return report(plan, baselines, layout, setting, gpu)


def plan_model(model: nn.Module, optimizer: Optimizer, layout: EngineLayout, ranks: int) -> Plan:
    """The plan of an optimizer for a model that may be on the meta device."""
    options = frugal_options(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about how little is projected: the figures tell
        frugal = Frugal(split_parameters(model), **{**options, "process_group": None})
    shown = range(ranks) if ranks <= ALL else [i * (ranks - 1) // (SPREAD - 1) for i in range(SPREAD)]
    return make_plan(frugal, layout, ranks, shown=list(shown))


def meta_model(recipe: Recipe) -> nn.Module:
    """The recipe's model without memory. ValueError for a model that is no LLaMA shape."""
    import torch
    from transformers import LlamaForCausalLM

    from frugal_dist.training.models import llama_config

    if recipe.model.llama is None:
        raise ValueError("model.llama is not set: plans are for LLaMA shapes.")
    config = llama_config(recipe.model.llama, recipe.model.vocab_size or 32_000, recipe.length)
    config.tie_word_embeddings = recipe.model.tied
    with torch.device("meta"):
        return LlamaForCausalLM(config)
