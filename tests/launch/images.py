"""Images without a container engine: buildah in a chroot, on a Debian that debootstrap makes once.

    with Store(scratch) as store:
        image = store.build({"EXTRAS": "all,dev"})
        process = host.start(store.container(image).command(host.name, ["id", "-u"]), log)

What a Dockerfile says is done for real, as root of this machine; only the base image is another one. All lies in the
scratch folder and goes with it, except for the base, which is kept in .cache/images. While working on docker/Dockerfile
set IMAGES_STORE to a folder: images and layers are kept there, and only what changed is built again.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from hosts import ROOT, path

RELEASE = "bookworm"
BASE = ROOT / ".cache" / "images" / f"debian-{RELEASE}.tar"
BASE_IMAGE, IMAGE = "localhost/base", "localhost/frugal-dist"
PACKAGES = "ca-certificates,python3,python3-venv"
PIP_KEYS = ("cert", "find-links", "index-url", "extra-index-url", "timeout")


@functools.cache
def why_not() -> str:
    """Why no image can be built; empty if it can."""
    if os.geteuid() != 0:
        return "building images in a chroot needs root"
    missing = [name for name in ("buildah", "debootstrap") if shutil.which(name, path=path()) is None]
    return (
        f"there is no {', '.join(missing)}; as root, `bash tests/launch/image_packages.sh` installs it"
        if missing
        else ""
    )


def need() -> None:
    """Skip the test where no image can be built."""
    if reason := why_not():
        pytest.skip(reason)


def run(*command: str | Path, cwd: Path = ROOT, timeout: float = 3000, **environ: str) -> str:
    """What a command prints; AssertionError with its end if it fails."""
    done = subprocess.run(
        list(map(str, command)),
        env={**os.environ, "PATH": path(), **environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))} ended with {done.returncode}\n{done.stdout[-6000:]}"
    return done.stdout


def base_tar() -> Path:
    """A minimal Debian, made at the first call."""
    if not BASE.exists():
        BASE.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BASE.parent) as scratch:
            root, tar = Path(scratch, "root"), Path(scratch, "base.tar")
            run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", RELEASE, root)
            run("tar", "--numeric-owner", "--exclude=./var/cache/apt/archives/*.deb", "-C", root, "-cf", tar, ".")
            tar.rename(BASE)
    return BASE


def pip_mounts(scratch: Path) -> list[str]:
    """What pip inside the build needs to find packages as pip here does: its settings, certificates, local folders."""
    listed = run(sys.executable, "-m", "pip", "config", "list")
    settings: dict[str, str] = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        if (name := key.rpartition(".")[2]) in PIP_KEYS:
            settings[name] = value.strip("'\"").replace("\\n", " ")
    file = scratch / "pip.conf"
    file.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))
    words = [urlparse(word).path for key, value in settings.items() if key != "cert" for word in value.split()]
    folders = {str(Path(word).parent if word.endswith("/simple") else word) for word in words}
    shared = [*sorted(folder for folder in folders if Path(folder).is_dir() and folder != "/"), "/etc/ssl/certs"]
    return [
        f"{file}:/etc/pip.conf:ro",
        *(f"{place}:{place}:ro" for place in shared),
        "/etc/resolv.conf:/etc/resolv.conf:ro",
    ]


class Store:
    """A place for images and containers of its own."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.kept = os.environ.get("IMAGES_STORE")
        self.folder = Path(self.kept) if self.kept else scratch / "store"
        conf = scratch / "storage.conf"
        places = f'graphroot = "{self.folder}/graph"\nrunroot = "{self.folder}/run"\n'
        conf.write_text(f'[storage]\ndriver = "overlay"\n{places}')
        self.environ = {"CONTAINERS_STORAGE_CONF": str(conf), "BUILDAH_ISOLATION": "chroot"}

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.buildah("rm", "--all")
        if not self.kept:
            self.buildah("rmi", "--all", "--force")
            shutil.rmtree(self.folder)

    def buildah(self, *arguments: str | Path, cwd: Path = ROOT) -> str:
        """What the command prints. Its processes copy themselves into memory; one fails if the kernel holds a page of
        the copy, which has nothing to do with the image: the command is run once more.
        """
        try:
            return run("buildah", *arguments, cwd=cwd, **self.environ)
        except AssertionError as error:
            if "sealing memfd copy: Device or resource busy" not in str(error):
                raise
        return run("buildah", *arguments, cwd=cwd, **self.environ)

    def build(self, arguments: Mapping[str, str]) -> str:
        """The image of docker/Dockerfile, with these build arguments, on the substitute base."""
        given = {"BASE_IMAGE": self._base(), **arguments}
        self.buildah(
            *("bud", "--format=docker", "--network=host", "-t", IMAGE, "-f", "docker/Dockerfile"),
            *(["--layers"] if self.kept else []),
            *(f"--build-arg={key}={value}" for key, value in given.items()),
            *(f"--volume={mount}" for mount in pip_mounts(self.scratch)),
            ".",
        )
        return IMAGE

    def _base(self) -> str:
        if BASE_IMAGE not in self.buildah("images", "--format={{.Name}}").split():
            context = self.scratch / "base"
            context.mkdir()
            shutil.copy(base_tar(), context / "base.tar")
            (context / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
            self.buildah("bud", "-q", "-t", BASE_IMAGE, context)
            shutil.rmtree(context)
        return BASE_IMAGE

    def config(self, image: str) -> dict[str, Any]:
        """User, entry point, health check and so on of an image."""
        found: dict[str, Any] = json.loads(self.buildah("inspect", "--type=image", image))["Docker"]["config"]
        return found

    def container(self, image: str) -> Container:
        return Container(self, self.buildah("from", image).strip().splitlines()[-1], self.config(image))


class Container:
    """A container of an image; commands in it run as its user, in the namespaces of whoever starts them."""

    def __init__(self, store: Store, name: str, config: Mapping[str, Any]) -> None:
        self.store = store
        self.name = name
        self.config = config

    def command(
        self,
        hostname: str,
        words: Sequence[str] = (),
        environment: Mapping[str, str] = {},
        volumes: Mapping[Path, str] = {},
        entrypoint: bool = True,
    ) -> list[str]:
        """The command that does what `docker run` would do with these words, or with the image's own."""
        environment = {"TINI_SUBREAPER": "1", **environment}  # here it is not process 1
        wanted = [*(self.config["Entrypoint"] if entrypoint else ()), *(words or self.config["Cmd"])]
        return [
            *("env", *(f"{key}={value}" for key, value in self.store.environ.items())),
            *("buildah", "run", f"--hostname={hostname}"),
            *(f"--env={key}={value}" for key, value in environment.items()),
            *(f"--volume={folder}:{place}" for folder, place in volumes.items()),
            *(self.name, "--", *wanted),
        ]
