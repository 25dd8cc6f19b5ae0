"""A GPU to be strict about, on machines without one: CPU tensors that say they are on ``cuda:0``.

Inside ``gpu()`` every tensor made for or moved to "cuda" is such a tensor. It computes on the CPU, but

- an operation that mixes it with a CPU tensor fails, as on a GPU (single numbers may be mixed, indices may lie
  anywhere);
- a collective on a CPU tensor fails, as with NCCL, and so does one in a dtype NCCL does not have;
- everything that makes the host wait for the device is noted in ``syncs``.

What it cannot show: kernels, memory, streams, and anything that asks the driver.
"""

from __future__ import annotations

import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)
WAITS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default)
BY_INDEX = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)
COLLECTIVES = ("all_reduce", "broadcast", "all_to_all_single", "all_gather_into_tensor", "all_gather_single")
NOT_IN_NCCL = (torch.bool, torch.int16, torch.uint16, torch.uint32, torch.complex64)
MODES = threading.local()


class OnGpu(Tensor):
    """``inner``, a CPU tensor, under another name. Views and in-place operations work on the same memory."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGpu:
        found: OnGpu = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device("cuda", 0),
        )
        found.inner = inner
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:  # reads memory, without an operation
            MODES.now.syncs.append("tolist")
            return args[0].inner.tolist()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return MODES.now.run(func, args, dict(kwargs or {}))  # DTensor computes outside of all modes

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.__reduce_ex__(protocol)


def on_cpu(value: Any) -> Any:
    """The CPU tensor behind a pretended one; anything else as it is. Counts as no wait."""
    return value.inner if isinstance(value, OnGpu) else value


class Pretend(TorchDispatchMode):
    """Runs operations on what is behind the tensors, and looks where they lie."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if any(isinstance(leaf, DTensor) for leaf in tree_leaves((args, kwargs))):
            return NotImplemented  # what it does with its parts comes by here
        return self.run(func, args, kwargs)

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The operation on the CPU, checked as a GPU would."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
        if there and func not in MOVES:
            _check_devices(func, args, tensors)
        self._note_wait(func, args, kwargs, there)
        wanted = kwargs.get("device")
        target = func is aten.copy_.default and isinstance(args[0], OnGpu)
        stays = bool(there) and func is not aten.copy_.default
        result = _run(func, args, kwargs)
        if not (torch.device(wanted).type == "cuda" if wanted is not None else target or stays):
            return result
        return return_and_correct_aliasing(func, args, kwargs, tree_map_only(Tensor, OnGpu, result))

    def _note_wait(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], there: Sequence[Any]) -> None:
        moved = func is aten._to_copy.default and kwargs.get("device", torch.device("cuda")).type == "cpu"
        copied = func is aten.copy_.default and not isinstance(args[0], OnGpu)
        if there and (func in WAITS or moved or copied):
            self.syncs.append(str(func))


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    inside, options = tree_map(on_cpu, args), tree_map(on_cpu, kwargs)
    if options.get("device") is not None:
        options["device"] = torch.device("cpu")
    if options.get("pin_memory"):
        options["pin_memory"] = False
    with _disable_current_modes():
        return func(*inside, **options)


def _check_devices(func: Any, args: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    here = [tensor for tensor in tensors if not isinstance(tensor, OnGpu) and tensor.dim() > 0]
    if func in BY_INDEX:
        here = [tensor for tensor in here if tensor is args[0]]
    described = [f"{'cuda' if isinstance(t, OnGpu) else 'cpu'} {tuple(t.shape)}" for t in tensors]
    assert not here, f"{func} mixes devices: {', '.join(described)}"


def _as_nccl(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
    """A collective of torch.distributed that takes what NCCL takes."""

    def strict(*args: Any, **kwargs: Any) -> Any:
        for tensor in (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)):
            shape, dtype = tuple(tensor.shape), tensor.dtype
            assert isinstance(tensor, OnGpu), f"{name} of a CPU tensor of shape {shape}: NCCL refuses it"
            assert dtype not in NOT_IN_NCCL, f"{name} in {dtype}: NCCL does not have it"
        return collective(*args, **kwargs)

    return strict


@contextmanager
def gpu() -> Iterator[Pretend]:
    """In this thread there is a GPU. Needs ``installed()``."""
    mode = MODES.now = Pretend()
    with FakeTensorMode(allow_non_fake_inputs=True), mode:  # under it torch does not look for a driver; it runs nothing
        yield mode


@contextmanager
def installed() -> Iterator[None]:
    """What is global for the time of a test. Objects travel as NCCL's do: torch itself takes them to the GPU and
    back."""
    _load_guard()
    gather = dist.all_gather_object

    def gather_objects(*args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():
            gather(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather_object", gather_objects)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        for name in COLLECTIVES:
            if hasattr(dist, name):
                patch.setattr(dist, name, _as_nccl(name, getattr(dist, name)))
        yield


@cache
def _load_guard() -> None:
    """Build device_guard.cpp, in about three seconds, and load it."""
    base = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "guard.so")
        source = str(Path(__file__).with_name("device_guard.cpp"))
        command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{base / 'include'}", source, "-o", str(library)]
        subprocess.run([*command, f"-L{base / 'lib'}", "-lc10"], check=True, timeout=300)
        torch.ops.load_library(str(library))
