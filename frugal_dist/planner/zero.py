"""What the settings of a DeepSpeed JSON decide about memory, besides the stage. Estimates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BUCKET = 500_000_000
LIVE = 1_000_000_000
"""Elements: DeepSpeed's defaults."""


@dataclass(frozen=True)
class Zero:
    """``wide_sums``: gradients of micro-batches add up in fp32, though the weights are half. ``bucket``: elements of
    all buffers in which gradients are sent, ``live``: of weights that stage 3 keeps gathered, at most. ``*_on_host``:
    it lies in the machine's memory.
    """

    stage: int
    wide_sums: bool
    bucket: int
    live: int
    optimizer_on_host: bool
    weights_on_host: bool


def read_zero(config: Mapping[str, Any], stage: int, low: bool) -> Zero:
    """What a DeepSpeed JSON says, at a stage that may be another than its own. ``low``: the weights are half."""
    zero = config.get("zero_optimization", {})
    size = int(zero.get("reduce_bucket_size", BUCKET))
    if stage in (1, 2) and zero.get("overlap_comm"):
        size *= 2
    host = offloads(zero, "optimizer") and stage > 0
    return Zero(
        stage=stage,
        wide_sums=low
        and stage > 0
        and not (stage == 2 and host)
        and config.get("data_types", {}).get("grad_accum_dtype") == "fp32",
        bucket=size if zero.get("contiguous_gradients", True) else 0,
        live=int(zero.get("stage3_max_live_parameters", LIVE)),
        optimizer_on_host=host,
        weights_on_host=offloads(zero, "param") and stage == 3,
    )


def offloads(zero: Mapping[str, Any], what: str) -> bool:
    """Whether a ``zero_optimization`` section keeps ``optimizer`` or ``param`` (weights) in the machine's memory."""
    return bool((zero.get(f"offload_{what}") or {}).get("device", "none") != "none")


def gradient_bytes(zero: Zero, item: int, everything: int, part: int) -> tuple[int, int]:
    """(Until the step, in the step) of a model of ``everything`` elements whose ``part`` this rank updates.

    ``item``: bytes of a weight. The step has them in fp32; at stage 2 sums in fp32 are these already, at stage 0 in
    fp32 the model's own are.
    """
    if zero.stage == 0:
        return item * everything, 0 if item == 4 else 4 * part
    if zero.stage == 1:
        return (4 + item if zero.wide_sums else item) * everything, 0 if zero.wide_sums else 4 * part
    if zero.stage == 2 and zero.wide_sums:
        return 0, 4 * part
    return (4 if zero.wide_sums else item) * part, 4 * part


def buffer_bytes(zero: Zero, item: int, everything: int) -> int:
    """Buffers for sending gradients, and at stage 3 the weights that are gathered, at most."""
    if zero.stage == 0 or (zero.stage == 1 and zero.wide_sums and not zero.optimizer_on_host):
        return (4 if zero.wide_sums else item) * min(BUCKET, everything)
    return item * (zero.bucket + (min(zero.live, everything) if zero.stage == 3 else 0))
