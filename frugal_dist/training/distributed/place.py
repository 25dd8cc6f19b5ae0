"""Where a process stands among the others: one answer, whichever launcher started it, and how the ranks meet."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class DistEnv:
    """A process among ``world``; ``address`` and ``port`` are where rank 0 can be reached."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    port: int
    launcher: str

    def environment(self) -> dict[str, str]:
        """The variables that torch.distributed and DeepSpeed read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


@dataclass(frozen=True)
class Launcher:
    """The names under which a launcher tells a process its place, and how ranks can find the first one's address."""

    rank: str
    world: str
    local_rank: str
    local_world: str
    discover: Callable[[int], tuple[str, int]] | None = None


@cache  # MPI cannot be asked again once it is finished, and a process may train several times
def mpi_meeting_point(world: int) -> tuple[str, int]:
    """Address and free port of rank 0, by a broadcast of mpi4py: mpirun tells each rank its number, no more.

    Called by all ranks.

    MPI is finished afterwards: torch communicates by itself, and a rank that fails must not wait for the others in
    MPI's own exit. Raises ValueError if mpi4py cannot be loaded, or belongs to another MPI than this mpirun.
    """
    advice = "or export MASTER_ADDR (the host of rank 0) and MASTER_PORT (a free port) before the launch."
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"MPI started {world} ranks, but mpi4py does not work ({error}). Install it, {advice}"
        ) from error
    everyone = MPI.COMM_WORLD
    if everyone.Get_size() != world:
        raise ValueError(
            f"MPI started {world} ranks, but mpi4py sees {everyone.Get_size()}: it loaded "
            f"{MPI.Get_library_version().split(',')[0].strip()}, which is not the MPI of this mpirun. Set "
            f"MPI4PY_MPIABI (openmpi or mpich) or MPI4PY_LIBMPI (the path of its libmpi.so), {advice}"
        )
    hosts = everyone.allgather(socket.gethostname())
    own = (_address() if len(set(hosts)) > 1 else "127.0.0.1", _free_port(""))
    address, port = everyone.bcast(own if everyone.Get_rank() == 0 else None)
    MPI.Finalize()
    return str(address), int(port)


def _address() -> str:
    """Of this host as others reach it. Names often mean 127.0.1.1 at home: then the first address of its interfaces."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "127.0.0.1"
    if not address.startswith("127."):
        return address
    listed = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False).stdout.split()
    return listed[0] if listed else address


LAUNCHERS = {
    "torchrun or deepspeed": Launcher("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "Open MPI": Launcher(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        mpi_meeting_point,
    ),
    "MPICH": Launcher("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", mpi_meeting_point),
    "Slurm": Launcher("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}
"""In the order in which they are asked: srun may start torchrun or mpirun, which then know better."""
PORTS = range(20_000, 60_000)
FIRST_RESERVED_STEP = 0xFFFF_FFF0
"""Slurm numbers the steps that are no srun of the user's from here on: an interactive shell has 4294967290."""


def find_dist_env(environ: Mapping[str, str] | None = None) -> DistEnv:
    """The place of this process, from the environment its launcher made; a process alone if there was none.

    Raises ValueError, naming the variables, if they are incomplete, no numbers, or contradict each other.
    """
    environ = os.environ if environ is None else environ
    for name, launcher in LAUNCHERS.items():
        if launcher.rank in environ and _started_by(name, environ):
            place = _checked(_place(name, launcher, environ), launcher)
            _check_step(place, environ)
            return place
    if "WORLD_SIZE" in environ and environ["WORLD_SIZE"] != "1":
        raise ValueError(
            f"WORLD_SIZE is {environ['WORLD_SIZE']}, but RANK is not set: start every rank with torchrun, deepspeed, "
            "srun or mpirun, or unset WORLD_SIZE for a single process."
        )
    return DistEnv(0, 1, 0, 1, "127.0.0.1", _free_port("127.0.0.1"), "none")


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def _started_by(name: str, environ: Mapping[str, str]) -> bool:
    """Slurm's variables are in the shell of sbatch and salloc too: only a step of several tasks is started by srun.

    srun with PMI-2 sets MPICH's variables as well, but not the local rank, which MPICH's own mpirun does.
    """
    step = _in_step(environ)
    return {"Slurm": step, "MPICH": not step or "MPI_LOCALRANKID" in environ}.get(name, True)


