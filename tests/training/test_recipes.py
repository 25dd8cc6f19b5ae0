"""Recipes: those that are shipped, how files and the command line are read, and what is refused before training."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("jsonargparse")

from frugal_dist.planner import LLAMA_SHAPES
from frugal_dist.training.distributed.place import find_dist_env
from frugal_dist.training.engines import check_engine
from frugal_dist.training.engines.deepspeed import recipe_json
from frugal_dist.training.finetune.recipe import FinetuneRecipe
from frugal_dist.training.optimizers import frugal_options
from frugal_dist.training.recipe import Data, Model, Optimizer, Recipe, Saving, check_recipe, read_recipe, shipped
from frugal_dist.training.schedule import build_schedule

PAPERS = {"9m": 128, "20m": 256, "60m": 512, "130m": 768, "350m": 1024, "1b": 2048, "3b": 2560, "7b": 4096}


@pytest.mark.parametrize("name", [name for name in shipped() if name.startswith("llama")])
def test_shipped_recipes_are_sound(name: str) -> None:
    recipe = read_recipe(name)
    check_recipe(recipe)
    small = name == "llama_7b_24gb"  # no gradient waits for another, and no basis is kept
    assert (recipe.batch, recipe.length, recipe.optimizer.lr) == ((16, 256, 5e-4) if small else (512, 256, 1e-3))
    options = frugal_options(recipe.optimizer)
    projection = "columns" if small else "svd"
    assert (options["density"], options["update_gap"], options["projection"]) == (0.25, 200, projection)
    rate = build_schedule(recipe.schedule, recipe.steps)
    assert rate(recipe.steps // 10 - 1) == 1.0
    assert rate(recipe.steps) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("false", False), ("true", True), ("1", 1), ("0", 0), ("0.5", 0.5), ("1e-3", 1e-3), ("svd", "svd")),
        *(("null", None), ("none", "none"), ("[0.9, 0.99]", [0.9, 0.99])),
    ],
)
def test_options_have_the_type_that_they_are_written_in(text: str, value: object) -> None:
    found = read_recipe("llama_9m", ["--optimizer.options.shard_state", text]).optimizer.options["shard_state"]
    assert (found, type(found)) == (value, type(value))


def test_the_recipe_for_comparisons_is_sound() -> None:
    recipe = read_recipe("reviews_5m")
    check_recipe(recipe)
    assert recipe.steps * recipe.batch * recipe.length > 3e6
    assert frugal_options(recipe.optimizer)["projection"] == "svd"


def test_the_papers_shapes_are_there() -> None:
    assert len(shipped()) > len(PAPERS)

    for size, hidden in PAPERS.items():
        assert LLAMA_SHAPES[str(read_recipe(f"llama_{size}").model.llama)].hidden == hidden


def test_the_command_line_changes_keys(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: {llama: quick}\nsteps: 7\noptimizer: {lr: 2e-3, options: {density: 0.5}}\n")
    changes = ["--steps", "9", "--optimizer.options.projection", "columns", "--engine=fsdp2", "--model.tied", "true"]
    recipe = read_recipe(str(path), changes)
    assert (recipe.steps, recipe.engine, recipe.model.tied, recipe.optimizer.lr) == (9, "fsdp2", True, 2e-3)
    assert recipe.optimizer.options == {"density": 0.5, "projection": "columns"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stesp: 3", ["stesp", "steps"]),
        ("model: {lama: 60M}", ["model", "lama", "model.llama"]),
        ("steps: abc", ["steps", "int", "abc"]),
        ("engine: dpp", ["engine", "'single', 'ddp', 'fsdp2', 'deepspeed'", "dpp"]),
        ("optimizer: {lr: [1]}", ["optimizer.lr", "float"]),
        ("steps: [", ["mine.yaml"]),
    ],
)
def test_mistakes_in_a_recipe_name_the_key(text: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_recipe(str(path))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--density 0.5", "Did you mean 'optimizer.options.density'?"),
        ("--optimizer.density 0.5", "Did you mean 'optimizer.options.density'?"),
        ("--optimizer.update-gap 5", "Did you mean 'optimizer.options.update_gap'?"),
        ("--lr 1e-3", "Did you mean 'optimizer.lr'?"),
        ("--batch-size 8", "Did you mean 'batch'?"),
        ("--path x", "Did you mean 'model.path' or 'data.path'?"),
        ("--device cpu", "CUDA_VISIBLE_DEVICES chooses"),
        ("--resume", "The same command resumes"),
        ("-steps 3", "write --steps VALUE"),
        ("folder=x", "write --folder x"),
        ("frugal-svd", "a value with blanks in quotes"),
        ("--steps", "--steps needs a value"),
        ("--engine fsdp", "Did you mean 'fsdp2'?"),
        ("--optimizer.name frugal-svdd", "Did you mean 'frugal-svd'?"),
        ("--optimizer.name Adam", "Did you mean 'adamw'?"),
        ("--schedule cosine", "Did you mean 'schedule.name'?"),
        ("--data no/such", "Did you mean 'data.path'?"),
        ("--optimizer=frugal", "Did you mean 'optimizer.name'?"),
        ("--print-config", "Did you mean --print_config?"),
        ("--steps two", "llama_60m: steps: Expected int. Got value: two."),
        ("--micro_batch two", "llama_60m: micro_batch: Expected int or null. Got value: two."),
    ],
)
def test_words_that_are_no_keys_are_told_which_is_meant(words: str, said: str) -> None:
    with pytest.raises(ValueError) as error:
        read_recipe("llama_60m", words.split())
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("density: 0.5", "Did you mean 'optimizer.options.density'?"),
        ("optimizer: {density: 0.5}", "no key 'density' in 'optimizer'. Did you mean 'optimizer.options.density'?"),
        ("lr: 1", "Did you mean 'optimizer.lr'?"),
        ("schedule: cosine", "schedule is 'cosine', but it is a section with the keys schedule.name, "),
        ("data:", "data is None, but it is a section"),
        ("steps: 4\nbatch: 8\nsteps: 5", "'steps' appears twice, in lines 1 and 3"),
        ("data:\n  kind: c4\n  kind: hub", "'data.kind' appears twice, in lines 2 and 3"),
        ("model:\n\tpath: x", "line 2 begins with a tab"),
        ("", "is empty"),
        ("- a\n- b", "holds a list"),
        ("engine: zero2\ndeepspeed: three.json", "engine is 'zero2', but {beside}/three.json says stage 3"),
        ("optimizer: {name: frugal-rows, options: {projection: svd}}", "optimizer.name is 'frugal-rows', but"),
    ],
)
def test_a_file_that_is_no_recipe_is_told_why(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "three.json").write_text('{"zero_optimization": {"stage": 3}}')
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        read_recipe(str(tmp_path / "mine.yaml"))
    assert said.format(beside=tmp_path) in str(error.value)


def test_recipes_of_other_encodings(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes("steps: 3".encode("utf-16"))
    with pytest.raises(ValueError, match="UTF-16"):
        read_recipe(str(path))
    path.write_bytes(b"steps: 3\nfolder: caf\xe9")
    with pytest.raises(ValueError, match="line 2 is no UTF-8"):
        read_recipe(str(path))
    path.write_bytes(b"\xef\xbb\xbfsteps: 3\r\nfolder: 2024-01-01\r\n")
    recipe = read_recipe(str(path))
    assert (recipe.steps, recipe.folder) == (3, "2024-01-01")


def test_values_are_taken_as_people_write_them(tmp_path: Path) -> None:
    """A word for a list of one, 1e3 for a whole number, short names for what is two keys."""
    path = tmp_path / "mine.yaml"
    path.write_text("trackers: wandb\nsteps: 1e3\noptimizer: {lr: '1e-3', no_decay: '*norm*'}\nengine: zero1\n")
    recipe = read_recipe(str(path))
    assert (recipe.trackers, recipe.steps, recipe.optimizer.lr) == (["wandb"], 1000, 1e-3)
    assert recipe.optimizer.no_decay == ["*norm*"]
    assert (recipe.engine, recipe.deepspeed, recipe_json(recipe)["zero_optimization"]) == (*ZERO1, {"stage": 1})
    changes = ["--trackers", "wandb,tensorboard", "--batch=1e2", "--engine", "ddp", "--optimizer.name", "frugal-rows"]
    recipe = read_recipe(str(path), changes)
    assert (recipe.trackers, recipe.batch, recipe.engine) == (["wandb", "tensorboard"], 100, "ddp")
    assert (recipe.deepspeed, recipe.optimizer.options) == (None, {"projection": "rows"})
    assert read_recipe(str(path), ["--optimizer.name", "frugal-rho0"]).optimizer.name == "signsgd"


ZERO1 = ("deepspeed", "zero1")


def test_paths_of_a_recipe_are_found_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any folder; what is there where the command is started goes first. Names of the hub stay names."""
    home, away = tmp_path / "home", tmp_path / "away"
    for folder in (home / "model", home / "texts", away / "texts"):
        folder.mkdir(parents=True)
    (home / "texts" / "a.jsonl").touch()
    (home / "held.jsonl").touch()
    (home / "mine.yaml").write_text(
        "model: {path: model}\n"
        "data: {path: 'texts/*.jsonl', tokenizer: t5-base, validation_path: held.jsonl}\ndeepspeed: ds.json\n"
    )
    (home / "tune.yaml").write_text("model: {path: model}\ndata: {train: held.jsonl, validation: gone.jsonl}\n")
    monkeypatch.chdir(away)
    recipe = read_recipe(str(home / "mine.yaml"))
    assert recipe.model.path == str(home / "model")
    assert (recipe.data.path, recipe.data.tokenizer) == (str(home / "texts" / "*.jsonl"), "t5-base")
    assert (recipe.data.validation_path, recipe.deepspeed) == (str(home / "held.jsonl"), "ds.json")
    tune = read_recipe(str(home / "tune.yaml"), (), FinetuneRecipe)
    assert (tune.data.train, tune.data.validation) == (str(home / "held.jsonl"), "gone.jsonl")
    (away / "texts" / "b.jsonl").touch()
    assert read_recipe(str(home / "mine.yaml")).data.path == "texts/*.jsonl"


