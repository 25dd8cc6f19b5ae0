"""What is done with recipes and runs beside training: check, copy, evaluate, generate, cards, tables."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("jsonargparse")
pytest.importorskip("transformers")

from frugal_dist.cli import main
from frugal_dist.training.card import recipe_in
from frugal_dist.training.compare import ends_of
from frugal_dist.training.distributed.run_lock import LOCK_FILE, own_holder
from frugal_dist.training.metrics.record import METRICS_FILE, PROMETHEUS_FILE, end_of, read_metrics
from frugal_dist.training.recipe import Recipe, kind_of, read_recipe, shipped
from frugal_dist.training.run_table import look

MODEL = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
STEPS = 3
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, its data and its model."""
    from frugal_dist.training.data.demo_texts import prepare_demo

    found = tmp_path_factory.mktemp("commands")
    prepare_demo(found / "data", source="topics", vocab_size=512)
    (found / "model").mkdir()
    (found / "model" / "config.json").write_text(json.dumps(MODEL))
    recipe = {
        "model": {"path": str(found / "model")},
        "data": {"path": str(found / "data")},
        "optimizer": {"name": "frugal", "options": {"projection": "columns"}},
        "folder": str(found / "runs" / "a"),
        "steps": STEPS,
        "batch": 4,
        "length": 32,
        "evaluate_every": 2,
        "evaluation_tokens": 640,
        "log_every": 1,
        "trackers": ["prometheus"],
    }
    (found / "recipe.yaml").write_text(json.dumps(recipe))
    return found


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    assert main(["pretrain", str(folder / "recipe.yaml")]) == 0
    return folder / "runs" / "a"


@pytest.fixture(scope="module")
def exported(folder: Path, run: Path) -> Path:
    assert main(["export", str(run), "--out", str(folder / "exported")]) == 0
    return folder / "exported"


