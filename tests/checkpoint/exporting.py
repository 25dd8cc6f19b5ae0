"""Jobs of test_export: they import transformers, so they run where it is imported already."""

from __future__ import annotations

import io
import json
import os
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import run_legs as legs
import torch
from deepspeed_cases import batch, small_llama
from torch import nn

from frugal_dist import Frugal, checkpoint, cli, split_parameters
from frugal_dist.training.export import export


def export_and_load(folder: Path, out: Path, *options: str) -> bytes:
    """The weights and the logits of what ``frugal-dist export`` has written, as AutoModelForCausalLM loads it."""
    from transformers import AutoModelForCausalLM

    assert cli.main(["export", str(folder), "--out", str(out), *options]) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.use_cache and model.generation_config.use_cache, "as it was trained"
    return legs.to_bytes(({name: param.detach() for name, param in model.named_parameters()}, _logits(model)))


def logits_of(packed: bytes) -> bytes:
    """Of the model with these weights."""
    weights = legs.from_bytes(packed)
    model = small_llama()
    model.load_state_dict(weights)
    return legs.to_bytes(_logits(model))


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=batch(0)).logits
    return logits


def _tied() -> nn.Module:
    from transformers import LlamaForCausalLM

    config = small_llama().config
    config.tie_word_embeddings = True
    return LlamaForCausalLM(config)


def tied_weights_of_the_latest(root: Path) -> None:
    """A model whose head is its embedding, in a folder of checkpoints."""
    from transformers import AutoModelForCausalLM

    model = _tied()
    optimizer = Frugal(split_parameters(model), projection="columns", density=0.25)
    for step in (1, 2):
        legs.loss_of(model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        checkpoint.save_step(root / "run", step, model, optimizer)
    report = export(root / "run", root / "out").report()
    assert "step_000002" in report
    assert "Without a tokenizer" in report
    found = AutoModelForCausalLM.from_pretrained(root / "out")
    assert found.lm_head.weight is found.model.embed_tokens.weight
    for (name, mine), theirs in zip(model.named_parameters(), found.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def _tokenizer(folder: Path) -> Path:
    """A tokenizer.json alone, as prepared data has it; what ends documents stands in the description of the data."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from frugal_dist.training.data.prepared import PreparedData, write_description

    words = {word: number for number, word in enumerate(("<pad>", "<end>", "<unk>", "a", "b", "c"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<pad>", "<end>", "<unk>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_description(folder, PreparedData(2, "", "", 6, "uint16", words["<end>"], 9, 9))
    return folder


def what_is_found_of_a_run(root: Path) -> None:
    """Its latest checkpoint and its tokenizer, from whatever part of it is named; a run without a tokenizer; links."""
    from transformers import AutoTokenizer

    model = small_llama()
    optimizer = Frugal(split_parameters(model), projection="columns", density=0.25)
    run = root / "runs" / "a"
    for step in (1, 2):
        checkpoint.save_step(run / "checkpoints", step, model, optimizer)
    data = {"kind": "tokens", "path": str(_tokenizer(root / "data"))}
    write_record(run, data=data)
    os.umask(0o027)
    checkpoints = run / "checkpoints"
    for number, named in enumerate(
        (run, checkpoints, checkpoints / "step_000002", checkpoints / "latest", run / "metrics.jsonl")
    ):
        out = root / f"out{number}"
        if number == 1:
            (root / "disk").mkdir()
            out.symlink_to(root / "disk")
        done = export_by_command(named, out)
        assert "step_000002" in done
        assert f"Tokenizer: {root / 'data'}" in done
        found = AutoTokenizer.from_pretrained(out)
        assert (found.eos_token, found.pad_token, found.unk_token) == ("<end>", "<pad>", "<unk>")
        assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o640}
    assert (root / "out1").is_symlink()
    assert (root / "disk" / "model.safetensors").exists()
    write_record(run, data={"kind": "files", "path": "x.txt", "tokenizer": str(root / "gone" / "tokenizer.json")})
    assert "Without a tokenizer: the run's cannot be taken: the tokenizer" in export_by_command(run, root / "without")
    (root / "a file").touch()
    for source, out, words in (
        (root / "runs", root / "x", "holds the runs a; name one of them"),
        (run, root / "a file" / "x", "cannot be written: Not a directory"),
    ):
        with pytest.raises(ValueError, match=words):
            export(source, out)


def write_record(run: Path, **values: object) -> None:
    (run / "metrics.jsonl").write_text(json.dumps({"kind": "run", **values}) + "\n")


def export_by_command(source: Path, out: Path) -> str:
    with redirect_stdout(io.StringIO()) as said:
        assert cli.main(["export", str(source), "--out", str(out)]) == 0
    return said.getvalue()


def refusals(folder: Path, root: Path) -> dict[str, str]:
    """The errors; none of them may leave anything behind."""
    other, plain, wide = root / "other", root / "plain", root / "wide.json"
    other.mkdir()
    (other / "thesis.tex").write_text("thesis")
    model = nn.Sequential(nn.Linear(8, 8))
    checkpoint.save(plain, model, Frugal(split_parameters(model), projection="columns", density=0.25))
    config = json.loads(small_llama().config.to_json_string())
    wide.write_text(json.dumps({**config, "hidden_size": 64}))
    attempts = {
        "out exists": (folder, other, {}),
        "no configuration": (plain, root / "a", {}),
        "another model": (folder, root / "b", {"config": wide}),
        "no tokenizer": (folder, root / "c", {"tokenizer": root / "nowhere"}),
        "dtype": (folder, root / "d", {"dtype": "fp8"}),
        "no checkpoint": (root, root / "e", {}),
    }
    before = sorted(path.name for path in root.iterdir())
    found = {}
    for what, (source, out, options) in attempts.items():
        try:
            export(source, out, **options)  # type: ignore[arg-type]
        except ValueError as error:
            found[what] = str(error)
    assert sorted(path.name for path in root.iterdir()) == before, "something was left behind"
    assert (other / "thesis.tex").read_text() == "thesis"
    return found
