"""Contamination: training examples that hold long pieces of test or retention items.

What stands in a test item word for word for 13 words is rarely there by chance (Brown et al. 2020,
appendix C). A training example that holds much of an item is removed; one that holds little of it
is flagged and stays, for a person to judge. Phrases that many examples share are no evidence.
"""

import duckdb
import numpy as np
import pyarrow as pa

from tell_core.data.shingles import HASH_BITS, PhraseCounts, ShingleSets, word_shingles
from tell_core.data.similarity import count_phrases
from tell_core.data.telling import Progress, silent
from tell_core.data.words import HashArray, IndexArray, WordStore, joined
from tell_core.data.workspace import (
    EVIDENCE_CHARACTERS,
    REJECT_TEXT_CHARACTERS,
    fetch_all,
    insert_table,
)

RUN_WORDS = 13
MIN_RUNS = 5
MIN_FLAGGED_RUNS = 3
STOCK_EXAMPLES = 10
_BATCH_ROWS = 512


def create_contamination_tables(connection: duckdb.DuckDBPyConnection) -> None:
    """Make the table `flagged`, empty."""
    connection.execute(_TABLES)


def find_contamination(
    connection: duckdb.DuckDBPyConnection,
    store: WordStore,
    id_of: IndexArray,
    share: float,
    *,
    drop: bool,
    report: Progress = silent,
) -> None:
    """List training examples that hold runs of 13 words of a test or retention item.

    Counted are the item's distinct runs that begin in its prompt and stand in at most 10 examples,
    if there are at least 5. An example that holds ``share`` of them is listed in `overlap` as
    ``13_grams``, and leaves for `rejects` when asked. Whether it has them in its prompt, in its
    response or across both makes no difference. One that holds fewer, or only runs of the item's
    response (which may rightly be the answer to other prompts), is listed in `flagged` and stays,
    if it has at least 3: a stock phrase with another word before or behind it has fewer.

    Args:
        connection: Workspace in which `index_prompts` was called.
        store: The words of all examples.
        id_of: Shape (N,). The example of each of the store's rows.
        share: Above 0, at most 1.
        drop: Whether what is listed in `overlap` leaves `examples`.
        report: Told of its steps.
    """
    connection.execute(_JOIN_TABLES)
    rows = pa.table({"row": np.arange(len(id_of)), "id": id_of})
    insert_table(connection, "word_rows", rows)
    counts = count_phrases(store, RUN_WORDS, report)
    protected = [row for (row,) in fetch_all(connection, _PROTECTED_ROWS)]
    known = _index_items(connection, store, counts, np.asarray(protected, dtype=np.int64))
    start = 0
    for words in store.batches(_BATCH_ROWS):
        report("pieces of test items", start, store.num_examples)
        sets = word_shingles(joined(words), RUN_WORDS)
        _insert_held(connection, sets, start, known)
        start += len(sets.sizes)
    connection.execute(_MATCH, [MIN_RUNS])
    connection.execute(_FLAG, [share, EVIDENCE_CHARACTERS])
    connection.execute(_LIST, [share, drop, EVIDENCE_CHARACTERS])
    if drop:
        connection.execute(_REJECT, [share, REJECT_TEXT_CHARACTERS])
        connection.execute("delete from examples where id in (select id from overlap)")
    for table in ("word_rows", "item_runs", "held_runs", "matches"):
        connection.execute(f"drop table {table}")


_TABLES = """
create table flagged (
    id bigint, source_id integer, file varchar, line bigint, example_id varchar, against varchar,
    matched_source varchar, matched_file varchar, matched_line bigint, share double,
    num_runs bigint, text varchar, matched_text varchar);
"""
_JOIN_TABLES = """
create temp table word_rows (row bigint, id bigint);
create temp table item_runs (row bigint, hash ubigint, of_prompt boolean);
create temp table held_runs (row bigint, hash ubigint);
"""
_PROTECTED_ROWS = """
select row from word_rows join examples using (id) where part in ('task_test', 'retention')
order by row
"""

