"""The DeepSpeed configuration of a recipe: made from its keys, or from a JSON beside it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("jsonargparse")

from frugal_dist.training.recipe import read_recipe


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
