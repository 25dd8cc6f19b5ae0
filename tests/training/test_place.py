"""A process's place among the ranks, as each launcher tells it; what contradicts itself is refused."""

from __future__ import annotations

import pytest

from frugal_dist.training.distributed.place import find_dist_env, first_host

MEETING = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


STARTS = {
    "torchrun": {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MEETING},
    "deepspeed": {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", **MEETING},
    "mpirun": {
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        **MEETING,
    },
    "mpich": {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", **MEETING},
    "srun": {
        "SLURM_PROCID": "3",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": "7",
    },
}


STARTS["srun with PMI-2"] = {**STARTS["srun"], "PMI_RANK": "3", "PMI_SIZE": "4"}


@pytest.mark.parametrize("launcher", STARTS)
def test_every_launcher_tells_the_place(launcher: str) -> None:
    place = find_dist_env(STARTS[launcher])
    assert (place.rank, place.world, place.local_rank, place.address) == (3, 4, 1, "node1")
    assert place.local_world == (4 if launcher == "deepspeed" else 2)
    assert place.port > 0


SHELLS = {
    "no launcher": {},
    "sbatch": {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"},
    "salloc": {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "4294967290"},
}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_process_alone(shell: str) -> None:
    place = find_dist_env(SHELLS[shell])
    assert (place.rank, place.world, place.launcher) == (0, 1, "none")
    assert place.port > 0


def test_nodes_of_different_size() -> None:
    uneven = {**STARTS["srun"], "SLURM_STEP_TASKS_PER_NODE": "1,3", "SLURM_LOCALID": "2"}
    assert find_dist_env(uneven).local_world == 3


def test_deepspeed_in_an_interactive_step_of_slurm() -> None:
    """It says nothing of the node's ranks; what Slurm says of the shell's step is not about them."""
    shell = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_PROCID": "0"}
    place = find_dist_env({**STARTS["deepspeed"], **shell})
    assert (place.rank, place.local_rank, place.local_world) == (3, 1, 4)


def test_left_over_ranks_under_srun_are_refused() -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **MEETING}
    with pytest.raises(ValueError, match="srun started 4 tasks, but WORLD_SIZE=1"):
        find_dist_env({**STARTS["srun"], **alone})
    assert find_dist_env({**STARTS["srun"], **alone, "TORCHELASTIC_RUN_ID": "mine"}).world == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"RANK": "4"}, "RANK=4 must be below WORLD_SIZE=4"),
        ({"RANK": "one"}, "RANK is 'one', which is no number"),
        ({"LOCAL_RANK": "2"}, "contradict each other"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR or MASTER_PORT is not set"),
        ({"MASTER_PORT": "here"}, "MASTER_PORT is 'here', which is no number"),
    ],
)
def test_contradictions_are_named(change: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_dist_env({**STARTS["torchrun"], **change})


def test_a_world_without_a_rank() -> None:
    with pytest.raises(ValueError, match="RANK is not set"):
        find_dist_env({"WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("nodes", "first"), [("a1", "a1"), ("a1,b2", "a1"), ("gpu[07-09,12],x", "gpu07"), ("n[3]", "n3"), ("", "")]
)
def test_the_first_host_of_a_slurm_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