def test_a_recipe_is_no_folder_and_may_lack_its_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "own.yaml").write_text("steps: 3")
    for name, said in (("model", "It is a folder"), ("own", "Did you mean 'own.yaml'?")):
        with pytest.raises(ValueError, match=re.escape(said)):
            read_recipe(name)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"steps": 0}, "steps"),
        ({"clip": -1.0}, "clip"),
        ({"length": 1}, "length is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"micro_batch": 0}, "micro_batch"),
        ({"saving": Saving(keep_last=0)}, "saving.keep_last"),
        ({"saving": Saving(every=-1)}, "saving.every"),
        ({"precision": "fp16"}, "fp16"),
        ({"weights": "bf16", "engine": "deepspeed"}, "DeepSpeed has bf16 weights and fp32 masters by itself"),
        ({"weights": "bf16", "precision": "fp32", "engine": "single"}, "Set precision: bf16"),
        ({"optimizer": Optimizer(options={"rounding": "remainder"})}, "Set weights: bf16"),
        ({"deepspeed": "x.json"}, "deepspeed"),
        ({"data": Data(kind="tokens", path="a", validation_path="b")}, "data.validation_path is 'b'"),
        ({"model": Recipe().model}, "model.llama"),
    ],
)
def test_values_that_do_not_fit_each_other(changes: dict[str, object], key: str) -> None:
    known = read_recipe("llama_60m")
    values = {field: getattr(known, field) for field in Recipe.__dataclass_fields__}
    with pytest.raises(ValueError, match=key):
        check_recipe(Recipe(**{**values, **changes}))  # type: ignore[arg-type]