def said(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command prints; it must end well."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command says that ends with 2."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_model_is_measured_as_its_run_has_measured_it(
    folder: Path, run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    end = end_of(read_metrics(run))
    assert end is not None
    for model in (run, run / "checkpoints", exported):
        found = json.loads(said(capsys, "evaluate", model, "--json"))
        assert (found["loss"], found["perplexity"]) == pytest.approx((end["validation_loss"], end["perplexity"]))
        assert found["amount"] == "640 tokens"
    text = said(capsys, "evaluate", run, "--evaluation_tokens", "64", "--batch", "1000")  # too many for training
    assert re.search(r"loss \d\.\d+, perplexity [\d.]+, unigram_loss \d\.\d+; over 64 tokens", text)
    other = tmp_path / "elsewhere"
    shutil.copytree(exported, other)
    (other / "recipe.yaml").unlink()
    assert "name a recipe that does, with --recipe" in refused(capsys, "evaluate", other)
    named = said(capsys, "evaluate", other, "--recipe", folder / "recipe.yaml")
    assert f"loss {end['validation_loss']:.4f}" in named
    assert "the recipe is one of fine-tuning" in refused(capsys, "evaluate", other, "--recipe", "minilm_reviews")
    assert "Did you mean 'evaluation_tokens'?" in refused(capsys, "evaluate", run, "--evaluation_token", "64")
    assert "the model comes first" in refused(capsys, "evaluate", "--steps", "3", run)


def test_text_is_drawn_as_asked(
    run: Path, exported: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = ("--prompt", "The value", "--tokens", "7")
    first = said(capsys, "generate", run, *words, "--seed", "3")
    assert first.startswith("The value")
    assert said(capsys, "generate", exported, *words, "--seed", "3") == first
    assert said(capsys, "generate", run, *words, "--seed", "4") != first
    greedy = said(capsys, "generate", run, *words, "--temperature", "0")
    assert said(capsys, "generate", run, *words, "--top-k", "1") == greedy
    assert said(capsys, "generate", run, *words, "--top-p", "1e-9") == greedy
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    ids = tokenizer("The value", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(7):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert tokenizer.decode(ids[0]) + "\n" == greedy
    monkeypatch.setattr("sys.stdin", io.StringIO("The value\n"))
    read = said(capsys, "generate", run, "--prompt", "-", "--tokens", "7", "--samples", "2", "--seed", "3")
    assert read.count("The value") >= 2
    assert main(["generate", str(run), "--tokens", "100", "--seed", "0"]) == 0  # no prompt: as a document begins
    assert "max_position_embeddings 64" in capsys.readouterr().err
    for option, value in (("--tokens", 0), ("--temperature", -1), ("--top-k", -1), ("--top-p", 0), ("--samples", 0)):
        assert f"{option} is {value}" in refused(capsys, "generate", run, option, value)
    assert "there is no such folder" in refused(capsys, "generate", run / "nowhere")


def test_a_model_card_says_what_was_trained(folder: Path, run: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    count = 2 * 512 * 16 + 4 * 16 * 16 + 3 * 16 * 24 + 3 * 16
    end = end_of(read_metrics(run))
    assert end is not None
    for line in (
        "pipeline_tag: text-generation",
        f"LlamaForCausalLM, {count:,} parameters, float32",
        "| began with | fresh weights |",
        f"| steps | {STEPS} of {STEPS} |",
        "| optimizer | frugal, lr 0.001 |",
        f"| validation perplexity | {end['perplexity']:,.4g} |",
    ):
        assert line in card
    trained = recipe_in(read_metrics(run))
    assert read_recipe(str(exported / "recipe.yaml")) == trained == read_recipe(str(folder / "recipe.yaml"))


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_a_shipped_recipe_is_copied_with_what_it_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "frugal-dist pretrain llama_1b_multinode.yaml" in said(capsys, "recipe", "copy", "llama_1b_multinode")
    copied = read_recipe("llama_1b_multinode.yaml")
    assert Path(str(copied.deepspeed)).is_file()
    assert copied == replace(read_recipe("llama_1b_multinode"), deepspeed=copied.deepspeed)
    assert "exists already" in refused(capsys, "recipe", "copy", "llama_1b_multinode")
    assert "frugal-dist finetune new/own.yaml" in said(capsys, "recipe", "copy", "minilm_reviews", "new/own.yaml")
    assert "Did you mean 'reviews_5m'?" in refused(capsys, "recipe", "copy", "reviews_5")
    names = said(capsys, "recipe", "list")
    assert names == said(capsys, "recipes")
    assert all(name in names for name in shipped())
    from frugal_dist.training.finetune.recipe import FinetuneRecipe

    kinds = (Recipe, FinetuneRecipe)
    assert [kind_of(name, kinds) for name in ("reviews_5m", "roberta_glue", "llama_1b_multinode.yaml")] == [
        Recipe, FinetuneRecipe, Recipe,
    ]  # fmt: skip
    assert kind_of("new/own.yaml", kinds) is FinetuneRecipe


def test_a_check_finds_what_would_end_a_training_before_its_first_step(
    folder: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, new = folder / "recipe.yaml", ("--folder", tmp_path / "new")
    text = said(capsys, "recipe", "check", recipe, *new, "--engine", "ddp", "--ranks", "4")
    assert "LlamaForCausalLM, 0.02 M parameters; frugal" in text
    assert "3 steps of 4 sequences; ddp on 4 ranks" in text
    assert "a new run" in text
    assert "resumes the run that is there" in said(capsys, "recipe", "check", recipe)
    longer = said(capsys, "recipe", "check", recipe, *new, "--length", "100")
    assert "length asks for 100 tokens at once" in longer
    wrong: list[tuple[list[object], str]] = [
        (["--data.path", tmp_path], "is not prepared"),
        (["--optimizer.project", "nothing*"], "nothing*"),
        (["--model.path", tmp_path], "model.path"),
        (["--engine", "ddp", "--ranks", "3"], "which 3 ranks cannot share equally"),
        (["--engine", "single", "--ranks", "2"], "engine single is for one process"),
        (["--ranks", "0"], "ranks is 0"),
        (["--steps", "100000"], "data.epochs is 1"),
        (["--folder", "/proc/run"], "cannot be written"),
        (["--folder", folder / "recipe.yaml" / "x"], "cannot be written"),
    ]
    for changes, words in wrong:
        assert words in refused(capsys, "recipe", "check", recipe, *new, *changes), changes
    assert "lr" in refused(capsys, "recipe", "check", recipe, "--optimizer.lr", "1")  # another run's folder
    assert "has done 3" in refused(capsys, "recipe", "check", recipe, "--steps", "2")
    assert not (tmp_path / "new").exists()


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_table_of_runs_has_what_each_has_come_to(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (run / METRICS_FILE).read_text().splitlines(keepends=True)

    def made(name: str, *lines: str) -> Path:
        found = tmp_path / "runs" / name
        found.mkdir(parents=True)
        (found / METRICS_FILE).write_text("".join(lines))
        return found

    made("compared/whole", *whole)
    made("killed", *whole[:5])
    made("begun", whole[0])
    made("empty")
    made("stopped", *whole[:5], '{"kind": "stopped", "step": 2}\n')
    made("longer", *whole, *whole[:1], '{"kind": "stopped", "step": 2}\n')
    made("longer and killed", *whole, *whole[:3])
    (made("refused", *whole[:5]) / "failed.txt").write_text("2\nno\n")
    made("lost", *whole[:5], '{"kind": "diverged", "step": 2, "reason": "nan"}\n')
    (made("failed", *whole[:5]) / "failed.txt").write_text("1\nno\n")
    holder = asdict(own_holder())
    (made("now", *whole[:5]) / LOCK_FILE).write_text(json.dumps(holder))
    (made("dead", *whole[:5]) / LOCK_FILE).write_text(json.dumps({**holder, "born": "1"}))
    far = made("far", *whole[:5]) / LOCK_FILE
    far.write_text(json.dumps({**holder, "machine": "another"}))
    gone = made("gone", *whole[:5]) / LOCK_FILE
    gone.write_text(far.read_text())
    os.utime(gone, (0, 0))
    listed = json.loads(said(capsys, "runs", tmp_path / "runs", "--json"))
    assert {Path(one["run"]).name: one["state"] for one in listed} == {
        "whole": "finished", "killed": "interrupted", "begun": "interrupted", "empty": "interrupted",
        "stopped": "stopped", "lost": "diverged", "failed": "failed", "now": "training", "dead": "interrupted",
        "far": "training", "gone": "interrupted", "longer": "stopped", "longer and killed": "interrupted",
        "refused": "interrupted",
    }  # fmt: skip
    table = said(capsys, "runs", tmp_path / "runs")
    (row,) = (line.split() for line in table.splitlines() if "whole" in line)
    end = end_of(read_metrics(run))
    assert end is not None
    assert row[1:5] == ["finished", str(STEPS), "of", str(STEPS)]
    assert f"perplexity {end['perplexity']:,.4g}" in " ".join(row)
    assert ends_of([read_metrics(tmp_path / "runs" / "longer")]) == [{}], "nor is it finished for a comparison"
    assert look(tmp_path / "runs" / "killed")["step"] == 2
    assert "there is no folder" in refused(capsys, "runs", tmp_path / "none")
    assert "there are no runs" in refused(capsys, "runs", run / "checkpoints")


def test_prometheus_has_the_latest_figures_and_a_heartbeat(run: Path) -> None:
    found: dict[str, float] = {}
    for line in (run / PROMETHEUS_FILE).read_text().splitlines():
        if match := re.fullmatch(rf'([a-z_]+)\{{run="{re.escape(str(run))}"\}} (\S+)', line):
            found[match.group(1)] = float(match.group(2))
        else:
            assert re.fullmatch("# TYPE frugal_[a-z_]+ gauge", line)
    records = read_metrics(run)
    last = [record for record in records if record["kind"] == "train"][-1]
    assert found["frugal_train_loss"] == last["loss"]
    assert (found["frugal_step"], found["frugal_steps_asked"]) == (STEPS, STEPS)
    assert found["frugal_summary_perplexity"] == records[-1]["perplexity"]
    assert abs(found["frugal_heartbeat_seconds"] - (run / PROMETHEUS_FILE).stat().st_mtime) < 60


# --- the shell --------------------------------------------------------------------------------------------------------


def test_shells_complete_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("shtab")
    script = tmp_path / "completion.bash"
    script.write_text(said(capsys, "completion", "bash"))
    typed = "COMP_WORDS=(frugal-dist generate --te) COMP_CWORD=2"
    ask = f"source {script}; {typed}; _shtab_frugal_dist; echo ${{COMPREPLY[@]}}"
    if shutil.which("bash"):
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["--temperature"]
    (known,) = re.findall(r"^_shtab_frugal_dist_subparsers=\((.*)\)$", script.read_text(), re.M)
    assert commands(capsys) <= set(known.split())


def test_every_command_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    named = set(re.findall(r"^\| `frugal-dist (\w+)", (ROOT / "docs" / "commands.md").read_text(), re.M))
    assert named == commands(capsys)


def commands(capsys: pytest.CaptureFixture[str]) -> set[str]:
    with suppress(SystemExit):
        main(["--help"])
    return set(re.findall(r"^    (\w+)", capsys.readouterr().out, re.M))
