"""The training application under ZeRO: no rank ever holds the whole model at stage 3, and gradients add up in fp32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import training_cases as cases
from fleet import Fleet

Fleets = Callable[[int], Fleet]


def test_stage_3_trains_as_stage_2_without_the_whole_model_on_a_rank(fleet: Fleets) -> None:
    """In bf16, two ranks, two micro-batches of a step."""
    runs = {stage: fleet(2).run(cases.trained, {"stage": stage}) for stage in (2, 3)}
    for two, three in zip(*runs.values(), strict=True):
        assert three.losses == pytest.approx(two.losses, abs=1e-3)
        assert (two.sums, three.sums) == ("torch.float32", "torch.float32")
        assert two.adamw == three.adamw == 8 * two.elements // 2, "two moments of fp32 masters, half of them"
        assert two.moved
        assert not three.moved, "the whole model was moved at once"
    assert runs[3][0].weights == runs[3][1].weights
