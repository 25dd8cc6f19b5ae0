"""Lightning: its Trainer and Fabric train like a plain loop, and resume exactly, on one process and under DDP."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning_cases as cases
import pytest
import torch
from fleet import ROOT, Fleet
from lightning_cases import BATCH, apart
from torch import Tensor, nn

from frugal_dist import checkpoint

Fleets = Callable[[int], Fleet]
LIMIT = 1e-10

# Lightning's advice to its users, and its own use of what torch and Python have deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.*"),
]


@pytest.mark.parametrize(
    "projection",
    ["svd", "columns", pytest.param("blockwise", marks=pytest.mark.heavy)],
)
def test_automatic_optimization(projection: str, tmp_path: Path) -> None:
    options = {"projection": projection}
    whole, half = cases.module_for(**options), cases.module_for(**options)
    cases.fit(whole, cases.EPOCHS)
    assert apart(whole.model, cases.plain(**options)) <= LIMIT
    cases.fit(half, 1).save_checkpoint(tmp_path / "half.ckpt")
    assert apart(cases.resumed(tmp_path / "half.ckpt", **options), whole.model) == 0


def test_released_gradients_under_the_trainer() -> None:
    """Its closure runs backward within step(); it clips between the two, when there is nothing left."""
    model = cases.small()
    optimizer = cases.optimizer_for(nn.ModuleDict({"model": model}))
    for batch in cases.rows().split(BATCH):
        cases.loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert apart(cases.released(None), model) == 0
    with pytest.raises(ValueError, match=re.escape("Trainer(gradient_clip_val=1) clips by the norm")):
        cases.released(1.0)


def test_manual_optimization_with_two_optimizers() -> None:
    """Lightning's wrappers, with closures and without, in turns."""
    import lightning

    class Pair(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.models = nn.ModuleList([cases.small(), cases.small()])

        def configure_optimizers(self) -> list[Any]:
            return [cases.optimizer_for(model) for model in self.models]

        def training_step(self, batch: Tensor, index: int) -> None:
            first, second = self.optimizers()
            schedule_free = second if index % 2 else first
            model = self.models[index % 2]

            def closure() -> Tensor:
                schedule_free.zero_grad()
                loss = cases.loss_of(model, batch)
                self.manual_backward(loss)
                return loss

            if index % 4 < 2:
                schedule_free.step(closure=closure)
            else:
                closure()
                schedule_free.step()

    pair = Pair()
    loader = torch.utils.data.DataLoader(cases.rows(), batch_size=BATCH)
    lightning.Trainer(max_epochs=1, **cases.QUIET).fit(pair, loader)
    for number, model in enumerate(pair.models):
        alone = cases.small()
        optimizer = cases.optimizer_for(alone)
        for batch in cases.rows().split(BATCH)[number::2]:
            optimizer.zero_grad()
            cases.loss_of(alone, batch).backward()
            optimizer.step()
        assert apart(model, alone) <= LIMIT


def test_the_programs_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    programs = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "lightning.md").read_text(), re.S)
    assert len(programs) == 2
    for program in programs:
        exec(program, {"__name__": "page"})
    assert checkpoint.latest(tmp_path / "run") == tmp_path / "run" / "step_000008"


def test_two_ranks_save_all_and_resume_on_any_number(fleet: Fleets, tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"
    for one in fleet(2).run(cases.trainer_under_ddp, path):
        assert one["apart"] <= LIMIT
        assert one["after resuming"] == 0
        assert one["told"] == []
        assert "saved_elsewhere" in one["refused"]
    assert apart(cases.resumed(path, batch=2 * BATCH), cases.plain(ranks=2)) <= LIMIT


def test_fabric_on_two_ranks(fleet: Fleets, tmp_path: Path) -> None:
    for one in fleet(2).run(cases.fabric_under_ddp, tmp_path):
        assert (one["divided"], one["shared"], one["loaded"]) == (False, True, 0)
        assert "saved_elsewhere" in one["refused"]


def test_ranks_of_which_one_is_fabrics_refuse_together(fleet: Fleets) -> None:
    for message in fleet(2).run(cases.fabric_on_one_rank):
        assert "shared state (shard_state=True or False says so on all ranks)" in message


def test_zero_redundancy_optimizer_is_refused(fleet: Fleets) -> None:
    for messages in fleet(2).run(cases.zero_redundancy):
        for message in messages:
            assert "shares its state among the ranks by itself" in message
