"""A small LLaMA as two pipeline stages with FSDP2 in each, by torch's own schedules. Runs inside each rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from engine_jobs import STEPS, Job, build, make_optimizer, never, reference, rows_of, train, whole
from storages import Named
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from frugal_dist import Frugal, checkpoint, split_parameters

STAGES, COPIES, MICRO = 2, 2, 2
SAVED_AFTER = 4


class Layers(nn.Module):
    """Some layers, under the names of the whole model; ids or hidden states in, hidden states or logits out."""

    def __init__(self, model: nn.Module, number: int) -> None:
        super().__init__()
        self.model, inside = nn.Module(), model.model
        self.model.layers = nn.ModuleDict({str(number): inside.layers[number]})
        self.model.rotary_emb = inside.rotary_emb
        if number == 0:
            self.model.embed_tokens = inside.embed_tokens
        if number == STAGES - 1:
            self.model.norm, self.lm_head = inside.norm, model.lm_head

    def forward(self, given: Tensor) -> Tensor:
        hidden = given if given.is_floating_point() else self.model.embed_tokens(given)
        length = hidden.shape[1]
        places = self.model.rotary_emb(hidden, torch.arange(length)[None])
        mask = torch.full((length, length), torch.finfo(hidden.dtype).min, dtype=hidden.dtype).triu(1)[None, None]
        for layer in self.model.layers.values():
            hidden = layer(hidden, attention_mask=mask, position_embeddings=places)
        return self.lm_head(self.model.norm(hidden)) if hasattr(self, "lm_head") else hidden


def next_token_loss(logits: Tensor, rows: Tensor) -> Tensor:
    """As transformers has it."""
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), rows[:, 1:].flatten())


def _stage(job: Job, axes: DeviceMesh) -> tuple[Layers, Frugal]:
    model = build(job)
    everything = split_parameters(model)
    layers = Layers(model, axes.get_local_rank("pp"))
    for layer in layers.model.layers.values():
        fully_shard(layer, mesh=axes["fsdp"])
    fully_shard(layers, mesh=axes["fsdp"])
    return layers, make_optimizer(layers, job, whole_model=everything)


def _train_stage(layers: Layers, optimizer: Frugal, job: Job, axes: DeviceMesh, steps: range) -> None:
    number, copy = axes.get_local_rank("pp"), axes.get_local_rank("fsdp")
    stage = PipelineStage(layers, number, STAGES, torch.device("cpu"), group=axes.get_group("pp"))
    schedule = ScheduleGPipe(stage, MICRO, loss_fn=next_token_loss)
    for step in steps:
        optimizer.zero_grad()
        rows = torch.cat([rows_of(step, micro, MICRO, copy, COPIES) for micro in range(MICRO)])
        schedule.step(rows) if number == 0 else schedule.step(target=rows)
        optimizer.step()


def difference(job: Job, folder: Path) -> float:
    """To one process: of a run that loads in the middle what it has saved, and of what it has saved there."""
    axes = init_device_mesh("cpu", (STAGES, COPIES), mesh_dim_names=("pp", "fsdp"))
    layers, optimizer = _stage(job, axes)
    _train_stage(layers, optimizer, job, axes, range(SAVED_AFTER))
    checkpoint.save(folder, layers, optimizer, process_group="auto")
    layers, optimizer = _stage(job, axes)
    with torch.no_grad():
        for param in layers.parameters():
            param.zero_()
    checkpoint.load(folder, layers, optimizer, process_group="auto")
    _train_stage(layers, optimizer, job, axes, range(SAVED_AFTER, STEPS))
    want = reference(replace(job, micro_steps=MICRO), COPIES)
    return _apart(layers, want)


def difference_of_the_rest(model: nn.Module, optimizer: Frugal, job: Job) -> float:
    """The same of one process that goes on where the stages had saved."""
    pieces = replace(job, micro_steps=MICRO * COPIES)
    train(model, optimizer, pieces, lambda step, micro: rows_of(step, micro, MICRO * COPIES, 0, 1), never, SAVED_AFTER)
    want = reference(replace(job, micro_steps=MICRO), COPIES)
    return _apart(model, want)


def _apart(model: nn.Module, want: Named) -> float:
    return max(float((whole(param) - want[name]).abs().max()) for name, param in model.named_parameters())
