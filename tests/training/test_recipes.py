"""Recipes, schedules and places: what is read before anything is trained."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("jsonargparse")

from frugal_dist.cli import main
from frugal_dist.config import HYPERPARAMETERS, config_from
from frugal_dist.optimizer import Frugal
from frugal_dist.planner import LLAMA_SHAPES
from frugal_dist.training.compare import contender
from frugal_dist.training.distributed.place import find_dist_env, first_host
from frugal_dist.training.engines import check_engine
from frugal_dist.training.engines.deepspeed import recipe_json
from frugal_dist.training.finetune.recipe import FinetuneRecipe
from frugal_dist.training.optimizers import OWN, build_optimizer, frugal_options
from frugal_dist.training.recipe import (
    Data,
    Model,
    Optimizer,
    Recipe,
    Saving,
    Schedule,
    check_recipe,
    read_recipe,
    shipped,
)
from frugal_dist.training.resume import FREE_ON_RESUME, check_existing_run
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


def test_a_wrong_switch_is_told_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"shard_state='flase' is not known. Use one of auto, true, false"):
        Frugal([torch.nn.Parameter(torch.ones(2, 2))], shard_state="flase")


def test_the_recipe_for_comparisons_is_sound() -> None:
    recipe = read_recipe("reviews_5m")
    check_recipe(recipe)
    assert recipe.steps * recipe.batch * recipe.length > 3e6
    assert frugal_options(recipe.optimizer)["projection"] == "svd"


@pytest.mark.parametrize(
    ("text", "rate", "scale"),
    [("galore", 1e-3, 0.25), ("galore@1e-2", 1e-2, 0.25), ("galore@1e-2x0.5", 1e-2, 0.5), ("adamw@3e-3x.1", 3e-3, 0.1)],
)
def test_contenders_have_rates_of_their_own(text: str, rate: float, scale: float) -> None:
    optimizer = contender(text, read_recipe("reviews_5m")).optimizer
    options = frugal_options(optimizer)
    assert (optimizer.lr, options["projected_lr_scale"]) == (rate, scale)


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("frugal-svd:density=0.5:update_gap=7", {"density": 0.5, "update_gap": 7, "projection": "svd"}),
        ("frugal-rows:density=0@1e-2x0.5", {"density": 0, "lr": 1e-2, "projected_lr_scale": 0.5, "projection": "rows"}),
        ("frugal@2e-3:projection=randperm:state_free=sgd", {"projection": "randperm", "state_free": "sgd", "lr": 2e-3}),
        ("adamw:weight_decay=0.1", {"weight_decay": 0.1, "density": 1.0}),
        ("galore:projected_lr_scale=0.5", {"projected_lr_scale": 0.5}),
        ("signsgd", {"density": 0.0}),
        ("frugal-randperm", {"projection": "randperm"}),
    ],
)
def test_contenders_have_settings_of_their_own(text: str, changed: dict[str, object]) -> None:
    config = config_from(frugal_options(contender(text, read_recipe("reviews_5m")).optimizer))
    assert {key: getattr(config, key) for key in changed} == changed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("frugal-svd:projection=rows", "'frugal-svd' decides about projection"),
        ("adamw:density=0.5", "'adamw' decides about density"),
        ("frugal:density", "'density' is no KEY=VALUE"),
        ("frugal:density=1:density=0", "stands twice"),
        ("frugal:densty=1", "Did you mean 'density'"),
        ("frugal-svdd", "optimizers='frugal-svdd' is not known"),
    ],
)
def test_contenders_that_contradict_themselves(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        frugal_options(contender(text, read_recipe("reviews_5m")).optimizer)


def test_a_contender_has_a_rank_or_a_density() -> None:
    recipe = read_recipe("minilm_reviews", (), FinetuneRecipe)
    tuned = [contender(text, recipe).optimizer for text in ("frugal:rank=4", "frugal:density=0.5")]
    assert [(one.rank, one.options.get("density")) for one in tuned] == [(4, None), (None, 0.5)]


def test_the_papers_shapes_are_there() -> None:
    assert len(shipped()) > len(PAPERS)
    from frugal_dist.planner import LLAMA_SHAPES

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


def test_mistakes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "lama_60m"]) == 2
    assert "Did you mean 'llama_60m'?" in capsys.readouterr().err
    assert main(["pretrain", "llama_60m", "--stesp", "3"]) == 2
    assert "Did you mean 'steps'?" in capsys.readouterr().err
    for command in (["pretrain", "llama_60m"], ["finetune", "minilm_reviews"]):
        run = tmp_path / command[0]
        assert main([*command, "--optimizer.options.densty", "0.1", "--folder", str(run)]) == 2
        assert "unknown key 'densty'" in capsys.readouterr().err
        assert not run.exists()  # before anything is begun
    (tmp_path / "file").touch()
    assert main(["pretrain", "llama_60m", "--folder", str(tmp_path / "file" / "run")]) == 2
    assert "cannot be written: Not a directory. Choose another --folder." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["memory", "--stesp", "3"])


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
        ("--resume", "The same command goes on"),
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
        ("steps: 4\nbatch: 8\nsteps: 5", "'steps' stands twice, in lines 1 and 3"),
        ("data:\n  kind: c4\n  kind: hub", "'data.kind' stands twice, in lines 2 and 3"),
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


def test_a_run_goes_on_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its recipe found beside itself has another path there; other data have another content."""
    for folder in ("home/data", "home/other", "run"):
        (tmp_path / folder).mkdir(parents=True)
    record = read_recipe("reviews_5m").record()

    def begun(before: str, now: str) -> None:
        line = {"kind": "run", **record, "data": {**record["data"], "path": before}}
        (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        check_existing_run(tmp_path / "run", {**record, "data": {**record["data"], "path": now}}, FREE_ON_RESUME)

    monkeypatch.chdir(tmp_path)
    begun("data", "home/data")
    begun("home/data", str(tmp_path / "home" / "data"))
    with pytest.raises(ValueError, match=r"data\.path 'home/data' \(now 'home/other'\)"):
        begun("home/data", "home/other")
    monkeypatch.chdir(tmp_path / "home")
    begun("home/data", "data")
    with pytest.raises(ValueError, match=r"data\.path"):
        begun("home/data", "other")


def test_what_a_recipe_says_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """--help with the recipe's values, --print_config checked, and a list of what there is."""
    with pytest.raises(SystemExit):
        main(["pretrain", "reviews_5m", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "default: runs/reviews_5m" in text
    assert "frugal-dist pretrain reviews_5m" in text
    for name in (*HYPERPARAMETERS, *LLAMA_SHAPES):
        if name not in OWN:
            assert re.search(rf"\b{name}\b", text), name
    assert main(["pretrain", "reviews_5m", "--print_config", "--steps", "7"]) == 0
    printed = capsys.readouterr().out
    assert "\nsteps: 7\n" in printed
    for changes in (["--optimizer.options.density", "1.5"], ["--schedule.floor", "2"], ["--batch", "0"]):
        assert main(["pretrain", "reviews_5m", "--print_config", *changes]) == 2
    assert main(["finetune", "minilm_reviews", "--print_config", "--epochs", "0"]) == 2
    capsys.readouterr()
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*shipped(), *shipped(FinetuneRecipe)))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("pretain llama_60m", "Did you mean 'pretrain'?"),
        ("data prepar x", "Did you mean 'prepare'?"),
        ("generat runs/a", "Did you mean 'generate'?"),
        ("evaluate --steps 3 runs/a", "the model comes first, then its keys"),
        ("recipe chek reviews_5m", "Did you mean 'check'?"),
        ("plot runs/a --ot x", "Did you mean --out?"),
        ("--verson", "Did you mean --version?"),
        ("help", "frugal-dist --help"),
    ],
)
def test_misspelt_commands_and_options(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(words.split())
    except SystemExit as ended:
        code = int(str(ended.code))
    assert (code, said in capsys.readouterr().err) == (2, True)


def test_a_recipe_is_no_folder_and_may_lack_its_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "own.yaml").write_text("steps: 3")
    for name, said in (("model", "It is a folder"), ("own", "Did you mean 'own.yaml'?")):
        with pytest.raises(ValueError, match=re.escape(said)):
            read_recipe(name)


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert re.fullmatch(r"frugal-dist [\w.()+ ]+\n", capsys.readouterr().out)


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


