"""`frugal-dist plan`: a recipe's bytes and collectives on any number of ranks, without running it."""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from frugal_dist.optimizer import Frugal
from frugal_dist.planner.formula import LLAMA_SHAPES, LlamaShape, Weight, table_of
from frugal_dist.planner.layouts import EngineLayout, engine_layout
from frugal_dist.planner.plan import Plan, make_plan
from frugal_dist.planner.report import Setting, check_gpu, figures, fits, report
from frugal_dist.planner.zero import Zero, read_zero
from frugal_dist.presets import BASELINES, DEFINED, OptimizerName
from frugal_dist.training.engines.deepspeed import data_types, equal_part, recipe_json
from frugal_dist.training.engines.plain import blocks_of
from frugal_dist.training.models import check_positions, llama_config, read_causal_config
from frugal_dist.training.optimizers import described, frugal_options, groups_of
from frugal_dist.training.recipe import Model, Optimizer, Recipe, check_recipe, check_released_share, read_recipe

ALL, SPREAD = 64, 5
"""Traffic is planned for each rank up to ``ALL``; of more for so many from the first to the last, where embedding and
head may lie."""


@contextmanager
def _without_collection() -> Iterator[None]:
    """A thousand ranks are millions of tiles, none of them garbage: looking for it takes a good part of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_collection()
def plan_recipe(recipe: Recipe, engine: str | None, ranks: int, gpu: str | None = None, as_json: bool = False) -> str:
    """The report, for people or as JSON. ``engine``: None takes the recipe's; "deepspeed" is its JSON's stage.

    Raises ValueError for an engine, GPU or number of ranks that makes no sense.
    """
    check_gpu(gpu)
    plan, baselines, layout, setting = _planned(recipe, engine, ranks, BASELINES)
    if gpu is not None and not fits(plan, layout, setting, gpu)[0]:
        setting = replace(setting, advice=_what_fits(recipe, ranks, gpu))
    if as_json:
        return json.dumps(figures(plan, baselines, layout, setting, gpu), indent=1)
    return report(plan, baselines, layout, setting, gpu)


def _planned(
    recipe: Recipe, engine: str | None, ranks: int, others: Sequence[OptimizerName] = ()
) -> tuple[Plan, dict[str, Plan], EngineLayout, Setting]:
    """The plan of a recipe, those of other optimizers in its place, and what decides about memory beside them."""
    check_recipe(recipe)
    engine = _planned_engine(recipe, engine)
    if ranks < 1 or (engine == "single" and ranks > 1):
        raise ValueError(
            f"ranks is {ranks}; engine {engine} needs {'exactly 1' if engine == 'single' else 'at least 1'}."
        )
    layout, model = engine_layout(engine), meta_model(recipe)
    longer = check_positions(model, recipe.length - (recipe.data.rows == "truncated"))
    units = _units(model, recipe, layout)
    narrow = recipe.weights == "bf16"
    plan = plan_model(model, recipe.optimizer, layout, ranks, units, narrow)
    baselines: dict[str, Plan] = {
        name: plan_model(model, replace(recipe.optimizer, name=name), layout, ranks, units, narrow)
        for name in others
        if name != recipe.optimizer.name
    }
    sharing = sharing_ranks(recipe, engine, ranks)
    share, rest = divmod(recipe.batch, sharing)
    check_released_share(recipe, share)
    notes = (
        [f"A batch of {recipe.batch} cannot be shared equally by {sharing} ranks: change it to train."] if rest else []
    )
    notes += [longer] if longer else []
    zero = _zero(recipe, layout, notes) if layout.masters else None
    # torch's engines end with a smaller micro-batch, DeepSpeed does not
    micro = equal_part(max(share, 1), recipe.micro_batch) if layout.masters else recipe.micro_batch or share
    sizes = [parameter.numel() for parameter in model.parameters()]
    setting = Setting(
        title=f"{recipe.folder.rpartition('/')[2]} with {described(recipe.optimizer)}",
        shape=_shape(model),
        parameters=sum(sizes),
        precision=recipe.precision,
        tokens=max(1, min(micro, share)) * recipe.length,
        checkpointing=recipe.model.checkpointing,
        note="\n".join(notes),
        zero=zero,
        weights=recipe.weights,
        added=max(sizes) if layout.name in ("single", "ddp") and micro < share else 0,
    )
    return plan, baselines, layout, setting


def _what_fits(recipe: Recipe, ranks: int, gpu: str) -> str:
    """The keys that make a recipe fit into a GPU, those that cost least first; or how near they come."""
    engine, micro = "single" if ranks == 1 else "fsdp2", recipe.micro_batch or max(recipe.batch // ranks, 1)
    words: list[str] = []
    total = 0
    for changes, options in (
        ({"engine": engine}, {}),
        ({"weights": "bf16"}, {"rounding": "stochastic"}),
        ({}, {"moments": "8bit"}),
        ({"release_gradients": True, "batch": micro * ranks, "micro_batch": None}, {}),
        ({}, {"projection": "columns"}),  # no bases
    ):
        mine = {key: value for key, value in options.items() if key not in DEFINED[recipe.optimizer.name]}
        more = {**recipe.optimizer.options, **mine}
        if all(getattr(recipe, key) == value for key, value in changes.items()) and more == recipe.optimizer.options:
            continue
        changed = replace(recipe, **changes, deepspeed=None, optimizer=replace(recipe.optimizer, options=more))
        try:
            plan, _, layout, setting = _planned(changed, None, ranks)
        except ValueError:  # the recipe asks for what goes against it
            continue
        recipe = changed
        words += [f"--{key} {json.dumps(value)}".replace('"', "") for key, value in changes.items()]
        words += [f"--optimizer.options.{key} {value}" for key, value in mine.items()]
        fit, total = fits(plan, layout, setting, gpu)
        if fit:
            return f"It fits with {' '.join(words)}: {total / 1e9:,.2f} GB"
    return f"Nor does it fit with {' '.join(words)}: {total / 1e9:,.2f} GB" if total else ""


def sharing_ranks(recipe: Recipe, engine: str | None, ranks: int) -> int:
    """Among how many a batch is divided: the ranks of tensor parallelism have the same rows."""
    return max(ranks // engine_layout(_planned_engine(recipe, engine)).copies, 1)


def _planned_engine(recipe: Recipe, engine: str | None) -> str:
    engine = engine or (f"fsdp2xtp:{recipe.tp}" if recipe.tp > 1 else recipe.engine)
    if engine != "deepspeed":
        return engine
    return f"zero{recipe_json(recipe).get('zero_optimization', {}).get('stage', 0)}"


def _zero(recipe: Recipe, layout: EngineLayout, notes: list[str]) -> Zero:
    """The settings of the recipe's DeepSpeed JSON; it is noted if its stage is not the one that is planned."""
    config, stage = recipe_json(recipe), int(layout.name.removeprefix("zero"))
    section = config.get("zero_optimization", {})
    own = section.get("stage", 0)
    if recipe.deepspeed is not None and own != stage:
        notes.append(f"{recipe.deepspeed} is for stage {own}: planned is stage {stage} with its other settings.")
    config = {**config, "zero_optimization": {**section, "stage": stage}}
    return read_zero({**config, **data_types(config, recipe.precision)}, stage, recipe.precision != "fp32")


