"""Near-duplicates: examples that say almost the same as another one, and which of them stays."""

import duckdb
import numpy as np
import pyarrow as pa

from tell_core.data.short_items import find_short_copies
from tell_core.data.similarity import SHINGLE_WORDS, count_phrases, find_similar
from tell_core.data.telling import Progress, silent
from tell_core.data.words import IndexArray, WordStore
from tell_core.data.workspace import (
    EVIDENCE_CHARACTERS,
    REJECT_TEXT_CHARACTERS,
    fetch_one,
    insert_table,
    spill_directory,
    stream_batches,
    stream_columns,
)

_BATCH_ROWS = 512
_PAIRS_AT_ONCE = 8192


def create_near_duplicate_tables(connection: duckdb.DuckDBPyConnection) -> None:
    """Make the tables `alike_pairs` and `near_duplicates`, both empty."""
    connection.execute(_TABLES)


def index_words(
    connection: duckdb.DuckDBPyConnection, report: Progress = silent
) -> tuple[WordStore, IndexArray]:
    """The words of all examples, and the id of each row; anchor prompts must be off by now.

    A system message and earlier turns count as part of the prompt.
    """
    store = WordStore(spill_directory(connection) / "words.bin")
    ids, done = [np.empty(0, dtype=np.int64)], 0
    num_examples = fetch_one(connection, "select count(*) from examples")
    for rows in stream_batches(connection, _TEXTS, _BATCH_ROWS):
        report("index words", done, num_examples)
        done += len(rows)
        store.append([row["prompt"] for row in rows], [row["response"] for row in rows])
        ids.append(np.asarray([row["id"] for row in rows], dtype=np.int64))
    store.seal()
    return store, np.concatenate(ids)


def find_near_duplicates(
    connection: duckdb.DuckDBPyConnection,
    store: WordStore,
    id_of: IndexArray,
    similarity: float,
    report: Progress = silent,
) -> None:
    """Fill the table `alike_pairs` with all pairs of examples that are alike.

    Which are: see `find_similar`, and `find_short_copies` for short test, dev and retention items.

    Args:
        connection: Workspace in which `create_near_duplicate_tables` was called.
        store: The examples' words.
        id_of: Shape (N,). The example of each of the store's rows.
        similarity: Least Jaccard similarity, between 0 and 1.
        report: Told of its steps.
    """
    counts = count_phrases(store, SHINGLE_WORDS, report)
    for pairs in find_similar(connection, store, counts, similarity, report):
        columns = {
            "first_id": id_of[pairs.first],
            "second_id": id_of[pairs.second],
            "prompt_similarity": pairs.prompt_similarity,
            "similarity": pairs.similarity,
            "same_answer": pairs.same_answer,
        }
        insert_table(connection, "alike_pairs", pa.table(columns))
    find_short_copies(connection, store, id_of, counts, similarity, report)


def settle_near_duplicates(
    connection: duckdb.DuckDBPyConnection, *, drop_duplicates: bool, drop_overlap: bool
) -> None:
    """List examples that are near-duplicates of one that stays, and remove them when asked.

    Within the task's training data, and within general data across its sources, an example is one
    when prompt and response are alike those of an earlier example that stays: the first in the
    order of sources, then of rows. Where one of the two stands where the other must not (test,
    retention, dev, task training data, in this order), alike prompts are enough, and the one in
    the later place is listed, in `overlap` too. Examples already listed are left out, so that it
    can be called again once parts have changed.

    Args:
        connection: Workspace in which `find_near_duplicates` and `index_prompts` were called.
        drop_duplicates: Whether near-duplicates within a part leave for `rejects`, as
            ``near_duplicate``.
        drop_overlap: Whether those of another part leave, as ``test_overlap`` and so on.
    """
    connection.execute(_SETTLED)
    gone = np.zeros(1 + fetch_one(connection, _LARGEST_ID), dtype=np.bool_)
    last = -1
    for pairs in stream_columns(connection, _PAIRS_IN_ORDER, _PAIRS_AT_ONCE):
        settled: list[tuple[int, int, bool, bool]] = []
        for kept, other, is_within in zip(*(pairs[name].tolist() for name in pairs), strict=True):
            if gone[kept] or last == other:
                continue
            drop = drop_duplicates if is_within else drop_overlap
            settled.append((other, kept, is_within, drop))
            gone[other], last = drop, other
        if settled:
            columns = dict(zip(_SETTLED_COLUMNS, zip(*settled, strict=True), strict=True))
            insert_table(connection, "settled", pa.table(columns))
    if last >= 0:
        connection.execute(_LIST)
        connection.execute(_LIST_OVERLAP)
        connection.execute(_REJECT, [REJECT_TEXT_CHARACTERS])
        connection.execute(
            "delete from examples where id in (select id from near_duplicates where dropped)"
        )
    connection.execute("drop table settled")


