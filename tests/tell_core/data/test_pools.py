from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tell_core.data.curation import curate, renderer_for
from tell_core.data.pools import Look, Pools
from tell_core.data.token_store import open_mixture
from tell_core.errors import DataError
from tell_core.pipeline import curate_stage, mix_stage
from tell_core.spec.cells import Cell
from tell_core.spec.model import ExperimentSpec
from tests.fixtures.tiny import tiny_fields

from .tiny_tokenizers import INSTRUCT, build_tokenizer
from .worlds import make_spec, write_world


@pytest.fixture
def curated(tmp_path, tokenizer):
    write_world(tmp_path)
    spec = make_spec(tmp_path)
    curate(spec, tokenizer, tmp_path / "curated")
    return tmp_path / "curated"


@pytest.fixture
def renderer(tokenizer, tmp_path):
    return renderer_for(make_spec(tmp_path), tokenizer)


def tokens_of(pools, look, part="task_train"):
    store = pools.store(part, look)
    return store.take(np.arange(len(store.lengths)), is_task=True)


@pytest.mark.parametrize("anchor", ["own", "anchor", "none", "random"])
def test_a_store_holds_what_the_renderer_gives(curated, renderer, anchor):
    pools = Pools(curated, renderer)
    look = Look(anchor, "some random words\n" if anchor == "random" else "")
    rows = np.arange(pools.corpus("task_train").num_examples)

    stored = tokens_of(pools, look)

    for row, (ids, start) in enumerate(renderer.encode(pools.seen("task_train", rows, look))):
        assert stored.example(row).tolist() == ids
        assert stored.response_starts[row] == start


def test_looks_with_the_same_text_share_a_store(curated, renderer):
    pools = Pools(curated, renderer)

    stores = [pools.store("task_train", Look(anchor)) for anchor in ("own", "anchor", "none")]

    assert stores[0] is stores[1]
    assert stores[2].path == curated / "task_train.tokens.arrow"


@pytest.mark.parametrize("what", ["tokenizer", "template"])
def test_data_curated_with_another_renderer_are_refused(curated, renderer, what):
    other = build_tokenizer(INSTRUCT if what == "template" else renderer.chat_template)
    if what == "tokenizer":
        other.add_tokens(["answer "])

    with pytest.raises(DataError, match=f"curated with another {what}.*tell curate"):
        Pools(curated, renderer_for(make_spec(curated.parent), other))


def test_a_store_is_found_by_another_process_and_made_anew_when_damaged(curated, renderer):
    path = Pools(curated, renderer).store("task_train", Look("own")).path
    whole, written_at = path.read_bytes(), path.stat().st_mtime_ns

    found = Pools(curated, renderer).store("task_train", Look("own"))
    assert (found.path, path.stat().st_mtime_ns) == (path, written_at)
    path.write_bytes(whole[:-30] + bytes(30))

    assert Pools(curated, renderer).store("task_train", Look("own")).path.read_bytes() == whole


def test_cells_that_ask_for_a_store_at_once_all_get_it(curated, renderer):
    pools = [Pools(curated, renderer) for _ in range(6)]

    with ThreadPoolExecutor(6) as threads:
        stores = list(threads.map(lambda one: one.store("task_train", Look("own")), pools))

    assert len({store.digest for store in stores}) == 1
    assert len(list(curated.parent.glob("tokens-*"))) == 1


def test_a_mix_stage_whose_tokens_are_gone_is_made_anew(tiny_world, tmp_path):
    spec = ExperimentSpec.model_validate(tiny_fields(tiny_world))
    curated, cell = curate_stage(spec, tmp_path), Cell("sft", 400, None, 0)
    before = open_mixture(mix_stage(spec, cell, curated).path).digest
    assert mix_stage(spec, cell, curated).reused
    for path in tmp_path.glob("stages/tokens-*/tokens.arrow"):
        path.unlink()

    again = mix_stage(spec, cell, curated)

    assert not again.reused
    assert open_mixture(again.path).digest == before
