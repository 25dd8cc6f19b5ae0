"""Parameter groups, frozen weights, accumulation, clipping, unusual shapes: ZeRO gives the weights of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import deepspeed_cases as cases
import deepspeed_variants as variants
import pytest
import tables
from fleet import Fleet

Fleets = Callable[[int], Fleet]
SIGNS = ("lion",)
FOUR_RANKS = ("all padding", "rows over three ranks")
STAGES = {
    "parameter_alignment": (1, 2),
    "small buckets": (1, 2),
    "several groups, offload": (1, 2, 3),
    "frozen at first": (0,),
    "split products": (2, 3),
    "frozen for a while, clipping, offload": (1, 2, 3),
}
"""Where not 0 to 3."""

QUICK = {
    "several groups": (3,),
    "optimizer object": (3,),
    "optimizer callable": (2,),
    "frozen parameters": (2,),
    "accumulation": (3,),
    "clipping": (3,),
    "clipping by default": (2,),
    "no_decay": (1,),
    "schedule": (2,),
    "parameter_alignment": (1,),
    "an empty group": (1,),
    "only matrices are trained": (1,),
    "gates, columns": (3,),
}
"""What is not named here runs with --heavy."""


def _items() -> list[object]:
    items = []
    for name in variants.VARIANTS:
        for stage in STAGES.get(name, (0, 1, 2, 3)):
            marks = [] if stage in QUICK.get(name, ()) else [pytest.mark.heavy]
            items.append(pytest.param(name, stage, marks=marks, id=f"{name}-{stage}"))
    return items


@pytest.mark.parametrize(("name", "stage"), _items())
def test_variants_give_the_weights_of_one_process(name: str, stage: int, fleet: Fleets) -> None:
    found = fleet(4 if name.startswith(FOUR_RANKS) else 2).run(variants.run, name, stage)
    assert len(set(found)) == 1, f"ranks hold different weights: {found}"
    tables.put("DeepSpeed, variants: largest difference by stage", name, str(stage), f"{found[0].largest:.1e}")
    if name in SIGNS:
        assert found[0].flips <= 1e-3 * found[0].entries
    else:
        assert found[0].largest <= variants.LIMIT


QUICK_TO_FREEZE = {("2", "svd std"), ("3", "columns")}
FREEZING = [
    pytest.param(setting, projection, marks=[] if (setting, projection) in QUICK_TO_FREEZE else [pytest.mark.heavy])
    for setting in cases.SETTINGS
    for projection in ("svd std", "columns", "blockwise")
]


@pytest.mark.parametrize(("setting", "projection"), FREEZING)
def test_freezing_in_mid_run_acts_as_on_one_process(setting: str, projection: str, fleet: Fleets) -> None:
    (first, first_stays), second = fleet(2).run(variants.frozen_for_a_while, setting, cases.PROJECTIONS[projection])
    assert second == (first, first_stays)
    assert first_stays, "frozen weights moved, or others did not"
    assert first.largest <= (1e-2 if cases.SETTINGS[setting].half else variants.LIMIT)


@pytest.mark.parametrize(
    "setting",
    ["3", *(pytest.param(one, marks=pytest.mark.heavy) for one in ("0, bf16", "1", "2", "BF16_Optimizer"))],
)
def test_what_deepspeed_left_out_cannot_be_unfrozen(setting: str, fleet: Fleets, tmp_path: Path) -> None:
    for text, same, trains in fleet(2).run(variants.unfrozen, setting, tmp_path):
        assert text.startswith("model.layers.0.mlp.gate_proj.weight and 2 more was frozen")
        assert "frugal_dist.checkpoint" in text
        assert same and trains, "the advice does not help"
