"""Data for training: streams and token files, their order, their positions, and errors before training starts."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("jsonargparse")
pytest.importorskip("transformers")

import corpora

from frugal_dist.cli import main
from frugal_dist.training.data.batches import IGNORED, DocumentRows, TokenRows, cut_or_padded
from frugal_dist.training.data.c4_and_hub import hub_dataset, open_documents
from frugal_dist.training.data.local_or_hub import nearby
from frugal_dist.training.data.prepare import Preparation, prepare
from frugal_dist.training.data.prepared import open_prepared
from frugal_dist.training.data.sources import open_data
from frugal_dist.training.data.streams import Lane, Position, Reading, Stream, choose_lanes
from frugal_dist.training.data.tokenizer import read_encoder
from frugal_dist.training.finetune.classifiers import read_tokenizer
from frugal_dist.training.loop import Training
from frugal_dist.training.metrics.record import of_kind, read_metrics
from frugal_dist.training.models import read_causal_config, token_losses
from frugal_dist.training.pretrain import pretrain
from frugal_dist.training.recipe import Data, Model, Recipe, read_recipe

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """C4-like data with and without README, and tokenizers."""
    found = tmp_path_factory.mktemp("data")
    corpora.write_c4(found / "c4")
    corpora.write_t5_like(found / "t5")
    corpora.write_tokenizer(found / "small.json")
    return found


def recipe_for(folder: Path, **data: Any) -> Recipe:
    values = {"kind": "c4", "path": str(folder / "c4"), "tokenizer": str(folder / "t5"), "rows": "truncated", **data}
    return Recipe(
        model=Model(llama="quick", vocab_size=500),
        data=Data(**values),
        steps=2,
        batch=16,
        length=32,
        evaluation_tokens=500,
    )


def batches_of(stream: Any, count: int, first: int = 0, world: int = 1) -> list[list[list[int]]]:
    """Global batches, put together from the shares of ``world`` ranks that share one process."""
    return [
        [row for rank in range(world) for row in stream[rank].share(first + index, rank, world).tolist()]
        for index in range(count)
    ]


# --- what a row is


def test_rows_are_those_of_the_papers(folder: Path) -> None:
    """As the papers' code calls the tokenizer: cut or padded to the length; labels are ids, padding is none."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "t5")
    encoder = read_encoder(str(folder / "t5"))
    texts = ["short", *corpora.topics()[0][:5]]
    theirs = tokenizer(texts, max_length=48, truncation=True, padding="max_length", return_tensors="np")
    labels = np.where(theirs["input_ids"] == tokenizer.pad_token_id, IGNORED, theirs["input_ids"])
    ours = np.stack([cut_or_padded(document, 48) for document in encoder.encode(texts)])
    assert (ours == labels).all()
    assert (encoder.vocab_size, len(tokenizer)) == (500, 510)
    assert max(encoder.encode(["<extra_id_3></s>"])[0][:-1]) < 500  # text, not tokens
    assert 1 not in encoder.encode(["<extra_id_3></s>"])[0][:-1]