def _in_step(environ: Mapping[str, str]) -> bool:
    step = environ.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < FIRST_RESERVED_STEP


def _check_step(place: DistEnv, environ: Mapping[str, str]) -> None:
    """Variables left over in the shell that called srun would make every task a world of its own."""
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "")
    each_its_own = "TORCHELASTIC_RUN_ID" in environ  # torchrun in every task is the user's wish
    if _in_step(environ) and tasks.isdigit() and place.world < int(tasks) and not each_its_own:
        raise ValueError(
            f"srun started {tasks} tasks, but WORLD_SIZE={place.world} and RANK={place.rank} are set: unset RANK, "
            "LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE before srun; every task knows its own."
        )


def _place(name: str, launcher: Launcher, environ: Mapping[str, str]) -> DistEnv:
    world = _number(environ, launcher.world, name)
    local_world = _local_world(environ, launcher, world)
    address, port = _meeting_point(name, environ)
    if launcher.discover is not None and not (address and port):
        address, port = launcher.discover(world)
    return DistEnv(
        rank=_number(environ, launcher.rank, name),
        world=world,
        local_rank=_number(environ, launcher.local_rank, name, 0 if world == 1 else None),
        local_world=local_world,
        address=address,
        port=port,
        launcher=name,
    )


def _number(environ: Mapping[str, str], key: str, launcher: str, default: int | None = None) -> int:
    text = environ.get(key)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"\d+", text):
        problem = "not set" if text is None else f"{text!r}, which is no number"
        raise ValueError(f"{key} is {problem}, although other variables of {launcher} are there; set it.")
    return int(text)


def _local_world(environ: Mapping[str, str], launcher: Launcher, world: int) -> int:
    """Ranks on this node; Slurm writes those of all nodes: "2(x3),1"."""
    text = environ.get(launcher.local_world, "")
    if text.isdigit():
        return int(text)
    nodes = [int(count) for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]
    node = int(environ.get("SLURM_NODEID", "0"))
    return nodes[node] if node < len(nodes) else world


def _meeting_point(name: str, environ: Mapping[str, str]) -> tuple[str, int]:
    """Where rank 0 listens. Slurm says who is first; ports follow job numbers, so that jobs do not share one."""
    address = environ.get("MASTER_ADDR", "")
    port = _number(environ, "MASTER_PORT", name) if environ.get("MASTER_PORT") else 0
    if name == "Slurm" and not address:
        address = first_host(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", ""))
    if name == "Slurm" and not port:
        port = PORTS[int(environ.get("SLURM_JOB_ID", "0")) % len(PORTS)]
    return address, port


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list such as "gpu[07-09,12],login1".

    >>> first_host("gpu[07-09,12],login1")
    'gpu07'
    """
    match = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\])?", nodes)
    return match.group(1) + (match.group(2) or "") if match else ""


def _checked(place: DistEnv, launcher: Launcher) -> DistEnv:
    if not place.rank < place.world:
        raise ValueError(f"{launcher.rank}={place.rank} must be below {launcher.world}={place.world}.")
    if not place.local_rank < max(place.local_world, 1) <= place.world:
        raise ValueError(
            f"{launcher.local_rank}={place.local_rank}, {launcher.local_world}={place.local_world} and "
            f"{launcher.world}={place.world} contradict each other."
        )
    if not place.address or not place.port:
        raise ValueError(
            f"{place.launcher} started {place.world} ranks, but MASTER_ADDR or MASTER_PORT is not set: before the "
            "launch export MASTER_ADDR (the first node's name) and MASTER_PORT (a free port)."
        )
    return place


def settle_accelerator() -> None:
    """Before DeepSpeed is imported: the CPU if this process sees no GPU, unless DS_ACCELERATOR says otherwise.

    Left alone, DeepSpeed tries all that it knows, and warns. This must not come from the host that a launch starts on:
    a login node has no GPU, but the nodes that train do.
    """
    import torch  # once the terminal is protected from its output

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
