"""Overlap: examples whose prompt is also a prompt of the test set."""

import hashlib

import duckdb
import pyarrow as pa

from tell_core.data.workspace import REJECT_TEXT_CHARACTERS, insert_table, stream_batches

_BATCH_ROWS = 8192


def normalised_key(text: str) -> str:
    """Digest of a text with case folded and runs of white space made one space."""
    return hashlib.md5(" ".join(text.casefold().split()).encode()).hexdigest()


def find_overlap(
    connection: duckdb.DuckDBPyConnection, own_instruction: str, *, drop: bool
) -> None:
    """Fill the table `overlap`, one row per example that occurs in the test set.

    A training or held-out example matches when its prompt is that of a test item, either bare or
    with the task's own instruction before it. Case and white space make no difference.

    Args:
        connection: Workspace with bare prompts in `examples`.
        own_instruction: The constant beginning that was removed from task prompts.
        drop: Whether matching examples leave `examples` for `rejects`, as ``test_overlap``.
    """
    connection.execute(
        "create table prompt_keys (id bigint, is_test boolean, prompt_key varchar,"
        " response_key varchar)"
    )
    query = "select id, part = 'task_test' as is_test, prompt, response from examples"
    for rows in stream_batches(connection, query, _BATCH_ROWS):
        insert_table(connection, "prompt_keys", _keys(rows, ""))
        tests = [row for row in rows if row["is_test"]]
        if own_instruction and tests:
            insert_table(connection, "prompt_keys", _keys(tests, own_instruction))
    connection.execute(_FIND, [REJECT_TEXT_CHARACTERS, drop])
    connection.execute("drop table prompt_keys")
    if drop:
        connection.execute(_REJECT)
        connection.execute("delete from examples where id in (select id from overlap)")


_FIND = """
create table overlap as
select e.id, e.source_id, e.file, e.line, e.example_id, t.file as test_file,
    tests.name as test_source, t.line as test_line,
    case when k.response_key = tk.response_key then 'prompt_and_response' else 'prompt' end
        as matched,
    substring(e.prompt, 1, $1) as text, $2 as dropped
from prompt_keys k
    join prompt_keys tk on tk.prompt_key = k.prompt_key and tk.is_test and not k.is_test
    join examples e on e.id = k.id
    join examples t on t.id = tk.id
    join sources tests on tests.source_id = t.source_id
qualify row_number() over (
    partition by e.id order by k.response_key = tk.response_key desc, t.id) = 1
"""

_REJECT = """
insert into rejects by name
select source_id, file, line, 'test_overlap' as reason,
    matched || ' of ' || test_file || ', line ' || test_line as detail, text
from overlap
"""


def _keys(rows: list[dict[str, object]], instruction: str) -> pa.Table:
    return pa.table(
        {
            "id": [row["id"] for row in rows],
            "is_test": [row["is_test"] for row in rows],
            "prompt_key": [normalised_key(f"{instruction}{row['prompt']}") for row in rows],
            "response_key": [normalised_key(str(row["response"])) for row in rows],
        }
    )
