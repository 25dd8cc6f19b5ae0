"""``frugal-dist plan`` and ``memory``: what a recipe will hold and send on each rank, from its shapes alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("jsonargparse")

from frugal_dist.cli import main


def test_a_plan_says_what_a_rank_holds_and_sends(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "llama_60m", "--engine", "zero3", "--ranks", "4", "--gpu", "h100"]
    assert main([*arguments, "--optimizer.options.density", "0.5"]) == 0
    half = capsys.readouterr().out
    assert main(arguments) == 0
    quarter = capsys.readouterr().out
    for words in ("58.1 M parameters", "adamw", "galore", "fits into h100", "a refresh, beside the step"):
        assert words in quarter
    assert _state(quarter) < _state(half)


def test_baselines_are_planned_at_the_same_setting_beside_the_papers_count(capsys: pytest.CaptureFixture[str]) -> None:
    for density, galore in (("0.25", 298.3), ("0.5", 346.6)):  # of 60M: 0.291 GiB in the papers' table; AdamW 0.433
        assert main(["plan", "llama_60m", "--engine=ddp", "--ranks=1", f"--optimizer.options.density={density}"]) == 0
        text = capsys.readouterr().out
        assert _size(text, "computing the largest basis") > 0
        rows = _rows(text, ("this", "adamw", "galore"))
        papers = {cells[1].strip(): float(cells[4]) for cells in rows}
        assert papers == {"this": galore, "adamw": 443.1, "galore": galore}


def test_of_many_ranks_all_is_known_that_layouts_decide(capsys: pytest.CaptureFixture[str]) -> None:
    """State of all ranks and who refreshes; a rank count that does not divide the batch is named."""
    assert main(["plan", "llama_9m", "--engine", "zero2", "--ranks", "65"]) == 2
    text = capsys.readouterr().out
    assert "Refreshes are owned by 28 of 65 ranks" in text
    assert "A batch of 512 cannot be shared equally by 65 ranks" in text
    (this,) = _rows(text, ("this",))
    assert float(this[3].replace(",", "")) > float(this[4].replace(",", "")) > float(this[2].replace(",", "")) > 0.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("llama_60m --engine zero2 --ranks 4 --gpu v100", "v100 does not compute in bf16"),
        ("llama_60m --engine zero2 --ranks 4 --gpu v100", "the peak of a rank is"),
        ("llama_20m --engine fsdp2 --ranks 512", "AdamW needs less here"),
        ("llama_9m --engine ddp --ranks 1 --optimizer.name adamw", "| galore "),
    ],
)
def test_a_plan_has_adamw_beside_it_and_fits_a_terminal(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments.split()]) == 0
    text = capsys.readouterr().out
    assert said in text
    assert max(map(len, text.splitlines())) <= 80
    if "adamw" not in arguments:
        (row,) = _rows(text, ("together",))
        plain = [line.split("|")[2:4] for line in text.splitlines() if re.match(r"\| [^ ].*\|.*\d \|.*\|$", line)]
        above = plain[: plain.index(row[2:4])]
        for column in (0, 1):
            sizes = [float(cells[column].strip().replace(",", "") or 0) for cells in above]
            assert float(row[2 + column].replace(",", "")) == pytest.approx(sum(sizes), abs=0.6)
        assert "moments" not in row[1]


def test_memory_of_a_model_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a recipe, a folder or a config.json; LLaMA's are those of the papers' table."""
    config = '{"model_type": "gpt2", "vocab_size": 500, "n_embd": 4096, "n_layer": 2, "n_head": 4}'
    (tmp_path / "config.json").write_text(config)
    for name in (tmp_path, tmp_path / "config.json"):
        assert main(["memory", str(name)]) == 0
        text = capsys.readouterr().out
        assert text.splitlines()[0].split("|")[2].strip() == tmp_path.name
        assert {len(line) for line in text.splitlines()} == {len(text.splitlines()[0])}
        assert "| AdamW " in text
    assert main(["memory", "llama_1b"]) == 0
    assert [line.split("|")[2].strip() for line in capsys.readouterr().out.splitlines()[2:]] == [
        *("9.977", "3.227", "3.883", "0.977")
    ]


