"""The Trainer of transformers with Frugal: the weights of plain PyTorch, resumed bit for bit; what is refused.

With the start of the processes about 90 s on two busy cores.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_cases
import pytest
import tables
import trainer_cases
from fleet import Fleet

Fleets = Callable[[int], Fleet]
WAYS = ["plain", "FSDP2", *trainer_cases.CONFIGS]
QUICK = ("plain", "FSDP2", "ZeRO-2, offload, client", "ZeRO-3, from_pretrained")
"""What is not named here runs with --heavy."""
SHARED = [way for way in WAYS if way != "plain"]


def _check(found: dict[str, Any], title: str, row: str) -> None:
    tables.note(title, row, "largest difference", found["apart"])
    tables.count(title, row, "weights that differ after resuming", len(found["differing"]))
    assert found["optimizer"] == "Frugal"
    assert found["steps"] == hf_cases.STEPS
    assert found["apart"] <= hf_cases.LIMIT
    assert found["differing"] == []


def _marked(way: str) -> object:
    return pytest.param(way, marks=[] if way in QUICK else [pytest.mark.heavy])


@pytest.mark.parametrize("way", [_marked(way) for way in WAYS])
def test_two_ranks_train_like_plain_pytorch_and_resume_exactly(way: str, fleet: Fleets, tmp_path: Path) -> None:
    first, second = fleet(2).run(trainer_cases.train_and_resume, tmp_path, way)
    _check(first, "Trainer, 2 ranks", way)
    _check(second, "Trainer, 2 ranks", way)
    assert (first["moments"] + second["moments"] == hf_cases.MOMENTS) == (way in SHARED)
    assert (first["moments"] == hf_cases.MOMENTS) == (way == "plain")


@pytest.mark.heavy
def test_one_process(fleet: Fleets, tmp_path: Path) -> None:
    (found,) = fleet(1).run(trainer_cases.train_and_resume, tmp_path, "plain")
    _check(found, "Trainer, 1 rank", "plain")


@pytest.mark.heavy
def test_released_gradients_under_fsdp2_and_ddp(fleet: Fleets, tmp_path: Path) -> None:
    """They change no bit; DDP is refused."""
    assert fleet(2).run(trainer_cases.released, tmp_path, "FSDP2") == [[]] * 2
    for message in fleet(2).run(trainer_cases.trouble, tmp_path, "released"):
        assert message.startswith("ValueError: ")
        assert "wrapped in DistributedDataParallel" in message


@pytest.mark.heavy
def test_released_gradients_on_one_process(tmp_path: Path) -> None:
    assert trainer_cases.released(tmp_path, "plain") == []
    clipped, accumulated = (trainer_cases.trouble(tmp_path, f"released, {how}") for how in ("clipped", "accumulated"))
    assert "TrainingArguments(max_grad_norm=1) clips by the norm" in clipped
    assert "had a second gradient before optimizer.step()" in accumulated


@pytest.mark.heavy
def test_replicas_share_their_state_if_the_callback_saves_it(fleet: Fleets, tmp_path: Path) -> None:
    for found in fleet(2).run(trainer_cases.train_and_resume, tmp_path, "plain", {"shard_state": True}):
        _check(found, "Trainer, 2 ranks", "plain, shard_state=True")
        assert found["moments"] < hf_cases.MOMENTS


LEGS: trainer_cases.Legs = {
    "FSDP2": ("FSDP2", "FSDP2", {"projection": "randk"}),
    "FSDP2, FULL": ("FSDP2, FULL", "FSDP2, FULL", {"projection": "svd"}),
    "ZeRO-2": ("ZeRO-2", "ZeRO-2", {"projection": "svd"}),
    "ZeRO-3": ("ZeRO-3", "ZeRO-3", {"projection": "columns"}),
    "ZeRO-3 to DDP": ("ZeRO-3", "plain", {"projection": "rows", "shard_state": True}),
    "DDP to ZeRO-2": ("plain", "ZeRO-2, client", {"projection": "svd", "shard_state": True}),
    "FSDP2 to ZeRO-3": ("FSDP2", "ZeRO-3, client", {"projection": "blockwise"}),
}


def test_other_rows_are_told_and_a_portable_resume_once(tmp_path: Path) -> None:
    warned, said = trainer_cases.resume_with_other_rows(tmp_path, "plain")
    (text,), (line,) = warned, said
    rows = hf_cases.BATCH
    assert f"had {rows} rows, a step of this one has {2 * rows}" in text
    copy = tmp_path / f"checkpoint-{trainer_cases.MIDDLE}" / "frugal"
    assert line.endswith(f"from its portable copy ({copy}), saved by plain tensors on 1 rank")


DEADLINE = 900.0
"""For a job of many runs, on few cores that may be busy."""


@pytest.mark.heavy
@pytest.mark.timeout(4 * DEADLINE)
def test_other_ranks_go_on(fleet: Fleets, tmp_path: Path) -> None:
    """2 ranks save, 1, 2 and 3 resume."""
    want = fleet(2).run(trainer_cases.save_portably, tmp_path, LEGS, deadline=DEADLINE)[0]
    for ranks in (1, 3, 2):
        for found in fleet(ranks).run(trainer_cases.resume_portably, tmp_path, LEGS, deadline=DEADLINE):
            for name, (losses, apart) in found.items():
                assert len(losses) == hf_cases.STEPS
                exact = ranks == 2 and len(set(LEGS[name][:2])) == 1
                assert losses == pytest.approx(want[name], abs=0 if exact else 1e-5), f"{name} on {ranks}"
                assert apart <= (0 if exact else hf_cases.LIMIT), f"{name} on {ranks}"
                tables.note("Trainer, saved on 2 ranks", name, f"{ranks} ranks", apart)


@pytest.mark.heavy
def test_parts_of_another_run_are_not_taken(fleet: Fleets, tmp_path: Path) -> None:
    for nowhere, foreign, *differing in fleet(2).run(trainer_cases.moved_checkpoints, tmp_path):
        assert "the rest is not in its folder" in nowhere
        assert "the rest is not in its folder" in foreign
        assert differing == []


def test_what_the_json_leaves_out_is_told_by_one_rank(fleet: Fleets, tmp_path: Path) -> None:
    """Arguments of the Trainer that do not count; and what is projected, after the first step."""
    (warned, said), other = fleet(2).run(trainer_cases.told, tmp_path)
    (text,) = warned
    assert "leaves out lr, weight_decay, so Frugal has its defaults: lr=0.001 and not " in text
    assert "as TrainingArguments says" in text
    assert '"lr": "auto"' in text
    assert said.count("elements projected") == 1
    assert other == ([], "")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("parts, nobody saves them", "callbacks=[FrugalCallback()]"),
        ("FULL_STATE_DICT", "SHARDED_STATE_DICT"),
        ("JSON and kwargs", "ignore optimizer_cls_and_kwargs"),
        ("optimizers= under DeepSpeed", "optimizers=(...)"),
        ("another optimizer", "trains with AdamW"),
        ("another JSON optimizer", "not with Frugal"),
        ("no factories", "Update transformers"),
        ("forced offload", '"zero_force_ds_cpu_optimizer": false'),
    ],
)
def test_refused_on_all_ranks(name: str, words: str, fleet: Fleets, tmp_path: Path) -> None:
    for message in fleet(2).run(trainer_cases.trouble, tmp_path, name):
        assert message.startswith("ValueError: ")
        assert words in message


@pytest.mark.parametrize(
    "name",
    ["parts, nothing is saved", "FULL_STATE_DICT, only the model is saved", "optimizers= under DDP", "train() twice"],
)
def test_not_refused(name: str, fleet: Fleets, tmp_path: Path) -> None:
    assert fleet(2).run(trainer_cases.trouble, tmp_path, name) == ["", ""]
