"""Overlap: examples whose prompt stands where it must not: test, retention, dev or task data."""

import hashlib

import duckdb
import pyarrow as pa

from tell_core.data.telling import Progress, silent
from tell_core.data.workspace import (
    EVIDENCE_CHARACTERS,
    REJECT_TEXT_CHARACTERS,
    fetch_one,
    insert_table,
    stream_batches,
)

_BATCH_ROWS = 8192


def normalised_key(text: str) -> str:
    """Digest of a text with case folded and runs of white space made one space."""
    return hashlib.md5(" ".join(text.casefold().split()).encode()).hexdigest()


def index_prompts(
    connection: duckdb.DuckDBPyConnection, own_instruction: str, report: Progress = silent
) -> None:
    """Make the tables that `find_overlap` needs: `prompt_keys`, and `overlap` without rows.

    Args:
        connection: Workspace with bare prompts in `examples`.
        own_instruction: The constant beginning that was removed from task prompts; with it they
            are looked for too.
        report: Told of the examples done.
    """
    connection.execute(_TABLES)
    query = "select id, part like 'task_%' as is_task, prompt, response from examples"
    num_examples, done = fetch_one(connection, "select count(*) from examples"), 0
    for rows in stream_batches(connection, query, _BATCH_ROWS):
        report("index prompts", done, num_examples)
        done += len(rows)
        insert_table(connection, "prompt_keys", _keys(rows, ""))
        task = [row for row in rows if row["is_task"]]
        if own_instruction and task:
            insert_table(connection, "prompt_keys", _keys(task, own_instruction))


def find_overlap(connection: duckdb.DuckDBPyConnection, *, drop: bool) -> None:
    """Add to the table `overlap` a row per example that occurs where it must not.

    Every example is looked for in the test set, all but test items also in the retention set,
    training and general examples also among the dev items, general ones also in the task's
    training data; the first of these that has it counts.
    It matches when its prompt is one of those, either bare or with the task's own instruction
    before it; or when prompt and response together are, wherever between words the one ends and the
    other begins. Case and white space make no difference. Examples already listed are left out, so
    that it can be called again once parts have changed.

    Args:
        connection: Workspace in which `index_prompts` was called.
        drop: Whether matching examples leave `examples` for `rejects`, as ``test_overlap``,
            ``retention_overlap``, ``dev_overlap`` or ``task_overlap``.
    """
    for key, matched in _MATCHES.items():
        connection.execute(_FIND.format(key=key, matched=matched), [EVIDENCE_CHARACTERS, drop])
    if drop:
        connection.execute(_REJECT, [REJECT_TEXT_CHARACTERS])
        connection.execute("delete from examples where id in (select id from overlap)")


_TABLES = """
create table prompt_keys (
    id bigint, is_bare boolean, prompt_key varchar, response_key varchar, text_key varchar);
create table places (part varchar, place integer, reason varchar);
insert into places values
    ('task_test', 0, 'test_overlap'), ('retention', 1, 'retention_overlap'),
    ('task_dev', 2, 'dev_overlap'), ('task_train', 3, 'task_overlap'),
    ('general', 4, null), ('general_heldout', 4, null);
create table overlap (
    id bigint, source_id integer, file varchar, line bigint, example_id varchar, against varchar,
    matched_file varchar, matched_source varchar, matched_line bigint, matched varchar,
    text varchar, matched_text varchar, dropped boolean);
"""

# What two examples have in common -> SQL of what that is called; the first that holds counts.
_MATCHES = {
    "prompt_key": "case when k.response_key = mk.response_key then 'prompt_and_response'"
    " else 'prompt' end",
    "text_key": "'same_text'",
}
_FIND = """
insert into overlap by name
with placed as (
    select e.*, p.place, s.name as source from examples e
        join places p using (part) join sources s using (source_id)),
protected as (
    select k.* from prompt_keys k join placed on placed.id = k.id
    where placed.place < (select max(place) from places))
select e.id, e.source_id, e.file, e.line, e.example_id, m.part as against,
    m.file as matched_file, m.source as matched_source, m.line as matched_line,
    {matched} as matched,
    substring(e.prompt || chr(10) || e.response, 1, $1) as text,
    substring(m.prompt || chr(10) || m.response, 1, $1) as matched_text, $2 as dropped
from prompt_keys k
    join protected mk on mk.{key} = k.{key} and k.is_bare and mk.id <> k.id
    join placed e on e.id = k.id
    join placed m on m.id = mk.id and m.place < e.place
where k.id not in (select id from overlap)
qualify row_number() over (
    partition by e.id order by m.place, k.response_key = mk.response_key desc, m.id) = 1
"""

_REJECT = """
insert into rejects by name
select o.source_id, o.file, o.line, p.reason,
    o.matched || ' of ' || o.matched_file || ', line ' || o.matched_line as detail,
    substring(o.text, 1, ?) as text
from overlap o join places p on p.part = o.against
where o.id in (select id from examples)
"""


def _keys(rows: list[dict[str, object]], instruction: str) -> pa.Table:
    return pa.table(
        {
            "id": [row["id"] for row in rows],
            "is_bare": [not instruction] * len(rows),
            "prompt_key": [normalised_key(f"{instruction}{row['prompt']}") for row in rows],
            "response_key": [normalised_key(str(row["response"])) for row in rows],
            "text_key": [
                normalised_key(f"{instruction}{row['prompt']} {row['response']}") for row in rows
            ],
        }
    )
