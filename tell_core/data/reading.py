"""Reading: from sources of any shape to examples, every unfit row set aside with a reason.

Every row becomes JSON text first, whatever its file was; then one set of SQL checks and one set
of expressions per format serve all files. Rows kept and rows set aside add up to rows read.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import duckdb

from tell_core.data.records import (
    csv_records,
    explain_unreadable,
    hub_batches,
    hub_commit,
    json_records,
    record_batches,
)
from tell_core.data.sources import ResolvedSource, kind_of
from tell_core.data.telling import Progress, silent
from tell_core.data.workspace import (
    HAS_INK,
    REJECT_TEXT_CHARACTERS,
    fetch_all,
    fetch_one,
    quoted,
)
from tell_core.errors import DataError
from tell_core.spec.model import SourceSpec

_REQUIRED = {
    "prompt_response": ("prompt", "response"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
}
_OPTIONAL = {
    "prompt_response": ("system",),
    "messages": (),
    "sharegpt": ("system",),
    "alpaca": ("input", "system"),
}
_KNOWN_COLUMNS = sorted(
    {name for names in (*_REQUIRED.values(), *_OPTIONAL.values()) for name in names}
)
_ROLES = "'^(system )?(user assistant )*user assistant $'"
_WHOLE_ROW = "the_whole_row_"


@dataclass(frozen=True)
class _Turns:
    """How the turns of a conversation are written.

    Attributes:
        column: Our name of the column that holds the list of turns.
        role: Key of a turn's role.
        text: Key of its text.
        roles: Their names of roles -> ours; others have to be ours.
    """

    column: str
    role: str
    text: str
    roles: dict[str, str]


_TURNS = {
    "messages": _Turns("messages", "role", "content", {}),
    "sharegpt": _Turns("conversations", "from", "value", {"human": "user", "gpt": "assistant"}),
}


@dataclass(frozen=True)
class Layout:
    """How the rows of a source are laid out.

    Attributes:
        format: Name of the format, decided or given.
        columns: Our column name -> theirs, for the columns the source has.
        revision: Commit of a hub dataset that was read; None for files.
    """

    format: str
    columns: dict[str, str]
    revision: str | None = None


def read_source(
    connection: duckdb.DuckDBPyConnection,
    source: ResolvedSource,
    source_id: int,
    report: Progress = silent,
) -> Layout:
    """Read one source into the tables `examples` and `rejects` of the workspace.

    Args:
        connection: The workspace.
        source: The source.
        source_id: Its number in the tables.
        report: Told of the rows read, then of the checks.

    Returns:
        How its rows are laid out.

    Raises:
        DataError: A file cannot be read, a column is missing from all rows, or no row is usable.
    """
    revision = hub_commit(source) if source.is_hub else None
    files = _load_raw(connection, source, revision, report)
    report(f"check {source.spec.name}", 0, 1)
    connection.execute(_MARK_BAD_JSON)
    layout = _choose_layout(connection, source, files)
    _extract(connection, layout)
    _store(connection, source, source_id, files)
    num_read = fetch_one(connection, "select count(*) from raw")
    connection.execute(
        "insert into sources values (?, ?, ?, ?)",
        [source_id, source.role, source.spec.name, num_read],
    )
    _require_examples(connection, source, source_id)
    connection.execute("delete from raw")
    return replace(layout, revision=revision)


def _kind_words(kind: str) -> str:
    """SQL of a JSON type in words; ``kind`` is SQL of what DuckDB calls it."""
    return (
        f"case {kind} when 'VARCHAR' then 'a string' when 'BOOLEAN' then 'true or false'"
        f" when 'ARRAY' then 'a list' when 'OBJECT' then 'an object' when 'NULL' then 'null'"
        " else 'a number' end"
    )


def _has_keys_twice(record: str) -> str:
    """SQL of whether a JSON object names a key twice, so that its value is anyone's guess."""
    return f"list_unique(json_keys({record})) <> len(json_keys({record}))"


_KEYS_TWICE = """array_to_string(list_distinct(list_filter(json_keys(record), lambda name:
    len(list_filter(json_keys(record), lambda other: other = name)) > 1)), ', ')"""
_HAS_NUL = "'the text holds a NUL character'"
_MARK_BAD_JSON = f"""
update raw set
    reason = case when not json_valid(record) then 'bad_json' else 'not_an_object' end,
    detail = case when not json_valid(record) then 'the line is not valid JSON'
        else 'needed is a JSON object, this is: ' || {_kind_words("json_type(record)")} end
where reason is null
    and case when json_valid(record) then json_type(record) <> 'OBJECT' else true end
"""


