"""What a run tells beside its losses: TensorBoard, W&B, MFU, memory, pictures of the refreshes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("jsonargparse")

from frugal_dist.cli import main
from frugal_dist.training.dropout import has_dropout, seed_masks
from frugal_dist.training.evaluate import perplexity_of
from frugal_dist.training.flops import flops_per_token, forget_peak, known_flops, memory, peak_flops
from frugal_dist.training.metrics import MetricsLog, of_kind, read_metrics
from frugal_dist.training.models import build_llama
from frugal_dist.training.plot import plot_runs
from frugal_dist.training.trackers import OPEN, Tracker, Trackers, check_trackers, identity

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of a small model in a process of its own, watched by both trackers; W&B offline."""
    from frugal_dist.training.prepare import prepare_demo

    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("metrics")
    prepare_demo(folder / "data", source="topics", vocab_size=512)
    recipe = {
        "model": {"llama": "quick"},
        "data": {"path": str(folder / "data"), "epochs": 100},
        "optimizer": {"options": {"projection": "random", "update_gap": 2}},
        "folder": str(folder / "run"),
        "saving": {"every": 0},
        "steps": 4,
        "batch": 2,
        "length": 32,
        "evaluate_every": 2,
        "evaluation_tokens": 64,
        "log_every": 2,
        "trackers": ["tensorboard", "wandb"],
        "peak_tflops": 0.1,
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "frugal_dist.cli", "pretrain", str(folder / "recipe.yaml")]
    environment = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=240)
    return folder / "run"


def test_tensorboard_has_what_the_file_has(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for kind, key in (("train", "loss"), ("train", "gradient_norm"), ("validation", "perplexity")):
        written = [(row["step"], row[key]) for row in of_kind(read_metrics(run), kind)]
        shown = [(event.step, event.value) for event in events.Scalars(f"{kind}/{key}")]
        assert shown == [(step, pytest.approx(value, rel=1e-6)) for step, value in written]
    assert [event.step for event in events.Scalars("refresh/residual_energy")] == [2, 4]


def test_wandb_has_an_offline_run(run: Path) -> None:
    (record,) = (run / "wandb").glob("offline-run-*/*.wandb")
    assert record.stem == f"run-{(run / 'wandb.id').read_text()}"
    text = record.read_bytes()
    assert b"refresh/overlap" in text
    assert b"train/tokens_per_second" in text


def test_memory_and_mfu(run: Path) -> None:
    for row in of_kind(read_metrics(run), "train"):
        assert row["memory"] > 50e6  # torch alone is more
        assert row["peak_memory"] > 0.9 * row["memory"]  # the kernel counts the two in different places
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * _flops() / 0.1e12, abs=1e-4)


def test_a_runs_peak_is_not_that_of_the_run_before() -> None:
    large = torch.ones(50_000_000, device="cuda" if torch.cuda.is_available() else "cpu")  # 200 MB
    before = memory()["peak_memory"]
    del large
    forget_peak()
    assert memory()["peak_memory"] < before - 100e6


def _flops() -> float:
    """Of the quick model by hand: 4 layers of 4 and 3 matrices and 2 norms, the last norm, and the head."""
    weights = 4 * (4 * 256 * 256 + 3 * 256 * 688 + 2 * 256) + 256 + 512 * 256
    return 6.0 * weights + 12 * 4 * 256 * 32


def test_flops_leave_out_the_input_embedding_only() -> None:
    with torch.device("meta"):
        model = build_llama("quick", 512, 32)
    assert flops_per_token(model, 32) == _flops()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert flops_per_token(model, 32) == _flops()


def test_peak_is_what_is_given_or_unknown() -> None:
    assert peak_flops("bf16", 2.0) == 2e12
    if not torch.cuda.is_available():
        assert peak_flops("bf16", None) is None


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("Tesla V100-SXM2-16GB", 125),
    ],
)
def test_peaks_go_by_whole_names(name: str, tflops: float | None) -> None:
    assert known_flops(name) == (None if tflops is None else tflops * 1e12)


