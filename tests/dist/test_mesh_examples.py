"""The examples in docs/distributed.md, on four real processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from frugal_dist import Frugal, checkpoint, split_parameters

transformers = pytest.importorskip("transformers", minversion="5.20")
pytest.importorskip("accelerate")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = re.findall(
    r"<!-- example -->\n```python\n(.*?)```", (ROOT / "docs" / "distributed.md").read_text(), re.DOTALL
)
ON_CPUS = """
from accelerate.parallelism_config import ParallelismConfig

ParallelismConfig._validate_accelerator = lambda self, accelerator: None  # it wants GPUs
"""


def run(folder: Path, ranks: int, *arguments: str) -> None:
    """``folder``/script.py on so many processes."""
    launch = [str(Path(sys.executable).parent / "torchrun"), f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*launch, "--rdzv-endpoint=localhost:0", "script.py", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.heavy
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", range(3))
def test_an_example_trains_and_its_checkpoint_loads_on_one_process(number: int, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "script.py").write_text(ON_CPUS + EXAMPLES[number])
    run(tmp_path, 4)
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = Frugal(split_parameters(model), lr=1e-3, process_group=None)
    checkpoint.load(tmp_path / ("by_hand", "accelerate", "trainer/frugal")[number], model, optimizer)
    assert all(not (old == new).all() for old, new in zip(before, model.parameters(), strict=True))
    _, inputs = optimizer.everything()
    assert {mat.state.counter("updates") for mat in inputs.mats} == {3}


MIXTRAL = """
import sys, torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from frugal_dist import Frugal, checkpoint, split_parameters

sizes = {key: int(size) for key, _, size in (word.partition("=") for word in sys.argv[1:])}
more = {"distributed_config": DistributedConfig(**sizes)} if sizes else {}
model = AutoModelForCausalLM.from_pretrained("model", **more)
options = {"projection": "columns", "state_free": "sgd", "eps": 1e-3, "update_gap": 2}
optimizer = Frugal(split_parameters(model), lr=1e-2, **options)
for step in range(3):
    rows = torch.randint(0, 128, (4, 16), generator=torch.Generator().manual_seed(step))
    model(input_ids=rows, labels=rows).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
checkpoint.save("ranks" if sizes else "alone", model, optimizer)
"""


@pytest.mark.heavy
@pytest.mark.timeout(300)
def test_experts_as_transformers_lays_them_on_meshes(tmp_path: Path) -> None:
    """A small Mixtral: packed experts under tensor parallelism, and experts on meshes of their own. In fp32, in which
    sums have another order.
    """
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=64, num_local_experts=4,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    (tmp_path / "script.py").write_text(MIXTRAL)
    run(tmp_path, 1)
    want = checkpoint.SavedWeights(tmp_path / "alone")
    for sizes in ("tp_size=2 fsdp_size=2", "fsdp_size=4 ep_size=2", "tp_size=2 fsdp_size=2 ep_size=4"):
        run(tmp_path, 4, *sizes.split())
        found = checkpoint.SavedWeights(tmp_path / "ranks")
        assert max(float((found[name] - want[name]).abs().max()) for name in want.shapes) < 1e-5, sizes


TRAINER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig
from frugal_dist.integrations.transformers import FrugalCallback, optimizer_cls_and_kwargs

copies, resume, *sizes = sys.argv[1:]
sizes = {key: int(size) for key, _, size in (word.partition("=") for word in sizes)}
more = {"distributed_config": DistributedConfig(**sizes)} if sizes else {}
model = AutoModelForCausalLM.from_pretrained("model", **more)
args = TrainingArguments(
    "out", max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=12 // int(copies), report_to=[],
    save_only_model=bool(sizes), use_cpu=True, learning_rate=1e-2, max_grad_norm=0.0, disable_tqdm=True,
)
options = optimizer_cls_and_kwargs(args, projection="randk", state_free="sgd", update_gap=3)
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 128, (12, 16)).repeat(4, 1)]
trainer = Trainer(
    model, args, train_dataset=rows, optimizer_cls_and_kwargs=options, callbacks=[FrugalCallback(portable=True)]
)
trainer.train(resume_from_checkpoint="out/checkpoint-2" if resume == "resume" else None)
if trainer.is_world_process_zero():
    json.dump([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], open("losses.json", "w"))
"""


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_the_trainer_goes_on_from_a_mesh_on_any_ranks(tmp_path: Path) -> None:
    """FSDP2 2 x TP 2 of transformers' own; its rank 0 would save a part. Then the same, three ranks, and one."""
    config = transformers.LlamaConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    (tmp_path / "script.py").write_text("import torch\ntorch.manual_seed(0)\n" + ON_CPUS + TRAINER)
    run(tmp_path, 4, "2", "begin", "fsdp_size=2", "tp_size=2")
    want = json.loads((tmp_path / "losses.json").read_text())
    assert want[0] > want[1] + 0.01 > want[2] + 0.02 > want[3] + 0.03
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    for ranks, copies, *sizes in ((4, "2", "fsdp_size=2", "tp_size=2"), (3, "3", "fsdp_size=3"), (1, "1")):
        run(tmp_path, ranks, copies, "resume", *sizes)
        assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(want, abs=1e-4), f"{ranks} ranks"