def _load_raw(
    connection: duckdb.DuckDBPyConnection,
    source: ResolvedSource,
    revision: str | None,
    report: Progress,
) -> list[str]:
    """Fill the table `raw`; returns the name of each file by its index."""
    rows = _RowsRead(source.spec.name, report)
    if source.is_hub:
        _load_hub(connection, source, revision, rows)
        return [f"{source.spec.path}@{source.spec.split}"]
    for index, path in enumerate(source.files):
        with explain_unreadable(path):
            rows.file, rows.num_files = index, len(source.files)
            _load_file(connection, path, index, rows)
    return [str(path) for path in source.files]


@dataclass
class _RowsRead:
    """How far the reading of a source is: rows are counted, but not known beforehand.

    Attributes:
        name: Name of the source.
        report: Who is told.
        num_rows: Rows read so far, of all files.
        file: The file at work.
        num_files: Files in all.
    """

    name: str
    report: Progress
    num_rows: int = 0
    file: int = 0
    num_files: int = 1

    def add(self, num_rows: int) -> None:
        """Count further rows."""
        self.num_rows += num_rows
        so_far = f", {self.num_rows:,} rows" if self.num_rows else ""
        self.report(f"read {self.name}{so_far}", self.file, self.num_files)


def _load_file(
    connection: duckdb.DuckDBPyConnection, path: Path, index: int, rows: "_RowsRead"
) -> None:
    rows.add(0)
    if kind_of(path) == "parquet":
        _load_parquet(connection, path, index)
        return
    records = json_records(path) if kind_of(path) == "json" else csv_records(path)
    for batch in record_batches(records):
        connection.register("arriving", batch)
        connection.execute(f"insert into raw select {index}, * from arriving")
        connection.unregister("arriving")
        rows.add(batch.num_rows)


def _load_parquet(connection: duckdb.DuckDBPyConnection, path: Path, index: int) -> None:
    try:
        connection.execute(
            f"insert into raw select {index}, row_number() over (), to_json({_WHOLE_ROW}),"
            f" null, null from read_parquet({quoted(str(path))}, hive_partitioning = false)"
            f" as {_WHOLE_ROW}"
        )
    except duckdb.Error as error:
        raise DataError(f"cannot read {path} as Parquet: {error}. Is the file complete?") from error


def _load_hub(
    connection: duckdb.DuckDBPyConnection,
    source: ResolvedSource,
    revision: str | None,
    rows: "_RowsRead",
) -> None:
    for batch in hub_batches(source, revision):
        connection.register("arriving", batch)
        connection.execute(
            f"insert into raw select 0, {rows.num_rows} + row_number() over (),"
            f" to_json({_WHOLE_ROW}), null, null from arriving as {_WHOLE_ROW}"
        )
        connection.unregister("arriving")
        rows.add(batch.num_rows)


def _choose_layout(
    connection: duckdb.DuckDBPyConnection, source: ResolvedSource, files: list[str]
) -> Layout:
    """Decide the format by the columns, and check that the columns asked for are there."""
    counts = dict(
        fetch_all(
            connection,
            "select key, count(*) from (select unnest(json_keys(record)) as key from raw"
            " where reason is null) group by key order by key",
        )
    )
    if not counts:
        raise DataError(f"{source.key}: {_no_rows(connection, 'raw', files)}")
    spec = source.spec
    _check_known(spec, source.key)
    name = spec.format if spec.format != "auto" else _detect(spec, list(counts))
    if name is None:
        raise DataError(
            f"{source.key}: the columns of {files[0]} ({', '.join(counts)}) are of no known"
            " format: needed are prompt and response, messages (turns with role and content),"
            " conversations (turns with from and value), or instruction and output. Map"
            " your columns onto these, e.g. `columns: {prompt: question, response: answer}`."
        )
    needed = (*_REQUIRED[name], *spec.columns)
    absent = [ours for ours in needed if spec.columns.get(ours, ours) not in counts]
    if absent:
        theirs = spec.columns.get(absent[0], absent[0])
        raise DataError(
            f"{source.key}: {files[0]} has no column {theirs!r}, which format {name} needs as"
            f" {absent[0]!r}. Its columns are {', '.join(counts)}. Correct `columns` or `format`."
        )
    ours = (*_REQUIRED[name], *_OPTIONAL[name])
    found = {column: spec.columns.get(column, column) for column in ours}
    return Layout(name, {ours: theirs for ours, theirs in found.items() if theirs in counts})


def _check_known(spec: SourceSpec, key: str) -> None:
    unknown = [name for name in spec.columns if name not in _KNOWN_COLUMNS]
    if unknown:
        raise DataError(
            f"{key}.columns: {unknown[0]!r} is no column of ours; known are"
            f" {', '.join(_KNOWN_COLUMNS)}, each with the name it has in your data."
        )


