"""Parameter groups, frozen weights, accumulation, clipping, unusual shapes: ZeRO gives the weights of one process."""

from __future__ import annotations

from collections.abc import Callable

import deepspeed_variants as variants
import pytest
import tables
from fleet import Fleet

Fleets = Callable[[int], Fleet]
LIMIT = 2e-5
FOUR_RANKS = ("all padding", "rows over three ranks")
STAGES = {"parameter_alignment": (1, 2), "small buckets": (1, 2), "several groups, offload": (1, 2, 3)}
"""Where not 0 to 3."""

QUICK = {
    "several groups": (0, 1, 3),
    "optimizer object": (2, 3),
    "optimizer callable": (2,),
    "frozen parameters": (0, 2, 3),
    "accumulation": (0, 1, 2, 3),
    "plain reduce": (2,),
    "clipping": (0, 1, 3),
    "clipping by default": (2,),
    "no_decay": (1, 3),
    "schedule": (2,),
    "parameter_alignment": (1,),
    "all padding": (1, 2, 3),
    "rows over three ranks, right": (2, 3),
    "rows over three ranks, left": (1, 3),
    "an empty group": (1, 3),
}


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
    assert found[0].largest <= LIMIT
