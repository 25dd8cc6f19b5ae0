"""docker/compose.yaml as compose reads it: variables at their defaults, merged keys, commands as words."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

COMPOSE = Path(__file__).resolve().parents[2] / "docker" / "compose.yaml"
VARIABLE = re.compile(r"\$\{\w+:?-([^}]*)\}")


@dataclass(frozen=True)
class Service:
    """A service: what of it decides about a run."""

    command: list[str]
    environment: dict[str, str]
    hostname: str
    networks: list[str]
    volumes: dict[str, str]
    after: tuple[str, ...]
    stop_grace_period: str


def services() -> dict[str, Service]:
    """The services by name."""
    text = VARIABLE.sub(r"\1", COMPOSE.read_text())
    return {name: _service(name, found) for name, found in yaml.safe_load(text)["services"].items()}


def _service(name: str, found: dict[str, Any]) -> Service:
    return Service(
        command=shlex.split(found["command"]),
        environment=found["environment"],
        hostname=found.get("hostname", name),
        networks=found["networks"],
        volumes=dict(volume.split(":") for volume in found["volumes"]),
        after=tuple(found["depends_on"]),
        stop_grace_period=found["stop_grace_period"],
    )
