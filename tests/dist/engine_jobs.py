"""A small odd LLaMA on torch's real engines, against one process with the whole batch. Runs inside each rank."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from frugal_dist import Frugal, split_parameters
from frugal_dist.update.remainder import split_

STEPS, ROWS, LENGTH, VOCAB = 7, 12, 6, 97
Named = dict[str, Tensor]


@dataclass(frozen=True)
class Job:
    """What is trained, and what happens on the way."""

    projection: str = "svd"
    side: str = "std"
    micro_steps: int = 1
    clip: float = 0.0
    tied: bool = False
    silent: tuple[int, ...] = ()
    schedule: bool = False
    freeze: tuple[int, ...] = ()
    decay_groups: bool = False
    dtype: torch.dtype = torch.float64
    more: tuple[tuple[str, Any], ...] = field(default=())

    @property
    def options(self) -> dict[str, Any]:
        """A real gradient's spectrum ends in a nearly degenerate tail. Its basis turns with the last bits of a sum over
        ranks, and with a tiny eps Adam would make whole steps of that; eps 1e-3 does not.
        """
        return {"projection": self.projection, "side": self.side, "update_gap": 3, "lr": 1e-2, "eps": 1e-3,
                "weight_decay": 0.1, **dict(self.more)}  # fmt: skip


def build(job: Job) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=101, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, max_position_embeddings=16, attn_implementation="eager", use_cache=False,
        tie_word_embeddings=job.tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(job.dtype)


def tokens(step: int) -> Tensor:
    return torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))


def make_optimizer(model: nn.Module, job: Job, **more: Any) -> Frugal:
    no_decay = ["*norm.weight", "*layernorm.weight"] if job.decay_groups else None
    return Frugal(split_parameters(model, no_decay=no_decay), **{**job.options, **more})


def one_process(job: Job) -> Named:
    model = build(job)
    optimizer = make_optimizer(model, job, process_group=None)
    train(model, optimizer, job, lambda step, micro: rows_of(step, micro, job.micro_steps, 0, 1), never)
    return {name: param.detach().clone() for name, param in model.named_parameters()}


@lru_cache
def reference(job: Job, ranks: int) -> Named:
    """The same rows in the same pieces: norms, softmax and loss of the model run in fp32, rounding by batch shape."""
    return one_process(replace(job, micro_steps=job.micro_steps * ranks))


def rows_of(step: int, micro: int, micro_steps: int, rank: int, ranks: int) -> Tensor:
    """The rows of one micro-batch on one rank."""
    share = ROWS // (micro_steps * ranks)
    start = (micro * ranks + rank) * share
    return tokens(step)[start : start + share]


@contextlib.contextmanager
def never(last: bool) -> Iterator[None]:
    yield


def train(model: nn.Module, optimizer: Frugal, job: Job, rows: Callable[[int, int], Tensor],
          sync: Callable[[bool], Any], first: int = 0) -> None:  # fmt: skip
    for step in range(first, STEPS):
        if job.schedule:
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (1 + step)
                group["density"] = 0.25 if step < 3 else 0.5
        optimizer.zero_grad()
        for micro in range(job.micro_steps):
            batch = rows(step, micro)
            with sync(micro == job.micro_steps - 1):
                model(input_ids=batch, labels=batch).loss.backward()
        for param in model.parameters():
            if param.grad is not None:
                param.grad.div_(job.micro_steps)  # after backward: parts of it run in fp32, where a scale would round
        _without_gradients(model, job, step)
        if job.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.clip)
        optimizer.step()


def _without_gradients(model: nn.Module, job: Job, step: int) -> None:
    """Parameters of layer 0 get no gradient on some steps; those of layer 1 are frozen on others."""
    for name, param in model.named_parameters():
        if ".0." in name and step in job.silent:
            param.grad = None
        if ".1." in name and job.freeze:
            param.requires_grad_(True)
            if step in job.freeze:
                param.grad = None


# --- engines -------------------------------------------------------------------------------------------


def ddp(job: Job, shard_state: bool | str) -> Named:
    model = DistributedDataParallel(build(job))
    optimizer = make_optimizer(model.module, job, shard_state=shard_state)

    @contextlib.contextmanager
    def sync(last: bool) -> Iterator[None]:
        with contextlib.nullcontext() if last else model.no_sync():
            yield

    rank, ranks = dist.get_rank(), dist.get_world_size()
    train(model, optimizer, job, lambda step, micro: rows_of(step, micro, job.micro_steps, rank, ranks), sync)
    return {name: param.detach().clone() for name, param in model.module.named_parameters()}


def sharded(job: Job, mesh_shape: tuple[int, ...] = (), columns: bool = False, **policies: Any) -> nn.Module:
    model = build(job)
    shape = mesh_shape or (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    if columns:
        policies["shard_placement_fn"] = _by_columns
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **policies)
    return fully_shard(model, mesh=mesh, **policies)


def _by_columns(param: nn.Parameter) -> Shard:
    """Shard(1) where the columns divide evenly, torch's limit."""
    even = param.dim() == 2 and param.shape[1] % dist.get_world_size() == 0
    return Shard(1) if even else Shard(0)


