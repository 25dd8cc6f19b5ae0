"""What lies in docker/: linted, and in agreement with itself, with pyproject.toml and with the scripts it starts.

That it also works is tested by test_images.py, which builds and runs.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml")
pytest.importorskip("tomllib")  # Python 3.11
pytest.importorskip("jsonargparse")

import tomllib
import yaml
from compose import services
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from frugal_dist.training.distributed.process import DIVERGED
from frugal_dist.training.recipe import Recipe, read_recipe

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
BIN = Path(sys.executable).parent
MANIFESTS = sorted(DOCKER.glob("kubernetes/*.yaml"))
LINTS = {
    "Dockerfile": ("hadolint", DOCKER / "Dockerfile"),
    "shell": ("shellcheck", *DOCKER.glob("*.sh")),
    "compose": ("check-jsonschema", "--builtin-schema", "vendor.compose-spec", *DOCKER.glob("compose*.yaml")),
    "kubernetes": ("kubernetes-validate", "--strict", *MANIFESTS),
}


@pytest.mark.parametrize("name", LINTS)
def test_lint(name: str) -> None:
    program, *arguments = map(str, LINTS[name])
    if not (BIN / program).exists():
        pytest.skip(f"no {program} in this environment; the extra dev brings it")
    done = subprocess.run([BIN / program, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def seconds(text: str) -> int:
    assert text.endswith("s")
    return int(text[:-1])


def recipe_of(command: list[str]) -> Recipe:
    """The recipe that a command of the form `bash launch/SCRIPT RECIPE --key value ...` trains."""
    assert command[0] == "bash" and (ROOT / command[1]).is_file(), command
    return read_recipe(command[2], command[3:])


# --- Kubernetes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    found = [item for file in MANIFESTS for item in yaml.safe_load_all(file.read_text())]
    return {item["kind"]: item for item in found}


def test_pods_find_each_other(objects: dict[str, Any]) -> None:
    job, service = objects["Job"], objects["Service"]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    for container in (*pod["initContainers"], *pod["containers"]):
        values = {item["name"]: item["value"] for item in container["env"]}
        host, _, port = values["MASTER"].partition(":")
        assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
        assert int(port) in {item["port"] for item in service["spec"]["ports"]}
        assert int(values["NODES"]) == spec["completions"] == spec["parallelism"]
        assert int(values["GRACE"]) < pod["terminationGracePeriodSeconds"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}


def test_the_job_trains_a_recipe_on_the_shared_volume(objects: dict[str, Any]) -> None:
    pod = objects["Job"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounts = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "storage"]
    assert f"/workspace/{recipe_of(container['args']).folder}".startswith(tuple(mounts))
    claims = {
        volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume
    }
    assert claims == {objects["PersistentVolumeClaim"]["metadata"]["name"]}
    assert objects["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    rule = objects["Job"]["spec"]["podFailurePolicy"]["rules"][0]  # mistakes and what diverged do not start again
    given_up = {"containerName": container["name"], "operator": "In", "values": [2, DIVERGED]}
    assert (rule["action"], rule["onExitCodes"]) == ("FailJob", given_up)


# --- compose ----------------------------------------------------------------------------------------------------------


def test_the_nodes_of_compose_train_together() -> None:
    nodes = {name: service for name, service in services().items() if name.startswith("node")}
    recipes = [recipe_of(service.command) for service in nodes.values()]
    assert all(recipe == recipes[0] for recipe in recipes)
    for name, service in nodes.items():
        assert int(service.environment["NODES"]) == len(nodes)
        assert service.environment["MASTER"].partition(":")[0] in nodes
        assert service.hostname == name
        assert service.networks
        assert int(service.environment["GRACE"]) < seconds(service.stop_grace_period)


def test_gpu_nodes_use_the_dockerfile_as_it_is() -> None:
    gpu = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())
    arguments = dict(re.findall(r"^ARG (\w+)=(.*)$", DOCKERFILE, re.MULTILINE))
    assert gpu["services"].keys() == services().keys()
    for service in gpu["services"].values():
        assert service["build"]["args"].items() <= arguments.items()


# --- packages ---------------------------------------------------------------------------------------------------------


def pinned() -> dict[str, str]:
    lines = (DOCKER / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_pinned_versions_are_those_that_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    built = {"dev", *Requirement(extras["all"][0]).extras}
    wanted = [*project["dependencies"], *(item for name in built for item in extras[name])]
    versions = pinned()
    asked = [requirement for requirement in map(Requirement, wanted) if requirement.name != "frugal_dist"]
    for requirement in asked:
        version = versions.get(canonicalize_name(requirement.name))
        assert version, f"docker/constraints.txt lacks {requirement.name}; its first lines say how it is made"
        assert requirement.specifier.contains(version), (
            f"docker/constraints.txt: {requirement.name} {version}, not {requirement}"
        )


def test_the_pinned_torch_is_the_one_that_is_installed_first() -> None:
    assert f"ARG TORCH=torch=={pinned()['torch']}\n" in DOCKERFILE
    cpu = yaml.safe_load((DOCKER / "compose.yaml").read_text())["x-node"]["build"]["args"]["TORCH"]
    assert f"torch=={pinned()['torch']}+cpu" in cpu