def test_optimizer_options_are_frugals() -> None:
    assert frugal_options(Optimizer(name="galore"))["state_free"] == "none"
    assert frugal_options(Optimizer(name="adamw"))["density"] == 1.0
    with pytest.raises(ValueError, match=r"optimizer\.options\(rank=8\): .*density=0\.25"):
        frugal_options(Optimizer(options={"rank": 8}))
    with pytest.raises(ValueError, match=r"optimizer\.options: unknown key 'densty'.*Did you mean 'density'"):
        frugal_options(Optimizer(options={"densty": 0.1}))
    with pytest.raises(ValueError, match=r"set optimizer\.lr instead"):
        frugal_options(Optimizer(options={"lr": 0.1}))


# --- schedules


def test_patterns_of_a_recipe_choose_what_is_projected() -> None:
    recipe = Optimizer(project=["*.weight"], skip=["norm.*", "head.*"], no_decay=["head.*"], weight_decay=0.1)
    linear = {name: torch.nn.Linear(8, 8) for name in ("body", "head")}
    model = torch.nn.ModuleDict({**linear, "norm": torch.nn.LayerNorm(8)})
    optimizer = build_optimizer(recipe, model)
    assert [row.name for row in optimizer.parameter_report_rows() if row.projected] == ["body.weight"]
    decays = {group["param_names"][0]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {"body.weight": 0.1, "body.bias": 0.1, "head.weight": 0.0}
    assert frugal_options(recipe)["project"] == ["*.weight"], "DeepSpeed's JSON gets them"
    for key in ("project", "skip"):
        with pytest.raises(ValueError, match=f"set optimizer.{key} instead"):
            frugal_options(Optimizer(options={key: ["*"]}))


def test_schedules() -> None:
    cosine = build_schedule(Schedule(), 100)
    assert [cosine(0), cosine(9), cosine(55), cosine(100)] == pytest.approx([0.1, 1.0, 0.55, 0.1], abs=2e-2)
    linear = build_schedule(Schedule(name="linear", floor=0.0), 100)
    assert [linear(10), linear(55), linear(100)] == pytest.approx([1.0, 0.5, 0.0])
    stable = build_schedule(Schedule(name="wsd", floor=0.0, decay=0.2), 100)
    assert [stable(10), stable(79), stable(90), stable(100)] == pytest.approx([1.0, 1.0, 0.5, 0.0])
    constant = build_schedule(Schedule(name="constant", warmup=4), 100)
    assert [constant(0), constant(3), constant(99)] == pytest.approx([0.25, 1.0, 1.0])


def test_cosine_cycles_start_again_and_a_run_may_end_high() -> None:
    """The papers' trap: 200,000 steps in cycles of 10,000; after 15,000 steps the rate is far from its floor."""
    rate = build_schedule(Schedule(cycle=10_000), 200_000)
    assert rate(9_999) == pytest.approx(0.1, abs=1e-3)
    assert rate(10_999) == 1.0
    assert rate(15_000) > 0.5


WSD = {"name": "wsd", "warmup": 0.5, "decay": 0.8}
"""It would jump from 1.0 to 0.62 at the end of the warm-up."""


@pytest.mark.parametrize("bad", [{"cycle": 10, "name": "linear"}, {"floor": 2.0}, {"warmup": 200}, WSD])
def test_schedules_that_make_no_sense(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="schedule"):
        build_schedule(Schedule(**bad), 100)  # type: ignore[arg-type]


# --- places

MEETING = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
STARTS = {
    "torchrun": {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MEETING},
    "deepspeed": {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", **MEETING},
    "mpirun": {
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        **MEETING,
    },
    "mpich": {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", **MEETING},
    "srun": {
        "SLURM_PROCID": "3",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": "7",
    },
}


STARTS["srun with PMI-2"] = {**STARTS["srun"], "PMI_RANK": "3", "PMI_SIZE": "4"}


@pytest.mark.parametrize("launcher", STARTS)
def test_every_launcher_tells_the_place(launcher: str) -> None:
    place = find_dist_env(STARTS[launcher])
    assert (place.rank, place.world, place.local_rank, place.address) == (3, 4, 1, "node1")
    assert place.local_world == (4 if launcher == "deepspeed" else 2)
    assert place.port > 0


SHELLS = {
    "no launcher": {},
    "sbatch": {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"},
    "salloc": {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "4294967290"},
}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_process_alone(shell: str) -> None:
    place = find_dist_env(SHELLS[shell])
    assert (place.rank, place.world, place.launcher) == (0, 1, "none")
    assert place.port > 0


def test_nodes_of_different_size() -> None:
    uneven = {**STARTS["srun"], "SLURM_STEP_TASKS_PER_NODE": "1,3", "SLURM_LOCALID": "2"}
    assert find_dist_env(uneven).local_world == 3


def test_deepspeed_in_an_interactive_step_of_slurm() -> None:
    """It says nothing of the node's ranks; what Slurm says of the shell's step is not about them."""
    shell = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_PROCID": "0"}
    place = find_dist_env({**STARTS["deepspeed"], **shell})
    assert (place.rank, place.local_rank, place.local_world) == (3, 1, 4)


def test_left_over_ranks_under_srun_are_refused() -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **MEETING}
    with pytest.raises(ValueError, match="srun started 4 tasks, but WORLD_SIZE=1"):
        find_dist_env({**STARTS["srun"], **alone})
    assert find_dist_env({**STARTS["srun"], **alone, "TORCHELASTIC_RUN_ID": "mine"}).world == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"RANK": "4"}, "RANK=4 must be below WORLD_SIZE=4"),
        ({"RANK": "one"}, "RANK is 'one', which is no number"),
        ({"LOCAL_RANK": "2"}, "contradict each other"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR or MASTER_PORT is not set"),
        ({"MASTER_PORT": "here"}, "MASTER_PORT is 'here', which is no number"),
    ],
)
def test_contradictions_are_named(change: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_dist_env({**STARTS["torchrun"], **change})


def test_a_world_without_a_rank() -> None:
    with pytest.raises(ValueError, match="RANK is not set"):
        find_dist_env({"WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("nodes", "first"), [("a1", "a1"), ("a1,b2", "a1"), ("gpu[07-09,12],x", "gpu07"), ("n[3]", "n3"), ("", "")]
)
def test_the_first_host_of_a_slurm_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


# --- plans


def test_a_plan_says_what_a_rank_holds_and_sends(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "llama_60m", "--engine", "zero3", "--ranks", "4", "--gpu", "h100"]
    assert main([*arguments, "--optimizer.options.density", "0.5"]) == 0
    half = capsys.readouterr().out
    assert main(arguments) == 0
    quarter = capsys.readouterr().out
    for words in ("58.1 M parameters", "adamw", "galore", "fits into h100", "a refresh, beside the step"):
        assert words in quarter
    assert _state(quarter) < _state(half)


def test_baselines_are_planned_at_the_same_setting_beside_the_papers_count(capsys: pytest.CaptureFixture[str]) -> None:
    for density, galore in (("0.25", 298.3), ("0.5", 346.6)):  # of 60M: 0.291 GiB in the papers' table; AdamW 0.433
        assert main(["plan", "llama_60m", "--engine=ddp", "--ranks=1", f"--optimizer.options.density={density}"]) == 0
        text = capsys.readouterr().out
        assert _size(text, "computing the largest basis") > 0
        rows = _rows(text, ("this", "adamw", "galore"))
        papers = {cells[1].strip(): float(cells[4]) for cells in rows}
        assert papers == {"this": galore, "adamw": 443.1, "galore": galore}


def test_of_many_ranks_all_is_known_that_layouts_decide(capsys: pytest.CaptureFixture[str]) -> None:
    """State of all ranks and who refreshes; a rank count that does not divide the batch is named."""
    assert main(["plan", "llama_9m", "--engine", "zero2", "--ranks", "65"]) == 2
    text = capsys.readouterr().out
    assert "Refreshes are owned by 28 of 65 ranks" in text
    assert "A batch of 512 cannot be shared equally by 65 ranks" in text
    (this,) = _rows(text, ("this",))
    assert float(this[3].replace(",", "")) > float(this[4].replace(",", "")) > float(this[2].replace(",", "")) > 0.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("llama_60m --engine zero2 --ranks 4 --gpu v100", "v100 does not compute in bf16"),
        ("llama_60m --engine zero2 --ranks 4 --gpu v100", "The peak of a rank is"),
        ("llama_20m --engine fsdp2 --ranks 512", "AdamW needs less here"),
        ("llama_9m --engine ddp --ranks 1 --optimizer.name adamw", "| galore "),
    ],
)
def test_a_plan_has_adamw_beside_it_and_fits_a_terminal(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments.split()]) == 0
    text = capsys.readouterr().out
    assert said in text
    assert max(map(len, text.splitlines())) <= 80
    if "adamw" not in arguments:
        (row,) = _rows(text, ("together",))
        plain = [line.split("|")[2:4] for line in text.splitlines() if re.match(r"\| [^ ].*\|.*\d \|.*\|$", line)]
        above = plain[: plain.index(row[2:4])]
        for column in (0, 1):
            sizes = [float(cells[column].strip().replace(",", "") or 0) for cells in above]
            assert float(row[2 + column].replace(",", "")) == pytest.approx(sum(sizes), abs=0.6)
        assert "moments" not in row[1]