def fsdp2(job: Job, mesh_shape: tuple[int, ...] = (), columns: bool = False, **policies: Any) -> Named:
    model = sharded(job, mesh_shape, columns, **policies)
    optimizer = make_optimizer(model, job)

    @contextlib.contextmanager
    def sync(last: bool) -> Iterator[None]:
        model.set_requires_gradient_sync(last)
        yield

    rank, ranks = dist.get_rank(), dist.get_world_size()
    train(model, optimizer, job, lambda step, micro: rows_of(step, micro, job.micro_steps, rank, ranks), sync)
    return {name: whole(param) for name, param in model.named_parameters()}


def fsdp2_tp(job: Job) -> Named:
    """By hand: parallelize_module on one axis, fully_shard on the other, on which the feed-forward layers are alone."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    model = build(job)
    plan = {name: ColwiseParallel() for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}
    plan["self_attn.o_proj"] = RowwiseParallel()
    for layer in model.model.layers:
        parallelize_module(layer, mesh["tp"], plan)
        fully_shard(layer, mesh=mesh["fsdp"])
    fully_shard(model, mesh=mesh["fsdp"])
    optimizer, copy = make_optimizer(model, job), dist.get_rank() // 2  # both ranks of tp have the same rows
    train(model, optimizer, job, lambda step, micro: rows_of(step, micro, job.micro_steps, copy, 2), never)
    return {name: whole(param) for name, param in model.named_parameters()}


def whole(param: Tensor) -> Tensor:
    return param.detach().full_tensor() if isinstance(param, DTensor) else param.detach()


ENGINES: dict[str, Callable[[Job], Named]] = {
    "DDP": lambda job: ddp(job, False),
    "DDP, shared state": lambda job: ddp(job, "auto"),
    "FSDP2": fsdp2,
    "FSDP2, Shard(1)": lambda job: fsdp2(job, columns=True),
    "FSDP2, CPU offload": lambda job: fsdp2(job, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "HSDP 2x2": lambda job: fsdp2(job, (2, 2)),
    "FSDP2 2 x TP 2": fsdp2_tp,
}
PARTS = {"FSDP2 2 x TP 2": 2}
"""Into how many parts a batch falls, where not every rank has its own."""


def compare(engine: str, jobs: list[Job]) -> list[float]:
    """The largest difference to one process, for each job."""
    found = []
    for job in jobs:
        got, want = ENGINES[engine](job), reference(job, PARTS.get(engine, dist.get_world_size()))
        assert got.keys() == want.keys()
        found.append(max(float((got[name] - want[name]).abs().max()) for name in want))
    return found


def mixed_precision(job: Job) -> tuple[float, set[torch.dtype]]:
    """bf16 compute with fp32 shards: (relative distance to the fp32 run, dtypes of weights and state)."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(job, mp_policy=policy)
    optimizer = make_optimizer(model, job)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    train(model, optimizer, job, lambda step, micro: rows_of(step, micro, 1, rank, ranks), never)
    want = reference(job, ranks)
    start = {name: param.detach() for name, param in build(job).named_parameters()}
    got = {name: whole(param) for name, param in model.named_parameters()}
    off = sum(float((got[n] - want[n]).square().sum()) for n in want) ** 0.5
    moved = sum(float((want[n] - start[n]).square().sum()) for n in want) ** 0.5
    _, inputs = optimizer.everything()
    dtypes = {mat.weight_dtype for mat in inputs.mats} | {mat.dtype for mat in inputs.mats}
    return off / moved, dtypes