def test_kernels_that_one_rank_lacks_are_found_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """``check_engine`` runs where all ranks hear of it."""
    monkeypatch.setenv("FRUGAL_KERNELS", "trition")
    with pytest.raises(ValueError, match=r"FRUGAL_KERNELS='trition' .* auto, torch, triton"):
        check_engine(read_recipe("reviews_5m"), find_dist_env({}))


def test_sections_and_lists_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("llama: 9M\ncompile: true\n")
    (tmp_path / "wrong.yaml").write_text("lama: 9M\n")
    words = ["--model", str(tmp_path / "model.yaml"), "--model.tied", "true", "--data", '{"path": "b"}']
    recipe = read_recipe("reviews_5m", [*words, "--trackers", "wandb", "--trackers+", "tensorboard"])
    assert recipe.model == Model(llama="9M", compile=True, tied=True)
    assert (recipe.data.kind, recipe.data.path) == ("tokens", "b")
    assert recipe.trackers == ["wandb", "tensorboard"]
    assert read_recipe("reviews_5m", ["--optimizer.project", "null"]).optimizer.project is None
    for words, message in (
        (["--model", str(tmp_path / "wrong.yaml")], "'lama' in 'model'. Did you mean 'model.llama'"),
        (["--data", '{"knd": "files"}'], "'knd' in 'data'. Did you mean 'data.kind'"),
        (["--model", "{llama: 9M"], "several keys"),
    ):
        with pytest.raises(ValueError, match=message):
            read_recipe("reviews_5m", words)