def test_memory_of_a_model_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a recipe, a folder or a config.json; LLaMA's are those of the papers' table."""
    config = '{"model_type": "gpt2", "vocab_size": 500, "n_embd": 4096, "n_layer": 2, "n_head": 4}'
    (tmp_path / "config.json").write_text(config)
    for name in (tmp_path, tmp_path / "config.json"):
        assert main(["memory", str(name)]) == 0
        text = capsys.readouterr().out
        assert text.splitlines()[0].split("|")[2].strip() == tmp_path.name
        assert {len(line) for line in text.splitlines()} == {len(text.splitlines()[0])}
        assert "| AdamW " in text
    assert main(["memory", "llama_1b"]) == 0
    assert [line.split("|")[2].strip() for line in capsys.readouterr().out.splitlines()[2:]] == [
        *("9.977", "3.227", "3.883", "0.977")
    ]


def test_a_plan_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the engine of the recipe, or the stage of its JSON."""
    (tmp_path / "three.json").write_text('{"zero_optimization": {"stage": 3}}')
    (tmp_path / "mine.yaml").write_text("model: {llama: 9M}\nengine: deepspeed\ndeepspeed: three.json\n")
    for engine in ([], ["--engine", "deepspeed"], ["--engine", "zero3"]):
        assert main(["plan", str(tmp_path / "mine.yaml"), "--ranks", "2", "--gpu", "v100", "--json", *engine]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["engine"], found["gpu"]["fits"], found["gpu"]["computes_in_it"]) == ("zero3", True, False)
        this, adamw = found["memory"]["this"], found["memory"]["adamw"]
        assert this["state_most_on_a_rank"] < adamw["state_most_on_a_rank"]
        assert this["peak"] <= this["together"]
        assert found["sent_by_the_optimizer"]["step"]["bytes"] > 0


