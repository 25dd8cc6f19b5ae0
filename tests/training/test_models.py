"""What a recipe says of its model, trained for a few steps: it changes memory and speed, not what is learned."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("jsonargparse")
pytest.importorskip("transformers")

from frugal_dist.cli import main
from frugal_dist.training.data.demo_texts import prepare_demo
from frugal_dist.training.metrics.record import of_kind, read_metrics
from frugal_dist.training.models import build_llama, build_model, check_positions, token_losses
from frugal_dist.training.pretrain import pretrain
from frugal_dist.training.recipe import Model, read_recipe

pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("models")]

VOCABULARY = 512
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 101,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "use_cache": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a model of transformers with its weights, and a recipe of three steps."""
    found = tmp_path_factory.mktemp("models")
    prepare_demo(found / "data", source="topics", vocab_size=VOCABULARY)
    (found / "model").mkdir()
    (found / "model" / "config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(3)
    model = build_model(Model(path=str(found / "model")), VOCABULARY, 32)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(9)  # type: ignore[operator]  # its losses are others than a new one's
    model.save_pretrained(found / "model")  # type: ignore[operator]
    recipe = {
        "model": {"path": str(found / "model")},
        "data": {"path": str(found / "data"), "epochs": 9},
        "optimizer": {"lr": 1e-3, "options": {"projection": "columns", "state_free": "sgd", "eps": 1e-3}},
        "saving": {"every": 0},
        "steps": 3,
        "batch": 4,
        "length": 32,
        "precision": "fp32",
        "evaluate_every": 0,
        "evaluation_tokens": 256,
        "log_every": 1,
    }
    (found / "recipe.yaml").write_text(json.dumps(recipe))
    return found


def losses(folder: Path, name: str, *changes: str) -> list[float]:
    """Of three steps, and of the validation before and after them."""
    run = folder / name
    assert pretrain(read_recipe(str(folder / "recipe.yaml"), ["--folder", str(run), *changes])) == 0
    return [row["loss"] for kind in ("train", "validation") for row in of_kind(read_metrics(run), kind)]


@pytest.fixture(scope="module")
def plain(folder: Path) -> list[float]:
    return losses(folder, "plain")


@pytest.mark.parametrize(
    ("key", "value", "most"),
    [
        ("checkpointing", "true", 0.0),
        ("attention", "eager", 1e-5),
        ("pretrained", "true", None),
        ("tied", "true", None),
    ],
)
def test_keys_of_the_model(key: str, value: str, most: float | None, folder: Path, plain: list[float]) -> None:
    """``most``: how far losses may be from those without it; None: another model, which learns too."""
    found = losses(folder, key, f"--model.{key}", value)
    assert len(found) == len(plain) == 5
    if most is None:
        assert abs(found[0] - plain[0]) > 1e-4
        assert found[-1] < found[-2]
    else:
        assert found == pytest.approx(plain, abs=most, rel=0)


def test_what_the_keys_build(folder: Path) -> None:
    """Recomputing layers, the chosen attention, the weights of the folder, one matrix for both embeddings."""
    path = str(folder / "model")
    model = build_model(Model(path=path, pretrained=True, checkpointing=True, attention="eager"), VOCABULARY, 32)
    assert model.is_gradient_checkpointing
    assert model.config._attn_implementation == "eager"  # type: ignore[union-attr]
    from safetensors.torch import load_file

    saved = load_file(folder / "model" / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[name]), name
    assert len(saved) == len(list(model.named_parameters()))
    for tied in (False, True):
        model = build_model(Model(path=path, tied=tied), VOCABULARY, 32)
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied  # type: ignore[operator]


def test_weights_are_trained_on_under_another_optimizer(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A run of AdamW is refused to FRUGAL by name; its weights are taken over as the message says."""
    before = losses(folder, "adamw", "--optimizer.name", "adamw")
    run, words = folder / "adamw", ["pretrain", str(folder / "recipe.yaml"), "--folder"]
    assert main([*words, str(run)]) == 2
    assert "optimizer.name 'adamw' (now 'frugal')" in (said := capfd.readouterr().err)
    assert f"frugal-dist export {run / 'checkpoints'} --out DIR" in said
    assert main(["export", str(run / "checkpoints"), "--out", str(folder / "exported")]) == 0
    after = losses(folder, "frugal", "--model.path", str(folder / "exported"), "--model.pretrained", "true")
    assert after[3] == before[4], "validation before the first step is that after the last of AdamW"
    assert after[4] < after[3]


def test_a_run_has_a_folder_of_its_own(folder: Path, plain: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for named, words in (("", "folder is empty"), (str(folder / "plain" / "checkpoints"), "holds checkpoints")):
        assert main(["pretrain", str(folder / "recipe.yaml"), "--folder", named]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.timeout(900)
@pytest.mark.heavy  # the C++ compiler takes minutes
def test_a_compiled_model_learns_the_same(folder: Path, plain: list[float]) -> None:
    torch._dynamo.utils.counters.clear()
    assert losses(folder, "compile", "--model.compile", "true") == pytest.approx(plain, abs=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_a_fresh_llama_ends_its_texts_with_the_separator() -> None:
    model: Any = build_model(Model(llama="quick"), VOCABULARY, 32, 7)
    ends = {(config.bos_token_id, config.eos_token_id) for config in (model.config, model.generation_config)}
    assert ends == {(7, 7)}
    assert model.model.embed_tokens.padding_idx is None


def _tiny(kind: str, **more: Any) -> Any:
    """A decoder with 32 positions, if it counts them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"vocab_size": 64, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(kind, **small, **more)
    if getattr(config, "max_position_embeddings", 0) > 0:
        config.max_position_embeddings = 32
    auto: Any = AutoModelForCausalLM
    return auto.from_config(config).eval()


POSITIONS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "opt": {"ffn_dim": 8, "word_embed_proj_dim": 8},
    "gptj": {"rotary_dim": 4},
    "mpt": {"max_seq_len": 32},
    "roberta": {"is_decoder": True, "intermediate_size": 8},
    "llama": {"intermediate_size": 8},
    "gpt_neox": {"intermediate_size": 8},
    "falcon": {"alibi": True},
    "xglm": {"ffn_dim": 8},
    "xlnet": {"d_inner": 8, "d_head": 4},
    "mamba": {},
}


@pytest.mark.parametrize("kind", POSITIONS)
def test_a_model_is_given_no_more_tokens_than_it_has_positions_for(kind: str) -> None:
    """Refused exactly where the model itself would fail, on a GPU with all that ran there; rotary ones are told."""
    model = _tiny(kind, **POSITIONS[kind])
    limit = 30 if kind == "roberta" else 32  # which counts from 2
    for tokens in (limit, limit + 1):
        try:
            model(input_ids=torch.full((1, tokens), 5))
        except (IndexError, RuntimeError):
            with pytest.raises(ValueError, match=rf"length asks for {limit + 1} tokens .* positions for {limit} "):
                check_positions(model, tokens)
        else:
            assert bool(check_positions(model, tokens)) == (tokens > 32 and kind in ("llama", "gpt_neox", "xglm"))


def test_pretraining_beyond_the_positions_ends_before_it_begins(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    short = {"model_type": "gpt2", "vocab_size": VOCABULARY, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32}
    (tmp_path / "config.json").write_text(json.dumps(short))
    changes = [f"--model.path={tmp_path}", f"--folder={tmp_path / 'run'}", "--model.attention=eager", "--length=33"]
    assert pretrain(read_recipe(str(folder / "recipe.yaml"), changes)) != 0
    assert "positions for 32 (n_positions). Lower length" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "bloom", "n_layer": 1}, "model.attention is 'sdpa', which a bloom model does not have"),
        ({"model_type": "t5", "d_model": 8, "num_layers": 1}, "a t5 model: it is no causal language model"),
    ],
)
def test_models_that_cannot_be_built_are_told_why(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    small = {"vocab_size": 64, "hidden_size": 8, "n_head": 2, "num_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({**small, **config}))
    with pytest.raises(ValueError, match=re.escape(said)):
        build_model(Model(path=str(tmp_path)), 64, 16)


def test_model_has_the_promised_size_and_starts_by_guessing():
    model = build_llama("quick", 4096, 128)
    assert 5e6 < sum(parameter.numel() for parameter in model.parameters()) < 10e6
    rows = torch.randint(0, 4096, (2, 9))
    losses = token_losses(model, rows).detach()
    assert losses.shape == (16,)
    assert float(losses.mean()) == pytest.approx(math.log(4096), abs=0.3)
    with pytest.raises(ValueError, match="model is 'huge'; choose one of quick, 9M"):
        build_llama("huge", 4096, 128)