def _detect(spec: SourceSpec, found: list[str]) -> str | None:
    """The format whose columns are all there, one with mapped columns before the others."""
    fitting = [
        name
        for name, required in _REQUIRED.items()
        if all(spec.columns.get(column, column) in found for column in required)
    ]
    fitting.sort(key=lambda name: -len(set(spec.columns) & set(_REQUIRED[name])))
    return fitting[0] if fitting else None


def _extract(connection: duckdb.DuckDBPyConnection, layout: Layout) -> None:
    """Fill the table `extracted` from `raw`: the parts of each example, or why it is unfit."""
    parts = _turn_parts(layout) if layout.format in _TURNS else _column_parts(layout)
    used = json.dumps(dict.fromkeys(layout.columns.values()))
    checks = " ".join(f"when {test} then {quoted(reason)}" for test, reason, _ in parts.checks)
    details = " ".join(f"when {test} then {detail}" for test, _, detail in parts.checks)
    connection.execute(
        f"""
        create or replace temp table extracted as
        with parts as (select *, {parts.columns} from raw where reason is null)
        select file_index, line, record, system, history, prompt, response,
            json_merge_patch(record, {quoted(used)})::varchar as extra,
            case when {_has_keys_twice("record")} then 'duplicate_key' {checks}
                when contains(concat_ws('', system, prompt, response), chr(0))
                    then 'nul_character'
                when not regexp_matches(prompt, {HAS_INK}) then 'empty_prompt'
                when not regexp_matches(response, {HAS_INK}) then 'empty_response' end as reason,
            case when {_has_keys_twice("record")}
                    then 'more than once stands: ' || {_KEYS_TWICE}
                {details}
                when contains(concat_ws('', system, prompt, response), chr(0)) then {_HAS_NUL}
                else '' end as detail
        from parts
        union all by name
        select file_index, line, record, reason, detail from raw where reason is not null
        """
    )


@dataclass(frozen=True)
class _Parts:
    """SQL of a format: columns to compute, and checks as (condition, reason, detail)."""

    columns: str
    checks: tuple[tuple[str, str, str], ...]


def _column_parts(layout: Layout) -> _Parts:
    """Parts of the formats whose texts stand in columns of their own."""
    text = {
        ours: f"json_extract_string(record, {_at(key)})" for ours, key in layout.columns.items()
    }
    prompt, response = text.get("prompt", ""), text.get("response", "")
    if layout.format == "alpaca":
        prompt, response = text["instruction"], text["output"]
        if "input" in text:
            more = text["input"]
            given = f"regexp_matches(coalesce({more}, ''), {HAS_INK})"
            prompt += f" || case when {given} then chr(10) || chr(10) || {more} else '' end"
    columns = (
        f"{text.get('system', 'null::varchar')} as system, null::varchar as history,"
        f" {prompt} as prompt, {response} as response"
    )
    required = _REQUIRED[layout.format]
    checks = [
        check
        for ours, key in layout.columns.items()
        for check in _text_checks(key, is_required=ours in required)
    ]
    return _Parts(columns, tuple(checks))


def _text_checks(key: str, *, is_required: bool) -> Iterator[tuple[str, str, str]]:
    kind = f"coalesce(json_type(record, {_at(key)}), 'NULL')"
    if is_required:
        yield f"{kind} = 'NULL'", "missing_column", quoted(f"column {key} is missing or null")
    yield (
        f"{kind} not in ('NULL', 'VARCHAR')",
        "not_text",
        f"{quoted(f'column {key} is not text but ')} || {_kind_words(kind)}",
    )


def _turn_parts(layout: Layout) -> _Parts:
    """Parts of a list of turns: system, earlier turns, last user and last assistant turn."""
    turns = _TURNS[layout.format]
    key = layout.columns[turns.column]
    messages = f"json_extract(record, {_at(key)})"
    given = f"json_extract_string({messages}, '$[*].{turns.role}')"
    roles = _renamed(given, turns.roles)
    texts = f"json_extract_string({messages}, '$[*].{turns.text}')"
    has_system = f"(coalesce({roles}[1], '') = 'system')"
    earlier = f"list_zip({roles}, {texts})[(1 + {has_system}::integer):-3]"
    system, checks = "null::varchar", [*_turn_checks(key, messages, turns, given, roles)]
    if "system" in layout.columns:
        at = layout.columns["system"]
        system = f"json_extract_string(record, {_at(at)})"
        detail = quoted(f"a system message stands both in column {at} and among the turns")
        checks += _text_checks(at, is_required=False)
        checks.append((f"{has_system} and {system} is not null", "wrong_roles", detail))
    columns = f"""
        case when {has_system} then {texts}[1] else {system} end as system,
        case when len({earlier}) > 0 then to_json(list_transform({earlier},
            lambda turn: struct_pack(role := turn[1], content := turn[2])))::varchar end as history,
        {texts}[-2] as prompt, {texts}[-1] as response"""
    has_nul = f"contains(array_to_string({texts}, ''), chr(0))"
    return _Parts(columns, (*checks, (has_nul, "nul_character", _HAS_NUL)))


