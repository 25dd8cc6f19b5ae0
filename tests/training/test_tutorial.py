"""Every command of docs/tutorial.md, as it stands there, one after the other in an empty folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the tutorial needs the extra train")

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", (ROOT / "docs" / "tutorial.md").read_text(), re.M | re.S)


def run(kind: str, block: str, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    words = ["bash", "-e", "-o", "pipefail", "-c", block] if kind == "bash" else [sys.executable, "-c", block]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_every_command_of_the_tutorial(tmp_path: Path) -> None:
    shown = [run(kind, block, tmp_path) for kind, block in BLOCKS]
    said = dict(zip((block for _, block in BLOCKS), shown, strict=True))
    (killed,) = (text for block, text in said.items() if "kill -KILL" in block)
    assert "ended with 137" in killed
    assert "step_000050" in killed

    records = [json.loads(line) for line in (tmp_path / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()]
    runs = [record for record in records if record["kind"] == "run"]
    assert [record["ranks"] for record in runs] == [1, 2]
    assert runs[1]["start"] in (50, 100, 150)  # of a checkpoint
    summary = records[-1]
    assert summary["kind"] == "summary"
    validation = [record["perplexity"] for record in records if record["kind"] == "validation"]
    assert validation[-1] < validation[0] / 5
    assert (tmp_path / "runs" / "mine" / "loss_curve.png").exists()
    assert shown[-2].startswith("The value of")
    assert len(shown[-2].strip()) > len("The value of") + 10  # tokens, of a model too small for words
    assert "adamw" in shown[-1]
