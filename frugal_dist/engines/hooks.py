"""What patches other libraries or walks their objects, and what upstream would make it unnecessary.

An optimizer is told little: not who builds it, nor who drives it or saves it. Where nobody can be asked, the answer
stands further up the call stack or among the objects that refer to a class. Nothing here imports those libraries: what
is not loaded is not used.

    what                                                until upstream has
    --------------------------------------------------  --------------------------------------------------------------
    DeepSpeed's list of optimizers it trusts            a way for an optimizer to say so (deepspeedai/DeepSpeed#161)
    names in torch.optim, for JSON's "type"             a registry of optimizers (deepspeedai/DeepSpeed#196)
    DeepSpeedEngine.load_checkpoint                     an error that says what to do (deepspeedai/DeepSpeed#3810)
    DeepSpeedEngine._configure_{zero,bf16}_optimizer    groups without trainable parameters (deepspeedai/DeepSpeed#7869)
    DeepSpeedEngine.offload_states, reload_states       other optimizers than FusedAdam (deepspeedai/DeepSpeed#6596)
    the engine that builds or drives an optimizer       a link from one to the other (no issue known)
    Frugal.defaults, which raises; DummyOptim           no replacing in silence (huggingface/accelerate#2169)
    the Trainer's own arguments                         the same (huggingface/transformers#38753)
    how the Trainer loads (1)                           a callback in place of loading (no issue known)
    how Accelerate saves and loads (2)                  hooks for optimizers, too (huggingface/accelerate#991: models)
    Lightning's wrappers and strategies                 a link between them (Lightning-AI/pytorch-lightning#18516)
    a trainer's clipping                                a way for an optimizer to refuse it (no issue known)
    DDP around a model, by its parameters               any optimizer in DDP's backward (pytorch/pytorch#78157)
    torch's join context, ZeroRedundancyOptimizer       join hooks for any optimizer (pytorch/pytorch#54318)
    options of torch.distributed.checkpoint             state that is not like a parameter (pytorch/pytorch#192224)
    offline mode of the hub, once imported (3)          a function for it (huggingface/transformers#42308)

Three bodies lie elsewhere. They stand above the engines, which import neither checkpoints nor the application; what
the first two put around a function goes through ``wrap`` here.

    (1) integrations/transformers.py       what was saved beside the Trainer's checkpoint is loaded in its place
    (2) integrations/accelerate.py         save_state and load_state of one Accelerator, with our checkpoint beside
    (3) training/data/local_or_hub.py      sets constants of huggingface_hub and datasets, which only training reads
"""

from __future__ import annotations

import functools
import gc
import inspect
import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Concatenate, ParamSpec, TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from frugal_dist.sharding.collectives import ranks_of

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")

# --- who is calling, who refers to it ---------------------------------------------------------------------------------


