"""The tokenizer that is trained on documents, and the token files that it writes."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tokenizers")


from frugal_dist.training.data import demo_texts
from frugal_dist.training.data.prepared import read_tokens, write_tokens
from frugal_dist.training.data.tokenizer import separator_id, train_tokenizer


@pytest.fixture(scope="module")
def topics() -> demo_texts.Corpus:
    return demo_texts.demo_corpus("topics")


def test_tokenizer_loses_nothing(topics):
    tokenizer = train_tokenizer(topics.train, 512)
    assert tokenizer.get_vocab_size() == 512
    sample = topics.validation[0][:500] + " déjà vu ☃ \t\n"
    assert tokenizer.decode(tokenizer.encode(sample).ids) == sample
    assert separator_id(tokenizer) == 0
    with pytest.raises(ValueError, match="vocab_size is 200"):
        train_tokenizer(topics.train, 200)


def test_token_file_separates_documents(tmp_path, topics):
    tokenizer = train_tokenizer(topics.train, 512)
    documents = topics.train[:3]
    count = write_tokens(tmp_path / "some.bin", documents, tokenizer, separator=0)
    tokens = read_tokens(tmp_path / "some.bin")
    assert len(tokens) == count
    ends = np.flatnonzero(tokens == 0)
    assert len(ends) == 3
    assert ends[-1] == count - 1
    assert tokenizer.decode(tokens[: ends[0]].tolist()) == documents[0]
    assert not list(tmp_path.glob("*.unfinished"))
    with pytest.raises(ValueError, match="missing or empty"):
        read_tokens(tmp_path / "none.bin")
