"""The sbatch scripts on a real Slurm cluster of two nodes: training, preemption, time limit, dying ranks and nodes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("psutil")

from cluster import Cluster, script
from hosts import need
from runs import LONG, Run, Workshop, difference, wait_until

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("launch slurm"), pytest.mark.shows_gpus]
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")
DDP = ("--engine", "ddp")
COLUMNS = ("--optimizer.options.projection", "columns")
"""test_one_host.py launches svd."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    need("slurmctld", "slurmd", "munged", "sbatch")
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        yield made
    finally:
        made.close()


def submit(cluster: Cluster, run: Run, *changes: str, options: tuple[str, ...] = ()) -> int:
    words = [*TWO_NODES, *options, script("pretrain.sbatch"), *run.arguments(*DDP, *COLUMNS, *changes)]
    return cluster.submit(*words, log=run.log)


def finish(cluster: Cluster, run: Run, job: int) -> None:
    state = cluster.wait_for(job, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
    assert state == "COMPLETED", f"{state}\n{run.output()}"
    cluster.wait_for_nodes()


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, workshop: Workshop) -> Run:
    run = workshop.run("slurm")
    finish(cluster, run, submit(cluster, run, *LONG))
    return run


def test_a_job_trains_on_two_nodes_and_its_log_can_be_read(uninterrupted: Run) -> None:
    assert len(uninterrupted.records("train")) == 60
    assert uninterrupted.records("run")[0]["ranks"] == 2
    printed = uninterrupted.printed()
    assert "start 0, on node[1-2]" in printed
    assert "ddp on 2 ranks" in printed and "validation perplexity" in printed
    assert "Warning" not in printed
    said = ("frugal-dist pretrain: loading", "WARNING: this run trains on the CPU", "Frugal (columns, density 0.25): ")
    expected = ("pretrain", "step", str(uninterrupted.folder), "valid", "Next: frugal-dist plot ", *said)
    assert [line for line in printed.split("\n") if line and not line.startswith(expected)] == []
    assert (uninterrupted.folder / "output.txt").exists() and (uninterrupted.folder / "output.rank1.txt").exists()


@pytest.mark.heavy
def test_a_preempted_job_saves_is_queued_again_and_goes_on(
    cluster: Cluster, workshop: Workshop, uninterrupted: Run
) -> None:
    """Nothing is saved in between: only what is saved at the signal can be continued."""
    run = workshop.run("preempted")
    job = submit(cluster, run, *LONG)
    run.reach(3)
    other = cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--wrap", "sleep 2")
    cluster.wait_for(job, "PENDING")
    (stopped,) = run.records("stopped")
    assert 3 <= stopped["step"] < 60
    assert "(SIGTERM); the same command resumes" in run.printed()
    cluster.wait_for(other, "COMPLETED")
    cluster.start_now(job)
    finish(cluster, run, job)
    assert cluster.restarts(job) == 1
    assert [record["start"] for record in run.records("run")] == [0, stopped["step"]]
    assert difference(run, uninterrupted) == 0


@pytest.mark.heavy
def test_a_killed_rank_ends_the_job_on_all_nodes_and_is_named(cluster: Cluster, workshop: Workshop) -> None:
    """Also: sbatch takes few variables along, but what the script sets reaches the ranks."""
    run = workshop.run("slurm-killed")
    job = submit(cluster, run, *LONG, options=("--export=PATH,PYTHONPATH",))
    run.reach(2)
    assert run.seen("OMP_NUM_THREADS", 2) == ["1", "1"]
    run.kill(1)
    assert cluster.wait_for(job, "FAILED", "PENDING", "COMPLETED", deadline=30) == "FAILED"
    assert not run.ranks()
    assert "node2: task 1: Killed" in run.printed()
    cluster.wait_for_nodes()


@pytest.mark.heavy
def test_a_job_that_meets_its_time_limit_is_queued_again_and_goes_on(cluster: Cluster, workshop: Workshop) -> None:
    run, whole = workshop.run("limited"), workshop.run("unlimited")
    plan = ("--evaluation_tokens", "64", "--schedule.name", "constant", "--schedule.warmup", "0")
    run.recipe = cluster.folder / "limited.yaml"
    text = workshop.recipe.read_text()
    run.recipe.write_text(text.replace("steps: 8\n", "steps: 100000\n"))
    job = submit(cluster, run, *plan, options=("--time=30", "--signal=USR1@100"))
    run.reach(3)
    limit = cluster.minutes(job) + 2  # near enough for the signal, whatever the start has taken, and a minute to save
    cluster.slurm("scontrol", "update", f"jobid={job}", f"TimeLimit={limit}")
    cluster.wait_for(job, "PENDING", "TIMEOUT", "FAILED")
    assert "(SIGUSR1); the same command resumes" in run.printed()
    (stopped,) = run.records("stopped")
    # A hundred thousand steps are too many for a test: the recipe that the job reads again has fewer.
    end = stopped["step"] + 20
    run.recipe.write_text(text.replace("steps: 8\n", f"steps: {end}\n"))
    cluster.slurm("scontrol", "update", f"jobid={job}", "TimeLimit=30")
    cluster.start_now(job, "now+10")  # a node does not start a job again in the second in which it ended it
    finish(cluster, run, job)
    assert cluster.restarts(job) == 1
    assert [record["start"] for record in run.records("run")] == [0, stopped["step"]]
    finish(cluster, whole, submit(cluster, whole, *plan, "--steps", str(end)))
    assert difference(run, whole) == 0


