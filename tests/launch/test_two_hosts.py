"""The launch scripts on two machines, joined by a network: real sshd, pdsh, mpirun and torchrun."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("psutil")

from hosts import Host, connect, need, path
from runs import LONG, Run, Workshop, difference

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("launch two hosts"), pytest.mark.shows_gpus]
CLOSE = 2e-4
NAMES = {"node1": "10.77.0.1", "node2": "10.77.0.2"}
INTERFACES = "--mca btl_tcp_if_include 10.77.0.0/24 --mca oob_tcp_if_include 10.77.0.0/24"
PORTS = itertools.count(29500)  # one that hangs shall not be in the way of the next
SSHD = """
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PermitRootLogin yes
PidFile none
"""
SSH = """
IdentityFile {folder}/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
BatchMode yes
"""


class Pair:
    """Two hosts that reach each other by ssh."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hostfile = folder / "hostfile"
        self.hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
        for name in ("host_key", "key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
        (folder / "sshd").write_text(SSHD.format(folder=folder))
        (folder / "config").write_text(SSH.format(folder=folder))
        (folder / "bin").mkdir()
        wrapper = folder / "bin" / "ssh"  # launchers call "ssh", which shall not read or change the user's own files
        wrapper.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {folder / "config"} "$@"\n')
        wrapper.chmod(0o755)
        self.hosts: list[Host] = []

    def open(self) -> None:
        self.hosts += [Host("node1", self.folder, NAMES)]
        self.hosts += [Host("node2", self.folder, NAMES)]
        connect(*self.hosts)
        for host in self.hosts:
            host.run("/usr/sbin/sshd", "-f", str(self.folder / "sshd"))
        assert self.start_on(0, ["ssh", "node2", "hostname"], self.folder / "ssh.log").wait(timeout=30) == 0

    def start_on(self, number: int, command: list[str], log: Path, **more: str) -> subprocess.Popen[bytes]:
        return self.hosts[number].start(command, log, PATH=f"{self.folder / 'bin'}:{path()}", **more)

    def close(self) -> None:
        for host in self.hosts:
            host.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    need("sshd", "ssh", "pdsh")
    assert os.path.isabs("/usr/bin/ssh")
    made = Pair(tmp_path_factory.mktemp("pair"))
    try:
        made.open()
        yield made
    finally:
        made.close()


AWKWARD = {"NCCL_SOCKET_IFNAME": "^docker,lo", "HF_NOTE": 'a "b" $HOME \\ 5%n', "SEND": "HF_NOTE", "UCX_NOTE": "other"}
"""Variables that DeepSpeed's launcher spoils if it is left to it, and one that the user's own file changes."""
OWN = {"UCX_NOTE": "of my own"}


def by_hostfile(
    pair: Pair, run: Run, launcher: str, *changes: str, slots: tuple[int, int] = (1, 1), **more: str
) -> subprocess.Popen[bytes]:
    """Start a run with these numbers of ranks on the two hosts."""
    command = run.script("deepspeed_hostfile.sh", *changes)
    hostfile = run.log.with_suffix(".hosts")
    hostfile.write_text("".join(f"node{number} slots={ranks}\n" for number, ranks in enumerate(slots, start=1)))
    own = run.log.with_suffix(".variables")
    own.write_text("# mine\n\n" + "".join(f"{name}={value}\n" for name, value in OWN.items()))
    known = {"HOSTFILE": str(hostfile), "LAUNCHER": launcher, "MASTER_PORT": str(next(PORTS)), "DS_ENV_FILE": str(own)}
    return pair.start_on(0, command, run.log, **known, **more)


def end_as_told(pair: Pair, run: Run, reference: Run, process: subprocess.Popen[bytes], ranks: int) -> None:
    """All ranks hear the words and variables as they were given, and train as one process does."""
    for name in ("NCCL_SOCKET_IFNAME", "HF_NOTE", "UCX_NOTE"):
        assert run.seen(name, ranks) == [{**AWKWARD, **OWN}[name]] * ranks
    assert run.seen("DS_ACCELERATOR", ranks) == [""] * ranks
    run.end(process)
    assert run.records("run")[0]["ranks"] == ranks
    assert difference(run, reference) < CLOSE


@pytest.mark.heavy
@pytest.mark.parametrize("slots", [(1, 1), (1, 3)], ids=str)
def test_pdsh(pair: Pair, workshop: Workshop, reference: Run, slots: tuple[int, int]) -> None:
    run = workshop.run(f"pdsh $HOME 'a' \"100%n\" {slots}")
    options = '{"update_gap":4,"state_free":"sgd","state_free_lr_scale":0.1,"eps":0.001}'
    process = by_hostfile(pair, run, "pdsh", "--optimizer.options", options, slots=slots, **AWKWARD)
    end_as_told(pair, run, reference, process, sum(slots))


@pytest.mark.heavy
def test_openmpi(pair: Pair, workshop: Workshop, reference: Run) -> None:
    need("mpirun.openmpi")
    run = workshop.run("hostfile-openmpi")
    more = {"LAUNCHER_ARGS": INTERFACES, "MPIRUN": "mpirun.openmpi", **AWKWARD}
    end_as_told(pair, run, reference, by_hostfile(pair, run, "openmpi", **more), 2)


@pytest.mark.heavy
def test_mpich(pair: Pair, workshop: Workshop, reference: Run) -> None:
    need("mpirun.mpich")
    run = workshop.run("hostfile-mpich")
    end_as_told(pair, run, reference, by_hostfile(pair, run, "mpich", **AWKWARD), 2)


@pytest.mark.heavy
@pytest.mark.parametrize("launcher", ["mpirun.openmpi", "mpirun.mpich"])
def test_mpirun(pair: Pair, workshop: Workshop, reference: Run, launcher: str) -> None:
    """mpi4py finds the meeting point."""
    need(launcher)
    run = workshop.run(f"two-{launcher}")
    command = run.script("mpirun.sh", "--engine", "ddp")
    # UCX, which MPICH uses, takes two hosts on one machine for one, and tries shared memory.
    more = {"MPIRUN_ARGS": INTERFACES} if launcher == "mpirun.openmpi" else {"UCX_TLS": "tcp,self"}
    run.end(pair.start_on(0, command, run.log, HOSTFILE=str(pair.hostfile), MPIRUN=launcher, **more))
    assert difference(run, reference) < CLOSE


@pytest.mark.heavy
def test_torchrun(pair: Pair, workshop: Workshop, reference: Run) -> None:
    run = workshop.run("two-torchrun")
    command = run.script("torchrun.sh", "--engine", "fsdp2")
    logs = [run.log, run.log.with_suffix(".node2.log")]
    started = [pair.start_on(n, command, log, NODES="2", MASTER="node1:29400") for n, log in enumerate(logs)]
    for process in started:
        run.end(process)
    assert difference(run, reference) < CLOSE


@pytest.mark.heavy
@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "mpich"])
def test_a_killed_rank_ends_the_job_on_both_hosts_and_is_named(pair: Pair, workshop: Workshop, launcher: str) -> None:
    run = workshop.run(f"killed-{launcher}")
    more = {"LAUNCHER_ARGS": INTERFACES, "MPIRUN": "mpirun.openmpi"} if launcher == "openmpi" else {}
    process = by_hostfile(pair, run, launcher, *LONG, **more)
    run.reach(2, process)
    run.kill(1)
    run.end(process, None, deadline=30)
    assert "rank 1 " in run.printed()
    assert not run.ranks()