def frames() -> Iterator[FrameType]:
    """The frames of the call stack, from here upwards."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def calling(kinds: tuple[type, ...]) -> Iterator[Any]:
    """The objects of ``kinds`` whose methods are running further up the stack, the nearest first."""
    if kinds:
        yield from (frame.f_locals["self"] for frame in frames() if isinstance(frame.f_locals.get("self"), kinds))


def loaded_classes(name: str, *modules: str) -> tuple[type, ...]:
    """The classes ``name`` of those ``modules`` that are loaded: what is not loaded is not used."""
    there = (sys.modules.get(module) for module in modules)
    return tuple(getattr(module, name) for module in there if hasattr(module, name))


def instances(kinds: Sequence[type]) -> Iterator[Any]:
    """The living objects that are exactly of one of ``kinds``.

    Not by gc.get_objects(): it touches tuples that other threads are building, which then fail (CPython issue 59313).
    """
    return (thing for thing in (gc.get_referrers(*kinds) if kinds else ()) if type(thing) in kinds)


# --- wrappers that take on an optimizer's class -----------------------------------------------------------------------

_OWNER = "_owner"


def own(optimizer: object) -> None:
    """Mark where the state lies.

    The wrappers of Lightning's Trainer and of Fabric set ``self.__class__ = type(..., (wrapper, Frugal), {})`` without
    ``__init__``, so that isinstance() holds. A method then runs on the wrapper and reads the optimizer's attributes
    through ``__getattr__``, but what it sets would stay with the wrapper, and the optimizer would never know.

    A plain reference would keep the state until garbage is collected; this one is weak.
    """
    optimizer.__dict__[_OWNER] = weakref.ref(optimizer)


def innermost(optimizer: T) -> T:
    """The optimizer whose state this is: ``optimizer``, or the one it shows as its own."""
    owner: Callable[[], Any] | None = getattr(optimizer, _OWNER, None)
    real = None if owner is None else owner()
    return optimizer if real is None else cast("T", real)


def on_innermost(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """The method works on the optimizer itself, whichever wrapper it is called on."""

    @functools.wraps(method)
    def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return method(innermost(self), *args, **kwargs)

    return call


# --- torch: join contexts, ZeroRedundancyOptimizer, torch.distributed.checkpoint --------------------------------------

_WATCHED: WeakKeyDictionary[Optimizer, Any] = WeakKeyDictionary()
"""Every live optimizer of ours with its process group."""

JOIN = (
    "A join context goes on with the ranks that still have batches, but Frugal's step() needs all ranks: they would "
    "wait for ever. Give all ranks equally many batches (DistributedSampler does), let them end together "
    "(model.join(throw_on_early_termination=True), without the optimizer), or build Frugal with process_group=None: "
    "then each rank steps by itself and keeps all of the state, as AdamW does under DDP."
)


def watch_joins(optimizer: Optimizer, process_group: Any) -> None:
    """From now on ValueError, on all ranks, where a join context is made for what ``optimizer`` trains.

    A rank that is out of batches answers the collectives of DDP, and no others, so those of a step would never end. It
    does not call step() any more, and one without any batch never did: only entering the context is something all ranks
    do.
    """
    _WATCHED[optimizer] = process_group
    if dist.is_available():
        _check_joins()


@functools.cache
def _check_joins() -> None:
    from torch.distributed.algorithms.join import Join

    inner = Join.__init__

    @functools.wraps(inner)
    def checked(
        self: Any,
        joinables: Sequence[Any],
        enable: bool = True,
        throw_on_early_termination: bool = False,
        **kwargs: Any,
    ) -> None:
        if enable:
            _refuse_join(joinables, throw_on_early_termination)
        inner(self, joinables, enable, throw_on_early_termination, **kwargs)  # type: ignore[arg-type]

    Join.__init__ = checked  # type: ignore[method-assign]


def _refuse_join(joinables: Sequence[Any], ends_together: bool) -> None:
    joined = {id(param) for one in joinables if isinstance(one, nn.Module) for param in one.parameters()}
    for optimizer, process_group in list(_WATCHED.items()):
        trains = any(id(param) in joined for group in optimizer.param_groups for param in group["params"])
        waits = trains and not ends_together and not ranks_of(process_group).alone
        if waits or any(one is optimizer for one in joinables):
            raise ValueError(JOIN)


def refuse_zero_redundancy() -> None:
    """ValueError if a ZeroRedundancyOptimizer is building an optimizer: all ranks do so alike.

    It deals out whole parameters by size. Ranks without a matrix could build nothing, "blockwise" would choose among a
    rank's own, and it hands over no names.
    """
    kinds = loaded_classes("ZeroRedundancyOptimizer", "torch.distributed.optim.zero_redundancy_optimizer")
    if any(True for _ in calling(kinds)):
        raise ValueError(
            "ZeroRedundancyOptimizer gives each rank an optimizer for some of the parameters. Frugal shares its state "
            "among the ranks by itself: build Frugal(split_parameters(model), ...) on every rank, without it, and save "
            "with frugal_dist.checkpoint."
        )


def wrapped_in_ddp(model: nn.Module, params: Sequence[Tensor]) -> bool:
    """Whether a DistributedDataParallel is part of ``model``, or trains any of ``params``."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    kinds = loaded_classes("DistributedDataParallel", "torch.nn.parallel")
    ours = {id(param) for param in params}
    living = instances(kinds)
    return any(isinstance(module, kinds) for module in model.modules()) or any(
        id(param) in ours for wrapper in living for param in wrapper.parameters()
    )


