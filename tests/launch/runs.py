"""A small recipe, its data, and what came of its runs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from hosts import ROOT

from frugal_dist.training.distributed.place import find_dist_env
from frugal_dist.training.metrics.record import METRICS_FILE, of_kind, read_metrics

MODEL = """{
 "model_type": "llama", "vocab_size": 512, "hidden_size": 48, "intermediate_size": 101, "num_hidden_layers": 3,
 "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "use_cache": false
}"""
RECIPE = """
model: {{path: {folder}/model}}
data: {{path: {folder}/data, epochs: 1000}}
optimizer: {{lr: 1e-3, options: {{update_gap: 4, state_free: sgd, state_free_lr_scale: 0.1, eps: 1e-3}}}}
saving: {{every: 1000}}
folder: {folder}/runs/none
steps: 8
batch: 8
micro_batch: 2
length: 32
precision: fp32
evaluate_every: 0
evaluation_tokens: 640
log_every: 1
"""
DEADLINE = 240.0
LONG = ("--steps", "60", "--batch", "40", "--micro_batch", "1")
"""A run that takes some seconds, so that it can be stopped in the middle."""


def wait_until(condition: Callable[[], Any], what: str, deadline: float = DEADLINE) -> Any:
    """What the condition returns once it is true."""
    end = time.monotonic() + deadline
    while not (found := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"waited {deadline:.0f} s in vain for: {what}")
        time.sleep(0.05)
    return found


class Workshop:
    """A folder with recipe, data and model, in which runs are made."""

    def __init__(self, folder: Path) -> None:
        from frugal_dist.training.data.demo_texts import prepare_demo

        self.folder = folder
        self.recipe = folder / "recipe.yaml"
        prepare_demo(folder / "data", source="topics", vocab_size=512)
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text(MODEL)
        self.recipe.write_text(RECIPE.format(folder=folder))

    def run(self, name: str) -> Run:
        return Run(self, name)


class Run:
    """One run: what to start, and what it left."""

    def __init__(self, workshop: Workshop, name: str) -> None:
        self.name = name
        self.recipe = workshop.recipe
        self.folder = workshop.folder / "runs" / name
        self.log = workshop.folder / f"{name}.log"

    def script(self, script: str, *changes: str) -> list[str]:
        return ["bash", str(ROOT / "launch" / script), *self.arguments(*changes)]

    def arguments(self, *changes: str) -> list[str]:
        return [str(self.recipe), "--folder", str(self.folder), *changes]

    def output(self) -> str:
        """What the launch printed, and what libraries printed on each rank."""
        files = [self.log, *sorted(self.folder.glob("output*.txt"))]
        return "\n".join(
            f"--- {file.name}\n{file.read_text(errors='replace')[-6000:]}" for file in files if file.exists()
        )

    def printed(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self, process: subprocess.Popen[Any], code: int | None = 0, deadline: float = DEADLINE) -> int:
        """Wait for the launch. AssertionError if its exit code is another; None: any but 0."""
        try:
            found = process.wait(timeout=deadline)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"{self.name} does not end\n{self.output()}") from error
        fits = found != 0 if code is None else found == code
        assert fits, f"{self.name} ended with {found}\n{self.output()}"
        return found

    def losses(self) -> dict[tuple[str, int], float]:
        records = read_metrics(self.folder)
        return {(r["kind"], r["step"]): r["loss"] for kind in ("train", "validation") for r in of_kind(records, kind)}

    def records(self, kind: str) -> list[dict[str, Any]]:
        return of_kind(read_metrics(self.folder), kind)

    def step(self) -> int:
        """The last step of which something was written."""
        metrics = self.folder / METRICS_FILE
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return sum('"kind": "train"' in line for line in lines)

    def reach(self, step: int, process: subprocess.Popen[Any] | None = None) -> None:
        """Wait until so many steps are done. AssertionError if the launch has ended."""

        def there() -> bool:
            assert process is None or process.poll() is None, f"{self.name} ended too early\n{self.output()}"
            return self.step() >= step

        try:
            wait_until(there, f"step {step} of {self.name}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output()}") from error

    def ranks(self) -> dict[int, psutil.Process]:
        """The living processes of this run by rank, on whichever host."""
        found = {}
        for process in psutil.process_iter():
            try:
                words, environ = process.cmdline(), process.environ()
            except psutil.Error:
                continue
            if str(self.folder) in words and not any("launcher" in word or "torchrun" in word for word in words[:4]):
                try:
                    place = find_dist_env({**environ, "MASTER_ADDR": "x", "MASTER_PORT": "1"})
                except ValueError:
                    continue
                if place.launcher != "none" and "python" in words[0]:
                    found[place.rank] = process
        return found

    def seen(self, name: str, ranks: int) -> list[str]:
        """A variable of each rank's environment, by rank, as soon as so many of them live."""
        found = wait_until(lambda: found if len(found := self.ranks()) == ranks else None, f"{ranks} ranks")
        return [found[rank].environ().get(name, "") for rank in sorted(found)]

    def kill(self, rank: int) -> None:
        os.kill(self.ranks()[rank].pid, signal.SIGKILL)


def difference(run: Run, other: Run) -> float:
    """The largest difference of losses, over the steps that both wrote down; the last is among them."""
    first, second = run.losses(), other.losses()
    both = first.keys() & second.keys()
    assert max(first) in both and max(second) in both, f"{sorted(first)} and {sorted(second)}"
    return max(abs(first[key] - second[key]) for key in both)
