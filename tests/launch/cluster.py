"""A Slurm cluster with two nodes, node1 and node2, on one host of its own: munged, slurmctld, two slurmd.

All state lies in a scratch folder; the daemons run in the foreground of their host and end with it.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import psutil
from hosts import ROOT, Host
from runs import wait_until

NODES = {"node1": "127.0.0.2", "node2": "127.0.0.3"}
CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=5
SlurmdTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
MailProg=/bin/true
SchedulerParameters=bf_interval=2,sched_interval=2
GresTypes=gpu
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.2 Port=17001 CPUs=2 Gres=gpu:2 State=UNKNOWN
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.3 Port=17002 CPUs=2 Gres=gpu:2 State=UNKNOWN
PartitionName=low Nodes=node1,node2 Default=YES PriorityTier=1 GraceTime=60 State=UP
PartitionName=high Nodes=node1,node2 PriorityTier=10 PreemptMode=OFF State=UP
"""


class Cluster:
    """Started by the constructor; ``close`` ends it with all its jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.conf.write_text(CONF.format(folder=folder))
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")  # stand for GPUs
        (folder / "munge").mkdir()
        (folder / "state").mkdir()
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        self._daemons: dict[str, subprocess.Popen[Any]] = {}
        self.host = Host("login", folder, {"login": "127.0.0.1", **NODES})
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        # Slurm resolves no name, not even a number, on a host that has nothing but the loopback interface.
        self.host.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
        self.host.run("ip", "address", "add", "10.78.0.1/24", "dev", "eth0")
        for interface in ("eth0", "eth1"):
            self.host.run("ip", "link", "set", interface, "up")
        munge = self.folder / "munge"
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={munge / name}" for option, name in files.items()]
        self._daemon("munged", "munged", "--foreground", "--force", *options)
        wait_until((munge / "socket").exists, "munged", 30)
        self._daemon("slurmctld", "slurmctld", "-D", "-c", "-f", str(self.conf))
        for node in NODES:
            self.start_node(node)
        self.wait_for_nodes()

    def start_node(self, node: str) -> None:
        self._daemon(node, "slurmd", "-D", "-N", node, "-f", str(self.conf))

    def wait_for_nodes(self) -> None:
        wait_until(
            lambda: self.slurm("sinfo", "-h", "-p", "low", "-o", "%D %t").split() == ["2", "idle"], "idle nodes", 60
        )

    def _daemon(self, name: str, *command: str) -> None:
        self._daemons[name] = self.host.start(command, self.folder / f"{name}.out", SLURM_CONF=str(self.conf))

    def fail(self, node: str) -> None:
        """The node loses power: its daemon and the processes of its jobs are gone at once."""
        family = psutil.Process(self._daemons[node].pid).children()
        for process in psutil.process_iter():
            try:
                environ = process.environ()
                if environ.get("SLURMD_NODENAME") == node and environ.get("SLURM_CONF") == str(self.conf):
                    family += [process.parent(), process]  # the first is Slurm's own, which watches the task
            except psutil.Error:
                continue
        for process in family:
            if process is not None and process.is_running():
                process.kill()

    def slurm(self, *command: str, check: bool = True, **more: str) -> str:
        """What a command of Slurm prints."""
        return self.host.run(*command, check=check, SLURM_CONF=str(self.conf), **more)

    def submit(self, *words: str, log: Path | None = None, **more: str) -> int:
        output = [] if log is None else [f"--output={log}"]
        found = self.slurm("sbatch", "--parsable", "--chdir", str(self.folder), *output, *words, **more)
        return int(found.strip().split(";")[0])

    def state(self, job: int) -> str:
        found = re.search(r"JobState=(\w+)", self.slurm("scontrol", "show", "job", str(job)))
        return found.group(1) if found else ""

    def restarts(self, job: int) -> int:
        found = re.search(r"Restarts=(\d+)", self.slurm("scontrol", "show", "job", str(job)))
        return int(found.group(1)) if found else 0

    def minutes(self, job: int) -> int:
        """How many whole minutes it has run since it was started last."""
        found = re.search(r"RunTime=(\d+):(\d+):", self.slurm("scontrol", "show", "job", str(job)))
        assert found is not None
        return int(found.group(1)) * 60 + int(found.group(2))

    def wait_for(self, job: int, *states: str, deadline: float = 240) -> str:
        """The state, once it is one of these."""

        def there() -> str:
            found = self.state(job)
            return found if found in states else ""

        try:
            return str(wait_until(there, f"job {job} to be {' or '.join(states)}", deadline))
        except AssertionError as error:
            raise AssertionError(f"{error}; {self.slurm('scontrol', 'show', 'job', str(job))}") from error

    def start_now(self, job: int, time: str = "now") -> None:
        """Slurm makes a job that was queued again wait for about two minutes."""
        self.wait_for(job, "PENDING")
        self.slurm("scontrol", "update", f"jobid={job}", f"StartTime={time}")

    def close(self) -> None:
        self.host.close()


def script(name: str) -> str:
    return str(ROOT / "launch" / name)
