"""Checkpoints of DeepSpeed engines: a resumed run ends in the same bits, at and between refreshes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import deepspeed_resume as resume
import pytest
import tables
from deepspeed_cases import PROJECTIONS
from deepspeed_variants import with_an_empty_group
from fleet import Fleet

Fleets = Callable[[int], Fleet]
SETTINGS = (
    "0",
    "1",
    "2",
    "3",
    "3, sub-groups",
    "1, offload",
    "3, offload",
    "BF16_Optimizer",
    "0, bf16",
    "2, bf16",
    "3, bf16",
)
STOPS = (2, 3, 4)
"""Refreshes happen at 0, 3 and 6: just before one, at one, and between."""

QUICK = {
    "1": ("svd left", "columns"),
    "2": ("svd left", "columns"),
    "3": ("svd std", "columns"),
    "3, sub-groups": ("randk",),
    "BF16_Optimizer": ("svd left", "columns"),
}
"""What is not named here runs with --heavy."""


def _items() -> list[object]:
    items = []
    for setting in SETTINGS:
        for projection in PROJECTIONS:
            marks = [] if projection in QUICK.get(setting, ()) else [pytest.mark.heavy]
            items.append(pytest.param(setting, projection, marks=marks, id=f"{setting}-{projection}"))
    return items


@pytest.mark.parametrize(("setting", "projection"), _items())
def test_a_resumed_run_ends_in_the_same_bits(setting: str, projection: str, fleet: Fleets, tmp_path: Path) -> None:
    stops = STOPS if projection == "svd std" else STOPS[:1]
    found = fleet(2).run(resume.resumed, setting, PROJECTIONS[projection], tmp_path, stops)
    tables.put("DeepSpeed: tensors that differ after a resume", setting, projection, str(sum(map(len, found))))
    assert found == [[], []]


@pytest.mark.heavy
@pytest.mark.parametrize("setting", ["2", "BF16_Optimizer"])
def test_a_run_on_one_rank_resumes(setting: str, fleet: Fleets, tmp_path: Path) -> None:
    """DeepSpeed loads the optimizer before its masters: nothing may be looked up in between."""
    assert fleet(1).run(resume.resumed, setting, PROJECTIONS["columns"], tmp_path, STOPS[:1]) == [[]]


def test_parameters_that_an_evaluation_left_whole_are_replaced(fleet: Fleets, tmp_path: Path) -> None:
    for saved, later, loaded in fleet(2).run(resume.loaded_after_an_evaluation, tmp_path):
        assert loaded == saved != later


def test_a_save_without_managed_accumulation(fleet: Fleets, tmp_path: Path) -> None:
    for after_one, after_two, between in fleet(2).run(resume.saved_where_the_user_counts, tmp_path):
        assert after_one == after_two == ""
        assert "micro-batches of the running step are done" in between


@pytest.mark.parametrize(
    ("projection", "mode"), [("svd std", "project"), pytest.param("randk", "keep", marks=pytest.mark.heavy)]
)
def test_state_that_is_carried_over_resumes(projection: str, mode: str, fleet: Fleets, tmp_path: Path) -> None:
    options = {**PROJECTIONS[projection], "on_refresh": mode, "refresh_schedule": "staggered"}
    assert fleet(2).run(resume.resumed, "2", options, tmp_path, (2, 4)) == [[], []]


@pytest.mark.parametrize("setting", ["1", pytest.param("3", marks=pytest.mark.heavy)])
def test_groups_keep_their_settings(setting: str, fleet: Fleets, tmp_path: Path) -> None:
    """DeepSpeed removes the empty one from the optimizer; the others must not move up."""
    assert fleet(2).run(resume.resumed, setting, {}, tmp_path, (2,), with_an_empty_group) == [[], []]


@pytest.mark.heavy
@pytest.mark.parametrize("setting", ["1", "2", "3", "BF16_Optimizer"])
def test_another_number_of_ranks_is_refused_with_what_to_use(setting: str, fleet: Fleets, tmp_path: Path) -> None:
    options = PROJECTIONS["columns"]
    fleet(2).run(resume.saved, setting, options, tmp_path)
    for text in fleet(4).run(resume.refused_elsewhere, setting, options, tmp_path):
        assert "world size of 2" in text or "no file for this rank" in text
        assert "has no portable copy. Resume on " in text
        assert "FrugalCallback(portable=True)" in text
        assert "If another optimizer" not in text
    (tmp_path / "frugal").mkdir()
    for text in fleet(4).run(resume.refused_elsewhere, setting, options, tmp_path):
        assert f"has a portable copy, {tmp_path / 'frugal'}, for any number of ranks" in text
        assert "give FrugalCallback(portable=True) when resuming, too" in text


@pytest.mark.heavy
def test_stage_0_goes_on_with_any_number_of_ranks(fleet: Fleets, tmp_path: Path) -> None:
    """Replicas do not share state there, so rank 0's is everybody's."""
    options = PROJECTIONS["svd std"]
    want, *_ = fleet(2).run(resume.saved, "0", options, tmp_path)
    for found, counts in fleet(4).run(resume.continued_elsewhere, "0", options, tmp_path):
        assert found == want
        assert counts == {3}


@pytest.mark.parametrize("setting", ["0", "0, bf16"])
def test_stage_0_does_not_save_one_part_of_shared_state(setting: str, fleet: Fleets, tmp_path: Path) -> None:
    options = {**PROJECTIONS["svd std"], "shard_state": True}
    for text in fleet(2).run(resume.refused_to_save, setting, options, tmp_path):
        assert "rank 0 only" in text
        assert "frugal_dist.checkpoint" in text


@pytest.mark.heavy
@pytest.mark.parametrize("setting", ["1", "2, bf16", "3", "3, bf16", "3, sub-groups"])
def test_states_that_were_moved_away_and_back(setting: str, fleet: Fleets) -> None:
    """At ZeRO-3 with a part of our own: DeepSpeed moves the state of its FusedAdam only."""
    assert fleet(2).run(resume.moved_away_and_back, setting, PROJECTIONS["svd std"]) == [[], []]


@pytest.mark.parametrize(
    "setting", ["3, bf16", *(pytest.param(one, marks=pytest.mark.heavy) for one in ("1", "2", "BF16_Optimizer"))]
)
def test_from_adamw_to_frugal(setting: str, fleet: Fleets, tmp_path: Path) -> None:
    for told, changed, counts in fleet(2).run(resume.from_adamw, setting, tmp_path):
        assert "If another optimizer saved it" in told and "load_optimizer_states=False" in told
        assert not changed
        assert counts == {1}