def _units(model: nn.Module, recipe: Recipe, layout: EngineLayout) -> list[set[str]]:
    """The names of parameters whose gradients are there together where gradients are released; none otherwise."""
    if not recipe.release_gradients:
        return []
    if layout.name == "single":
        return [{name} for name, _ in model.named_parameters()]
    if not layout.cuts_weights or layout.masters:
        raise ValueError(f"release_gradients is for engine single, fsdp2, hsdp or a mesh, not for {layout.name}.")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    blocks = [{names.pop(id(parameter)) for parameter in block.parameters()} for block in blocks_of(model)]
    return [*blocks, set(names.values())]


def plan_model(
    model: nn.Module,
    optimizer: Optimizer,
    layout: EngineLayout,
    ranks: int,
    units: Sequence[set[str]] = (),
    narrow: bool = False,
) -> Plan:
    """The plan of an optimizer for a model that may be on the meta device. ``units``, ``narrow``: see ``make_plan``."""
    options = frugal_options(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about how little is projected: the figures tell
        frugal = Frugal(groups_of(model, options), **{**options, "process_group": None})
    shown = range(ranks) if ranks <= ALL else [i * (ranks - 1) // (SPREAD - 1) for i in range(SPREAD)]
    return make_plan(frugal, layout, ranks, shown=list(shown), units=units, narrow=narrow)


def memory_of(name: str, density: float) -> str:
    """Optimizer state of a recipe's model, or of that with a ``config.json``, for the choices of state, as a table."""
    path = Path(name)
    if path.is_dir() or path.suffix == ".json":
        folder = path if path.is_dir() else path.parent
        recipe = Recipe(model=Model(path=str(path if path.is_file() else folder)))
        title = folder.absolute().name
    else:
        recipe, title = read_recipe(name), path.stem
    groups = groups_of(meta_model(recipe), frugal_options(recipe.optimizer))
    weights = [_weight(one, group["projected"]) for group in groups for _, one in group["params"]]
    return table_of({title: weights}, density)


def _weight(parameter: Tensor, projected: bool) -> Weight:
    if not projected:
        return Weight(1, parameter.numel(), 1, projected=False)
    rows, cols = parameter.shape[-2:]
    return Weight(rows, cols, parameter.numel() // (rows * cols), projected=True)


def meta_model(recipe: Recipe) -> nn.Module:
    """The recipe's model without memory or weights. ValueError for a shape or folder that is not there."""
    import torch
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM  # transformers' own hints are incomplete
    name, tied = recipe.model.llama, recipe.model.tied
    if name is None:
        config = read_causal_config(str(recipe.model.path))
        tied = tied or config.tie_word_embeddings
    else:
        vocab = recipe.model.vocab_size or (LLAMA_SHAPES[name].vocab if name in LLAMA_SHAPES else 1)
        config = llama_config(name, vocab, recipe.length)
    config.tie_word_embeddings = tied
    with torch.device("meta"):
        model: nn.Module = auto.from_config(config)
    return model


def _shape(model: Any) -> LlamaShape:
    """The numbers from which activations are estimated."""
    config = model.config
    hidden = config.hidden_size
    return LlamaShape(
        hidden=hidden,
        intermediate=getattr(config, "intermediate_size", None) or 4 * hidden,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        vocab=config.vocab_size,
    )
