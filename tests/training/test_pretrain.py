"""Pre-training by recipe, for real: the same losses on every engine, and a run that was killed goes on where it was."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

pytest.importorskip("jsonargparse")
pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM

from frugal_dist.checkpoint import SavedWeights
from frugal_dist.cli import main
from frugal_dist.training.compare import contender, run_folder
from frugal_dist.training.distributed.process import STOPPED
from frugal_dist.training.distributed.run_lock import LOCK_FILE, check_free
from frugal_dist.training.engines.tensor_parallel import divide_layers, two_axes
from frugal_dist.training.metrics.record import of_kind, read_metrics
from frugal_dist.training.pretrain import pretrain
from frugal_dist.training.recipe import Recipe, read_recipe
from frugal_dist.training.resume import already_ended
from frugal_dist.training.run import FAILURE_FILE

ROOT = Path(__file__).resolve().parents[2]
MODEL = """{
 "model_type": "llama", "vocab_size": 512, "hidden_size": 48, "intermediate_size": 101, "num_hidden_layers": 3,
 "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "use_cache": false
}"""
RECIPE = """
model: {{path: {folder}/model}}
data: {{path: {folder}/data, epochs: 100}}
optimizer: {{lr: 1e-3, options: {{update_gap: 4, state_free: sgd, state_free_lr_scale: 0.1, eps: 1e-3}}}}
saving: {{every: 3}}
folder: {folder}/runs/single
steps: 10
batch: 8
micro_batch: 2
length: 32
precision: fp32
evaluate_every: 5
evaluation_tokens: 640
log_every: 1
"""

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, its data and its model."""
    from frugal_dist.training.data.demo_texts import prepare_demo

    found = tmp_path_factory.mktemp("pretrain")
    prepare_demo(found / "data", source="topics", vocab_size=512)
    (found / "model").mkdir()
    (found / "model" / "config.json").write_text(MODEL)
    (found / "recipe.yaml").write_text(RECIPE.format(folder=found))
    return found


def recipe(folder: Path, name: str, *changes: str) -> Recipe:
    return read_recipe(str(folder / "recipe.yaml"), ["--folder", str(folder / "runs" / name), *changes])


def losses(folder: Path, name: str) -> dict[tuple[str, int], float]:
    """Training and validation loss by step."""
    records = read_metrics(folder / "runs" / name)
    return {(r["kind"], r["step"]): r["loss"] for kind in ("train", "validation") for r in of_kind(records, kind)}


def refreshes(folder: Path, name: str) -> list[tuple[int, int, float, float]]:
    """Step, matrices, share of energy in the residual and overlap of every refresh."""
    records = of_kind(read_metrics(folder / "runs" / name), "refresh")
    return [(r["step"], r["matrices"], r["residual_energy"], r["overlap"] or 0.0) for r in records]


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> dict[tuple[str, int], float]:
    torch.manual_seed(1)  # the recipe's own seed counts, not this one
    assert pretrain(recipe(folder, "single")) == 0
    return losses(folder, "single")