@pytest.mark.heavy
def test_a_rank_killed_under_torchrun_ends_both_hosts_and_is_named(pair: Pair, workshop: Workshop) -> None:
    run = workshop.run("two-torchrun-ends")
    logs = [run.log, run.log.with_suffix(".node2.log")]
    command = run.script("torchrun.sh", *LONG, "--engine", "ddp")
    started = [pair.start_on(n, command, log, NODES="2", MASTER="node1:29402") for n, log in enumerate(logs)]
    run.reach(2, started[0])
    run.kill(1)
    for process in started:
        run.end(process, None, deadline=30)
    assert any("no word from rank 1 (" in log.read_text(errors="replace") for log in logs)
    assert not run.ranks()


@pytest.mark.heavy
def test_sigterm_saves_on_both_hosts_and_the_same_command_goes_on(pair: Pair, workshop: Workshop) -> None:
    run = workshop.run("stopped-pdsh")
    process = by_hostfile(pair, run, "pdsh", *LONG)
    run.reach(2, process)
    pair.hosts[0].run("pkill", "-TERM", "-f", f"^bash .*deepspeed_hostfile.sh .*{run.folder}")
    run.end(process, 75, deadline=90)
    assert not run.ranks()
    (stopped,) = run.records("stopped")
    assert 2 <= stopped["step"] < 60
    run.end(by_hostfile(pair, run, "pdsh", *LONG, "--steps", str(stopped["step"] + 2)))
    assert [record["start"] for record in run.records("run")] == [0, stopped["step"]]


@pytest.mark.heavy
def test_torchrun_starts_again_on_both_hosts(pair: Pair, workshop: Workshop) -> None:
    run = workshop.run("two-torchrun-killed")
    command = run.script("torchrun.sh", *LONG, "--engine", "ddp", "--saving.every", "5")
    logs = [run.log, run.log.with_suffix(".node2.log")]
    more = {"NODES": "2", "MASTER": "node1:29401", "RESTARTS": "2"}
    started = [pair.start_on(n, command, log, **more) for n, log in enumerate(logs)]
    run.reach(7, started[0])
    run.kill(1)
    for process in started:
        run.end(process)
    first, second = (record["start"] for record in run.records("run"))
    assert first == 0 and second >= 5 and second % 5 == 0
