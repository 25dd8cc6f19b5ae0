"""The command line: what is shown on demand, and what a misspelt word or a wrong value is answered with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("jsonargparse")


from frugal_dist.cli import main
from frugal_dist.config import HYPERPARAMETERS
from frugal_dist.planner import LLAMA_SHAPES
from frugal_dist.training.finetune.recipe import FinetuneRecipe
from frugal_dist.training.optimizers import OWN
from frugal_dist.training.recipe import shipped


def test_command_line_mistakes_are_explained(tmp_path, capsys):
    for arguments, message in (
        (["plot", str(tmp_path)], "holds no metrics.jsonl"),
        (["demo", "train"], "there is no command 'train'"),
        (["demo", "prepare", "--data", str(tmp_path), "--source", "novels"], "'novels'"),
        (["unknown"], "there is no command 'unknown'"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


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


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert re.fullmatch(r"frugal-dist [\w.()+ ]+\n", capsys.readouterr().out)


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
