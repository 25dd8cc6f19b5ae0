"""Machines for launchers: Linux namespaces with their own network, processes, name, /run and /dev/shm, and our files.

    with Host("node1", scratch, {"10.77.0.1": "node1"}) as host:
        process = host.start(["bash", "launch/torchrun.sh", ...], log)

All that was started in a host ends with it, and a host ends with the process that made it, even when that is killed:
its first process reads from a pipe that then closes. Nothing is left: no daemon, interface, mount or shared memory.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from devices import GPUS

ROOT = Path(__file__).resolve().parents[2]
SETUP = """
set -e
exec 3>&1 >&2
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mkdir -p /run/sshd
mount --bind "$2" /etc/hosts
hostname "$1"
ip link set lo up
echo ready >&3
exec 3>&-
read -r _ || true
"""
"""The read ends when the other end of the pipe closes, and with the first process of a namespace end all."""
NAMESPACES = [
    "--net",
    "--mount",
    "--uts",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
    "--propagation",
    "private",
]
SBIN = ":/usr/local/sbin:/usr/sbin:/sbin"
OTHER_LAUNCHES = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "SLURM", "OMPI_", "PMI", "PYTEST", "CUDA_", "DS_")


@functools.cache
def why_not(*commands: str) -> str:
    """Why there can be no hosts with these commands; empty if there can."""
    missing = [name for name in (*commands, "unshare", "nsenter", "ip") if shutil.which(name, path=path()) is None]
    if missing:
        return f"there is no {', '.join(missing)} on this machine; as root, tests/launch/packages.sh installs it"
    if os.geteuid() != 0:
        return "namespaces with daemons in them need root"
    tried = subprocess.run(
        ["unshare", *NAMESPACES, "mount", "-t", "tmpfs", "tmpfs", "/run"], capture_output=True, text=True
    )
    return f"this machine allows no namespaces: {tried.stderr.strip()}" if tried.returncode else ""


def need(*commands: str) -> None:
    """Skip the test where there can be no hosts with these commands."""
    if reason := why_not(*commands):
        pytest.skip(reason)


def path() -> str:
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}{SBIN}"


def environment(more: Mapping[str, str] = {}) -> dict[str, str]:
    """Of what runs on a host: this checkout, on the CPU, and nothing of a launch that this test may be part of."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(OTHER_LAUNCHES)}
    return {
        **own,
        **({"CUDA_VISIBLE_DEVICES": ""} if GPUS else {}),
        "PATH": path(),
        "PYTHONPATH": str(ROOT),
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache/torch_extensions")),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **more,
    }


class Host:
    """A machine. ``names``: the addresses of all machines that it knows, by name."""

    def __init__(self, name: str, scratch: Path, names: Mapping[str, str]) -> None:
        self.name = name
        known = scratch / f"{name}.hosts"
        known.write_text(
            "".join(f"{address} {host}\n" for host, address in {"localhost": "127.0.0.1", **names}.items())
        )
        self._started: list[subprocess.Popen[Any]] = []
        self._holder = subprocess.Popen(
            ["unshare", *NAMESPACES, "bash", "-c", SETUP, "bash", name, str(known)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        assert self._holder.stdout is not None and self._holder.stderr is not None
        if self._holder.stdout.readline() != "ready\n":
            raise AssertionError(f"host {name} cannot be set up: {self._holder.stderr.read()}")
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()
        self.pid = int(children[0])

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the machine and all that runs on it."""
        assert self._holder.stdin is not None
        self._holder.stdin.close()
        self._holder.wait(timeout=60)
        for pipe in (self._holder.stdout, self._holder.stderr):
            assert pipe is not None
            pipe.close()
        for process in self._started:
            process.wait(timeout=60)

    def start(self, command: Sequence[str], log: Path, cwd: Path = ROOT, **more: str) -> subprocess.Popen[Any]:
        """Start a command; its output goes to the file. ``more``: for its environment."""
        with log.open("ab") as file:
            process = subprocess.Popen(
                [*self._enter(), *command],
                env=environment(more),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=cwd,
            )
        self._started.append(process)
        return process

    def run(self, *command: str, check: bool = True, **more: str) -> str:
        """What a command prints; AssertionError if it fails."""
        done = subprocess.run(
            [*self._enter(), *command], env=environment(more), capture_output=True, text=True, cwd=ROOT, timeout=120
        )
        assert not check or done.returncode == 0, f"{command} on {self.name}: {done.stdout}{done.stderr}"
        return done.stdout

    def _enter(self) -> list[str]:
        return ["nsenter", "--target", str(self.pid), "--net", "--mount", "--uts", "--pid", f"--wd={ROOT}", "--"]


def connect(first: Host, second: Host, subnet: str = "10.77.0") -> None:
    """A cable between two machines: addresses .1 and .2, on eth0."""
    enter = ["nsenter", "--target", str(first.pid), "--net", "--"]  # our own /proc, in which the second has its number
    link = ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(second.pid)]
    subprocess.run([*enter, *link], check=True, env=environment())
    for number, host in enumerate((first, second), start=1):
        host.run("ip", "address", "add", f"{subnet}.{number}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
