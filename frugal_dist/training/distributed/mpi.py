"""Where the ranks of an MPI launch meet: mpirun tells each its number, but not where rank 0 can be reached."""

from __future__ import annotations

import socket
import subprocess
from functools import cache


@cache  # MPI cannot be asked again once it is finished, and a process may train several times
def meeting_point(world: int) -> tuple[str, int]:
    """Address and free port of rank 0, by a broadcast of mpi4py; called by all ranks.

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
    own = (_address() if len(set(hosts)) > 1 else "127.0.0.1", _free_port())
    address, port = everyone.bcast(own if everyone.Get_rank() == 0 else None)
    MPI.Finalize()
    return str(address), int(port)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _address() -> str:
    """Of this host as others reach it. Names often mean 127.0.1.1 at home: then the first address of its interfaces."""
    try:
        found = socket.gethostbyname(socket.gethostname())
    except OSError:
        found = "127.0.0.1"
    if not found.startswith("127."):
        return found
    listed = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False).stdout.split()
    return listed[0] if listed else found