def _renamed(roles: str, names: dict[str, str]) -> str:
    """SQL of a list of roles in our names; ``roles`` is SQL of the list in theirs."""
    if not names:
        return roles
    cases = " ".join(f"when {quoted(theirs)} then {quoted(ours)}" for theirs, ours in names.items())
    return f"list_transform({roles}, lambda role: case role {cases} else role end)"


def _turn_checks(
    key: str, messages: str, turns: _Turns, given: str, roles: str
) -> Iterator[tuple[str, str, str]]:
    """A JSON path skips turns that lack a key, so lengths are compared before anything else."""
    kind = f"coalesce(json_type(record, {_at(key)}), 'NULL')"
    kinds = f"json_type({messages}, '$[*].{turns.text}')"
    count = f"coalesce(json_array_length({messages}), 0)"
    spoken = f"array_to_string({roles}, ' ') || ' '"
    user, assistant = list(turns.roles) or ["user", "assistant"]
    yield f"{kind} = 'NULL'", "missing_column", quoted(f"column {key} is missing or null")
    yield f"{kind} <> 'ARRAY'", "wrong_roles", quoted(f"column {key} is no list of messages")
    yield (
        f"len({roles}) <> {count} or not regexp_matches({spoken}, {_ROLES})",
        "wrong_roles",
        f"'needed: an optional system message, then {user} and {assistant} in turn,"
        f" {assistant} last, each under {turns.role}; got: ' || array_to_string({given}, ' ')",
    )
    twice = f"lambda turn: {_has_keys_twice('turn')}"
    yield (
        f"len(list_filter(json_extract({messages}, '$[*]'), {twice})) > 0",
        "duplicate_key",
        "'a message has a key more than once'",
    )
    yield (
        f"len({kinds}) <> {count} or list_distinct({kinds}) <> ['VARCHAR']",
        "not_text",
        "'the content of a message is missing or not text'",
    )


def _store(
    connection: duckdb.DuckDBPyConnection,
    source: ResolvedSource,
    source_id: int,
    files: list[str],
) -> None:
    """Move `extracted` into `examples` and `rejects`, and see that no row is lost."""
    connection.execute("create or replace temp table files (file_index integer, file varchar)")
    connection.executemany("insert into files values (?, ?)", list(enumerate(files)))
    num_before = fetch_one(connection, "select count(*) from examples")
    connection.execute(
        """
        insert into examples by name
        select ? + row_number() over (order by file_index, line) as id, ? as source_id,
            ? as part, file, line, system, history, prompt, response, extra
        from extracted join files using (file_index) where reason is null
        """,
        [num_before, source_id, source.role],
    )
    connection.execute(
        """
        insert into rejects by name
        select ? as source_id, file, line, reason, detail, substring(record, 1, ?) as text
        from extracted join files using (file_index) where reason is not null
        """,
        [source_id, REJECT_TEXT_CHARACTERS],
    )
    num_read = fetch_one(connection, "select count(*) from raw")
    num_stored = fetch_one(
        connection,
        "select (select count(*) from examples where source_id = $1)"
        " + (select count(*) from rejects where source_id = $1)",
        [source_id],
    )
    assert num_read == num_stored, f"{num_read} rows read, {num_stored} accounted for"


def _require_examples(
    connection: duckdb.DuckDBPyConnection, source: ResolvedSource, source_id: int
) -> None:
    kept = fetch_one(connection, "select count(*) from examples where source_id = ?", [source_id])
    if not kept:
        names = [str(file) for file in source.files] or [source.spec.path]
        raise DataError(f"{source.key}: {_no_rows(connection, 'extracted', names)}")


def _no_rows(connection: duckdb.DuckDBPyConnection, table: str, files: list[str]) -> str:
    """Say that no row is usable, with the first one that is not."""
    rows = fetch_all(
        connection,
        f"select file_index, line, reason, detail from {table} where reason is not null"
        " order by file_index, line",
    )
    where = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more files"
    if not rows:
        return f"{where}: there are no rows. Needed is at least one example."
    index, line, reason, detail = rows[0]
    return (
        f"none of the {len(rows)} rows of {where} can be used; the first: {files[index]}, line"
        f" {line}: {reason} ({detail}). Correct the rows, or `format` and `columns`."
    )


def _at(key: str) -> str:
    """JSON pointer to a column, as an SQL string."""
    return quoted("/" + key.replace("~", "~0").replace("/", "~1"))
