"""docker/ for real: the image is built and used as its user, alone and as the nodes of a cluster.

Every line of the Dockerfile is carried out; the base is Debian instead of NVIDIA's image. Nodes are containers in
network namespaces, and run the commands and variables of compose.yaml and of the Kubernetes Job.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml")
pytest.importorskip("psutil")

import images
import psutil
import yaml
from compose import services
from hosts import ROOT, Host, connect
from hosts import need as need_hosts
from images import Container, Store
from runs import wait_until

from frugal_dist.training.metrics.record import of_kind, read_metrics

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(3600), pytest.mark.xdist_group("images")]
ARGUMENTS = {"TORCH": "torch==2.13.0+cpu", "EXTRAS": "all,dev", "WITH_SSH": "1", "APT_PACKAGES": "bsdextrautils"}
SMALL = (
    *("--model.llama", "9M", "--model.checkpointing", "false", "--precision", "fp32"),
    *(
        "--data.kind",
        "tokens",
        "--data.path",
        ".cache/quickstart",
        "--data.rows",
        "packed",
        "--evaluation_tokens",
        "2000",
    ),
    *("--steps", "3", "--batch", "8", "--micro_batch", "4", "--length", "64"),
)
USER = 1000


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    images.need()
    need_hosts()
    with Store(tmp_path_factory.mktemp("images")) as made:
        yield made


@pytest.fixture(scope="module")
def image(store: Store) -> str:
    return store.build(ARGUMENTS)


class Cluster:
    """Two hosts, a container on each, and folders that both see: those that a cluster's volumes would be."""

    def __init__(
        self, store: Store, image: str, scratch: Path, names: tuple[str, str], more: Mapping[str, str]
    ) -> None:
        self.scratch = scratch
        self.volumes = {scratch / "runs": "/workspace/runs", scratch / "cache": "/workspace/.cache"}
        for folder in self.volumes:
            folder.mkdir()
            os.chown(folder, USER, USER)
        self._stack = ExitStack()
        known = {names[0]: "10.77.0.1", names[1]: "10.77.0.2", **more}
        self.hosts = [self._stack.enter_context(Host(name, scratch, known)) for name in names]
        connect(*self.hosts)
        self.containers = [store.container(image) for _ in names]

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def log(self, node: int) -> Path:
        return self.scratch / f"{node}.log"

    def start(self, node: int, *words: str, entrypoint: bool = True, **environment: str) -> subprocess.Popen[Any]:
        container: Container = self.containers[node]
        command = container.command(self.hosts[node].name, words, environment, self.volumes, entrypoint)
        return self.hosts[node].start(command, self.log(node))

    def end(self, *processes: subprocess.Popen[Any], code: int | None = 0) -> None:
        """Wait for commands. AssertionError with what they printed if one ends in another way; None: any but 0."""
        found = [process.wait(timeout=900) for process in processes]
        good = all(one != 0 if code is None else one == code for one in found)
        assert good, f"exit codes {found}\n" + "\n".join(
            file.read_text()[-5000:] for file in self.scratch.glob("*.log")
        )

    def stop(self, *processes: subprocess.Popen[Any]) -> None:
        """What an engine does to stop a container: SIGTERM to its first process."""
        for process in processes:
            family = psutil.Process(process.pid).children(recursive=True)
            next(member for member in family if member.name() == "tini").terminate()

    def losses(self, run: str) -> list[float]:
        return [record["loss"] for record in of_kind(read_metrics(self.scratch / "runs" / run), "train")]


@pytest.fixture
def cluster(store: Store, image: str, tmp_path: Path) -> Iterator[Cluster]:
    more = {"frugal-0.frugal": "10.77.0.1", "frugal-1.frugal": "10.77.0.2"}
    with Cluster(store, image, tmp_path, ("node0", "node1"), more) as made:
        yield made


def test_the_quickstart_as_the_images_user(cluster: Cluster) -> None:
    cluster.end(cluster.start(0, "id", "-u"))
    assert cluster.log(0).read_text().split() == [str(USER)]
    assert cluster.containers[0].config["User"] == str(USER)
    words = [*cluster.containers[0].config["Cmd"], "--steps", "4"]
    cluster.end(cluster.start(0, *words, RUN_DIR="runs/quickstart"))
    printed = cluster.log(0).read_text()
    assert "the container image has what is needed" in printed
    assert "compiling" not in printed
    assert (cluster.scratch / "runs/quickstart/loss_curve.png").exists()


