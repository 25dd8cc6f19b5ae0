"""Where a run happens: device, host, versions, the checkout's commit. It stands in the record and the first line."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
from datetime import datetime
from importlib import metadata
from pathlib import Path

import frugal_dist


def surroundings() -> dict[str, str]:
    """For the record of a run."""
    import torch

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
    import torch

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
    import torch

    if torch.cuda.is_available():
        return ""
    if shutil.which("nvidia-smi"):
        why = unused_gpus()[0]
        if why:
            return why
    if os.environ.get("SLURM_JOB_ID"):
        return "this Slurm job has no GPU; if it should have: sbatch --gpus-per-node=N --ntasks-per-node=N"
    return ""


def unused_gpus() -> tuple[str, bool]:
    """Why torch finds no GPU although nvidia-smi lists some, and whether that is somebody's choice; else nothing."""
    import torch

    try:
        said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return "", True
    count = sum(line.startswith("GPU") for line in said.splitlines())
    if count == 0:
        return "", True
    if (shown := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None and _shows_none(shown, count):
        return f'CUDA_VISIBLE_DEVICES="{shown}" shows none of this machine\'s {count}', True
    why = "torch is a CPU build" if torch.version.cuda is None else "driver and CUDA do not fit"
    return f"nvidia-smi lists {count}, but torch {torch.__version__} finds none: {why}", False


def _shows_none(shown: str, count: int) -> bool:
    """Whether CUDA_VISIBLE_DEVICES begins with what is none of so many GPUs: CUDA reads no further."""
    first = shown.partition(",")[0].strip()
    return int(first) >= count if first.isdecimal() else not first.startswith(("GPU-", "MIG-"))