# The best match of every example: the item of which it holds the largest share.
_MATCH = """
create temp table matches as
with sizes as (
    select row, count(*) as num_of_prompt from item_runs where of_prompt group by row),
held as (
    select h.row as row, i.row as item_row, count(*) as num_runs,
        count(*) filter (of_prompt) as num_of_prompt
    from held_runs h join item_runs i using (hash) where h.row <> i.row group by all),
shares as (
    select held.row, item_row, num_runs,
        case when s.num_of_prompt >= $1 then held.num_of_prompt / s.num_of_prompt else 0 end
            as share
    from held left join sizes s on s.row = item_row)
select e.id, m.id as item_id, mp.reason, share, num_runs
from shares
    join word_rows w on w.row = shares.row join examples e on e.id = w.id
    join word_rows mw on mw.row = item_row join examples m on m.id = mw.id
    join places p on p.part = e.part join places mp on mp.part = m.part
where mp.place < p.place and e.id not in (select id from overlap)
qualify row_number() over (partition by e.id order by share desc, num_runs desc, mp.place, m.id) = 1
"""
_MATCHED = """
from matches join examples e using (id) join examples m on m.id = item_id
    join sources ms on ms.source_id = m.source_id
"""
_FLAG = f"""
insert into flagged by name
select e.id, e.source_id, e.file, e.line, e.example_id, m.part as against,
    ms.name as matched_source, m.file as matched_file, m.line as matched_line, share, num_runs,
    substring(e.prompt || chr(10) || e.response, 1, $2) as text,
    substring(m.prompt || chr(10) || m.response, 1, $2) as matched_text
{_MATCHED} where share < $1 and num_runs >= {MIN_FLAGGED_RUNS}
"""
_LIST = f"""
insert into overlap by name
select e.id, e.source_id, e.file, e.line, e.example_id, m.part as against, m.file as matched_file,
    ms.name as matched_source, m.line as matched_line, '13_grams' as matched,
    substring(e.prompt || chr(10) || e.response, 1, $3) as text,
    substring(m.prompt || chr(10) || m.response, 1, $3) as matched_text, $2 as dropped
{_MATCHED} where share >= $1
"""
_REJECT = """
insert into rejects by name
select o.source_id, o.file, o.line, matches.reason,
    printf('holds %.0f %% of the runs of 13 words in the prompt of ', 100 * share) || o.matched_file
        || ', line ' || o.matched_line as detail, share as value, substring(o.text, 1, $2) as text
from matches join overlap o using (id) where share >= $1
"""


def _index_items(
    connection: duckdb.DuckDBPyConnection,
    store: WordStore,
    counts: PhraseCounts,
    rows: IndexArray,
) -> HashArray:
    """Fill the table `item_runs`; returns all runs in it, rising."""
    known = [np.empty(0, dtype=np.uint64)]
    for start in range(0, len(rows), _BATCH_ROWS):
        some = rows[start : start + _BATCH_ROWS]
        words = store.take(some)
        runs = counts.without_common(word_shingles(joined(words), RUN_WORDS), STOCK_EXAMPLES)
        responses = word_shingles(words.second_of_each_pair(), RUN_WORDS)
        of_prompt = np.isin(_marked(runs), _marked(responses), invert=True)
        columns = {"row": np.repeat(some, runs.sizes), "hash": runs.hashes, "of_prompt": of_prompt}
        insert_table(connection, "item_runs", pa.table(columns))
        known.append(runs.hashes)
    return np.unique(np.concatenate(known))


def _marked(sets: ShingleSets) -> HashArray:
    """Shingles with the place of their text above their bits."""
    places = np.repeat(np.arange(len(sets.sizes), dtype=np.uint64), sets.sizes)
    return sets.hashes | (places << np.uint64(HASH_BITS))


def _insert_held(
    connection: duckdb.DuckDBPyConnection, sets: ShingleSets, start: int, known: HashArray
) -> None:
    """Add to the table `held_runs` those of a batch's runs that are known."""
    is_known = np.isin(sets.hashes, known)
    if is_known.any():
        rows = start + np.repeat(np.arange(len(sets.sizes)), sets.sizes)[is_known]
        held = pa.table({"row": rows, "hash": sets.hashes[is_known]})
        insert_table(connection, "held_runs", held)