_TABLES = """
create table alike_pairs (
    first_id bigint, second_id bigint, prompt_similarity double, similarity double,
    same_answer boolean);
create table near_duplicates (
    id bigint, kept_id bigint, source_id integer, source varchar, file varchar, line bigint,
    example_id varchar, part varchar, kept_source varchar, kept_file varchar, kept_line bigint,
    kept_example_id varchar, kept_part varchar, similarity double, text varchar,
    kept_text varchar, dropped boolean);
"""
_TEXTS = """
select id, concat_ws(chr(10), system, history, prompt) as prompt, response from examples
order by id
"""

_SETTLED_COLUMNS = ("id", "kept_id", "is_within", "dropped")
_SETTLED = """
create table settled (id bigint, kept_id bigint, is_within boolean, dropped boolean)
"""
_LARGEST_ID = "select coalesce(max(greatest(first_id, second_id)), 0) from alike_pairs"

# Ranked by place, then id: the lower rank of a pair stays.
_PAIRS_IN_ORDER = """
with ranked as (select id, place, part in ('task_train', 'general') as is_training,
        row_number() over (order by place, id) as rank from examples join places using (part)),
    both_ways as (
        select first_id as kept, second_id as other, same_answer from alike_pairs
        union all select second_id, first_id, same_answer from alike_pairs)
select kept, other, k.place = o.place as is_within
from both_ways join ranked k on k.id = kept join ranked o on o.id = other
where k.rank < o.rank and (k.place < o.place or (o.is_training and same_answer))
    and other not in (select id from near_duplicates)
order by o.rank, k.rank
"""
_LIST = f"""
insert into near_duplicates by name
select e.id, k.id as kept_id, e.source_id, es.name as source, e.file, e.line, e.example_id, e.part,
    ks.name as kept_source, k.file as kept_file, k.line as kept_line,
    k.example_id as kept_example_id, k.part as kept_part, settled.dropped,
    case when settled.is_within then s.similarity else s.prompt_similarity end as similarity,
    substring(e.prompt || chr(10) || e.response, 1, {EVIDENCE_CHARACTERS}) as text,
    substring(k.prompt || chr(10) || k.response, 1, {EVIDENCE_CHARACTERS}) as kept_text
from settled
    join examples e using (id) join sources es on es.source_id = e.source_id
    join examples k on k.id = settled.kept_id join sources ks on ks.source_id = k.source_id
    join alike_pairs s on s.first_id = least(e.id, k.id) and s.second_id = greatest(e.id, k.id)
"""
_LIST_OVERLAP = """
insert into overlap by name
select id, source_id, file, line, example_id, kept_part as against, kept_file as matched_file,
    kept_source as matched_source, kept_line as matched_line, 'near_duplicate' as matched,
    text, kept_text as matched_text, near_duplicates.dropped
from near_duplicates join settled using (id)
    join places p on p.part = near_duplicates.part
    join places kp on kp.part = kept_part
where kp.place < p.place and id not in (select id from overlap)
"""
_REJECT = """
insert into rejects by name
select n.source_id, n.file, n.line,
    case when kp.place < p.place then kp.reason else 'near_duplicate' end as reason,
    printf('similarity %.2f to ', n.similarity) || kept_file || ', line ' || kept_line as detail,
    n.similarity as value,
    substring(n.text, 1, ?) as text
from near_duplicates n join places p on p.part = n.part join places kp on kp.part = kept_part
where n.dropped and n.id in (select id from examples)
"""
