"""What a run tells beside its losses: TensorBoard, W&B, MFU, memory, pictures of the refreshes."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("jsonargparse")

from frugal_dist.cli import main
from frugal_dist.training.engines.protocol import count_state_kinds
from frugal_dist.training.metrics.device import flops_per_token, forget_peak, known_flops, memory, peak_flops
from frugal_dist.training.metrics.plot import PLOT_FILE, Look, _drawn, grouped, plot_runs
from frugal_dist.training.metrics.record import (
    OPEN,
    MetricsLog,
    Tracker,
    Trackers,
    check_trackers,
    identity,
    of_kind,
    read_metrics,
)
from frugal_dist.training.models import build_llama, has_dropout, seed_masks
from frugal_dist.training.validation import perplexity_of

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of a small model in a process of its own, watched by both trackers; W&B offline."""
    from frugal_dist.training.data.demo_texts import prepare_demo

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


@pytest.mark.heavy
def test_tensorboard_has_what_the_file_has(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for kind, key in (("train", "loss"), ("train", "gradient_norm"), ("validation", "perplexity")):
        written = [(row["step"], row[key]) for row in of_kind(read_metrics(run), kind)]
        shown = [(event.step, event.value) for event in events.Scalars(f"{kind}/{key}")]
        assert shown == [(step, pytest.approx(value, rel=1e-6)) for step, value in written]
    assert [event.step for event in events.Scalars("refresh/residual_energy")] == [1, 3]


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
    assert datetime.fromisoformat(record.pop("time")).tzinfo is not None
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


def made_up(folder: Path, seed: int | None = None, end: float = 75.0, **begun: Any) -> Path:
    """A run of which only the file is there: from perplexity 5,000 down to ``end``, with AdamW's bytes."""
    if seed is not None:
        begun = {"seed": seed, "folder": str(folder), **begun}
    rows: list[dict[str, Any]] = [{"kind": "run", **begun}]
    for step in range(0, 101, 10):
        perplexity = end + (5000 - end) * 2.0**-step
        place = {"step": step, "tokens": 100 * step, "seconds": 2.0 * step}
        rows.append({"kind": "validation", **place, "loss": math.log(perplexity), "perplexity": perplexity})
        if step:
            rows.append({"kind": "train", **place, "loss": math.log(perplexity), "peak_memory": 2**30})
    kinds = [{"moments": 15_000_000, "bases": 2_000_000, "other": 8}]
    rows.append({"kind": "summary", "state_bytes": [17_000_008], "state_kinds": kinds})
    rows[-1]["adamw_state_bytes_per_rank"] = 42_000_000
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_no_two_runs_look_alike() -> None:
    """Also without colours, next to each other, and with a hundred of them."""
    looks = [Look(number) for number in range(100)]
    assert len({(look.colour, str(look.line), look.marker) for look in looks}) == 100
    for one, next_one in itertools.pairwise(looks):
        assert one.colour != next_one.colour
        assert one.line != next_one.line
        assert one.marker != next_one.marker
    assert len({(str(look.line), look.marker) for look in looks[:36]}) == 36


def test_seeds_are_one_line_in_a_band(tmp_path: Path) -> None:
    """The legend says how many, and where they came out; runs that differ in more than the seed stay apart."""
    runs = [made_up(tmp_path / f"svd-seed{seed}", seed, 75.0 + seed) for seed in (0, 1, 2)]
    runs += [made_up(tmp_path / "svd-seed3", 3, 80.0, batch=7), made_up(tmp_path / "old", end=90.0)]
    found = grouped({run.name: read_metrics(run) for run in runs})
    assert [(group.name, len(group.seeds)) for group in found] == [("svd, 3 seeds", 3), ("svd-seed3", 1), ("old", 1)]
    assert main(["plot", str(tmp_path), "--out", str(tmp_path / "all.png")]) == 0
    text = (tmp_path / "all.svg").read_text()
    for words in ("svd, 3 seeds: 76.0 (75.0 to 77.0)", "svd-seed3: 80.0", "old: 90.0", "mean as line"):
        assert words in text, words


def test_what_decides_is_large_enough_to_be_read(tmp_path: Path) -> None:
    """An untrained model does not set the limits; AdamW's bytes stand beside the run's; no legend lies on data."""
    runs = {name: read_metrics(made_up(tmp_path / name, end=end)) for name, end in (("a", 75.0), ("b", 78.0))}
    figure = _drawn(grouped(runs), "perplexity")
    figure.canvas.draw()
    rows = figure.subfigs
    for row in rows[:2]:
        low, high = row.axes[1].get_ylim()
        assert 60 < low < 75 < 78 < high < 100
        assert any("from 5,000" in text.get_text() for text in row.axes[1].texts)
    assert "17.0, 40 % of 42.0" in [text.get_text() for text in rows[2].axes[0].texts]
    boxes = [legend.get_window_extent() for row in rows for axes in row.axes if (legend := axes.get_legend())]
    boxes += [legend.get_window_extent() for row in rows for legend in row.legends]
    assert len(boxes) == 2
    for axes in (axes for row in rows for axes in row.axes):
        assert not any(box.overlaps(axes.get_window_extent()) for box in boxes)
    assert all(bar.get_height() < 0.5 for bar in rows[2].axes[0].patches)
    assert rows[2].bbox.height < rows[0].bbox.height


def test_a_run_is_found_from_its_checkpoints(tmp_path: Path) -> None:
    run = made_up(tmp_path / "runs" / "a")
    (run / "checkpoints" / "step_000100").mkdir(parents=True)
    for named in (run, run / "checkpoints", run / "checkpoints" / "step_000100"):
        (run / "loss_curve.png").unlink(missing_ok=True)
        assert main(["plot", str(named)]) == 0
        assert (run / "loss_curve.png").exists()
    made_up(tmp_path / "runs" / "b")
    assert main(["plot", str(tmp_path / "runs")]) == 0
    assert ": 75.0" in (tmp_path / "runs" / "runs.svg").read_text()


def test_pictures_are_written_where_and_as_what_was_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_up(tmp_path / "a")
    out = tmp_path / "pictures"
    out.mkdir()
    for name, files in (
        ("a.pdf", {"a.pdf"}),
        ("b.svg", {"b.png", "b.svg"}),
        ("v1.2", {"v1.2.png", "v1.2.svg"}),
        ("plain", {"plain.png", "plain.svg"}),
        ("", {"runs.png", "runs.svg"}),
    ):
        assert main(["plot", str(run), "--out", str(out / name)]) == 0
        assert {path.name for path in out.iterdir()} == files
        for path in out.iterdir():
            path.unlink()
    (tmp_path / "a file").touch()
    for name, words in (("a.docx", "not written as .docx, but as"), ("a file/a.png", "/a.png cannot be written: ")):
        assert main(["plot", str(run), "--out", str((tmp_path if "file" in name else out) / name)]) == 2
        assert words in capsys.readouterr().err


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
    monkeypatch.setattr("frugal_dist.training.metrics.record.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"trackers has 'wandb'.*frugal_dist\[tracking\]"):
        check_trackers(["wandb"])


def test_a_disk_without_room_for_metrics_does_not_end_rank_0(capsys):
    metrics = MetricsLog(Path("/dev/full"))
    metrics.write("train", step=1)
    metrics.write("train", step=2)
    assert capsys.readouterr().err.count("metrics.jsonl cannot be written any more") == 1


def test_a_record_that_was_cut_off_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "run"}\n{"kind": "tra')
    assert read_metrics(tmp_path) == [{"kind": "run"}]


def test_state_bytes_are_those_of_the_tensors():
    weight = torch.nn.Parameter(torch.zeros(10, 3))
    weight.grad = torch.ones(10, 3)
    optimizer = torch.optim.AdamW([weight])
    assert sum(count_state_kinds(optimizer).values()) == 0
    optimizer.step()
    assert count_state_kinds(optimizer) == {"moments": 2 * 30 * 4, "bases": 0, "other": 4}  # the step is a tensor


def test_metrics_survive_and_plot(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as metrics:
        metrics.write("run", model="quick", parameters=5_000_000, optimizer="Frugal", unigram_loss=6.8)
        metrics.write("validation", step=0, tokens=0, loss=8.3, perplexity=4000.0)
        metrics.write("train", step=10, tokens=1000, loss=7.0)
        assert len(read_metrics(tmp_path)) == 3  # readable before the run ends
    assert of_kind(read_metrics(tmp_path), "train")[0]["loss"] == 7.0
    pictures = plot_runs([tmp_path], tmp_path / PLOT_FILE)
    assert [picture.name for picture in pictures] == ["loss_curve.png", "loss_curve.svg"]
    assert pictures[0].read_bytes().startswith(b"\x89PNG")
    other = tmp_path / "b"
    other.mkdir()
    (other / "metrics.jsonl").write_bytes((tmp_path / "metrics.jsonl").read_bytes())
    png, svg = plot_runs([tmp_path, other], tmp_path / "pictures" / "both.png")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()
    with pytest.raises(ValueError, match=r"holds no metrics.jsonl"):
        plot_runs([tmp_path / "nothing"], tmp_path / "nothing.png")