@torch.no_grad()
def test_padding_changes_no_loss(folder: Path) -> None:
    """The loss of a padded row is that of the row alone, with an attention mask as in the papers' code."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    rows = torch.randint(3, 500, (2, 32))
    rows[1, 20:] = IGNORED
    losses = token_losses(model, rows).view(2, 31)
    assert (losses[1, 19:] == 0).all()
    alone = token_losses(model, rows[1:, :20])
    assert torch.allclose(losses[1, :19], alone, atol=1e-5)
    ids, labels = rows.clamp(min=0), rows
    theirs = model(input_ids=ids, attention_mask=(rows != IGNORED).long(), labels=labels).loss
    assert float(losses.sum() / (31 + 19)) == pytest.approx(float(theirs), abs=1e-5)


def test_document_rows_of_a_token_file() -> None:
    tokens = np.array([5, 6, 0, 7, 0, 1, 2, 3, 4, 5, 6, 0], dtype=np.uint32)
    rows = DocumentRows(tokens, 5, separator=0)
    assert rows.count == 3
    assert rows.take([0, 2, 1]).tolist() == [[5, 6, 0, -100, -100], [1, 2, 3, 4, 0], [7, 0, -100, -100, -100]]
    assert (rows.targets(3), rows.targets(2)) == (2 + 1 + 4, 3)
    assert [rows.enough(tokens) for tokens in (0, 1, 2, 3, 4, 7, 99)] == [1, 1, 1, 2, 3, 3, 3]
    packed = TokenRows(tokens, 5)
    assert (packed.enough(5), packed.enough(99), packed.targets(2)) == (1, 2, 10)


# --- streams


@pytest.mark.parametrize("rows", ["packed", "truncated"])
def test_batches_do_not_depend_on_the_ranks(rows: str, folder: Path) -> None:
    recipe = recipe_for(folder, rows=rows, epochs=9)
    curves = []
    for world in (1, 2, 4):
        streams = [open_data(recipe, world).batches for _ in range(world)] if world < 4 else None
        if streams is None:  # opened once: what differs is the share only
            data = open_data(recipe, world).batches
            assert isinstance(data, Stream)
            streams = [Stream(data.reading, 16, data.lanes, False, 1) for _ in range(world)]
        curves.append(batches_of(streams, 3, world=world))
    assert curves[0] == curves[1] == curves[2]
    assert len(curves[0][0]) == 16
    assert {len(row) for row in curves[0][0]} == {33 if rows == "packed" else 32}
    assert curves[0][0] != curves[0][1]


def reading_of(folder: Path, **changes: Any) -> Reading:
    recipe = recipe_for(folder)
    known = Reading(open_documents(recipe.data), read_encoder(recipe.data.tokenizer), 32, False, 7, 0, 3.0)
    return replace(known, **changes)


@pytest.mark.parametrize("lanes", [1, 3, 8])  # three do not divide the files: each reads all and keeps its share
def test_every_pass_has_every_document_once_in_another_order(lanes: int, folder: Path) -> None:
    reading = reading_of(folder)
    wanted = sorted(
        cut_or_padded(ids, 32).tolist() for ids in reading.encoder.encode([t.strip() for t in corpora.topics()[0]])
    )
    passes = []
    for epoch in range(2):
        start = Position(epoch=epoch)
        found = [row.tolist() for n in range(lanes) for row, _ in Lane(reading, n, lanes).rows(start, passes=epoch + 1)]
        assert sorted(found) == wanted
        passes.append(found)
    assert passes[0] != passes[1]
    other = [row.tolist() for row, _ in Lane(replace(reading, seed=1), 0, lanes).rows(Position(), passes=1)]
    assert other != passes[0][: len(other)]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_a_lane_goes_on_from_every_position(packed: bool, lanes: int, folder: Path) -> None:
    """Across blocks and passes; a position survives what checkpoints allow: plain numbers and text."""
    lane = Lane(reading_of(folder, packed=packed, length=200 if packed else 32), lanes - 1, lanes)
    steps = list(lane.rows(Position()))
    assert {position.epoch for _, position in steps} == {0, 1, 2}
    for number in range(0, len(steps) - 1, max(1, len(steps) // 9)):
        saved = json.loads(json.dumps(vars(steps[number][1])))
        position = Position(**{**saved, "carry": tuple(saved["carry"])})
        later = lane.rows(position)
        for wanted, place in steps[number + 1 : number + 12]:
            row, position = next(later)
            assert row.tolist() == wanted.tolist()
            assert replace(position, source=None) == replace(place, source=None)


def test_packed_rows_lose_nothing(folder: Path) -> None:
    """Rows overlap by one token; together they are the documents, each with its separator."""
    reading = reading_of(folder, packed=True)
    rows = [row.tolist() for row, _ in Lane(reading, 0, 1).rows(Position(), passes=1)]
    assert all(before[-1] == after[0] for before, after in pairwise(rows))
    stream = [token for row in rows for token in row[:-1]]
    wanted = Counter(map(tuple, reading.encoder.encode(corpora.topics()[0])))
    assert 0 <= sum(len(ids) * count for ids, count in wanted.items()) - len(stream) <= 33
    ends = [number + 1 for number, token in enumerate(stream) if token == 1]
    found = Counter(tuple(stream[start:end]) for start, end in pairwise([0, *ends]))
    assert found <= wanted
    assert found.total() > 40


def test_lanes_follow_the_batch_alone() -> None:
    assert [choose_lanes(None, 512, world) for world in (1, 2, 4, 8, 64)] == [8] * 5
    assert [choose_lanes(None, batch, 1) for batch in (12, 7, 22, 1)] == [6, 7, 2, 1]
    assert choose_lanes(None, 512, 2, most=5) == 4
    assert choose_lanes(4, 512, 8) == 4
    with pytest.raises(ValueError, match=r"data.streams is 3: it must divide the batch of 512"):
        choose_lanes(3, 512, 1)
    with pytest.raises(ValueError, match="batch is 512, which 3 ranks"):
        choose_lanes(None, 512, 3)


@pytest.mark.parametrize("documents", ["line", "file"])
def test_batches_of_one_file_do_not_depend_on_the_ranks(documents: str, folder: Path, tmp_path: Path) -> None:
    """Also on more ranks than there are streams, and when the number changes on the way."""
    texts = [text.replace("\n", " ") for text in corpora.topics()[0]]
    (tmp_path / "one.txt").write_text("\n".join(texts))
    place = {"path": str(tmp_path / "one.txt"), "validation_path": str(tmp_path / "one.txt")}
    recipe = recipe_for(folder, kind="files", documents=documents, rows="packed", epochs=99, **place)
    curves = []
    for worlds in ((1, 1), (2, 2), (16, 4)):
        got, states = [], []
        for first, world in zip((0, 2), worlds, strict=True):
            streams = [open_data(recipe, world).batches for _ in range(world)]
            for stream in streams:
                if states:
                    stream.load_state_dict(states, first)
            got += batches_of(streams, 2, first, world)
            states = json.loads(json.dumps([stream.state_dict() for stream in streams]))
            for stream in streams:
                stream.close()
        curves.append(got)
        assert {state["lanes"] for state in states} == {8 if documents == "line" else 1}
    assert curves[0] == curves[1] == curves[2]


def test_a_stream_goes_on_with_other_ranks(folder: Path) -> None:
    """Two ranks save, one goes on, then four; in between more was read ahead than was trained on."""
    data = open_data(recipe_for(folder, epochs=9, shuffle_buffer=40), 1).batches
    assert isinstance(data, Stream)

    def fresh(states: list[dict[str, Any]], at: int, world: int) -> list[Stream]:
        other = replace(data.reading, block=3)  # as ranks would choose that are to divide it by another number
        found = [Stream(other, 16, 8, False, 2) for _ in range(world)]
        for stream in found:
            stream.load_state_dict(states, at)
        return found

    wanted = batches_of([data], 9)
    streams = [Stream(data.reading, 16, 8, False, 2) for _ in range(2)]
    got = batches_of(streams, 3, world=2)
    for first, world in ((3, 1), (6, 4)):
        states = json.loads(json.dumps([stream.state_dict() for stream in streams]))
        streams = fresh(states, first, world)
        got += batches_of(streams, 3, first, world)
    assert got == wanted
    unread = fresh([stream.state_dict() for stream in streams], 9, 1)[0].state_dict()
    assert len(unread["positions"]) == 8
    with pytest.raises(ValueError, match=r"step 4 has no position in .*c4"):
        streams[0].load_state_dict([unread], 4)
    with pytest.raises(ValueError, match=r"data.streams is 4, but the run was begun with 8"):
        Stream(data.reading, 16, 4, True, 1).load_state_dict([unread], 9)
    with pytest.raises(ValueError, match="seed is 5, but the run was begun with 0"):
        Stream(replace(data.reading, seed=5), 16, 8, True, 1).load_state_dict([unread], 9)
    with pytest.raises(ValueError, match=r"batch is 12, but the run was begun with 8 streams.*multiple of 8"):
        Stream(data.reading, 12, 6, False, 1).load_state_dict([unread], 9)


# --- kinds of sources


def texts_of(data: Data, validation: bool = False) -> list[str]:
    documents = open_documents(data, validation)
    return [text.strip() for text in documents.take(iter(documents.dataset), 10_000)[0]]


def test_every_kind_of_source(folder: Path, tmp_path: Path) -> None:
    train, validation = corpora.topics()
    bare = corpora.write_c4(tmp_path / "bare", readme=False)
    for place, kind in ((folder / "c4", "c4"), (bare, "c4"), (folder / "c4", "hub")):
        data = Data(kind=kind, path=str(place), name="en")
        assert sorted(texts_of(data)) == sorted(train), (place, kind)
        assert sorted(texts_of(data, validation=True)) == sorted(validation)
    corpora.write_jsonl(tmp_path / "a.jsonl", train[:3], "body")
    corpora.write_parquet(tmp_path / "b.parquet", train[:3], "body")
    (tmp_path / "c.txt").write_text("one\ntwo\n\nthree\n")
    for name in ("a.jsonl", "b.parquet"):
        both = {"path": str(tmp_path / name), "validation_path": str(tmp_path / name)}
        assert texts_of(Data(kind="files", column="body", **both)) == train[:3]
        assert texts_of(Data(kind="files", column="body", **both), validation=True) == train[:3]
    text = {"kind": "files", "path": str(tmp_path / "*.txt")}
    assert texts_of(Data(**text)) == ["one", "two", "", "three"]
    assert texts_of(Data(**text, documents="paragraph")) == ["one\ntwo", "three"]
    assert texts_of(Data(**text, documents="file")) == ["one\ntwo\n\nthree"]


# --- errors before training


def broken(folder: Path, tmp_path: Path, name: str) -> dict[str, Any]:
    """Data that cannot be trained on, by what is wrong with it."""
    copy = tmp_path / "copy"
    shutil.copytree(folder / "c4", copy)
    shard = next((copy / "en").glob("c4-train.00003*"))
    if name == "empty":
        shard.write_bytes(b"")
    elif name == "no gzip":
        shard.write_bytes(b"not packed\n")
    elif name == "no json":
        with gzip.open(shard, "wt") as file:
            file.write('{"text": "cut\n')
    elif name == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif name == "no split":
        for file in (copy / "en").glob("c4-validation*"):
            file.unlink()
        (copy / "README.md").unlink()
        return {"kind": "hub", "path": str(copy), "name": None}
    return {"path": str(copy)}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("empty", r"c4-train.00003-of-00008.json.gz is empty"),
        ("no gzip", r"c4-train.00003-of-00008.json.gz is damaged"),
        ("no json", r"c4-train.00003-of-00008.json.gz is damaged"),
        ("cut", r"copy \(en, train\) cannot be read any further: .*train.00003-of-00008.json.gz, after line \d+: "),
        ("no split", r"data.validation_split"),
    ],
)
def test_damaged_text(name: str, words: str, folder: Path, tmp_path: Path) -> None:
    changes = {"name": "en", **broken(folder, tmp_path, name)}
    with pytest.raises(ValueError, match=words):
        open_data(recipe_for(folder, **changes), 1)


LATE = 3000
"""Where damage is: beyond the 10 MB that are read when a file is opened."""
DEEP = {
    "latin-1.txt": rf"latin-1.txt, line {LATE}: no UTF-8: .*b'\\xe9'",
    "latin-1.jsonl": rf"latin-1.jsonl, line {LATE}: no UTF-8",
    "cut.jsonl": rf"cut.jsonl, line {LATE}: not JSON",
    "null.jsonl": rf"null.jsonl, line {LATE}: column 'text' holds null where text should be. Remove that document",
    "lacks.jsonl": rf"lacks.jsonl, line {LATE}: column 'text' holds null",
    "null.parquet": rf"null.parquet, row {LATE}: column 'text' holds null where text should be. Remove",
}


def damaged_late(path: Path) -> Path:
    """A file whose name says what is wrong in its last line; as long a file before it is whole."""
    texts: list[Any] = [f"{number} " + "word " * 1000 for number in range(LATE)]
    what = path.stem
    if path.suffix == ".parquet":
        corpora.write_parquet(path, [*texts[1:], None])  # type: ignore[list-item]
        return path
    as_line = str if path.suffix == ".txt" else lambda text: json.dumps({"text": text})
    last = {"latin-1": as_line("caf@"), "cut": '{"text": "caf', "null": as_line(None), "lacks": '{"body": "a"}'}[what]
    lines = "\n".join([*map(as_line, texts[1:]), last]).replace("@", "\xe9")
    path.write_bytes(lines.encode("latin-1") + b"\n")
    return path


@pytest.mark.parametrize("name", DEEP)
def test_damage_deep_in_a_file_names_file_and_line(name: str, folder: Path, tmp_path: Path) -> None:
    """Training and preparing alike."""
    path = damaged_late(tmp_path / name)
    place = {"path": str(path), "validation_path": str(folder / "c4" / "en" / "*validation*")}
    with pytest.raises(ValueError, match=DEEP[name]):
        open_data(replace(recipe_for(folder, kind="files", streams=1, **place), steps=1000), 1)
    with pytest.raises(ValueError, match=DEEP[name]):
        prepare(preparation(folder, tmp_path / "out", source=str(path), column="text", part_documents=LATE))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"column": "body"}, r"no column 'body': its columns are text, timestamp, url. Set data.column"),
        ({"column": "timestamp"}, r"column 'timestamp' holds datetime where text should be.*data.column"),
        ({"name": "de"}, r"'de'.*Set data.name"),
        ({"tokenizer": None}, "data.tokenizer is not set"),
        ({"tokenizer": "t5-base"}, r"data.tokenizer is 't5-base', which could not be had.*HF_HOME"),
        ({"path": None}, r"data.path: allenai/c4 \(en, train\) could not be had.*HF_HOME.*a folder with the dataset"),
        ({"kind": "hub", "path": None}, "data.path is not set"),
        ({"kind": "files", "path": "nowhere/*.jsonl"}, r"data.path is 'nowhere/\*.jsonl', where there are no files"),
        ({"epochs": 0.1}, r"steps need 4 sequences of each of 8 streams, .* but data.epochs is 0.1"),
        ({"streams": 5}, "data.streams is 5: it must divide the batch of 16"),
    ],
)
def test_what_cannot_be_trained_on(changes: dict[str, Any], words: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=words):
        open_data(recipe_for(folder, **changes), 1)


def test_a_vocabulary_that_does_not_fit(folder: Path) -> None:
    recipe = replace(recipe_for(folder), model=Model(llama="quick", vocab_size=499))
    with pytest.raises(ValueError, match=r"model.vocab_size is 499, but the tokenizer .* has 500"):
        open_data(recipe, 1)


# --- token files


@pytest.fixture(scope="module")
def prepared(folder: Path) -> Path:
    """Token files of the training text, made by two processes, a tenth held back."""
    source = corpora.write_jsonl(folder / "texts.jsonl", corpora.topics()[0], "body")
    options = ["--tokenizer", str(folder / "t5"), "--column", "body", "--part-documents", "9", "--workers", "2"]
    out = folder / "prepared"
    assert main(["data", "prepare", str(source), "--out", str(out), "--validation-share", "0.1", *options]) == 0
    return out


def preparation(folder: Path, out: Path, **changes: Any) -> Preparation:
    values = {"column": "body", "validation_share": 0.1, "part_documents": 9, "tokenizer": str(folder / "t5")}
    return Preparation(**{"source": str(folder / "texts.jsonl"), "out": out, **values, **changes})


def test_token_files_are_the_documents(folder: Path, prepared: Path, tmp_path: Path) -> None:
    """On one process as on two; every document once, in one of the halves, as a stream would cut it."""
    alone = prepare(preparation(folder, tmp_path / "alone"))
    assert sorted(path.name for path in prepared.iterdir()) == [
        "prepared.json",
        "tokenizer.json",
        "train.bin",
        "validation.bin",
    ]
    for name in ("train.bin", "validation.bin", "tokenizer.json"):
        assert (tmp_path / "alone" / name).read_bytes() == (prepared / name).read_bytes()
    assert (alone.vocab_size, alone.dtype, alone.separator) == (500, "uint16", 1)
    data, train, validation = open_prepared(prepared)
    documents = [DocumentRows(tokens, 32, data.separator) for tokens in (train, validation)]
    assert 0 < documents[1].count < documents[0].count / 2
    found = [row for rows in documents for row in rows.take(range(rows.count)).tolist()]
    encoder = read_encoder(str(folder / "t5"))
    assert sorted(found) == sorted(cut_or_padded(ids, 32).tolist() for ids in encoder.encode(corpora.topics()[0]))


def test_prepared_data_is_made_once(
    folder: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (prepared / "train.bin").stat().st_mtime_ns
    prepare(preparation(folder, prepared, workers=2))
    assert "Data is ready" in capsys.readouterr().out
    assert (prepared / "train.bin").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="prepared holds other data"):
        prepare(preparation(folder, prepared, validation_share=0.2))
    with pytest.raises(ValueError, match=r"none is left for validation. Change --validation-share \(1e-06\)"):
        prepare(preparation(folder, tmp_path, validation_share=1e-6))


def test_a_tokenizer_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its end token is the one that ends documents, for the files and for transformers."""
    from transformers import AutoTokenizer

    (tmp_path / "mine.txt").write_text("\n\n".join(corpora.topics()[0]))
    out = tmp_path / "tokenizer"
    arguments = ["data", "tokenizer", str(tmp_path / "mine.txt"), "--documents", "paragraph", "--vocab-size", "400"]
    assert main([*arguments, "--out", str(out)]) == 0
    encoder, tokenizer = read_encoder(str(out)), AutoTokenizer.from_pretrained(out)
    assert (encoder.vocab_size, encoder.separator) == (400, tokenizer.eos_token_id)
    assert tokenizer.decode(encoder.encode(["A word"])[0], skip_special_tokens=True) == "A word"
    for more, said in ((["--out", str(out)], "is not empty"), (["--out", str(tmp_path / "mine.txt")], "is a file")):
        assert main([*arguments, *more]) == 2
        assert said in capsys.readouterr().err