_DCP = "torch.distributed.checkpoint"
DCP_FILE = re.compile(r"__0_\d+\.distcp")
"""What rank 0 writes into a checkpoint of torch's."""
_FLATTEN = "flatten_optimizer_state_dict"
_LOSING = ("full_state_dict", _FLATTEN)
"""The first gathers DTensors and keeps the rest as rank 0 has it; the second drops, when loading, keys that only
``state_dict`` knows.
"""


def dcp_is_asking() -> bool:
    """Whether torch.distributed.checkpoint is the caller, somewhere up the stack."""
    return any(f"{name}.".startswith(f"{_DCP}.") for _, name in _modules())


def dcp_does_without_names() -> bool:
    """Whether its get_state_dict is the caller, which has names of its own: it would keep a group's list of them once
    per parameter.

    When that flattens it asks at loading for every key of the groups, and this list is one of them. Who gives the
    optimizer itself to dcp.save, or a container that flattens it (torchtitan's), has no other names.
    """
    given = _given_options()
    return given is not None and _FLATTEN not in given


def dcp_losing_option() -> str:
    """The option by which its running call would lose other ranks' parts, "" if none."""
    return next(iter(_given_options() or ()), "")


def _given_options() -> list[str] | None:
    """Those of a running get_state_dict or set_state_dict; None if there is none."""
    infos = [
        frame.f_locals["info"]
        for frame, name in _modules()
        if name == f"{_DCP}.state_dict" and "info" in frame.f_locals
    ]
    return [option for option in _LOSING if any(getattr(info, option, False) for info in infos)] if infos else None


def _modules() -> Iterator[tuple[FrameType, str]]:
    return ((frame, str(frame.f_globals.get("__name__"))) for frame in frames())


# --- Accelerate and the Trainer of transformers -----------------------------------------------------------------------


def wishes() -> tuple[str, dict[str, Any]]:
    """What a program asks of an optimizer that DeepSpeed is building: of whom, and its values by key.

    TrainingArguments, or else DummyOptim: both stand further up the stack.
    """
    dummy: dict[str, Any] = {}
    for frame in frames():
        caller, given = frame.f_locals.get("self"), cast("Any", frame.f_locals.get("optimizer"))
        if type(given).__name__ == "DummyOptim" and not dummy:
            dummy = {"lr": given.lr, "weight_decay": given.weight_decay}
        if "transformers" in sys.modules and _is_trainer(caller):
            args: Any = getattr(caller, "args", None)
            if hasattr(args, "adam_epsilon"):
                betas = (args.adam_beta1, args.adam_beta2)
                asked = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "betas": betas}
                return "TrainingArguments", {**asked, "eps": args.adam_epsilon}
    return "DummyOptim", dummy


_CLIPPING: dict[str, Callable[[Any], Any]] = {
    "TrainingArguments(max_grad_norm={:g})": lambda trainer: getattr(
        getattr(trainer, "args", None), "max_grad_norm", 0
    ),
    "Trainer(gradient_clip_val={:g})": lambda trainer: getattr(trainer, "gradient_clip_val", 0),
}
"""How the Trainers of transformers and of Lightning are told to clip."""


def clipping_of_trainer() -> str:
    """The argument by which a trainer further up the stack clips gradients, "" if there is none."""
    for frame in frames():
        caller = frame.f_locals.get("self")
        for words, asked in _CLIPPING.items() if _is_trainer(caller) else ():
            limit = asked(caller)
            if limit:
                return words.format(limit)
    return ""