def with_masters(job: Job, engine: str) -> list[str]:
    """bf16 weights with remainders beside fp32 masters that get the same gradients: names of those that differ."""
    exact = replace(job, dtype=torch.bfloat16, more=(*job.more, ("rounding", "remainder")))
    wrap = sharded if engine == "FSDP2" else lambda one: DistributedDataParallel(build(one))
    model, masters = wrap(exact), wrap(job)
    pairs = list(zip(masters.parameters(), model.parameters(), strict=True))
    for high, low in pairs:
        high.data.copy_(low.detach())
    optimizer, reference = (make_optimizer(getattr(m, "module", m), j) for m, j in ((model, exact), (masters, job)))
    for step in range(STEPS):
        optimizer.zero_grad()
        rows = rows_of(step, 0, 1, dist.get_rank(), dist.get_world_size())
        model(input_ids=rows, labels=rows).loss.backward()
        for high, low in pairs:
            high.grad = None if low.grad is None else low.grad.to(high.dtype)
        optimizer.step()
        reference.step()
    found = []
    for (name, low), high in zip(model.named_parameters(), masters.parameters(), strict=True):
        want = whole(high)
        near = torch.empty_like(want, dtype=torch.bfloat16)
        split_(near, torch.empty_like(want, dtype=torch.int16), want)
        found += [] if torch.equal(whole(low), near) else [name]
    return found


def saved_with(option: str) -> str:
    """The error of get_optimizer_state_dict with an option; every rank must get one."""
    model = sharded(Job())
    optimizer = make_optimizer(model, Job())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    try:
        get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**{option: True}))
    except ValueError as error:
        return str(error)
    return ""


def built_too_early() -> list[str]:
    """What an optimizer says that holds the parameters from before fully_shard; it must not say it twice."""
    model = build(Job())
    optimizer = make_optimizer(model, Job())
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    model(tokens(0)).logits.sum().backward()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer.step()
        optimizer.step()
    return [str(one.message) for one in told]


def refused(kind: str) -> str:
    """The error of an unsupported way to store parameters; every rank must get one."""
    try:
        optimizer = _UNSUPPORTED[kind]()
        optimizer.step()
    except ValueError as error:
        return str(error)
    return ""


def _dtensor_optimizer(placements: list[Any], mesh_shape: tuple[int, ...]) -> Frugal:
    mesh = init_device_mesh("cpu", mesh_shape)
    if any(isinstance(p, Partial) for p in placements):
        weight = DTensor.from_local(torch.ones(8, 8), mesh, placements)
    else:
        weight = distribute_tensor(torch.ones(8, 8), mesh, placements)
    param = nn.Parameter(weight)
    param.grad = torch.ones_like(weight)
    return Frugal([{"params": [("w", param)], "projected": True}])


def _fsdp1(use_orig_params: bool) -> Frugal:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(build(Job()), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    return Frugal(model.named_parameters())


_UNSUPPORTED: dict[str, Callable[[], Frugal]] = {
    "partial": lambda: _dtensor_optimizer([Replicate(), Partial()], (2, 2)),
    "FSDP1": lambda: _fsdp1(False),
    "FSDP1 with original parameters": lambda: _fsdp1(True),
}
