"""Where a run happens and how much of it is used: device, host, versions, commit, memory, and the device's FLOP/s.

Model FLOPs utilisation (MFU) is after PaLM, appendix B.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import subprocess
from contextlib import suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

import frugal_dist

PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10": 125.0,
    "A10G": 70.0,
    "RTX 4090": 165.0,
    "V100": 125.0,
}
"""Dense bf16 (V100: fp16) matmul rates by the makers' data sheets; the first name that is in the device's counts."""


def surroundings() -> dict[str, str]:
    """For the record of a run."""
    return {
        "device": device(),
        "host": socket.gethostname(),
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "frugal_dist": frugal_dist.__version__,
        "deepspeed": _version("deepspeed"),
        "transformers": _version("transformers"),
        "commit": commit(),
    }


def in_words() -> str:
    """For the first line of a run."""
    here = surroundings()
    source = f" ({here['commit']})" if here["commit"] else ""
    return (
        f"{here['device']} of {here['host']}, torch {here['torch']}, frugal_dist {here['frugal_dist']}{source}, "
        f"{here['time']}"
    )


def device() -> str:
    """What this process trains on, by name."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({os.cpu_count()} cores)"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """Of the checkout that this package is imported from, with a mark if files were changed; empty if it is none."""
    root = Path(frugal_dist.__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def idle_gpus() -> str:
    """Why this process trains on the CPU of a machine with GPUs, or in a job that has none; empty if it does not."""
    if torch.cuda.is_available():
        return ""
    if shutil.which("nvidia-smi"):
        with suppress(OSError, subprocess.SubprocessError):
            count, _ = listed_gpus()
            if count:
                return unused_gpus(count)[0]
    if os.environ.get("SLURM_JOB_ID"):
        return "this Slurm job has no GPU; if it should have: sbatch --gpus-per-node=N --ntasks-per-node=N"
    return ""


def listed_gpus() -> tuple[int, str]:
    """How many GPUs nvidia-smi lists, and its first line. Raises OSError or SubprocessError if it cannot be run."""
    said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    count = sum(line.startswith("GPU") for line in said.splitlines())
    return count, (said.strip().splitlines() or ["it says nothing"])[0]


def unused_gpus(count: int) -> tuple[str, bool]:
    """Why torch finds none of the GPUs that nvidia-smi lists, and whether that is somebody's choice."""
    if (shown := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None and _shows_none(shown, count):
        return f'CUDA_VISIBLE_DEVICES="{shown}" shows none of this machine\'s {count}', True
    cpu, old = "torch is a CPU build", f"the driver may be too old for its CUDA {torch.version.cuda}"
    why = cpu if torch.version.cuda is None else f"{old} (bash launch/setup.sh --help: TORCH_SPEC)"
    return f"nvidia-smi lists {count}, but torch {torch.__version__} finds none: {why}", False


def _shows_none(shown: str, count: int) -> bool:
    """Whether CUDA_VISIBLE_DEVICES begins with what is none of so many GPUs: CUDA reads no further."""
    first = shown.partition(",")[0].strip()
    return int(first) >= count if first.isdecimal() else not first.startswith(("GPU-", "MIG-"))


# --- how much of it is used -------------------------------------------------------------------------------------------


def flops_per_token(model: nn.Module, length: int) -> float:
    """Forward and backward: 6 per weight that is multiplied, and 12 * layers * width * length for attention.

    The input embedding is looked up, not multiplied; one that is also the output head counts. Recomputed activations
    (checkpointing) do not count.
    """
    parameters = {id(parameter): parameter.numel() for parameter in model.parameters()}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    heads = {id(parameter) for parameter in output.parameters()} if output is not None else set()
    looked_up = {
        id(module.weight): module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Embedding) and id(module.weight) not in heads
    }
    config = getattr(model, "config", None)
    attention = 12 * getattr(config, "num_hidden_layers", 0) * getattr(config, "hidden_size", 0) * length
    return 6.0 * (sum(parameters.values()) - sum(looked_up.values())) + attention


def peak_flops(precision: str, given: float | None) -> float | None:
    """The device's rate in FLOP/s: ``given`` in TFLOP/s, or what is known of this GPU; None if nothing is."""
    if given is not None:
        return given * 1e12
    if precision == "fp32" or not torch.cuda.is_available():
        return None
    return known_flops(torch.cuda.get_device_name())


def known_flops(name: str) -> float | None:
    """What is known of a GPU with this name; an A10 is no A100, an RTX A1000 neither, a part (MIG) is not the whole."""
    if re.search(r"\bMIG\b", name):
        return None
    rates = (rate for known, rate in PEAK_TFLOPS.items() if re.search(rf"\b{re.escape(known)}\b", name))
    return next((rate * 1e12 for rate in rates), None)


def forget_peak() -> None:
    """From here on ``memory`` counts the most; a process that trains several models would show the largest for all.

    On a system that cannot, it goes on counting.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def memory() -> dict[str, int]:
    """Bytes that this process uses now and used at most: of the GPU's memory, or of the machine's without a GPU."""
    if torch.cuda.is_available():
        return {"memory": torch.cuda.memory_allocated(), "peak_memory": torch.cuda.max_memory_allocated()}
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            resident = int(file.read().split()[1]) * resource.getpagesize()
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            peak = re.search(r"^VmHWM:\s*(\d+) kB", file.read(), re.MULTILINE)
    except (ImportError, OSError):  # all are Linux's
        return {}
    most = int(peak.group(1)) if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory": resident, "peak_memory": most * 1024}