def _is_trainer(thing: Any) -> bool:
    return any(kind.__name__ == "Trainer" for kind in type(thing).__mro__)


def wrap(owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put ``wrapper`` of it in the place of a function of a module, a class or an object. Once."""
    inner = getattr(owner, name)
    if not hasattr(inner, _WRAPPED):
        outer = functools.wraps(inner)(wrapper(inner))
        setattr(outer, _WRAPPED, True)
        setattr(owner, name, outer)


_WRAPPED = "_frugal_dist_asks"


# --- Lightning's Trainer and Fabric -----------------------------------------------------------------------------------

_STRATEGIES = tuple(
    f"{package}.strategies.strategy"
    for package in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
)
"""Its two packages come under two names each."""


def lightning_keeps_rank_zero_only(optimizer: object) -> bool:
    """Whether Lightning's checkpoints keep no other rank's ``state_dict`` of ``optimizer`` than rank 0's.

    So it is where a strategy saves as the base class does (DDP): every rank gives its state, one file is written. The
    strategies that shard write in ways of their own; ModelParallelStrategy (FSDP2) can be told to write one file.
    """
    bases = loaded_classes("Strategy", *_STRATEGIES)
    strategy = _lightning_strategy(optimizer, bases)
    if strategy is None:
        return False
    kind = strategy.__class__  # not type(): the Trainer's wrapper has a weak proxy
    if any(kind.save_checkpoint is base.save_checkpoint for base in bases):  # type: ignore[attr-defined]
        return True
    return not getattr(strategy, "_save_distributed_checkpoint", True)


def _lightning_strategy(optimizer: object, bases: tuple[type, ...]) -> Any | None:
    """The strategy that drives ``optimizer``: one that is calling it, or that of the wrapper around it.

    Lightning gives an optimizer no link to either. Its wrappers are of classes made for each, below the optimizer's.
    """
    strategy = next(calling(bases), None)
    for wrapper in instances(type(optimizer).__subclasses__()) if bases and strategy is None else ():
        if wrapper.__dict__.get("_optimizer") is optimizer:
            strategy = wrapper.__dict__.get("_strategy") or strategy
    return strategy


# --- DeepSpeed --------------------------------------------------------------------------------------------------------

ANY_RANKS = "frugal_dist.checkpoint saves on any engine and number of ranks and loads on any other"
PORTABLE = "frugal"
"""The folder in a trainer's checkpoint that any number of ranks can load."""
WAYS = (
    "FrugalCallback(portable=True), with Accelerate portable_checkpoints, in a loop of your own frugal_dist.checkpoint"
)
OTHER_OPTIMIZER = (
    "If another optimizer saved it (AdamW, say), or other parameter groups: load the weights alone, "
    "engine.load_checkpoint(folder, load_optimizer_states=False, load_lr_scheduler_states=False); with the Trainer "
    "begin with the model of that checkpoint instead of resume_from_checkpoint (docs/deepspeed.md)"
)


def register_in_torch(optimizer_class: type[Any]) -> None:
    """Put the class where DeepSpeed looks up JSON's ``optimizer.type``, in the cases that people write."""
    name = optimizer_class.__name__
    for spelling in (name, name.lower(), name.upper()):
        setattr(torch.optim, spelling, optimizer_class)


def deepspeed_engine_in_construction() -> Any | None:
    """The engine that is building an optimizer right now: it runs a function further up the stack.

    Not looked for among all objects: an engine that could not be built lives on until it is collected.
    """
    engines = calling(loaded_classes("DeepSpeedEngine", "deepspeed.runtime.engine"))
    return next((engine for engine in engines if engine.__dict__.get("basic_optimizer") is None), None)


_ENGINES: WeakSet[Any] = WeakSet()
"""DeepSpeed's living engines that configured an optimizer after one of ours was built."""


def deepspeed_engine_of(optimizer: object) -> Any | None:
    """The engine that drives ``optimizer``, if any.

    A search of all objects takes a good part of a second in a large process, and is only needed if DeepSpeed was
    imported after the optimizer was built: then nobody has watched its engines.
    """
    kinds = list(loaded_classes("DeepSpeedEngine", "deepspeed.runtime.engine"))
    if not kinds:
        return None
    engines: Iterable[Any] = _ENGINES
    if not hasattr(getattr(kinds[0], "_configure_optimizer", None), _WATCHES):
        for kind in kinds:
            kinds.extend(kind.__subclasses__())
        engines = instances(kinds)
    return next((one for one in list(engines) if one.__dict__.get("basic_optimizer") is optimizer), None)


def make_known_to_deepspeed(optimizer_class: type[Any]) -> None:
    """Tell DeepSpeed, if it is loaded, that ZeRO may wrap this optimizer, and wrap the methods of its engine. Once."""
    utils, module = sys.modules.get("deepspeed.runtime.zero.utils"), sys.modules.get("deepspeed.runtime.engine")
    if utils is None or optimizer_class in utils.ZERO_SUPPORTED_OPTIMIZERS:
        return
    utils.ZERO_SUPPORTED_OPTIMIZERS.append(optimizer_class)  # no zero_allow_untested_optimizer needed
    if module is None:
        return
    engine_class = module.DeepSpeedEngine
    if (engine := deepspeed_engine_in_construction()) is not None:
        _ENGINES.add(engine)
    for name, wrapper in {
        "_configure_optimizer": _watch,
        "load_checkpoint": _load_checkpoint,
        "_configure_zero_optimizer": _configure,
        "_configure_bf16_optimizer": _configure,
        "offload_states": _offload_states,
        "reload_states": _reload_states,
    }.items():
        setattr(engine_class, name, wrapper(getattr(engine_class, name), optimizer_class))


_WATCHES = "_frugal_dist_watches"


def _watch(inner: Callable[..., Any], optimizer_class: type[Any]) -> Callable[..., Any]:
    """DeepSpeed gives an optimizer no link to its engine."""

    @functools.wraps(inner)
    def configure(engine: Any, *args: Any, **kwargs: Any) -> Any:
        _ENGINES.add(engine)
        return inner(engine, *args, **kwargs)

    setattr(configure, _WATCHES, True)
    return configure


def _load_checkpoint(inner: Callable[..., Any], optimizer_class: type[Any]) -> Callable[..., Any]:
    """DeepSpeed loads ZeRO state of the same number of ranks, optimizer and groups only; its errors do not say so.

    It calls nothing of ours before it refuses, and at stage 3 a rank without a file of its own fails with a bare
    assertion.
    """
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    refusals = (ZeRORuntimeException, AssertionError, RuntimeError, ValueError)
    signature = inspect.signature(inner)

    @functools.wraps(inner)
    def load_checkpoint(engine: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return inner(engine, *args, **kwargs)
        except refusals as error:
            ours = isinstance(engine.basic_optimizer, optimizer_class) and engine.zero_optimization()
            fewer, said = "The checkpoint has no file for this rank", str(error)
            told = said or fewer
            if not ours or type(error) not in refusals or "loading state_dict" in told:  # the last is torch's own
                raise
            by_ranks = told == fewer or "world size" in told
            advice = _for_other_ranks(engine, Path(str(signature.bind(engine, *args, **kwargs).arguments["load_dir"])))
            advice = advice if by_ranks else f"{OTHER_OPTIMIZER}."
            raise type(error)(f"{told.rstrip('.')}. {advice}") from error

    return load_checkpoint


def _for_other_ranks(engine: Any, folder: Path) -> str:
    """What to do about a checkpoint that another number of ranks has saved."""
    if (folder / PORTABLE).is_dir():
        return (
            f"{folder.name} has a portable copy, {folder / PORTABLE}, for any number of ranks: give "
            "FrugalCallback(portable=True) when resuming, too; with Accelerate call portable_checkpoints; in a loop of "
            "your own load that folder with frugal_dist.checkpoint.load."
        )
    then = getattr(engine, "loaded_checkpoint_dp_world_size", None) or "the same number of"
    return (
        f"{folder.name} has no portable copy. Resume on {then} ranks with {WAYS}; save once, then change the number of "
        "ranks (docs/huggingface.md)."
    )


def _configure(inner: Callable[..., Any], optimizer_class: type[Any]) -> Callable[..., Any]:
    """ZeRO-1 and 2 stumble over a group without a trainable parameter, such as our regular ones beside adapters.

    DeepSpeed itself has removed the empty groups just before (deepspeedai/DeepSpeed, engine._configure_optimizer).
    """
    from deepspeed.runtime.utils import is_optimized_parameter

    @functools.wraps(inner)
    def configure(engine: Any, optimizer: Any) -> Any:
        if isinstance(optimizer, optimizer_class):
            groups = [group for group in optimizer.param_groups if any(map(is_optimized_parameter, group["params"]))]
            optimizer.param_groups[:] = groups or optimizer.param_groups
        return inner(engine, optimizer)

    return configure


def _offload_states(inner: Callable[..., Any], optimizer_class: type[Any]) -> Callable[..., Any]:
    """ZeRO-3 offloads its own FusedAdam's state and, with it, the masters; ours it refuses. So that part is ours."""
    signature = inspect.signature(inner)

    @functools.wraps(inner)
    def offload_states(engine: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(engine, *args, **kwargs)
        call.apply_defaults()
        asked = call.arguments
        if not _is_ours_on_zero3(engine, optimizer_class) or asked["device"].value != "cpu":
            return inner(engine, *args, **kwargs)
        from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as Kinds

        wanted = set(engine._refine_include_states(asked["include"]))
        ours = {Kinds.hp_params, Kinds.optim_states} & wanted
        result = inner(engine, list(wanted - ours), asked["device"], asked["pin_memory"], asked["non_blocking"])
        away = functools.partial(to_host, pin=asked["pin_memory"], non_blocking=asked["non_blocking"])
        zero, anew = engine.optimizer, ours - engine.optimizer.offloaded_states
        if Kinds.hp_params in anew:
            for flat in zero.fp32_partitioned_groups_flat:
                flat.data = away(flat.data)
        if Kinds.optim_states in anew:
            move_state(engine.basic_optimizer, lambda value, param: away(value))
        zero.offloaded_states |= anew  # its reload_states brings the masters back
        return result

    return offload_states


def _reload_states(inner: Callable[..., Any], optimizer_class: type[Any]) -> Callable[..., Any]:
    """Ours comes back to where its parameters are, counts stay on the CPU."""

    @functools.wraps(inner)
    def reload_states(engine: Any, *args: Any, **kwargs: Any) -> Any:
        result = inner(engine, *args, **kwargs)
        if _is_ours_on_zero3(engine, optimizer_class):
            move_state(engine.basic_optimizer, lambda value, param: value.to(param.device))
        return result

    return reload_states


def _is_ours_on_zero3(engine: Any, optimizer_class: type[Any]) -> bool:
    return isinstance(engine.basic_optimizer, optimizer_class) and engine.zero_optimization_partition_weights()


def move_state(optimizer: Any, move: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Replace every moment and basis by ``move(it, the parameter it belongs to)``."""
    for param, store in optimizer.state.items():
        for key, value in store.items():
            if value.is_floating_point():  # the counts stay on the CPU
                store[key] = move(value, param)


def to_host(tensor: Tensor, pin: bool, non_blocking: bool) -> Tensor:
    """A copy in host memory, pinned or not; the tensor itself if it is there already."""
    if tensor.is_cpu:
        return tensor
    host = torch.empty_like(tensor, device="cpu", pin_memory=pin)
    return host.copy_(tensor, non_blocking=non_blocking)