def test_a_plan_knows_the_positions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}'
    )
    (tmp_path / "mine.yaml").write_text("model: {path: .}\nlength: 9\n")
    assert main(["plan", str(tmp_path / "mine.yaml"), "--ranks", "1", f"--model.path={tmp_path}"]) == 2
    assert "positions for 8 (n_positions)" in capsys.readouterr().err


def test_a_plan_of_replicas_that_do_not_share(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "llama_9m", "--engine", "ddp", "--ranks", "2"]
    assert main([*arguments, "--optimizer.options.shard_state", "false"]) == 0
    alone = capsys.readouterr().out
    assert main(arguments) == 0
    assert _state(alone) > _state(capsys.readouterr().out)


def test_any_causal_model_can_be_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "gpt2", "vocab_size": 500, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}'
    )
    (tmp_path / "mine.yaml").write_text(f"model: {{path: {tmp_path}, pretrained: true}}\nbatch: 8\nlength: 32\n")
    assert main(["plan", str(tmp_path / "mine.yaml"), "--engine", "zero1", "--ranks", "2"]) == 0
    text = capsys.readouterr().out
    assert "0.1 M parameters" in text
    assert "144x48" in text or "48x144" in text
    assert main(["plan", str(tmp_path / "mine.yaml"), "--engine=ddp", "--ranks=1", "--model.path=nowhere"]) == 2
    assert "model.path is 'nowhere', where no model's config.json can be read" in capsys.readouterr().err