def test_why_a_checkpoint_could_not_be_saved_is_said(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Where the user looks, and while there is time to make room."""
    (folder / "runs" / "full").mkdir(parents=True)
    (folder / "runs" / "full" / "checkpoints").symlink_to("/proc/nowhere")
    assert pretrain(recipe(folder, "full", "--steps", "4")) == 1
    said = capfd.readouterr().err
    assert "Training goes on without this checkpoint: /proc/nowhere: No such file or directory" in said
    assert "step     3/4: the checkpoint could not be saved" in said
    first = next(line for line in said.splitlines() if "tokens a step" in line)
    version = metadata.version("frugal_dist")
    for word in (socket.gethostname(), f"torch {torch.__version__}", f"frugal_dist {version}", "CPU ("):
        assert word in first, "where it ran, for whoever reads the log later"


def command(folder: Path, name: str, *changes: str) -> list[str]:
    return ["pretrain", str(folder / "recipe.yaml"), "--folder", str(folder / "runs" / name), *changes]


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        **more,
    }


def start(arguments: list[str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


LAUNCHES = {
    "ddp": ["torchrun", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m"],
    "fsdp2": ["torchrun", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m"],
    "deepspeed": ["deepspeed", "--num_gpus=2", "--no_local_rank", "--log_level=error", "--module"],
}


def with_stale_locks(folder: Path) -> Path:
    """A copy of the built operations of DeepSpeed, if there are any, each with a lock that nobody holds."""
    built = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "none"))
    if built.is_dir():
        shutil.copytree(built, folder)
    (folder / "deepspeed_shm_comm").mkdir(parents=True, exist_ok=True)
    (folder / "deepspeed_shm_comm" / "lock").touch()
    return folder


@pytest.mark.parametrize("engine", [pytest.param("ddp", marks=pytest.mark.heavy), "fsdp2", "deepspeed"])
def test_every_engine_has_the_same_curve(
    engine: str, folder: Path, uninterrupted: dict[tuple[str, int], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real launchers, two ranks. Smooth rules in fp32: what differs is the order of sums.

    DeepSpeed finds the lock of a build that was killed, for which torch would wait in silence and without end.
    """
    launch = LAUNCHES[engine]
    if engine == "deepspeed":
        launch = [launch[0], f"--master_port={20_000 + os.getpid() % 20_000}", *launch[1:]]
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(with_stale_locks(folder / "extensions")))
    launch = [str(Path(sys.executable).parent / launch[0]), *launch[1:]]
    process = start([*launch, "frugal_dist.cli", *command(folder, engine, "--engine", engine)])
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    found = losses(folder, engine)
    assert found.keys() == uninterrupted.keys()
    assert max(abs(found[key] - uninterrupted[key]) for key in found) < 2e-4
    assert refreshes(folder, engine) == [pytest.approx(row, rel=2e-2) for row in refreshes(folder, "single")]
    (summary,) = of_kind(read_metrics(folder / "runs" / engine), "summary")
    assert output.count("elements projected") == 1, "by one rank, at the first step"
    assert "(AdamW: " in output
    assert len(summary["state_bytes"]) == 2
    assert [sum(kinds.values()) for kinds in summary["state_kinds"]] == summary["state_bytes"]
    assert all(kinds["bases"] > 0 for kinds in summary["state_kinds"])
    (alone,) = of_kind(read_metrics(folder / "runs" / "single"), "summary")
    share = 1 if engine == "ddp" else 2  # replicas each have all of AdamW's state
    adamw = alone["adamw_state_bytes_per_rank"] / share
    assert summary["adamw_state_bytes_per_rank"] == pytest.approx(adamw, rel=0.05)


@pytest.mark.heavy
def test_bf16_weights_with_remainders_have_the_curve_of_fp32_ones(folder: Path) -> None:
    """The forward pass sees the same numbers; gradients are bf16's."""
    short = ("--precision", "bf16", "--steps", "6", "--evaluate_every", "3")
    bf16 = ("--weights", "bf16", "--optimizer.options.rounding", "remainder")
    assert pretrain(recipe(folder, "bf16", *short)) == 0
    assert pretrain(recipe(folder, "remainder", *short, *bf16)) == 0
    want, found = losses(folder, "bf16"), losses(folder, "remainder")
    assert found.keys() == want.keys()
    assert max(abs(found[key] - want[key]) for key in want) < 0.01
    saved = SavedWeights(folder / "runs" / "remainder" / "checkpoints")
    assert {saved[name].dtype for name in saved.shapes} == {torch.bfloat16}
    (summary,) = of_kind(read_metrics(folder / "runs" / "remainder"), "summary")
    numbers = sum(saved[name].numel() for name in saved.shapes)
    assert [kinds["remainders"] for kinds in summary["state_kinds"]] == [2 * numbers]


def test_the_curve_falls(uninterrupted: dict[tuple[str, int], float]) -> None:
    assert uninterrupted["validation", 10] < uninterrupted["validation", 0] - 0.05


