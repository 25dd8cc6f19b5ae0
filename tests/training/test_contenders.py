"""Contenders of a comparison: their rates and settings, and those that contradict themselves."""

from __future__ import annotations

import pytest

pytest.importorskip("jsonargparse")

from frugal_dist.config import config_from
from frugal_dist.training.compare import contender
from frugal_dist.training.finetune.recipe import FinetuneRecipe
from frugal_dist.training.optimizers import frugal_options
from frugal_dist.training.recipe import read_recipe


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
        ("frugal:density=1:density=0", "appears twice"),
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