def test_what_json_does_not_have_is_null(tmp_path: Path) -> None:
    """A NaN or enormous loss neither ends the run nor makes its file unreadable to other programs."""
    assert perplexity_of(710.0) == math.inf
    assert math.isnan(perplexity_of(math.nan))
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write("validation", step=1, loss=math.nan, perplexity=perplexity_of(710.0), best={"score": [math.nan, 1]})
    text = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert record == {"kind": "validation", "step": 1, "loss": None, "perplexity": None, "best": {"score": [None, 1]}}


def test_ranks_drop_different_places_and_nothing_else_differs() -> None:
    """Seeds are set apart only where there is dropout, in modules or as a share in the configuration."""
    llama = build_llama("quick", 512, 32)
    assert not has_dropout(llama)
    llama.config.attention_dropout = 0.1
    assert has_dropout(llama)
    assert has_dropout(torch.nn.Sequential(torch.nn.Dropout(0.1)))
    assert not has_dropout(torch.nn.Sequential(torch.nn.Dropout(0.0)))
    masks = []
    for rank in (0, 1, 0):
        seed_masks(7, rank)
        masks.append(torch.nn.functional.dropout(torch.ones(64)).tolist())
    assert masks[0] == masks[2] != masks[1]


PANELS = ("thousand tokens", "minutes", "training loss", "validation perplexity", "optimizer state", "peak memory")


def test_pictures_of_one_run_and_of_several(run: Path, tmp_path: Path) -> None:
    """Losses against tokens and time, memory, refreshes; the latter only where there were any."""
    assert main(["plot", str(run)]) == 0
    png, svg = run / "loss_curve.png", run / "loss_curve.svg"
    assert png.stat().st_size > 10_000
    for words in (*PANELS, "share of energy in the residual", "overlap with the basis before", "moments", "bases"):
        assert f"<!-- {words}" in svg.read_text(), words
    records = [row for row in read_metrics(run) if row["kind"] != "refresh"]
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    _, bare = plot_runs([tmp_path / "bare"], tmp_path / "bare.png")
    assert "residual" not in bare.read_text()
    _, both = plot_runs([run, tmp_path / "bare"], tmp_path / "both.png")
    for words in (*PANELS, "share of energy in the residual", "run", "bare"):
        assert f"<!-- {words}" in both.read_text(), words


def test_a_folder_begun_anew_is_another_run(tmp_path: Path) -> None:
    """Of W&B by its identity, of TensorBoard by hiding what was there; one that goes on is the same."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = identity(tmp_path, 0)
    assert identity(tmp_path, 4) == first != identity(tmp_path, 0)
    for start in (0, 1, 0):
        tracker = OPEN["tensorboard"](tmp_path, {}, start)
        assert tracker.add is not None
        for step in range(start + 1, 4):
            tracker.add(step, {"loss": float(start)})
        tracker.close()
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]


def test_trouble_with_a_tracker_is_told_and_ends_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def fails(step: int, figures: dict[str, float]) -> None:
        calls.append(step)
        raise OSError("no space")

    def no_account(folder: Path, record: dict[str, Any], start: int) -> Tracker:
        raise RuntimeError("no account")

    monkeypatch.setitem(OPEN, "tensorboard", lambda *_: Tracker("tensorboard", fails, lambda: None))
    monkeypatch.setitem(OPEN, "wandb", no_account)
    told: list[str] = []
    trackers = Trackers(["tensorboard", "wandb"], tmp_path, {}, 0, told.append)
    with MetricsLog(tmp_path / "metrics.jsonl", also=trackers) as log:
        for step in (1, 2):
            log.write("train", step=step, loss=1.0)
    trackers.close()
    assert calls == [1]
    assert [line.partition(":")[0] for line in told] == [
        "wandb cannot be started, the run goes on without it",
        "tensorboard failed, the run goes on without it",
    ]
    assert len(of_kind(read_metrics(tmp_path), "train")) == 2


def test_a_missing_package_is_an_error_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frugal_dist.training.trackers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"trackers has 'wandb'.*frugal_dist\[tracking\]"):
        check_trackers(["wandb"])