def test_a_plan_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the engine of the recipe, or the stage of its JSON."""
    (tmp_path / "three.json").write_text('{"zero_optimization": {"stage": 3}}')
    (tmp_path / "mine.yaml").write_text("model: {llama: 9M}\nengine: deepspeed\ndeepspeed: three.json\n")
    for engine in ([], ["--engine", "deepspeed"], ["--engine", "zero3"]):
        assert main(["plan", str(tmp_path / "mine.yaml"), "--ranks", "2", "--gpu", "v100", "--json", *engine]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["engine"], found["gpu"]["fits"], found["gpu"]["computes_in_it"]) == ("zero3", True, False)
        this, adamw = found["memory"]["this"], found["memory"]["adamw"]
        assert this["state_most_on_a_rank"] < adamw["state_most_on_a_rank"]
        assert this["peak"] <= this["together"]
        assert found["sent_by_the_optimizer"]["step"]["bytes"] > 0


def test_a_plan_knows_the_positions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}'
    )
    (tmp_path / "mine.yaml").write_text("model: {path: .}\nlength: 9\n")
    assert main(["plan", str(tmp_path / "mine.yaml"), "--ranks", "1", f"--model.path={tmp_path}"]) == 2
    assert "positions for 8 (n_positions)" in capsys.readouterr().err


def test_a_plan_of_replicas_that_do_not_share(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "llama_9m", "--engine", "ddp", "--ranks", "2"]
    assert main([*arguments, "--optimizer.options.shard_state", "false"]) == 0
    alone = capsys.readouterr().out
    assert main(arguments) == 0
    assert _state(alone) > _state(capsys.readouterr().out)


def test_any_causal_model_can_be_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "gpt2", "vocab_size": 500, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}'
    )
    (tmp_path / "mine.yaml").write_text(f"model: {{path: {tmp_path}, pretrained: true}}\nbatch: 8\nlength: 32\n")
    assert main(["plan", str(tmp_path / "mine.yaml"), "--engine", "zero1", "--ranks", "2"]) == 0
    text = capsys.readouterr().out
    assert "0.1 M parameters" in text
    assert "144x48" in text or "48x144" in text
    assert main(["plan", str(tmp_path / "mine.yaml"), "--engine=ddp", "--ranks=1", "--model.path=nowhere"]) == 2
    assert "model.path is 'nowhere', where no model's config.json can be read" in capsys.readouterr().err


@pytest.mark.parametrize(("engine", "micro"), [("ddp", "5"), ("zero2", "4")])
def test_a_plan_has_the_micro_batch_of_the_engine(engine: str, micro: str, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["--batch", "16", "--micro_batch", "5", "--length", "10"]
    assert main(["plan", "llama_9m", "--engine", engine, "--ranks", "2", *changes]) == 0
    assert f"activations of {micro}0 tokens" in capsys.readouterr().out


def test_a_plan_has_the_buffers_and_the_offload_of_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In bf16, on two ranks."""
    (tmp_path / "mine.yaml").write_text("model: {llama: 9M}\nengine: deepspeed\n")
    path = tmp_path / "ds.json"
    zero = '"stage": 2, "overlap_comm": true, "reduce_bucket_size": 1048576, "offload_optimizer": {"device": "cpu"}'
    path.write_text(f'{{"zero_optimization": {{{zero}}}}}')
    seen = {}
    for engine, changes in (
        ("zero2", []),
        ("zero2", ["--deepspeed", str(path)]),
        ("zero3", ["--deepspeed", str(path)]),
    ):
        assert main(["plan", str(tmp_path / "mine.yaml"), "--engine", engine, "--ranks", "2", *changes]) == 0
        seen[engine, bool(changes)] = capsys.readouterr().out
    plain, offloaded, other = seen.values()
    assert _size(plain, "buffers of DeepSpeed") == pytest.approx(2 * 500e6 / 2**20, abs=0.1)
    assert _size(offloaded, "buffers of DeepSpeed") == 4.0
    assert "host" not in plain
    assert "| optimizer state, on the host " in offloaded
    assert "On the host" in offloaded
    assert "is for stage 2: planned is stage 3" in other
    assert "is for stage" not in offloaded


def _size(text: str, name: str) -> float:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name}")]
    return float(line.split("|")[2].replace(",", ""))


def _rows(text: str, names: tuple[str, ...]) -> list[list[str]]:
    return [cells for line in text.splitlines() if (cells := line.split("|"))[1:] and cells[1].strip() in names]


def _state(text: str) -> float:
    (line,) = [line for line in text.splitlines() if line.startswith("| optimizer state   ")]
    return float(line.split("|")[2].replace(",", ""))


@pytest.mark.parametrize(
    ("engine", "ranks", "gpu", "words"),
    [
        ("zero4", "2", "h100", "engine is 'zero4'"),
        ("single", "2", "h100", "exactly 1"),
        ("hsdp:3", "4", "h100", "4 ranks do not divide"),
        ("fsdp2:4xtp:2", "4", "h100", "4 ranks are not 1 x 4 x 2"),
        ("hsdp:2xtp:2", "4", "h100", "write fsdp2:SHARDS or hsdp:REPLICASxSHARDS"),
        ("fsdp2xep:3", "4", "h100", "4 ranks do not divide into groups of 3"),
        ("fsdp2xtp:0", "4", "h100", "tp and ep take one size each"),
        ("zero2", "2", "h1000", "gpu is 'h1000'"),
    ],
)
def test_plans_that_make_no_sense(
    engine: str, ranks: str, gpu: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "llama_9m", "--engine", engine, "--ranks", ranks, "--gpu", gpu]) == 2
    assert words in capsys.readouterr().err
