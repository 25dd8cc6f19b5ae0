"""The examples in docs/distributed.md, on four real processes."""

from __future__ import annotations

import os
import re
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
    launch = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node=4", "--rdzv-backend=c10d"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launch, "--rdzv-endpoint=localhost:0", "script.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = Frugal(split_parameters(model), lr=1e-3, process_group=None)
    checkpoint.load(tmp_path / ("by_hand", "accelerate", "trainer/frugal")[number], model, optimizer)
    assert all(not (old == new).all() for old, new in zip(before, model.parameters(), strict=True))
    _, load = optimizer.everything()
    assert {work.state.counter("updates") for work in load.works} == {3}
