"""What a recipe says of its model, trained for a few steps: it changes memory and speed, not what is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("jsonargparse")
pytest.importorskip("transformers")

from frugal_dist.training.metrics import of_kind, read_metrics
from frugal_dist.training.models import build_model
from frugal_dist.training.prepare import prepare_demo
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
