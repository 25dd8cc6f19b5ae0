"""Accelerate: ``prepare`` with a finished Frugal, or a JSON one; the weights of plain PyTorch; what is refused.

About 20 s with the start of the processes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import accelerate_cases
import hf_cases
import pytest
import tables
from fleet import Fleet
from selection import mostly_heavy

Fleets = Callable[[int], Fleet]
ENGINES = ["plain", "FSDP2", "ZeRO-2", "ZeRO-3", "ZeRO-2, JSON", "ZeRO-2, offload"]
QUICK = ("FSDP2", "ZeRO-2, JSON")
"""What is not named here runs with --heavy."""


@pytest.mark.parametrize("engine", mostly_heavy(ENGINES, QUICK))
def test_two_ranks_train_like_plain_pytorch_and_load_exactly(engine: str, fleet: Fleets, tmp_path: Path) -> None:
    found = fleet(2).run(accelerate_cases.train_and_resume, tmp_path, engine)
    for one in found:
        tables.note("Accelerate, 2 ranks", engine, "largest difference", one["apart"])
        assert one["optimizer"] == "Frugal"
        assert one["apart"] <= hf_cases.LIMIT
        assert one["differing"] == []
    assert sum(one["moments"] for one in found) == hf_cases.MOMENTS * (2 if engine == "plain" else 1)


@pytest.mark.heavy
@pytest.mark.parametrize("projection", ["svd", "columns", "randk", "blockwise"])
def test_fsdp2_goes_on_on_another_number_of_ranks(projection: str, fleet: Fleets, tmp_path: Path) -> None:
    fleet(2).run(accelerate_cases.save_in_the_middle, tmp_path, projection)
    assert max(fleet(4).run(accelerate_cases.resume_elsewhere, tmp_path, projection)) <= hf_cases.LIMIT


LEGS: accelerate_cases.Legs = {
    "FSDP2": ("FSDP2", "FSDP2", "columns"),
    "FSDP2, FULL": ("FSDP2, FULL_STATE_DICT", "FSDP2, FULL_STATE_DICT", "svd"),
    "ZeRO-2": ("ZeRO-2", "ZeRO-2", "randk"),
    "ZeRO-3": ("ZeRO-3", "ZeRO-3", "svd"),
    "ZeRO-3 to FSDP2": ("ZeRO-3", "FSDP2", "blockwise"),
    "FSDP2 to DDP": ("FSDP2", "plain", "rows"),
}


DEADLINE = 900.0
"""For a job of many runs, on few cores that may be busy."""


@pytest.mark.heavy
@pytest.mark.timeout(4 * DEADLINE)
def test_other_ranks_go_on(fleet: Fleets, tmp_path: Path) -> None:
    """2 ranks save, 1, 2 and 3 resume."""
    want = fleet(2).run(accelerate_cases.save_portably, tmp_path, LEGS, deadline=DEADLINE)[0]
    for ranks in (1, 3, 2):
        for found in fleet(ranks).run(accelerate_cases.resume_portably, tmp_path, LEGS, deadline=DEADLINE):
            for name, (losses, apart) in found.items():
                exact = ranks == 2 and len(set(LEGS[name][:2])) == 1
                assert losses == pytest.approx(want[name], abs=0 if exact else 1e-5), f"{name} on {ranks}"
                assert apart <= (0 if exact else hf_cases.LIMIT), f"{name} on {ranks}"
                tables.note("Accelerate, saved on 2 ranks", name, f"{ranks} ranks", apart)


@pytest.mark.heavy
def test_another_stage_goes_on(fleet: Fleets, tmp_path: Path) -> None:
    legs: accelerate_cases.Legs = {"3": ("ZeRO-2", "ZeRO-3", "svd")}
    want = fleet(2).run(accelerate_cases.save_portably, tmp_path, legs)[0]
    for found in fleet(2).run(accelerate_cases.resume_portably, tmp_path, legs):
        losses, apart = found["3"]
        assert losses == pytest.approx(want["3"], abs=1e-5)
        assert apart <= hf_cases.LIMIT


@pytest.mark.heavy
def test_what_an_earlier_save_left_is_not_taken(fleet: Fleets, tmp_path: Path) -> None:
    for message in fleet(2).run(accelerate_cases.saved_again_without, tmp_path):
        assert "again, or changed, without frugal" in message


@pytest.mark.heavy
def test_one_process(fleet: Fleets, tmp_path: Path) -> None:
    (found,) = fleet(1).run(accelerate_cases.train_and_resume, tmp_path, "plain")
    assert found["apart"] <= hf_cases.LIMIT
    assert found["differing"] == []


@pytest.mark.heavy
@pytest.mark.parametrize("built_first", [True, False])
def test_silent_replacement_under_offload_is_refused(built_first: bool, fleet: Fleets) -> None:
    for message in fleet(2).run(accelerate_cases.replaced, built_first):
        assert message.startswith("ValueError: ")
        assert '"zero_force_ds_cpu_optimizer": false' in message


def test_without_accelerate_deepspeed_refuses_it_itself(fleet: Fleets) -> None:
    for message in fleet(2).run(accelerate_cases.replaced_by_deepspeed):
        assert "zero_force_ds_cpu_optimizer" in message


def test_accelerate_refuses_two_optimizers_itself(fleet: Fleets) -> None:
    for message in fleet(2).run(accelerate_cases.two_optimizers):
        assert "DummyOptim" in message


@pytest.mark.parametrize(
    ("engine", "options"), [("FSDP2, FULL_STATE_DICT", {}), ("plain", {"shard_state": True})], ids=["FULL", "parts"]
)
def test_what_would_be_saved_in_part_is_refused(engine: str, options: dict[str, bool], fleet: Fleets) -> None:
    for message in fleet(2).run(accelerate_cases.partly_saved, engine, options):
        assert message.startswith("ValueError: ")
        assert "saved_elsewhere" in message