BAD_LINES = ['{"text": "cut off', '{"text": null}', '{"content": "a"}', "[1]", '{"text": 5}', '{"text": "caf\xe9"}']


def test_bad_documents_are_left_out_and_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also by an interrupted preparation that goes on; the texts held back are those of a file of one's own."""
    good = corpora.topics()[0][:12]
    lines = [json.dumps({"text": text}) for text in good]
    for number, bad in enumerate(BAD_LINES):
        lines.insert(2 * number + 1, bad)
    source, held_back = tmp_path / "texts.jsonl", corpora.write_jsonl(tmp_path / "held.jsonl", corpora.topics()[1][:3])
    source.write_bytes("\r\n".join(lines).encode("latin-1", "replace") + b"\n")
    wanted = Preparation(source=str(source), out=tmp_path / "out", tokenizer=str(folder / "t5"), part_documents=2)
    with pytest.raises(ValueError, match=r"texts.jsonl, line 2: not JSON: .*; and 3 more.*; --skip-bad leaves such"):
        prepare(wanted)
    wanted = replace(wanted, skip_bad=True, validation_path=str(held_back))
    made = prepare(wanted)
    said = capsys.readouterr().out
    assert f"Left out {len(BAD_LINES)} documents: {source}, line 2: not JSON" in said
    counts = [int((tokens == made.separator).sum()) for tokens in open_prepared(tmp_path / "out")[1:]]
    assert counts == [len(good), 3]
    documents = open_documents(Data(kind="files", path=str(source)), skip=True)
    stream = documents.part(None, 0, 0, 1)
    texts, skipped = documents.take(iter(stream), 5)
    again = documents.part(None, 0, 0, 1)
    again.load_state_dict(stream.state_dict())
    rest, left = documents.take(iter(again), 100)
    assert (texts + rest, skipped + left) == (good, len(BAD_LINES))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"source": "no_such.jsonl"}, r"SOURCE is 'no_such.jsonl': there is no such file"),
        ({"tokenizer": "no/such/folder"}, r"--tokenizer is 'no/such/folder': there is no such file"),
        ({"column": "txt"}, r"Set --column to one"),
        ({"validation_path": "gone.jsonl"}, r"--validation-path is 'gone.jsonl': there is no such file"),
        ({"validation_path": "a", "validation_split": "b"}, r"--validation-split and --validation-path: give one"),
        ({"out": "{here}/file/out"}, r"file is a file; name a folder"),
    ],
)
def test_what_is_wrong_is_said_with_the_flag(
    folder: Path, tmp_path: Path, changes: dict[str, Any], said: str, prepared: Path
) -> None:
    (tmp_path / "file").touch()
    if "out" in changes:
        changes = {"out": Path(changes["out"].format(here=tmp_path))}
    with pytest.raises(ValueError, match=said):
        prepare(replace(preparation(folder, tmp_path / "out"), **changes))


