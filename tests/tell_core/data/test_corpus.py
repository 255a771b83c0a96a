import math

import numpy as np
import pytest

from tell_core.data.corpus import Corpus, parse_extra
from tell_core.data.curation import curate, renderer_for

from .worlds import make_spec, write_world


@pytest.fixture
def curated(tmp_path, tokenizer):
    write_world(tmp_path)
    spec = make_spec(tmp_path)
    curate(spec, tokenizer, tmp_path / "curated")
    return tmp_path / "curated", renderer_for(spec, tokenizer)


def test_corpus_gives_rows_in_the_order_asked_for(curated):
    directory, renderer = curated
    corpus = Corpus(directory / "general.parquet")
    rows = np.asarray([5, 0, 9])

    records = corpus.records(rows, ("row", "example_id"))
    encoded = corpus.encoded(rows, is_task=False)

    assert [record["row"] for record in records] == [5, 0, 9]
    assert [record["example_id"] for record in records] == [corpus.example_ids[row] for row in rows]
    again = renderer.encode(corpus.examples(rows))
    for index, (ids, start) in enumerate(again):
        assert encoded.example(index).tolist() == ids
        assert encoded.response_starts[index] == start


def test_numbers_that_json_cannot_hold_become_none():
    text = f'{{"a": NaN, "b": -Infinity, "c": 1e999, "d": {"9" * 5000}, "e": [1, 2.5, "NaN"]}}'

    values = parse_extra(text)

    assert values == {"a": None, "b": None, "c": None, "d": None, "e": [1, 2.5, "NaN"]}
    assert math.isfinite(values["e"][1])