def test_the_health_check_and_what_the_image_is_for(cluster: Cluster) -> None:
    kind, *words = cluster.containers[0].config["Healthcheck"]["Test"]
    assert kind == "CMD"
    cluster.end(cluster.start(0, *words, entrypoint=False))
    cluster.end(cluster.start(0, "bash", "launch/setup.sh", "all,dev"))
    cluster.end(
        cluster.start(0, "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/test_architecture.py")
    )
    cluster.end(cluster.start(0, "bash", "launch/setup.sh", "train,deepspeed", FRUGAL_DIST_IMAGE="train"), code=2)
    assert 'built without the extra "deepspeed"' in cluster.log(0).read_text()


def test_compose_trains_stops_and_goes_on(cluster: Cluster) -> None:
    found = services()
    nodes = [(number, found[name]) for number, name in enumerate(("node0", "node1"))]
    (prepare,) = nodes[0][1].after
    cluster.end(cluster.start(0, *found[prepare].command))

    def up() -> list[subprocess.Popen[Any]]:
        changes = ("--steps", "40", "--log_every", "1")
        return [cluster.start(number, *node.command, *changes, **node.environment) for number, node in nodes]

    metrics = cluster.scratch / "runs/two_nodes/metrics.jsonl"
    first = up()

    def begun() -> bool:
        assert all(process.poll() is None for process in first), cluster.printed()
        return metrics.exists() and bool(cluster.losses("two_nodes"))

    wait_until(begun, "the first step", deadline=600)
    cluster.stop(*first)
    cluster.end(*first, code=None)
    (stopped,) = of_kind(read_metrics(metrics.parent), "stopped")
    assert 0 < stopped["step"] < 40
    cluster.end(*up())
    steps = [record["step"] for record in of_kind(read_metrics(metrics.parent), "train")]
    assert steps == list(range(1, 41))
    assert of_kind(read_metrics(metrics.parent), "summary")


def test_the_kubernetes_job_trains(store: Store, image: str, tmp_path: Path) -> None:
    objects = yaml.safe_load_all((ROOT / "docker/kubernetes/job.yaml").read_text())
    (job,) = [item for item in objects if item["kind"] == "Job"]
    pod = job["spec"]["template"]["spec"]
    (ready,), (train,) = pod["initContainers"], pod["containers"]
    names = {"frugal-0.frugal": "10.77.0.1", "frugal-1.frugal": "10.77.0.2"}
    with Cluster(store, image, tmp_path, ("frugal-0", "frugal-1"), names) as cluster:
        environment = {item["name"]: item["value"] for item in train["env"]}
        cluster.end(
            cluster.start(0, "frugal-dist", "demo", "prepare", "--data", ".cache/quickstart", "--source", "topics")
        )
        cluster.end(*(cluster.start(pod, *ready["command"], entrypoint=False, **environment) for pod in (0, 1)))
        cluster.end(*(cluster.start(pod, *train["args"], *SMALL, **environment) for pod in (0, 1)))
        assert len(cluster.losses("llama_1b")) > 0


def test_a_hostfile_over_ssh_between_containers(cluster: Cluster, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", cache / "key"], check=True)
    (cache / "hostfile").write_text("node0 slots=1\nnode1 slots=1\n")
    for file in cache.iterdir():
        os.chown(file, USER, USER)
    cluster.end(cluster.start(0, "frugal-dist", "demo", "prepare", "--data", ".cache/quickstart", "--source", "topics"))
    servers = [cluster.start(node, "frugal-sshd", SSH_KEY="/workspace/.cache/key") for node in (0, 1)]
    for node in (0, 1):
        wait_until(lambda node=node: "listening on" in cluster.log(node).read_text().lower(), "ssh server")
    script = ["bash", "launch/deepspeed_hostfile.sh", "llama_9m", "--folder", "runs/ssh"]
    json = ["--deepspeed", "ds_configs/zero2_fp32.json"]
    cluster.end(cluster.start(0, *script, *json, *SMALL, HOSTFILE=".cache/hostfile"))
    assert len(cluster.losses("ssh")) > 0
    cluster.stop(*servers)
    cluster.end(*servers)
