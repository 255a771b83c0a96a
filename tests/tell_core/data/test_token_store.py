import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tell_core.data.encoding import Mixture, concatenate, from_lists
from tell_core.data.token_store import (
    INDEX_FILE,
    IndexPart,
    MixtureIndex,
    TokenStore,
    has_stores,
    open_mixture,
    open_writer,
)
from tell_core.errors import DataError, StoreError

ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9)
examples = st.lists(
    st.tuples(ids, st.integers(0, 9)).map(lambda e: (e[0], min(e[1], len(e[0])))), max_size=12
)


def write_store(path, encoded, batch=3):
    path.parent.mkdir(exist_ok=True)
    with open_writer(path, "digest of a renderer") as writer:
        for start in range(0, len(encoded), batch):
            writer.append(from_lists(encoded[start : start + batch], is_task=False))
    return TokenStore(path)


@settings(max_examples=60, deadline=None)
@given(examples, st.data(), st.integers(1, 5), st.booleans())
def test_a_store_gives_back_any_rows_in_any_order(tmp_path_factory, encoded, data, batch, mapped):
    path = tmp_path_factory.mktemp("store") / "tokens.arrow"
    write_store(path, encoded, batch)
    some = st.lists(st.integers(0, max(len(encoded) - 1, 0)), max_size=15)
    rows = np.asarray(data.draw(some) if encoded else [], dtype=np.int64)
    store = TokenStore(path, is_mapped=mapped)

    taken = store.take(rows, is_task=True)

    assert (
        Mixture(taken, rows).digest
        == Mixture(from_lists([encoded[row] for row in rows], is_task=True), rows).digest
    )
    assert store.lengths.tolist() == [len(tokens) for tokens, _ in encoded]
    assert store.supervised_counts.tolist() == [len(tokens) - start for tokens, start in encoded]


TASK = [([1, 2, 3], 1), ([4, 5], 1), ([6], 0)]
GENERAL = [([7, 8], 0), ([9, 10, 11, 12], 2)]


@pytest.fixture
def index(tmp_path):
    task = write_store(tmp_path / "tokens-a" / "tokens.arrow", TASK)
    general = write_store(tmp_path / "curate-b" / "general.tokens.arrow", GENERAL)
    (tmp_path / "mix-c").mkdir()
    parts = (
        IndexPart(task, np.asarray([2, 0]), is_task=True),
        IndexPart(general, np.asarray([1]), is_task=False),
    )
    index = MixtureIndex(parts, np.asarray([1, 2, 0, 0, 2, 1], dtype=np.int32))
    index.save(tmp_path / "mix-c" / INDEX_FILE)
    return index


def self_contained():
    task = from_lists([TASK[2], TASK[0]], is_task=True)
    mixture = concatenate([task, from_lists([GENERAL[1]], is_task=False)])
    return Mixture(mixture, np.asarray([1, 2, 0, 0, 2, 1], dtype=np.int32))


def test_an_index_opens_as_the_self_contained_mixture(index, tmp_path):
    mixture = open_mixture(tmp_path / "mix-c")

    assert mixture.digest == self_contained().digest


def test_an_index_counts_what_its_mixture_holds(index):
    examples = index.load().examples

    assert index.lengths.tolist() == examples.lengths.tolist()
    assert index.supervised_counts.tolist() == examples.supervised_counts.tolist()
    assert index.is_task.tolist() == examples.is_task.tolist()


def test_a_self_contained_mixture_opens_too(tmp_path):
    self_contained().save(tmp_path / "mixture.safetensors")

    assert open_mixture(tmp_path).digest == self_contained().digest


def test_a_moved_run_directory_still_opens(index, tmp_path):
    moved = tmp_path.with_name(tmp_path.name + "-moved")
    tmp_path.rename(moved)

    assert open_mixture(moved / "mix-c").digest == self_contained().digest


def test_a_directory_without_mixture_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"mixture\.safetensors is missing.*tell mix"):
        open_mixture(tmp_path)


def test_a_store_rendered_anew_with_other_tokens_is_noticed(index, tmp_path):
    assert has_stores(tmp_path / "mix-c")
    path = tmp_path / "tokens-a" / "tokens.arrow"
    path.unlink()
    write_store(path, [([1, 2, 99], 1), *TASK[1:]])

    assert not has_stores(tmp_path / "mix-c")
    with pytest.raises(StoreError, match=r"tokens-a/tokens\.arrow is missing or not the one"):
        open_mixture(tmp_path / "mix-c")


def test_a_missing_store_is_noticed(index, tmp_path):
    (tmp_path / "curate-b" / "general.tokens.arrow").unlink()

    assert not has_stores(tmp_path / "mix-c")
    with pytest.raises(StoreError, match="Run the same command again"):
        open_mixture(tmp_path / "mix-c")


def test_an_unfinished_store_is_an_error(tmp_path):
    path = tmp_path / "tokens.arrow"
    write_store(path, TASK)
    path.write_bytes(path.read_bytes()[:-20])

    with pytest.raises(StoreError, match="cannot read the token store"):
        TokenStore(path)