def test_gpus_without_ranks_are_noticed(cluster: Cluster, workshop: Workshop) -> None:
    run = workshop.run("idle-gpus")
    job = cluster.submit("--gpus-per-node=2", script("pretrain.sbatch"), *run.arguments(), log=run.log)
    cluster.wait_for(job, "FAILED", "COMPLETED")
    assert "has 2 GPUs on a node, but ranks for 1: give sbatch --ntasks-per-node=2" in run.printed()


@pytest.mark.heavy
def test_two_ranks_on_each_node(cluster: Cluster, workshop: Workshop, reference: Run) -> None:
    run = workshop.run("slurm-four")
    options = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1")
    finish(cluster, run, cluster.submit(*options, script("pretrain.sbatch"), *run.arguments(*DDP), log=run.log))
    assert run.records("run")[0]["ranks"] == 4
    assert difference(run, reference) < 2e-4


@pytest.mark.heavy
def test_a_run_that_diverged_is_not_queued_again(cluster: Cluster, workshop: Workshop) -> None:
    run = workshop.run("slurm-diverged")
    job = submit(cluster, run, "--optimizer.lr", "1e30", "--bad_steps", "2")
    assert cluster.wait_for(job, "FAILED", "COMPLETED") == "FAILED", run.output()
    assert "ExitCode=65:0" in cluster.slurm("scontrol", "show", "job", str(job)), run.output()
    assert cluster.restarts(job) == 0
    cluster.wait_for_nodes()


@pytest.mark.heavy
def test_a_cancelled_job_does_not_come_back(cluster: Cluster, workshop: Workshop) -> None:
    run = workshop.run("cancelled")
    job = submit(cluster, run, *LONG)
    run.reach(2)
    cluster.slurm("scancel", str(job))
    cluster.wait_for(job, "CANCELLED")
    wait_until(lambda: not run.ranks(), "the ranks to end", 60)
    cluster.wait_for_nodes()
    assert cluster.state(job) == "CANCELLED"


@pytest.mark.heavy
def test_a_node_that_fails_costs_no_more_than_the_steps_since_the_last_checkpoint(
    cluster: Cluster, workshop: Workshop, uninterrupted: Run
) -> None:
    run = workshop.run("node-fails")
    job = submit(cluster, run, *LONG, "--saving.every", "5")
    run.reach(7)
    cluster.fail("node2")
    cluster.wait_for(job, "PENDING")
    assert cluster.restarts(job) == 1
    # Slurm has it in the queue again. This node is back much sooner than a real one, and would still be told to end the
    # job as it was: the rest is a job of its own.
    cluster.slurm("scancel", str(job))
    cluster.start_node("node2")
    cluster.wait_for_nodes()
    finish(cluster, run, submit(cluster, run, *LONG, "--saving.every", "5"))
    assert [record["start"] % 5 for record in run.records("run")] == [0, 0]
    assert run.records("run")[1]["start"] >= 5
    assert difference(run, uninterrupted) == 0


@pytest.mark.heavy
def test_a_sweep_runs_each_line(cluster: Cluster, workshop: Workshop) -> None:
    lines = cluster.folder / "rates"
    lines.write_text("--optimizer.lr 1e-3\n--optimizer.lr 2e-3 --optimizer.name 'adamw' --optimizer.options {}\n")
    recipe = str(workshop.recipe)
    job = cluster.submit("--array=1-2", "--chdir", str(cluster.folder), script("sweep.sbatch"), recipe, "./rates")
    wait_until(lambda: str(job) not in cluster.slurm("squeue", "-h", "-o", "%A %F"), "the sweep to end")
    for number, rate in (("1", 1e-3), ("2", 2e-3)):
        run = workshop.run("none")
        run.log = cluster.folder / f"frugal-sweep-{job}_{number}.log"
        run.folder = cluster.folder / "runs" / "rates" / number
        assert run.folder.exists(), run.output()
        assert run.records("run")[0]["optimizer"]["lr"] == rate
        assert run.records("summary")


@pytest.mark.heavy
def test_deepspeed_inside_an_allocation(cluster: Cluster, workshop: Workshop, reference: Run) -> None:
    """LAUNCHER=slurm of the hostfile script."""
    pytest.importorskip("deepspeed")
    run = workshop.run("slurm-deepspeed")
    hostfile = cluster.folder / "hostfile"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    command = " ".join(["LAUNCHER=slurm", f"HOSTFILE={hostfile}", *run.script("deepspeed_hostfile.sh")])
    interfaces, own = "^docker,lo", "of, my own"  # DeepSpeed's launcher would cut them at the comma
    (cluster.folder / "variables").write_text(f"# mine\nUCX_OWN={own}\n")
    more = {"UCX_NOTE": interfaces, "UCX_OWN": "other", "DS_ENV_FILE": str(cluster.folder / "variables")}
    job = cluster.submit(*TWO_NODES, "--wrap", command, log=run.log, **more)
    assert run.seen("UCX_NOTE", 2) == [interfaces, interfaces]
    assert run.seen("UCX_OWN", 2) == [own, own]
    finish(cluster, run, job)
    assert difference(run, reference) < 2e-4
