"""What is installed, and what the machine has, judged: torch.utils.collect_env only lists it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from frugal_dist.training.distributed.place import settle_accelerator
from frugal_dist.training.metrics.device import listed_gpus, unused_gpus

GIB, MIB = 2**30, 2**20
OK, NOTE, FAIL = "ok", "note", "FAIL"


@dataclass(frozen=True)
class Finding:
    """What one check found: ``verdict`` is ok, note (works, but look) or FAIL (does not work)."""

    verdict: str
    what: str
    found: str

    def line(self) -> str:
        """As the user reads it."""
        return f"{self.verdict:<5} {self.what:<26} {self.found}"


# --- versions -------------------------------------------------------------------------------------------------------


def versions(folder: Path) -> Iterator[Finding]:
    """Installed packages against the ranges that are tested; those of an extra may be missing."""
    from packaging.requirements import Requirement

    yield Finding(OK, "frugal_dist", f"{metadata.version('frugal_dist')} at {Path(__file__).parents[2]}")
    yield Finding(OK, "Python", sys.version.split()[0])
    shown: set[str] = set()
    for text in metadata.requires("frugal_dist") or []:
        requirement = Requirement(text)
        extra = _extra(text)
        if extra in ("dev", "all") or requirement.name in {"frugal_dist", *shown}:
            continue
        shown.add(requirement.name)
        yield _version(requirement.name, str(requirement.specifier), extra, requirement.specifier.contains)


def _extra(text: str) -> str:
    return text.partition("extra == ")[2].strip("\"' ")


def _version(name: str, tested: str, extra: str, contains: Callable[..., bool]) -> Finding:
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(NOTE, name, f"not installed; what needs it: pip install 'frugal_dist[{extra}]'")
    if contains(installed, prereleases=True):
        return Finding(OK, name, installed)
    # Only the core's range is a condition: applications may work with others.
    return Finding(NOTE if extra else FAIL, name, f"{installed}, tested is {tested}")


# --- the machine ----------------------------------------------------------------------------------------------------


def devices(folder: Path) -> Iterator[Finding]:
    """GPUs that torch can use, or cores."""
    import torch

    if not torch.cuda.is_available():
        yield from _no_gpu()
        return
    yield from map(_device, range(torch.cuda.device_count()))
    try:
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            yield Finding(NOTE, "bf16", "not supported by this GPU: use precision fp16 under DeepSpeed, or fp32")
    except (RuntimeError, AssertionError):
        return  # said already
    if torch.cuda.device_count() > 1:
        yield Finding(OK, "NCCL", ".".join(map(str, torch.cuda.nccl.version())))


def untouched_devices(folder: Path) -> Iterator[Finding]:
    """As ``devices`` by what nvidia-smi says: torch would take memory on each GPU to find out how much is free."""
    import torch

    if not torch.cuda.is_available():
        yield from _no_gpu()
        return
    query = ["nvidia-smi", "--query-gpu=index,name,memory.used,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        count = torch.cuda.device_count()
        yield Finding(NOTE, "GPU", f"torch sees {count}; nvidia-smi, which knows their memory, cannot be run: {error}")
        return
    for line in filter(None, said.splitlines()):
        index, name, *figures = (cell.strip() for cell in line.split(","))
        try:
            used, total = (float(figure) * MIB for figure in figures)
        except ValueError:  # such as [N/A] of a GPU in parts
            yield Finding(OK, f"GPU {index}", name)
        else:
            yield _memory(index, name, total - used, total)


def kernels(folder: Path) -> Iterator[Finding]:
    """What steps the matrices: torch's own operations always work, but go over the weights several times."""
    import torch

    from frugal_dist.update.kernels import kind_for

    one = torch.zeros((1, 1), device="cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = kind_for(one)
    except (RuntimeError, ValueError) as error:
        yield Finding(FAIL, "kernels", str(error).splitlines()[0])
        return
    if kind == "torch":
        yield Finding(NOTE, "kernels", "none: torch's own operations, several passes over the weights each")
    else:
        yield Finding(OK, "kernels", {"triton": "Triton", "native": "C++"}[kind])


def _no_gpu() -> Iterator[Finding]:
    import torch

    if shutil.which("nvidia-smi"):
        yield _unused_gpus()
    yield Finding(OK, "device", f"CPU, {os.cpu_count()} cores, torch {torch.__version__}")


def _unused_gpus() -> Finding:
    """Why torch finds no GPU on a machine with nvidia-smi: a failure only if there is one that we were to use."""
    try:
        count, said = listed_gpus()
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(NOTE, "GPU", f"nvidia-smi is here, but cannot be run: {error}")
    if count == 0:  # a login node, or a driver that is not loaded
        return Finding(NOTE, "GPU", f"nvidia-smi is here, but lists no GPU: {said}")
    why, chosen = unused_gpus(count)
    return Finding(NOTE if chosen else FAIL, "GPU", why)


def _device(index: int) -> Finding:
    """A GPU that cannot be used, full or taken by another process alone, fails."""
    import torch

    try:
        return _memory(index, torch.cuda.get_device_name(index), *torch.cuda.mem_get_info(index))
    except (RuntimeError, AssertionError) as error:
        return Finding(FAIL, f"GPU {index}", f"cannot be used: {str(error).splitlines()[0]}")


def _memory(index: int | str, name: str, free: float, total: float) -> Finding:
    verdict = OK if free > total / 2 else NOTE
    return Finding(verdict, f"GPU {index}", f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free")


def disk(folder: Path) -> Iterator[Finding]:
    """Whether runs can be written, and the shared memory through which ranks of a machine exchange data."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        yield Finding(FAIL, "disk", f"cannot write to {existing}: {error.strerror}")
    else:
        free = shutil.disk_usage(existing).free
        verdict = OK if free > 20 * GIB else NOTE
        yield Finding(verdict, "disk", f"{free / GIB:,.0f} GiB free at {existing}")
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        small = size < GIB
        advice = "; ranks may fail: docker run --shm-size 8g, or --ipc host" if small else ""
        yield Finding(NOTE if small else OK, "shared memory", f"{size / GIB:.1f} GiB at {shared}{advice}")


def deepspeed_ops(folder: Path) -> Iterator[Finding]:
    """Whether DeepSpeed's operations for this device can be built or are."""
    try:
        metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        return
    if not shutil.which("ninja"):
        yield Finding(NOTE, "DeepSpeed ops", "ninja is not on PATH; activate the environment, or pip install ninja")
    if not (shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")):
        yield Finding(NOTE, "DeepSpeed ops", "no C++ compiler; an operation that is not built yet cannot be")
    settle_accelerator()
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    wanted = ["FusedAdamBuilder"] if accelerator.device_name() == "cuda" else ["ShareMemCommBuilder"]
    for name in wanted:
        builder = accelerator.create_op_builder(name)
        fits = builder is not None and builder.is_compatible(verbose=False)
        text = f"{name.removesuffix('Builder')} can be built for {accelerator.device_name()}"
        if fits and accelerator.device_name() == "cuda" and _nvcc() is None:
            why = "no nvcc on PATH or under CUDA_HOME. Frugal does not need it, DeepSpeed's own Adam does"
            yield Finding(NOTE, "DeepSpeed ops", f"{text.replace('can', 'cannot')}: {why}")
            continue
        yield Finding(OK if fits else NOTE, "DeepSpeed ops", text if fits else text.replace("can", "cannot"))


def _nvcc() -> str | None:
    """CUDA's compiler, where torch looks for it."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which("nvcc", path=os.pathsep.join([*places, os.environ.get("PATH", "")]))
