"""What launch/README.md says of the planner's output is what the planner says."""

from __future__ import annotations

import re

from hosts import ROOT

from frugal_dist.training.plan import plan_recipe
from frugal_dist.training.recipe import read_recipe

README = (ROOT / "launch" / "README.md").read_text()


def plan(ranks: int) -> list[str]:
    return plan_recipe(read_recipe("llama_1b_multinode", []), "zero2", ranks, "a100").splitlines()


def figure(lines: list[str], name: str) -> str:
    """Of the first row that begins so."""
    row = next(line for line in lines if re.match(rf"\|\s+{name} ", line))
    return row.split("|")[2].strip()


def test_the_planned_memory_and_traffic() -> None:
    (shown,) = re.findall(r"```\n(\| rank with the most state.*?)```", README, re.S)
    planned = {ranks: plan(ranks) for ranks in (8, 16, 32)}
    assert not [line for line in shown.splitlines() if line and line not in planned[32]]
    rows = {
        int(ranks): row
        for ranks, *row in re.findall(r"^\| (8|16|32) \| ([\d.]+) \| ([\d.,]+) \| ([\d.,]+) \|", README, re.M)
    }
    for ranks, lines in planned.items():
        (together,) = re.findall(r"^Together ([\d.]+) GB", "\n".join(lines), re.M)
        assert rows[ranks] == [together, figure(lines, "optimizer state"), figure(lines, "adamw")]