def test_refreshes_and_validation_are_written_down(folder: Path, uninterrupted: dict[tuple[str, int], float]) -> None:
    """Every four steps, 21 matrices; the first has nothing to overlap with."""
    found = refreshes(folder, "single")
    assert [row[:2] for row in found] == [(1, 21), (5, 21), (9, 21)]
    assert all(0.0 < row[2] < 1.0 for row in found)
    assert [row[3] > 0.0 for row in found] == [False, True, True]
    (record,) = of_kind(read_metrics(folder / "runs" / "single"), "run")
    assert record["validation_tokens"] == 640
    assert record["surroundings"]["torch"] == torch.__version__ and record["surroundings"]["host"]


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGKILL, marks=pytest.mark.heavy),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.heavy),
        pytest.param(signal.SIGINT, marks=pytest.mark.heavy),
    ],
)
def test_a_stopped_run_goes_on_exactly(
    number: signal.Signals,
    folder: Path,
    uninterrupted: dict[tuple[str, int], float],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Also where the terminal is lost, here after the first line and before SIGUSR1."""
    name = number.name
    for _ in range(5):  # on a busy machine a run may end before the signal is sent
        shutil.rmtree(folder / "runs" / name, ignore_errors=True)
        process, output = _stop(number, folder)
        if process.returncode != 0:
            break
    assert process.returncode == (-number if number == signal.SIGKILL else STOPPED), output
    if number == signal.SIGTERM:
        assert f"({number.name}); the same command resumes" in output
    assert pretrain(recipe(folder, name)) == 0
    found = losses(folder, name)
    assert found == {key: value for key, value in uninterrupted.items() if key in found}
    assert ("train", 10) in found
    (folder / "runs" / name / "output.txt").unlink()
    assert pretrain(recipe(folder, name)) == 0  # there is nothing left to do: nothing is done
    assert "already finished, all 10 steps are done, perplexity" in capfd.readouterr().err
    assert len(of_kind(read_metrics(folder / "runs" / name), "run")) == 2
    assert not (folder / "runs" / name / LOCK_FILE).exists()


def _stop(number: signal.Signals, folder: Path) -> tuple[subprocess.Popen[str], str]:
    """Start a run, and send it a signal after its fourth step: the process, and what it said."""
    name = number.name
    process = start([sys.executable, "-m", "frugal_dist.cli", *command(folder, name)])
    assert process.stdout is not None
    if number == signal.SIGUSR1:
        assert "loading PyTorch" in process.stdout.readline()
        assert name in process.stdout.readline()
        process.stdout.close()
    metrics = folder / "runs" / name / "metrics.jsonl"
    while process.poll() is None and (not metrics.is_file() or '"train", "step": 4' not in metrics.read_text()):
        time.sleep(0.02)
    if process.poll() is not None:
        return process, process.communicate()[0]
    if number == signal.SIGTERM:  # while it trains: nobody else may, and is told by whom
        with pytest.raises(ValueError, match=rf"is in use by process {process.pid} on .* since 2"):
            check_free(folder / "runs" / name, print)
    process.send_signal(number)
    if process.stdout.closed:
        process.stdout = None  # communicate would read it
    output, _ = process.communicate(timeout=60)
    return process, output


def test_fewer_steps_than_are_done_are_refused(
    folder: Path, uninterrupted: dict[tuple[str, int], float], capfd: pytest.CaptureFixture[str]
) -> None:
    """Else their weights would be saved as an earlier step's, and the run would go on from there.

    The engine is built by then. A process group like NCCL's, which is left together only, is not left.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    saved = sorted(path.name for path in (folder / "runs" / "single" / "checkpoints").iterdir())
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    assert pretrain(recipe(folder, "single", "--steps", "5")) == 2
    torch.distributed.destroy_process_group()
    assert "has done 10: raise it or change folder" in capfd.readouterr().err
    assert sorted(path.name for path in (folder / "runs" / "single" / "checkpoints").iterdir()) == saved


def test_a_run_of_another_setting_is_not_continued(
    folder: Path, uninterrupted: dict[tuple[str, int], float], capfd: pytest.CaptureFixture[str]
) -> None:
    run = folder / "runs" / "single"
    saved, printed = (run / "metrics.jsonl").read_bytes(), (run / "output.txt").read_bytes()
    for key, value, words in (
        ("--optimizer.lr", "2e-3", "optimizer.lr 0.001 (now 0.002)"),
        ("--seed", "1", "seed 0 (now 1)"),  # of the data's order, which a checkpoint of token files does not hold
    ):
        assert pretrain(recipe(folder, "single", key, value)) == 2
        said = capfd.readouterr().err
        assert words in said and said.startswith("frugal-dist: error: ")
    assert (run / "metrics.jsonl").read_bytes() == saved
    assert (run / "output.txt").read_bytes() == printed, "no traceback: nothing has failed"
    assert not (run / FAILURE_FILE).exists()


def test_a_finished_run_is_finished_on_any_engine(
    folder: Path, uninterrupted: dict[tuple[str, int], float], capfd: pytest.CaptureFixture[str]
) -> None:
    """Decided before anything is built: these engines would not start here. An evaluation of more tokens is new."""
    run = folder / "runs" / "single"
    assert "summary" in (saved := (run / "metrics.jsonl").read_text())
    for changes in (
        ("--engine", "ddp"),
        ("--engine", "fsdp2", "--tp", "2"),
        ("--micro_batch", "1", "--log_every", "3"),
    ):
        assert pretrain(recipe(folder, "single", *changes)) == 0
        assert "already finished, all 10 steps are done, perplexity" in capfd.readouterr().err
        assert (run / "metrics.jsonl").read_text() == saved
    for changes in (("--steps", "12"), ("--evaluation_tokens", "64")):
        assert already_ended(recipe(folder, "single", *changes)) == ""


def test_the_end_says_whether_it_is_better_than_guessing_and_what_comes_next(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(recipe(folder, "short", "--steps", "1")) == 0
    said = capfd.readouterr().err
    assert "(not yet better than guessing by frequency, " in said and ": train longer)" in said
    for command in ("plot", "generate", "export"):
        assert f"frugal-dist {command} {folder / 'runs' / 'short'}" in said


@pytest.mark.heavy
def test_a_comparison_that_one_rank_cannot_begin_is_begun_by_none(folder: Path, tmp_path: Path) -> None:
    """A recipe that only rank 0 can read; then runs of another setting, which only rank 0 looks at."""
    arguments = ["--optimizers", "adamw", "--engine", "ddp", "--folder", str(tmp_path), "--batch", "4"]
    known = str(folder / "recipe.yaml")
    begun = contender("adamw", read_recipe(known, [], Recipe)).record()
    for recipes, words in (
        ((known, "missing.yaml"), (1, "there is no recipe 'missing.yaml'")),
        ((known, known), (0, "holds a run with batch 8 (now 4)")),
    ):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "frugal_dist.cli", "compare", name, *arguments],
                env=environment(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2",
                                MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank, name in enumerate(recipes)
        ]  # fmt: skip
        outputs = [process.communicate(timeout=200)[0] for process in ranks]
        assert [process.returncode for process in ranks] == [2, 2], outputs
        assert words[1] in outputs[words[0]]
        assert words[1] not in outputs[1 - words[0]]
        run = tmp_path / "adamw-seed0"
        assert run.exists() == (recipes[1] == known)
        run.mkdir(exist_ok=True)
        (run / "metrics.jsonl").write_text(json.dumps({"kind": "run", **begun}) + '\n{"kind": "summary"}\n')


@pytest.mark.heavy  # tests/checkpoint goes from any engine to any other
def test_a_run_goes_on_on_another_engine(folder: Path, uninterrupted: dict[tuple[str, int], float]) -> None:
    """Six steps under DDP on two ranks by one recipe, the rest on one process."""
    launch = [str(Path(sys.executable).parent / "torchrun"), *LAUNCHES["ddp"][1:]]
    changes = ["--engine", "ddp", "--saving.every", "100"]
    process = start([*launch, "frugal_dist.cli", *command(folder, "moved", *changes)])
    metrics = folder / "runs" / "moved" / "metrics.jsonl"
    while process.poll() is None and (not metrics.is_file() or '"train", "step": 3' not in metrics.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    process.communicate(timeout=60)
    (stopped,) = of_kind(read_metrics(folder / "runs" / "moved"), "stopped")
    assert 3 <= stopped["step"] < 10
    assert pretrain(recipe(folder, "moved")) == 0
    found = losses(folder, "moved")
    assert max(abs(found[key] - uninterrupted[key]) for key in found) < 2e-4


DIVISIBLE = MODEL.replace("101", "102")
"""Of a layer of 101 outputs two ranks cannot have equal parts."""


@pytest.fixture(scope="module")
def divisible(folder: Path) -> list[str]:
    """Changes of the recipe for three, and two times two ranks."""
    (folder / "divisible").mkdir()
    (folder / "divisible" / "config.json").write_text(DIVISIBLE)
    return ["--model.path", str(folder / "divisible"), "--batch", "12", "--micro_batch", "2", "--clip", "100"]


def on_ranks(ranks: int) -> list[str]:
    launch = ["torchrun", f"--nproc-per-node={ranks}", *LAUNCHES["fsdp2"][2:], "frugal_dist.cli"]
    return [str(Path(sys.executable).parent / launch[0]), *launch[1:]]


@pytest.mark.heavy
def test_tensor_parallelism_beside_fsdp2(folder: Path, divisible: list[str]) -> None:
    """The curve of one process on 2 x 2 ranks; killed there, the run goes on on three ranks, and on one."""
    assert pretrain(recipe(folder, "whole", *divisible)) == 0
    want, runs = losses(folder, "whole"), folder / "runs"
    on_axes = [*divisible, "--engine", "fsdp2", "--tp", "2"]
    process = start([*on_ranks(4), *command(folder, "axes", *on_axes)])
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    found = losses(folder, "axes")
    assert found.keys() == want.keys()
    assert max(abs(found[key] - want[key]) for key in want) < 2e-4
    process = start([*on_ranks(4), *command(folder, "killed", *on_axes)], start_new_session=True)
    metrics = runs / "killed" / "metrics.jsonl"
    while process.poll() is None and (not metrics.is_file() or '"train", "step": 4' not in metrics.read_text()):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    for engine, launch in (("fsdp2", on_ranks(3)), ("single", [sys.executable, "-m", "frugal_dist.cli"])):
        resumed = f"killed, then {engine}"  # other runs in this folder have the names of engines
        shutil.copytree(runs / "killed", runs / resumed)
        process = start([*launch, *command(folder, resumed, *divisible, "--engine", engine)])
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        found = losses(folder, resumed)
        assert {step for kind, step in found if kind == "train"} == set(range(1, 11))
        assert max(abs(found[key] - want[key]) for key in found) < 2e-4


@pytest.mark.parametrize(
    ("model", "words"),
    [(MODEL, "tp is 2, which does not divide the 101 of model.layers.0.mlp.gate_proj"),
     (DIVISIBLE.replace('_value_heads": 2', '_value_heads": 1'), "does not divide the 1 of num_key_value_heads"),
     ('{"model_type": "gpt2", "vocab_size": 512, "n_embd": 48, "n_layer": 1, "n_head": 4, "n_positions": 64}',
      "GPT2LMHeadModel has no layers that it divides")],
)  # fmt: skip
def test_models_that_tensor_parallelism_does_not_divide(model: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(model)
    found = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(ValueError, match=re.escape(words)):
            divide_layers(found, two_axes(2, 2, "cpu")["tp"])
    finally:
        dist.destroy_process_group()


def test_too_little_text_is_an_error_before_training(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert pretrain(recipe(folder, "short", "--data.epochs", "0.01")) == 2
    assert "data.epochs is 0.01" in capfd.readouterr().err


def test_optimizers_are_compared_and_finished_runs_are_not_repeated(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One of them diverges: it counts as finished, and the next follow."""
    root = folder / "runs" / "comparison"
    names = ["adamw", "adamw@1e30", "frugal-columns", "galore@4e-3", "frugal-rho0", "frugal-columns:density=0.5"]
    arguments = ["compare", str(folder / "recipe.yaml"), "--optimizers", ", ".join(names), "--bad_steps", "1"]
    arguments += ["--folder", str(root), "--steps", "2", "--evaluate_every", "0", "--saving.every", "0"]
    assert main(arguments) == 1
    out = capfd.readouterr().out
    assert "Run 1 of 6, 6 to train" in out
    assert "Run 6 of 6, " in out
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in (root / "comparison.md").read_text().splitlines()
    ]
    assert [line[0] for line in lines[2:]] == names
    assert [line[0] for line in lines[2:] if line[1] == "nan"] == ["adamw@1e30"]
    state = {line[0]: float(line[3]) for line in lines[2:]}
    assert state["adamw"] > state[names[-1]] > state["frugal-columns"] > state["frugal-rho0"]
    assert [line[5:] for line in lines[2:] if line[0].startswith("galore")] == [["0.004", "0.25", "2", lines[2][8]]]
    assert lines[0][1:3] == ["perplexity", "largest - smallest of 1 seed"]
    assert (root / "comparison.png").read_bytes().startswith(b"\x89PNG")
    before = [(run_folder(root, name, 0) / "metrics.jsonl").read_bytes() for name in names]
    assert main(arguments) == 1
    assert [(run_folder(root, name, 0) / "metrics.jsonl").read_bytes() for name in names] == before
    for change, words in ((["--steps", "3"], "steps 2 (now 3)"), (["--batch", "4"], "batch 8 (now 4)")):
        assert main([*arguments, *change]) == 2
        assert words in capfd.readouterr().err
    assert [(run_folder(root, name, 0) / "metrics.jsonl").read_bytes() for name in names] == before
    # What only a later contender would refuse is said before the first is trained.
    assert main([*arguments, "--folder", f"{root}2", "--optimizer.options.svd_method", "gram"]) == 2
    assert "svd_method='gram' is not known" in capfd.readouterr().err
    assert not Path(f"{root}2").exists()
    assert main([*arguments[:3], "adam", *arguments[4:]]) == 2
    assert "optimizers='adam' is not known" in capfd.readouterr().err
    assert main([*arguments[:3], "adamw,adamw", *arguments[4:]]) == 2
    assert "names one of them twice" in capfd.readouterr().err
    assert main([*arguments, "--engine", "deepspeed"]) == 2
    assert "engine deepspeed can start only once" in capfd.readouterr().err
