"""Short items: near-duplicates of test, dev and retention items too short for runs of words alone.

One word in a short request changes what it asks for, so among training examples short ones count as
alike only when their words are the same. Against an item that must not be trained on the answer
decides: a prompt that is alike with the very same answer is that item.
"""

from collections.abc import Iterator
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tell_core.data.shingles import PhraseCounts, word_shingles
from tell_core.data.similarity import (
    MIN_SHINGLES,
    SHINGLE_WORDS,
    STOCK_EXAMPLES,
    TEMPLATE_ALLOWANCE,
)
from tell_core.data.telling import Progress, silent
from tell_core.data.words import IndexArray, Words, WordStore, mixed, text_digests
from tell_core.data.workspace import fetch_all, insert_table, stream_columns

SHORT_WORDS = MIN_SHINGLES + SHINGLE_WORDS - 1
_BATCH_ROWS = 512
_PAIRS_AT_ONCE = 8192
_Keys = dict[str, npt.NDArray[Any]]


def find_short_copies(
    connection: duckdb.DuckDBPyConnection,
    store: WordStore,
    id_of: IndexArray,
    counts: PhraseCounts,
    similarity: float,
    report: Progress = silent,
) -> None:
    """Add to `alike_pairs` short protected items and examples with a prompt alike, the answer same.

    Short is a prompt of fewer than 24 words, which are 20 runs of 5. It is alike when its words are
    the same, or when the Jaccard similarity of the runs reaches ``similarity`` and that of the runs
    which stand in at most 50 examples is lower by 0.1 at most. Answers are the same when their
    words are.

    Args:
        connection: Workspace in which `create_near_duplicate_tables` was called.
        store: The words of all examples.
        id_of: Shape (N,). The example of each of the store's rows.
        counts: In how many of them each run of 5 words stands.
        similarity: Between 0 and 1.
        report: Told of the examples done.
    """
    connection.execute(_TABLES)
    ids = pa.table({"row": np.arange(len(id_of)), "id": id_of})
    insert_table(connection, "short_ids", ids)
    protected = np.asarray([row for (row,) in fetch_all(connection, _PROTECTED)], dtype=np.int64)
    known = [np.empty(0, dtype=np.uint64)]
    for start in range(0, len(protected), _BATCH_ROWS):
        some = protected[start : start + _BATCH_ROWS]
        columns = _keys(store.take(some), some, counts)
        insert_table(connection, "short_items", pa.table(columns))
        known.append(columns["key"])
    every, start = np.unique(np.concatenate(known)), 0
    for words in store.batches(_BATCH_ROWS) if len(every) else ():
        report("short items", start, store.num_examples)
        columns = _keys(words, np.arange(start, start + words.num_texts // 2), counts)
        is_known = np.isin(columns["key"], every)
        if is_known.any():
            held = {name: values[is_known] for name, values in columns.items()}
            insert_table(connection, "short_held", pa.table(held))
        start += words.num_texts // 2
    for pairs in _alike(connection, similarity):
        insert_table(connection, "short_pairs", pairs)
    connection.execute(_LIST)
    for table in ("short_ids", "short_items", "short_held", "short_pairs"):
        connection.execute(f"drop table {table}")


_TABLES = """
create table short_ids (row bigint, id bigint);
create table short_items (
    row bigint, key ubigint, is_whole boolean, is_rare boolean, num_runs bigint, num_rare bigint);
create table short_held (
    row bigint, key ubigint, is_whole boolean, is_rare boolean, num_runs bigint, num_rare bigint);
create table short_pairs (row bigint, item_row bigint, prompt_similarity double);
"""
_PROTECTED = """
select row from short_ids join examples using (id)
where part in ('task_test', 'task_dev', 'retention') order by row
"""
_CANDIDATES = """
select h.row as row, i.row as item_row, bool_or(h.is_whole) as is_same,
    count(*) filter (not h.is_whole) as shared, any_value(h.num_runs) as runs,
    any_value(i.num_runs) as item_runs, count(*) filter (h.is_rare) as shared_rare,
    any_value(h.num_rare) as rare, any_value(i.num_rare) as item_rare
from short_held h join short_items i using (key) where h.row <> i.row
group by h.row, i.row order by h.row, i.row
"""
_LIST = """
insert into alike_pairs by name
select distinct least(a.id, b.id) as first_id, greatest(a.id, b.id) as second_id,
    prompt_similarity, prompt_similarity as similarity, true as same_answer
from short_pairs p join short_ids a using (row) join short_ids b on b.row = p.item_row
where not exists (from alike_pairs k where k.first_id = least(a.id, b.id)
    and k.second_id = greatest(a.id, b.id))
"""


def _keys(words: Words, rows: IndexArray, counts: PhraseCounts) -> _Keys:
    """Runs of the short prompts among some examples, and the whole prompt, each with the answer.

    A key is of a run and of the answer, so that only examples with the same answer share one.
    """
    prompts = words.first_of_each_pair()
    short = np.flatnonzero(np.diff(prompts.offsets) < SHORT_WORDS)
    prompts, answers = prompts.only(short), text_digests(words.second_of_each_pair().only(short))
    sets = word_shingles(prompts, SHINGLE_WORDS)
    rare = counts.without_common(sets, STOCK_EXAMPLES)
    places = np.arange(len(short))
    of = np.concatenate([np.repeat(places, sets.sizes), places])
    is_whole = np.arange(len(of)) >= len(sets.hashes)
    keys = np.concatenate([sets.hashes, text_digests(prompts)])
    is_rare = counts.is_rare(sets.hashes, STOCK_EXAMPLES)
    return {
        "row": rows[short[of]],
        "key": mixed(keys ^ mixed(answers[of] + is_whole.astype(np.uint64))),
        "is_whole": is_whole,
        "is_rare": np.concatenate([is_rare, np.zeros(len(short), dtype=np.bool_)]),
        "num_runs": sets.sizes[of],
        "num_rare": rare.sizes[of],
    }


def _alike(connection: duckdb.DuckDBPyConnection, similarity: float) -> Iterator[pa.Table]:
    """The candidates that are alike."""
    for found in stream_columns(connection, _CANDIDATES, _PAIRS_AT_ONCE):
        whole = _jaccard(found["shared"], found["runs"], found["item_runs"])
        rare = _jaccard(found["shared_rare"], found["rare"], found["item_rare"])
        near = np.minimum(whole, rare + TEMPLATE_ALLOWANCE)
        near = np.where(found["is_same"], 1.0, near)
        kept = near >= similarity
        columns = {name: found[name][kept] for name in ("row", "item_row")}
        yield pa.table(columns | {"prompt_similarity": near[kept]})


def _jaccard(shared: IndexArray, first: IndexArray, second: IndexArray) -> npt.NDArray[np.float64]:
    return np.asarray(shared / np.maximum(first + second - shared, 1), dtype=np.float64)
