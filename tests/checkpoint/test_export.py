"""``frugal-dist export``: a checkpoint of any engine becomes a folder that AutoModelForCausalLM loads."""

from __future__ import annotations

from pathlib import Path

import exporting
import pytest
import run_legs as legs
import torch
from forks import Forks
from save_and_load_ways import PORTABLE

SOURCES = [
    pytest.param("ZeRO-3", 3, marks=pytest.mark.heavy),
    pytest.param("FSDP2", 2, marks=pytest.mark.heavy),
    pytest.param("ZeRO-2 bf16", 2, marks=pytest.mark.heavy),
]

pytestmark = pytest.mark.timeout(900)


def saved(processes: Forks, engine: str, ranks: int, folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint, and the whole weights it must hold."""
    spot = (engine, "svd std", "adamw")
    (answer, *_) = processes.run(ranks, legs.as_bytes, "leg", spot, (0, 2), None, {(PORTABLE, 2): folder})
    weights: dict[str, torch.Tensor] = legs.from_bytes(answer)
    return weights


@pytest.mark.parametrize(("engine", "ranks"), SOURCES)
def test_what_any_engine_saved_is_loaded(engine: str, ranks: int, processes: Forks, tmp_path: Path) -> None:
    """With the weights of the optimizer, fp32 masters included, in their dtype or in another."""
    weights = saved(processes, engine, ranks, tmp_path / "saved")
    for dtype, options in ((torch.float32, ()), (torch.bfloat16, ("--dtype", "bf16"))):
        out = tmp_path / str(dtype)
        (answer,) = processes.run(1, exporting.export_and_load, tmp_path / "saved", out, *options)
        found, logits = legs.from_bytes(answer)
        assert found.keys() == weights.keys()
        for name, weight in weights.items():
            assert found[name].dtype == dtype
            assert torch.equal(found[name], weight.to(dtype)), name
        if dtype == torch.float32:
            (answer,) = processes.run(1, exporting.logits_of, legs.to_bytes(weights))
            torch.testing.assert_close(logits, legs.from_bytes(answer), rtol=1e-5, atol=1e-5)


def test_tied_weights_and_a_folder_of_checkpoints(processes: Forks, tmp_path: Path) -> None:
    processes.run(1, exporting.tied_weights_of_the_latest, tmp_path)


def test_a_run_is_exported_with_its_tokenizer(processes: Forks, tmp_path: Path) -> None:
    """Also from its folder of checkpoints or from one of them, with the permissions that files have here."""
    processes.run(1, exporting.what_is_found_of_a_run, tmp_path)


def test_what_does_not_fit_is_named(processes: Forks, tmp_path: Path) -> None:
    saved(processes, "one process", 1, tmp_path / "saved")
    (found,) = processes.run(1, exporting.refusals, tmp_path / "saved", tmp_path)
    words = {
        "out exists": "exists already",
        "no configuration": "give one with --config",
        "another model": "of another shape: ",
        "no tokenizer": "nowhere does not exist",
        "dtype": "dtype is 'fp8'",
        "no checkpoint": "is not a frugal_dist checkpoint",
    }
    assert found.keys() == words.keys(), "something was accepted"
    assert {what for what, text in found.items() if words[what] not in text} == set()
