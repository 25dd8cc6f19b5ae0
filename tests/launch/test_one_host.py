"""The launch scripts on one machine: real launchers, two ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("psutil")

from hosts import Host, need, path
from runs import LONG, Run, Workshop, difference

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("launch one host")]
CLOSE = 2e-4  # what differs between engines is the order of sums
DDP = ("--engine", "ddp")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    need("pgrep")
    with Host("node1", tmp_path_factory.mktemp("host"), {"node1": "127.0.0.1"}) as made:
        yield made


@pytest.fixture(scope="module")
def uninterrupted(host: Host, workshop: Workshop) -> Run:
    """The long run on two ranks under torchrun."""
    run = workshop.run("torchrun")
    run.end(host.start(run.script("torchrun.sh", *LONG, *DDP), run.log, RANKS="2"))
    return run


@pytest.mark.shows_gpus
def test_deepspeed(host: Host, workshop: Workshop, reference: Run) -> None:
    run = workshop.run("deepspeed")
    # There are no such GPUs; LOCAL_SIZE makes DeepSpeed believe in eight devices.
    gpus = {"CUDA_VISIBLE_DEVICES": "4,5,6", "LOCAL_SIZE": "8"}
    process = host.start(run.script("deepspeed.sh"), run.log, RANKS="2", **gpus)
    assert run.seen("CUDA_VISIBLE_DEVICES", 2) == ["4,5", "4,5"]
    run.end(process)
    assert difference(run, reference) < CLOSE
    assert (run.folder / "output.rank1.txt").exists()
    assert "validation perplexity" in run.printed()


@pytest.mark.heavy
@pytest.mark.shows_gpus
def test_a_rank_killed_under_deepspeed_is_named(host: Host, workshop: Workshop) -> None:
    run = workshop.run("deepspeed-killed")
    process = host.start(run.script("deepspeed.sh", *LONG), run.log, RANKS="2")
    run.reach(2, process)
    run.kill(1)
    run.end(process, None, deadline=30)
    assert "no word from rank 1" in run.printed()
    assert not run.ranks()


@pytest.mark.heavy
@pytest.mark.shows_gpus
@pytest.mark.parametrize(("script", "changes"), [("deepspeed.sh", ()), ("torchrun.sh", DDP)])
def test_sigterm_saves_and_the_same_command_goes_on(
    script: str, changes: tuple[str, ...], host: Host, workshop: Workshop
) -> None:
    """The script passes a scheduler's signal on to the ranks, which DeepSpeed's launcher does not, and says no more."""
    run = workshop.run(f"{script}-stopped")
    command = run.script(script, *LONG, *changes)
    process = host.start(command, run.log, RANKS="2")
    run.reach(2, process)
    host.run("pkill", "-TERM", "-f", f"^bash .*{script} .*{run.folder}")
    run.end(process, 75, deadline=60)
    assert "Traceback" not in run.printed()
    (stopped,) = run.records("stopped")
    assert 2 <= stopped["step"] < 60
    run.end(host.start([*command, "--steps", str(stopped["step"] + 2)], run.log, RANKS="2"))
    assert [r["start"] for r in run.records("run")] == [0, stopped["step"]]


@pytest.mark.heavy
def test_a_run_that_diverged_says_so_by_its_exit_code(host: Host, workshop: Workshop) -> None:
    run = workshop.run("torchrun-diverged")
    changes = (*DDP, "--optimizer.lr", "1e30", "--bad_steps", "2")
    run.end(host.start(run.script("torchrun.sh", *changes), run.log, RANKS="2"), 65)
    assert "The run diverged" in run.printed()


@pytest.mark.heavy
def test_torchrun_starts_again_after_a_kill(host: Host, workshop: Workshop, uninterrupted: Run) -> None:
    """From the last checkpoint, and to the same losses as without the kill."""
    run = workshop.run("torchrun-killed")
    changes = (*LONG, *DDP, "--saving.every", "5")
    process = host.start(run.script("torchrun.sh", *changes), run.log, RANKS="2", RESTARTS="2")
    run.reach(7, process)
    run.kill(1)
    run.end(process)
    first, second = (record["start"] for record in run.records("run"))
    assert first == 0 and second >= 5 and second % 5 == 0
    assert difference(run, uninterrupted) == 0
    assert "no word from rank 1 (node1, process" in run.printed()


def test_what_one_rank_cannot_read_ends_all(host: Host, workshop: Workshop) -> None:
    """A recipe that is missing on one host only. No launcher is there to end the other rank: it hears of it."""
    run = workshop.run("one-cannot")
    logs = [run.log, run.log.with_suffix(".rank1.log")]
    processes = []
    for rank, recipe in enumerate([str(run.recipe), "nowhere.yaml"]):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        command = [sys.executable, "-m", "frugal_dist.cli", "pretrain", recipe, *run.arguments(*DDP)[1:]]
        meeting = {"MASTER_ADDR": "node1", "MASTER_PORT": "29555"}
        processes.append(host.start(command, logs[rank], **place, **meeting))
    for process in processes:
        run.end(process, 2)
    assert "Rank 1 failed: ValueError: there is no recipe 'nowhere.yaml'" in logs[1].read_text()
    assert "failed" not in logs[0].read_text()  # said once, by the rank that it happened to
    assert "rank 1 failed: ValueError: there is no recipe" in (run.folder / "output.txt").read_text()


@pytest.fixture(params=["", "mpirun.openmpi", "mpirun.mpich"], ids=["PyPI", "openmpi", "mpich"])
def mpirun(request: pytest.FixtureRequest) -> str:
    if request.param:
        need(request.param)
    elif not Path(sys.executable).with_name("mpirun").exists():
        pytest.skip("there is no mpirun in this environment; the dev extra has one")
    return request.param or str(Path(sys.executable).with_name("mpirun"))


@pytest.mark.heavy
@pytest.mark.parametrize("mpirun", [""], ids=["PyPI"], indirect=True)
def test_mpirun(host: Host, workshop: Workshop, reference: Run, mpirun: str) -> None:
    mpirun_trains(host, workshop, reference, mpirun)


@pytest.mark.heavy
@pytest.mark.parametrize("mpirun", ["mpirun.openmpi", "mpirun.mpich"], indirect=True)
def test_other_mpiruns(host: Host, workshop: Workshop, reference: Run, mpirun: str) -> None:
    mpirun_trains(host, workshop, reference, mpirun)


def mpirun_trains(host: Host, workshop: Workshop, reference: Run, mpirun: str) -> None:
    run = workshop.run(Path(mpirun).name)
    ordinary = ":".join(folder for folder in path().split(":") if not folder.endswith("sbin"))  # not root's
    run.end(host.start(run.script("mpirun.sh", *DDP), run.log, RANKS="2", MPIRUN=mpirun, PATH=ordinary))
    assert difference(run, reference) < CLOSE


@pytest.mark.heavy
def test_a_rank_killed_under_mpirun_is_named(host: Host, workshop: Workshop, mpirun: str) -> None:
    run = workshop.run(f"{Path(mpirun).name}-killed")
    process = host.start(run.script("mpirun.sh", *LONG, *DDP), run.log, RANKS="2", MPIRUN=mpirun)
    run.reach(2, process)
    status = Path(f"/proc/{run.ranks()[1].pid}/status").read_text()
    number = next(line.split()[-1] for line in status.splitlines() if line.startswith("NSpid:"))  # as the host counts
    run.kill(1)
    run.end(process, None, deadline=30)
    # MPICH kills the other at once, mostly but not always after it has said of whom it hears no more.
    assert "rank 1 " in run.printed() or f"PID {number} RUNNING AT node1" in run.printed()
    assert not run.ranks()