@pytest.mark.parametrize(("engine", "micro"), [("ddp", "5"), ("zero2", "4")])
def test_a_plan_has_the_micro_batch_of_the_engine(engine: str, micro: str, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["--batch", "16", "--micro_batch", "5", "--length", "10"]
    assert main(["plan", "llama_9m", "--engine", engine, "--ranks", "2", *changes]) == 0
    assert f"activations of {micro}0 tokens" in capsys.readouterr().out


def test_a_plan_has_the_buffers_and_the_offload_of_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In bf16, on two ranks."""
    (tmp_path / "mine.yaml").write_text("model: {llama: 9M}\nengine: deepspeed\n")
    path = tmp_path / "ds.json"
    zero = '"stage": 2, "overlap_comm": true, "reduce_bucket_size": 1048576, "offload_optimizer": {"device": "cpu"}'
    path.write_text(f'{{"zero_optimization": {{{zero}}}}}')
    seen = {}
    for engine, changes in (
        ("zero2", []),
        ("zero2", ["--deepspeed", str(path)]),
        ("zero3", ["--deepspeed", str(path)]),
    ):
        assert main(["plan", str(tmp_path / "mine.yaml"), "--engine", engine, "--ranks", "2", *changes]) == 0
        seen[engine, bool(changes)] = capsys.readouterr().out
    plain, offloaded, other = seen.values()
    assert _size(plain, "buffers of DeepSpeed") == pytest.approx(2 * 500e6 / 2**20, abs=0.1)
    assert _size(offloaded, "buffers of DeepSpeed") == 4.0
    assert "host" not in plain
    assert "| optimizer state, on the host " in offloaded
    assert "On the host" in offloaded
    assert "is for stage 2: planned is stage 3" in other
    assert "is for stage" not in offloaded


def _size(text: str, name: str) -> float:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name}")]
    return float(line.split("|")[2].replace(",", ""))


def _rows(text: str, names: tuple[str, ...]) -> list[list[str]]:
    return [cells for line in text.splitlines() if (cells := line.split("|"))[1:] and cells[1].strip() in names]


def _state(text: str) -> float:
    (line,) = [line for line in text.splitlines() if line.startswith("| optimizer state   ")]
    return float(line.split("|")[2].replace(",", ""))


@pytest.mark.parametrize(
    ("engine", "ranks", "gpu", "words"),
    [
        ("zero4", "2", "h100", "engine is 'zero4'"),
        ("single", "2", "h100", "exactly 1"),
        ("hsdp:3", "4", "h100", "4 ranks do not divide"),
        ("fsdp2:4xtp:2", "4", "h100", "4 ranks are not 1 x 4 x 2"),
        ("hsdp:2xtp:2", "4", "h100", "write fsdp2:SHARDS or hsdp:REPLICASxSHARDS"),
        ("fsdp2xep:3", "4", "h100", "4 ranks do not divide into groups of 3"),
        ("fsdp2xtp:0", "4", "h100", "tp and ep take one size each"),
        ("zero2", "2", "h1000", "gpu is 'h1000'"),
    ],
)
def test_plans_that_make_no_sense(
    engine: str, ranks: str, gpu: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "llama_9m", "--engine", engine, "--ranks", ranks, "--gpu", gpu]) == 2
    assert words in capsys.readouterr().err


# --- the DeepSpeed JSON of a recipe


def test_the_json_keeps_its_loss_scaling_under_the_recipes_precision(tmp_path: Path) -> None:
    from frugal_dist.training.engines.deepspeed import deepspeed_config

    path = tmp_path / "ds.json"
    path.write_text('{"fp16": {"enabled": false, "initial_scale_power": 8}, "bf16": {"enabled": true}}')
    recipe = read_recipe("llama_9m", ["--engine", "deepspeed", "--deepspeed", str(path), "--precision", "fp16"])
    config = deepspeed_config(recipe, 2)
    assert config["fp16"] == {"enabled": True, "initial_scale_power": 8}
    assert "bf16" not in config
    assert "data_types" not in config


def test_bf16_gradients_add_up_in_fp32_where_deepspeed_can(tmp_path: Path) -> None:
    from frugal_dist.training.engines.deepspeed import deepspeed_config

    path, fp32 = tmp_path / "ds.json", {"grad_accum_dtype": "fp32"}
    own = {"grad_accum_dtype": "bf16"}
    host = {"offload_optimizer": {"device": "cpu"}}
    for zero, given, found in (
        ({"stage": 2}, {}, fp32),
        ({"stage": 3, **host}, {}, fp32),
        ({"stage": 2}, own, own),
        ({"stage": 2, **host}, {}, None),
        ({"stage": 1}, {}, None),
        ({"stage": 0}, {}, None),
    ):
        path.write_text(json.dumps({"zero_optimization": zero, **({"data_types": given} if given else {})}))
        recipe = replace(read_recipe("llama_1b"), deepspeed=str(path))
        assert deepspeed_config(recipe, 2).get("data_types") == found, zero
    assert "data_types" not in deepspeed_config(replace(recipe, precision="fp32"), 2)


def test_kernels_that_one_rank_lacks_are_found_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """``check_engine`` runs where all ranks hear of it."""
    monkeypatch.setenv("FRUGAL_KERNELS", "trition")
    with pytest.raises(ValueError, match=r"FRUGAL_KERNELS='trition' .* auto, torch, triton"):
        check_engine(read_recipe("reviews_5m"), find_dist_env({}))


def test_keys_of_the_recipe_are_not_short_for_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--seed is the recipe's, not --seeds cut short; --help lists the recipe's keys."""
    assert main(["finetune", "minilm_reviews", "--seeds", "1"]) == 2
    assert "the seed of a single run is --seed" in capsys.readouterr().err
    assert main(["finetune", "minilm_reviews", "--seed", "one"]) == 2
    assert "one" in capsys.readouterr().err
    for command, recipe in (("pretrain", "reviews_5m"), ("compare", "reviews_5m"), ("finetune", "minilm_reviews")):
        with pytest.raises(SystemExit) as end:
            main([command, recipe, "--help"])
        assert end.value.code in (0, None)
        assert "--optimizer.lr" in capsys.readouterr().out
    assert main(["pretrain", "reviews_5", "--help"]) == 2


@pytest.mark.parametrize(
    ("batch", "micro", "world", "expected"),
    [(512, 16, 32, 16), (512, 16, 64, 8), (512, 16, 512, 1), (512, None, 4, 128), (12, 4, 2, 3), (14, 4, 2, 1)],
)
def test_deepspeed_takes_the_rank_counts_of_other_engines(
    batch: int, micro: int | None, world: int, expected: int
) -> None:
    """In equal micro-batches, the largest within the recipe's."""
    from frugal_dist.training.engines.deepspeed import deepspeed_config

    config = deepspeed_config(replace(read_recipe("llama_1b"), batch=batch, micro_batch=micro), world)
    assert config["train_micro_batch_size_per_gpu"] == expected
    with pytest.raises(ValueError, match=f"batch is {batch}, which {batch - 1} ranks cannot share equally"):
        deepspeed_config(replace(read_recipe("llama_1b"), batch=batch), batch - 1)
    with pytest.raises(ValueError, match="cannot share equally"):
        deepspeed_config(replace(read_recipe("llama_1b"), batch=batch), 2 * batch)


def test_a_json_beside_the_recipe_is_found_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from frugal_dist.training.engines.deepspeed import deepspeed_config

    monkeypatch.chdir(tmp_path)
    config = deepspeed_config(read_recipe("llama_1b_multinode"), 64)
    assert config["zero_optimization"]["reduce_bucket_size"] == 200_000_000
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("model: {llama: 9M}\nengine: deepspeed\ndeepspeed: mine.json\n")
    (tmp_path / "recipes" / "mine.json").write_text('{"zero_optimization": {"stage": 3}}')
    read = "recipes/mine.yaml"
    assert deepspeed_config(read_recipe(read), 1)["zero_optimization"]["stage"] == 3
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 1}}')  # the working directory comes first
    assert deepspeed_config(read_recipe(read), 1)["zero_optimization"]["stage"] == 1
    with pytest.raises(ValueError, match=r"cannot read the DeepSpeed configuration none\.json"):
        deepspeed_config(read_recipe(read, ["--deepspeed", "none.json"]), 1)


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