def test_uint32_and_a_validation_split(folder: Path, tmp_path: Path) -> None:
    """A vocabulary beyond 65,536 ids; validation from a split of its own."""
    tokenizer = corpora.write_words(tmp_path / "words.json", 70_000)
    changes = {"name": "en", "column": "text", "validation_split": "validation", "tokenizer": str(tokenizer)}
    wanted = replace(preparation(folder, tmp_path / "out", **changes), source=str(folder / "c4"))
    made = prepare(wanted)
    assert (made.dtype, made.vocab_size) == ("uint32", 70_000)
    data, train, validation = open_prepared(tmp_path / "out")
    assert (train.dtype, int(train.max())) == (np.uint32, 69_999)
    counts = [int((tokens == data.separator).sum()) for tokens in (train, validation)]
    assert counts == [len(half) for half in corpora.topics()]


def test_a_killed_preparation_goes_on(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [f"{number} {text}" for number in range(25) for text in corpora.topics()[0]]
    source = corpora.write_jsonl(tmp_path / "many.jsonl", texts)
    more = {"source": str(source), "column": "text", "part_documents": 50}
    whole = prepare(replace(preparation(folder, tmp_path / "whole"), **more))
    out = tmp_path / "killed"
    options = ["--out", str(out), "--tokenizer", str(folder / "t5"), "--validation-share", "0.1", "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "frugal_dist.cli", "data", "prepare", str(source), *options, "--part-documents", "50"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    while process.poll() is None and not (out / "parts" / "train" / "00002.json").is_file():
        time.sleep(0.005)
    process.kill()
    assert process.wait() != 0, "it was finished before it could be killed"
    first = out / "parts" / "train" / "00000.train"
    marked = np.full(first.stat().st_size // 2, 7, dtype=np.uint16)
    first.write_bytes(marked.tobytes())  # seen in the result if the part is kept
    capsys.readouterr()
    made = prepare(replace(preparation(folder, out), **more))
    assert replace(made, requested="") == replace(whole, requested="")
    assert "Going on with the parts" in capsys.readouterr().out
    train, wanted = ((place / "train.bin").read_bytes() for place in (out, tmp_path / "whole"))
    assert train == marked.tobytes() + wanted[len(marked) * 2 :]
    assert (out / "validation.bin").read_bytes() == (tmp_path / "whole" / "validation.bin").read_bytes()
    assert not (out / "parts").exists()


def damage(folder: Path, name: str) -> None:
    content = bytearray((folder / "train.bin").read_bytes())
    if name == "empty":
        content.clear()
    elif name == "half a token":
        content.pop()
    elif name == "cut":
        del content[-10:]
    elif name == "large token":
        content[20:22] = b"\xf4\x01"  # 500
    elif name == "no description":
        (folder / "prepared.json").unlink()
    (folder / "train.bin").write_bytes(content)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("empty", {}, "train.bin is missing or empty"),
        ("half a token", {}, "train.bin has .* bytes, which is no whole number of uint16"),
        ("cut", {}, r"train.bin has [\d,]+ tokens, but prepared.json beside it says"),
        ("large token", {}, "train.bin has token 500 at position 10, but the vocabulary has 500"),
        ("no description", {}, "is not prepared.*frugal-dist data prepare"),
        ("short", {"epochs": 0.001}, r"data.epochs is 0.001. Raise it"),
        ("short", {"epochs": 0.001, "rows": "packed"}, r"data.epochs is 0.001. Raise it"),
    ],
)
def test_damaged_token_files(
    name: str, changes: dict[str, Any], words: str, folder: Path, prepared: Path, tmp_path: Path
) -> None:
    shutil.copytree(prepared, tmp_path / "copy")
    damage(tmp_path / "copy", name)
    with pytest.raises(ValueError, match=words):
        open_data(recipe_for(folder, kind="tokens", path=str(tmp_path / "copy"), **changes), 1)


@pytest.mark.parametrize("rows", ["packed", "truncated"])
def test_token_files_are_trained_on_as_streams_are(rows: str, folder: Path, prepared: Path) -> None:
    data = open_data(recipe_for(folder, kind="tokens", path=str(prepared), rows=rows), 1)
    assert data.batches.full == (rows == "packed")
    assert data.batches.share(0, 0, 1).shape == (16, 33 if rows == "packed" else 32)
    assert data.vocab_size == 500


# --- training

CONFIG = """{"model_type": "llama", "vocab_size": 512, "hidden_size": 48, "intermediate_size": 101, "use_cache": false,
"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}"""
CHANGES = """
--model.path {folder}/model --model.llama null --model.vocab_size null --data.path {folder}/c4 --data.tokenizer
{folder}/t5 --data.epochs 9 --batch 16 --micro_batch 2 --length 48 --precision fp32 --evaluate_every 4
--evaluation_tokens 3000 --log_every 1 --schedule.name constant --schedule.warmup 0 --data.shuffle_buffer 40
--optimizer.options.update_gap 4 --optimizer.options.state_free sgd --optimizer.options.eps 1e-3
"""
LAUNCHES = {
    "ddp": ["torchrun", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m"],
    "fsdp2": ["torchrun", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m"],
    "deepspeed": ["deepspeed", "--num_gpus=2", "--no_local_rank", "--log_level=error", "--module"],
}


def arguments(folder: Path, name: str, *more: str) -> list[str]:
    return [*CHANGES.format(folder=folder).split(), "--folder", str(folder / "runs" / name), *more]


def losses(folder: Path, name: str) -> dict[tuple[str, int], float]:
    records = read_metrics(folder / "runs" / name)
    return {(r["kind"], r["step"]): r["loss"] for kind in ("train", "validation") for r in of_kind(records, kind)}


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[tuple[str, int], float]:
    """The losses of eight steps of the papers' recipe on one process, and a run that did four."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(CONFIG)
    for name, steps in (("all", 8), ("half", 4)):
        assert pretrain(read_recipe("llama_60m", arguments(folder, name, "--steps", str(steps)))) == 0
    return losses(folder, "all")


def test_the_papers_recipe_goes_on_exactly(folder: Path, runs: dict[tuple[str, int], float]) -> None:
    shutil.copytree(folder / "runs" / "half", folder / "runs" / "more")
    assert pretrain(read_recipe("llama_60m", arguments(folder, "more", "--steps", "8"))) == 0
    assert losses(folder, "more") == runs
    assert runs["train", 1] == pytest.approx(runs["validation", 0], abs=0.1)  # padding counts in neither
    assert runs["validation", 8] < runs["validation", 0] - 0.05


@pytest.mark.heavy
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "deepspeed"])
def test_padded_rows_of_a_stream_on_several_ranks(
    engine: str, folder: Path, runs: dict[tuple[str, int], float]
) -> None:
    """Two ranks go on where one was: the mean is over the real tokens of all ranks and micro-batches."""
    shutil.copytree(folder / "runs" / "half", folder / "runs" / engine)
    launch = [str(Path(sys.executable).parent / LAUNCHES[engine][0]), *LAUNCHES[engine][1:]]
    if engine == "deepspeed":
        launch.insert(1, f"--master_port={20_000 + os.getpid() % 20_000}")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [*launch, "frugal_dist.cli", "pretrain", "llama_60m"]
    done = subprocess.run(
        [*command, *arguments(folder, engine, "--steps", "8", "--engine", engine)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + (folder / "runs" / engine / "output.txt").read_text()[-3000:]
    found = losses(folder, engine)
    assert found.keys() == runs.keys()
    assert max(abs(found[key] - runs[key]) for key in found) < 2e-4


class Alone:
    """Of an engine: one of two ranks. ``others``: what the other one adds to each sum."""

    rank, world, share, shares = 0, 2, 0, 2

    def __init__(self, others: list[float]) -> None:
        self.others = others
        self.told: list[list[float]] = []

    def total(self, values: list[float]) -> list[float]:
        self.told.append(values)
        return [own + other for own, other in zip(values, self.others, strict=True)]


def rows_on(engine: Alone, source: Any) -> Any:
    return Training(engine, source, None, None, None, steps=1, evaluate_every=0)._rows(0)  # type: ignore[arg-type]


def test_what_one_rank_cannot_read_stops_all(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "c4", tmp_path / "c4")
    stream = open_data(recipe_for(folder, path=str(tmp_path / "c4")), 2).batches
    rows, targets = rows_on(Alone([0.0, 10.0]), stream)
    assert targets == (int((rows[:, 1:] != IGNORED).sum()) + 10) / 2
    stream.close()
    stream = open_data(recipe_for(folder, path=str(tmp_path / "c4")), 2).batches
    with pytest.raises(ValueError, match="could not be read on 1 other"):
        rows_on(Alone([1.0, 10.0]), stream)
    stream.close()
    stream = open_data(recipe_for(folder, path=str(tmp_path / "c4")), 2).batches
    for shard in (tmp_path / "c4" / "en").glob("c4-train*"):
        shard.write_bytes(shard.read_bytes()[:-100])  # after the check, as a disk may fail
    alone = Alone([0.0, 10.0])
    with pytest.raises(ValueError, match=r"c4 \(en, train\) cannot be read any further"):
        rows_on(alone, stream)
    assert alone.told == [[1.0, 0.0]]
    stream.close()


# --- what is neither here nor on the hub


@pytest.mark.parametrize(
    "name", ["no/such/folder", "./tok", "no_such.jsonl", "texts/*.jsonl", "/data/model", "~/tok", "a\\b", "tok/"]
)
def test_what_can_only_be_a_path_is_not_asked_for_at_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a name may be either: it would take the hub's libraries a minute to give up."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")  # must not be asked: it would be said
    monkeypatch.chdir(tmp_path)
    asks = (
        lambda: read_encoder(name),
        lambda: read_causal_config(name),
        lambda: read_tokenizer(name),
        lambda: hub_dataset(name, None, "train", "data.path"),
        lambda: open_documents(Data(kind="hub", path=name)),
    )
    for ask in asks:
        with pytest.raises(ValueError, match=r"(data.tokenizer|model.path|data.path) is .* no such file or folder"):
            ask()


def test_names_nearby_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    assert nearby("text.jsonl") == " Did you mean 'texts.jsonl'?"
    assert nearby("gone/text.jsonl") == " Nor is 'gone'."


def test_a_hub_that_does_not_answer_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After that the libraries look into their cache, and say at once that it is not there."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(ValueError, match=r"data.tokenizer is 'no-such-tokenizer'.*Where there is no network"):
        read_encoder("no-such-tokenizer")
    with pytest.raises(ValueError, match=r"data.path: nobody/nothing .*Where there is no network"):
        open_documents(Data(kind="hub", path="nobody/nothing"))
    assert constants.HF_HUB_OFFLINE
    assert datasets.config.HF_HUB_OFFLINE
    assert capsys.readouterr().err.count("http://127.0.0.1:1 does not answer") == 1
