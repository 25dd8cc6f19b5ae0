"""The optimizer section of a DeepSpeed config: every key, "auto", misspelled keys, and features that are refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed_experts
import deepspeed_json as json_jobs
import pytest
from fleet import Fleet, environment, free_port

from frugal_dist.config import HYPERPARAMETERS, FrugalConfig

Fleets = Callable[[int], Fleet]


def test_every_hyperparameter_arrives(fleet: Fleets) -> None:
    assert set(json_jobs.OTHER) == set(HYPERPARAMETERS)
    for groups in fleet(2).run(json_jobs.groups_after, json_jobs.OTHER, {"stage": 2}):
        for group in groups:
            assert {key: group[key] for key in HYPERPARAMETERS} == json_jobs.OTHER


def test_auto_means_our_default(fleet: Fleets) -> None:
    others = ("project", "skip", "no_decay", "shard_state", "lr_scale")
    params = dict.fromkeys((*HYPERPARAMETERS, *others), "auto")
    for groups in fleet(2).run(json_jobs.groups_after, params, {"stage": 1}):
        for group in groups:
            assert {key: group[key] for key in HYPERPARAMETERS} == asdict(FrugalConfig())


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"updategap": 100}, "Did you mean 'update_gap'?"),
        ({"projection": "colums"}, "Did you mean 'columns'?"),
        (
            {"torch_adam": True, "densty": 0.5},
            "Frugal(torch_adam=True): it says which AdamW DeepSpeed takes. Leave it out",
        ),
        ({"torch_adam": True, "densty": 0.5}, "Frugal: unknown key 'densty'. Did you mean 'density'?"),
        ({"lr": "1e-3"}, "lr='1e-3' must be a number, not str"),
        ({"density": 1.5}, "density=1.5 must be between 0 and 1"),
        ({"no_decay": ["*.nrom.weight"]}, "matches no parameter"),
    ],
)
def test_what_is_wrong_in_the_config_is_named(params: dict[str, Any], told: str, fleet: Fleets) -> None:
    for text in fleet(2).run(json_jobs.error_of, params, {"stage": 2}, {}):
        assert text.startswith("ValueError")
        assert told in text


def test_keys_of_deepspeeds_adam_that_say_what_is_done_here_may_stay(fleet: Fleets) -> None:
    params = {"adam_w_mode": True, "bias_correction": True, "amsgrad": False, "torch_adam": False, "fused": False}
    more = {**params, "fp32_optimizer_states": True, "weight_decay": 0.1}
    assert fleet(2).run(json_jobs.error_of, more, {"stage": 2}, {}, 1) == ["", ""]


def test_known_keys_are_those_that_json_can_say(fleet: Fleets) -> None:
    for text in fleet(2).run(json_jobs.error_of, {"quux": 1}, {"stage": 2}, {}):
        assert "Known keys: " in text
        assert "process_group" not in text
        assert "whole_model" not in text


def test_the_name_in_another_case(fleet: Fleets) -> None:
    more = {"optimizer": {"type": "frugal", "params": {"projection": "columns"}}}
    assert fleet(2).run(json_jobs.error_of, {}, {"stage": 1}, more, 1) == ["", ""]


@pytest.mark.parametrize("stage", [1, 3])
def test_sharded_parameters_do_not_fit_a_lonely_process(stage: int, fleet: Fleets) -> None:
    for text in fleet(2).run(json_jobs.error_of, {"process_group": None}, {"stage": stage}, {}, 1):
        assert text.startswith("ValueError")
        assert "process_group=None" in text


CPU_ONLY = '"offload_optimizer": {"device": "cpu"}'
OFFLOAD = {"device": "cpu"}
REFUSED = {
    "SuperOffload": ({"stage": 3, "offload_optimizer": {**OFFLOAD, "super_offload": True}}, {}, CPU_ONLY),
    "ZenFlow": ({"stage": 2, "offload_optimizer": OFFLOAD, "zenflow": {"topk_ratio": 0.1}}, {}, CPU_ONLY),
    "partial offload": ({"stage": 3, "offload_optimizer": {**OFFLOAD, "ratio": 0.5}}, {}, CPU_ONLY),
    "NVMe offload of the optimizer": (
        {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "."}},
        {},
        CPU_ONLY,
    ),
    "hpZ": ({"stage": 3, "zero_hpz_partition_size": 2}, {}, "plain ZeRO-3"),
    "round_robin_gradients": ({"stage": 2, "round_robin_gradients": True}, {}, "set it to false"),
    "elastic": ({"stage": 1, "elastic_checkpoint": True}, {}, "frugal_dist.checkpoint"),
    "universal": ({"stage": 1}, {"checkpoint": {"load_universal": True}}, "frugal_dist.checkpoint"),
    "expert parallelism": ({"stage": 2}, {"expert_parallel": {"enabled": True, "autoep_size": 2}}, "autoep_size 1"),
    "DeepCompile": ({"stage": 2}, {"compile": {"deepcompile": True}}, "torch.compile"),
    "AutoTP": ({"stage": 1}, {"tensor_parallel": {"autotp_size": 2}, "train_micro_batch_size_per_gpu": 12}, "ZeRO-3"),
    "NVMe offload of parameters": (
        {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "."}},
        {},
        '"offload_param": {"device": "cpu"}',
    ),
    "torch_autocast in float16": (
        {"stage": 2},
        {"torch_autocast": {"enabled": True, "dtype": "float16"}},
        "use bfloat16",
    ),
    "zero_quantized_nontrainable_weights": (
        {"stage": 3, "zero_quantized_nontrainable_weights": True},
        {},
        "remove it",
    ),
    "bf16_master_weights_and_grads": (
        {"stage": 2},
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        "fp32 master weights",
    ),
}


@pytest.mark.parametrize("feature", REFUSED)
def test_what_is_not_supported_is_refused_by_name(feature: str, fleet: Fleets) -> None:
    zero, more, instead = REFUSED[feature]
    for text in fleet(2).run(json_jobs.error_of, {"lr": 1e-3}, zero, more, 1):
        assert text.startswith("ValueError: Frugal does not support DeepSpeed's")
        assert feature in text
        assert instead in text


def test_tensor_parallelism_by_tp_model_init_is_refused(fleet: Fleets) -> None:
    for text in fleet(2).run(json_jobs.error_of_tp_model_init, {"stage": 1}):
        assert text.startswith("ValueError: Frugal does not support DeepSpeed's tensor parallelism (AutoTP, mpu)")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_experts_that_are_others_on_each_rank_are_refused(stage: int, fleet: Fleets) -> None:
    """They begin as copies of one, under the same names: no comparison would show it."""
    for text in fleet(2).run(deepspeed_experts.trained, 2, {"stage": stage}):
        assert "expert parallelism (deepspeed.moe with ep_size above 1)" in text
        assert "use ep_size 1" in text


def test_experts_that_all_ranks_hold_train(fleet: Fleets) -> None:
    assert fleet(2).run(deepspeed_experts.trained, 1, {"stage": 2}) == ["", ""]


def test_mics_is_refused_by_deepspeed(fleet: Fleets) -> None:
    for text in fleet(2).run(json_jobs.error_of, {"lr": 1e-3}, {"stage": 3, "mics_shard_size": 1}, {}, 1):
        assert "MiCS ZeRO-3 sharding has been removed" in text


@pytest.mark.parametrize("path", ["object", "callable"])
def test_it_is_refused_for_an_optimizer_from_the_script_too(path: str, fleet: Fleets) -> None:
    for text, at_once in fleet(2).run(json_jobs.error_of_client, path, {"stage": 2, "round_robin_gradients": True}):
        assert "round_robin_gradients: set it to false" in text
        assert at_once == (path == "callable"), "an object is there before the engine: refused at its first step"


def test_a_corrected_config_is_accepted(fleet: Fleets) -> None:
    """The engine that was refused lives on until it is collected; it must not be taken for the new one."""
    for told, steps in fleet(2).run(json_jobs.refused_and_then_built, {"stage": 2, "round_robin_gradients": True}):
        assert "round_robin_gradients" in told
        assert steps == 1


def test_names_are_known_whatever_happens_to_other_engines(fleet: Fleets) -> None:
    for names in fleet(2).run(json_jobs.names_while_another_engine_goes):
        assert "model.layers.0.mlp.up_proj.weight" in names


def test_no_decay_means_the_same_on_every_path(fleet: Fleets) -> None:
    for by_name, *others in fleet(2).run(json_jobs.decays, ["*norm.weight", "embed_tokens.*"]):
        assert "lm_head.weight" in by_name
        assert not {"model.norm.weight", "model.embed_tokens.weight"} & by_name
        assert others == [by_name] * 3


@pytest.mark.parametrize("stage", [2, 3])
def test_patterns_in_the_json_choose_what_is_projected(stage: int, fleet: Fleets) -> None:
    """The first rank gives the advice and, after the first step, tells what is projected and what that saves."""
    params = {"project": ["*_proj.weight"], "skip": ["layers.0.*"], "lr_scale": 0.25}
    first, second = fleet(2).run(json_jobs.told_by, params, {"stage": stage})
    chosen = {name for name, projected in first[0].items() if projected}
    assert first[0] == second[0]
    assert chosen == {name for name in first[0] if name.endswith("_proj.weight") and "layers.0." not in name}
    assert ["Only" in text for text in first[1] if "are projected" in text] == [True]
    assert not [text for text in second[1] if "are projected" in text]
    assert first[2].count("elements projected") == 1
    assert second[2] == ""


def test_patterns_against_given_groups_are_refused(fleet: Fleets) -> None:
    for text in fleet(2).run(json_jobs.error_of_groups, {"skip": ["layers.0.*"]}, {"stage": 2}):
        assert 'its group says "projected": True, but project and skip of Frugal say otherwise' in text


SCRIPT = """
import sys, logging
sys.path.insert(0, {here!r})
import frugal_dist
import deepspeed
import deepspeed_cases as cases
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
engine = cases.start(cases.config_of({{"lr": 1e-3}}, {{"stage": 2}}, 1))
cases.train(engine, range(1))
print("trained with", type(engine.basic_optimizer).__name__)
"""


@pytest.mark.heavy
def test_frugal_dist_may_be_imported_before_deepspeed(tmp_path: Path) -> None:
    """The fleets of the other tests import it after DeepSpeed."""
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    code = SCRIPT.format(here=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment(), **alone}, cwd=tmp_path, capture_output=True, text=True
    )
    assert "trained with Frugal" in done.stdout, done.stderr[-3000:]
