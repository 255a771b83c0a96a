"""Curation: from sources to clean corpora, everything set aside accounted for.

Read, remove the task's constant prefix, filter general data, remove duplicates and what stands in
more than one of test, dev, task and general data, render and count tokens, set aside what is too
long, remove near-duplicates and what holds pieces of test items, carve out dev and held-out
examples, write.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pyarrow as pa

from tell_core.data.anchors import Anchor, apply_anchor, resolve_anchor, with_num_tokens
from tell_core.data.contamination import create_contamination_tables, find_contamination
from tell_core.data.corpus import bare_store_path, example_from_row, parse_extra
from tell_core.data.encoding import EncodedExamples, from_lists
from tell_core.data.filters import chosen_filters, measure_unfit
from tell_core.data.near_duplicates import (
    create_near_duplicate_tables,
    find_near_duplicates,
    index_words,
    settle_near_duplicates,
)
from tell_core.data.overlap import find_overlap, index_prompts
from tell_core.data.profile import profile_source
from tell_core.data.reading import Layout, read_source
from tell_core.data.rendering import ChatRenderer, Example, load_chat_template
from tell_core.data.sources import ResolvedSource, resolve_sources, source_identity
from tell_core.data.telling import Progress, telling
from tell_core.data.token_store import STORE_FILE, TokenStore, open_writer
from tell_core.data.workspace import (
    HAS_INK,
    REJECT_TEXT_CHARACTERS,
    fetch_all,
    fetch_one,
    insert_table,
    open_workspace,
    quoted,
    spill_directory,
    stream_batches,
    stream_columns,
)
from tell_core.errors import AnchorError, DataError, StoreError
from tell_core.spec.identity import file_digest
from tell_core.spec.model import CurationSpec, ExperimentSpec
from tell_core.store import explain_disk_errors, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTS = ("task_train", "task_dev", "task_test", "general", "general_heldout", "retention")
_ENCODE_ROWS = 2048


def curation_inputs(spec: ExperimentSpec) -> dict[str, Any]:
    """What decides about the sources' rows, by content, before anything is read.

    Returns:
        ``sources``: per source its role, name, format, columns, and either sha256 and size of
        each file or the hub id with subset, split and revision; ``chat_template``: sha256 of the
        template file, or None. No directories, so that moved data keeps its identity.

    Raises:
        DataError: A source cannot be found.
    """
    template = spec.model.chat_template
    load_chat_template(template)
    return {
        "sources": [source_identity(source) for source in resolve_sources(spec)],
        "chat_template": None if template is None else file_digest(Path(template)),
    }


def renderer_for(spec: ExperimentSpec, tokenizer: PreTrainedTokenizerBase) -> ChatRenderer:
    """The renderer that an experiment uses everywhere."""
    return ChatRenderer(tokenizer, load_chat_template(spec.model.chat_template))


def curate(
    spec: ExperimentSpec,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Curate all sources of an experiment and write the corpora.

    Duplicates are exact copies within the task's training data, and within general data across
    its sources; the first in the order of sources stays. An example is too long when it has more
    than `curation.max_tokens` tokens with the anchor prompt on it; general examples are measured
    with the anchor's length too, so that all arms draw from the same pool. Among what is short
    enough, near-duplicates are looked for (`settle_near_duplicates`), then pieces of test and
    retention items (`find_contamination`).

    Args:
        spec: The experiment.
        tokenizer: Tokenizer of the base model.
        out: Existing directory for ``task_train.parquet`` and its siblings with their tokens
            (``task_train.tokens.arrow``), ``rejects.parquet``, ``overlap.parquet``,
            ``flagged.parquet``, ``near_duplicates.parquet``, ``anchor.json`` and
            ``profile.json``.
        on_progress: Called with the step's name, units done and units in all, every few seconds
            at least, also while the data engine is at work (`telling`).

    Returns:
        The content of ``profile.json``.

    Raises:
        DataError: A source cannot be read, or nothing is left of a part.
        AnchorError: The anchor prompt cannot be resolved or leaves no room.
    """
    renderer = renderer_for(spec, tokenizer)
    sources = resolve_sources(spec)
    out.mkdir(parents=True, exist_ok=True)
    with (
        explain_disk_errors(out),
        open_workspace(out, spec.curation.max_memory_gb) as connection,
        telling(connection, on_progress) as report,
    ):
        layouts = _read(connection, sources, report)
        anchor = _settle_anchor(connection, spec, renderer)
        report("identify", 0, 1)
        _identify(connection)
        _reject_unfit(connection, spec.curation, report)
        if spec.curation.drop_duplicates:
            report("copies", 0, 1)
            _reject_duplicates(connection)
        index_prompts(connection, anchor.own_instruction, report)
        report("same prompts", 0, 1)
        find_overlap(connection, drop=spec.curation.drop_overlap)
        tokens = _encode(connection, renderer, anchor, report)
        _reject_too_long(connection, spec.curation.max_tokens)
        _compare(connection, spec.curation, report)
        report("hold out", 0, 1)
        _require_parts(connection, sources)
        _carve(connection, spec)
        find_overlap(connection, drop=spec.curation.drop_overlap)  # of train with carved dev items
        _settle_near_duplicates(connection, spec.curation)
        _require_parts(connection, sources)
        _write(connection, out, report)
        _write_tokens(connection, tokens, renderer, out, report)
        report("profile", 0, 1)
        profile = _profile(connection, sources, layouts, renderer)
    write_json(out / "anchor.json", anchor.record())
    write_json(out / "profile.json", profile)
    return profile


def _read(
    connection: duckdb.DuckDBPyConnection, sources: Sequence[ResolvedSource], report: Progress
) -> list[Layout]:
    layouts = []
    for source_id, source in enumerate(sources):
        layouts.append(read_source(connection, source, source_id, report))
    return layouts


def _settle_anchor(
    connection: duckdb.DuckDBPyConnection, spec: ExperimentSpec, renderer: ChatRenderer
) -> Anchor:
    """Resolve the anchor prompt and leave task prompts bare."""
    rows = fetch_all(
        connection,
        "select prompt, extra, file || ', line ' || line from examples where part like 'task_%'"
        " order by id",
    )
    column = spec.anchor.length_column
    anchor = resolve_anchor(
        spec.anchor,
        prompts=[prompt for prompt, _, _ in rows],
        lengths=None if column is None else [_length(extra, column) for _, extra, _ in rows],
        places=[place for _, _, place in rows],
    )
    anchor = with_num_tokens(anchor, renderer.num_text_tokens(anchor.text) if anchor.text else 0)
    if anchor.num_tokens >= spec.curation.max_tokens:
        raise AnchorError(
            f"the anchor prompt has {anchor.num_tokens} tokens, and `curation.max_tokens` is"
            f" {spec.curation.max_tokens}: no example fits beside it. Shorten the anchor or raise"
            " the limit."
        )
    _strip_prefix(connection, anchor.own_instruction)
    return anchor


def _length(extra: str, column: str) -> int | None:
    value = parse_extra(extra).get(column)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _strip_prefix(connection: duckdb.DuckDBPyConnection, prefix: str) -> None:
    if not prefix:
        return
    connection.execute(
        "update examples set prompt = substring(prompt, ?) where part like 'task_%'",
        [len(prefix) + 1],
    )
    _reject(
        connection,
        "select id, 'empty_prompt', 'nothing follows the constant beginning of the prompt', null"
        f" from examples where part like 'task_%' and not regexp_matches(prompt, {HAS_INK})",
    )


def _identify(connection: duckdb.DuckDBPyConnection) -> None:
    """Give every example the digest of its content."""
    connection.execute(
        "create or replace table examples as select *, left(sha256(to_json(struct_pack("
        "system := system, history := history, prompt := prompt, response := response))::varchar),"
        " 16) as example_id from examples"
    )


def _reject_unfit(
    connection: duckdb.DuckDBPyConnection, curation: CurationSpec, report: Progress
) -> None:
    filters = chosen_filters(curation)
    if filters:
        measure_unfit(connection, filters, report)
        _reject(connection, "select id, reason, detail, value from unfit_general")


def _reject_duplicates(connection: duckdb.DuckDBPyConnection) -> None:
    _reject(
        connection,
        """
        with copies as (
            select part, example_id, min(id) as first_id from examples
            where part in ('task_train', 'general') group by part, example_id having count(*) > 1)
        select e.id, 'duplicate', 'same as ' || f.file || ', line ' || f.line, null
        from copies join examples e using (part, example_id) join examples f on f.id = first_id
        where e.id <> first_id
        """,
    )


def _reject(connection: duckdb.DuckDBPyConnection, query: str) -> None:
    """Set aside the examples of a query of (id, reason, detail, measured value)."""
    connection.execute(f"create or replace temp table unfit (id, reason, detail, value) as {query}")
    connection.execute(
        "insert into rejects by name select source_id, file, line, reason, detail, value,"
        " substring(prompt, 1, ?) as text from examples join unfit using (id)",
        [REJECT_TEXT_CHARACTERS],
    )
    connection.execute("delete from examples where id in (select id from unfit)")


def _encode(
    connection: duckdb.DuckDBPyConnection, renderer: ChatRenderer, anchor: Anchor, report: Progress
) -> TokenStore:
    """Render every example without the anchor, and measure it with the anchor.

    Returns:
        The tokens, under the spill directory; column `place` of `encoded` says where.
    """
    connection.execute(
        "create table encoded (id bigint, place bigint, num_tokens bigint,"
        " num_response_tokens bigint, num_anchored_tokens bigint)"
    )
    num_examples, done = fetch_one(connection, "select count(*) from examples"), 0
    query = "select id, part, system, history, prompt, response from examples order by id"
    path = spill_directory(connection) / STORE_FILE
    with open_writer(path, renderer.digest) as writer:
        for rows in stream_batches(connection, query, _ENCODE_ROWS):
            report("encode", done, num_examples)
            examples = [example_from_row(row) for row in rows]
            encoded = from_lists(renderer.encode(examples), is_task=False)
            writer.append(encoded)
            counts = _token_counts(rows, examples, encoded, renderer, anchor)
            counts["place"] = np.arange(done, done + len(rows))
            insert_table(connection, "encoded", pa.table(counts))
            done += len(rows)
    report("encode", num_examples, num_examples)
    return TokenStore(path, is_mapped=False)


def _token_counts(
    rows: list[dict[str, Any]],
    examples: list[Example],
    encoded: EncodedExamples,
    renderer: ChatRenderer,
    anchor: Anchor,
) -> dict[str, Any]:
    return {
        "id": [row["id"] for row in rows],
        "num_tokens": encoded.lengths,
        "num_response_tokens": encoded.supervised_counts,
        "num_anchored_tokens": _anchored_lengths(
            rows, examples, encoded.lengths.tolist(), renderer, anchor
        ),
    }


def _anchored_lengths(
    rows: list[dict[str, Any]],
    examples: list[Example],
    lengths: list[int],
    renderer: ChatRenderer,
    anchor: Anchor,
) -> list[int]:
    """Tokens with the anchor: rendered for task data, the anchor's own length added for general."""
    anchored = [length + anchor.num_tokens for length in lengths]
    task = [at for at, row in enumerate(rows) if row["part"].startswith("task_")]
    with_anchor = []
    for at in task:
        example = examples[at]
        system, prompt = apply_anchor("anchor", anchor, example.prompt, example.system)
        with_anchor.append(example._replace(system=system, prompt=prompt))
    for at, (ids, _) in zip(task, renderer.encode(with_anchor), strict=True):
        anchored[at] = len(ids)
    return anchored


def _reject_too_long(connection: duckdb.DuckDBPyConnection, max_tokens: int) -> None:
    _reject(
        connection,
        "select id, 'too_long', num_anchored_tokens || ' tokens with the anchor prompt, at most"
        f" {max_tokens} allowed', num_anchored_tokens from encoded"
        f" where num_anchored_tokens > {max_tokens}",
    )


def _compare(
    connection: duckdb.DuckDBPyConnection, curation: CurationSpec, report: Progress
) -> None:
    """Remove near-duplicates, then what holds long pieces of test or retention items."""
    similarity, share = curation.near_duplicate_similarity, curation.overlap_ngram_share
    create_near_duplicate_tables(connection)
    create_contamination_tables(connection)
    if similarity is not None or share is not None:
        store, id_of = index_words(connection, report)
    if similarity is not None:
        find_near_duplicates(connection, store, id_of, similarity, report)
        report("near-duplicates", 0, 1)
        _settle_near_duplicates(connection, curation)
    if share is not None:
        find_contamination(
            connection, store, id_of, share, drop=curation.drop_overlap, report=report
        )


def _settle_near_duplicates(connection: duckdb.DuckDBPyConnection, curation: CurationSpec) -> None:
    settle_near_duplicates(
        connection,
        drop_duplicates=curation.drop_duplicates,
        drop_overlap=curation.drop_overlap,
    )


def _require_parts(
    connection: duckdb.DuckDBPyConnection, sources: Sequence[ResolvedSource]
) -> None:
    """Every role that was given must have examples left."""
    for role in dict.fromkeys(source.role for source in sources):
        if fetch_one(connection, "select count(*) from examples where part = ?", [role]):
            continue
        reasons = fetch_all(
            connection,
            "select reason, count(*) from rejects join sources using (source_id) where role = ?"
            " group by reason order by reason",
            [role],
        )
        keys = ", ".join(source.key for source in sources if source.role == role)
        found = ", ".join(f"{reason} {count}" for reason, count in reasons)
        raise DataError(
            f"{keys}: no example is left after curation; set aside were: {found}. Mend the data,"
            " or the limits under `curation`."
        )


def _carve(connection: duckdb.DuckDBPyConnection, spec: ExperimentSpec) -> None:
    """Take dev examples out of the task's, and held-out ones out of general data."""
    seed = spec.curation.seed
    if spec.task.dev is None:
        _take_out(connection, "task_train", "task_dev", spec.task.dev_examples, seed)
    if spec.general:
        count = spec.curation.general_heldout_examples
        _take_out(connection, "general", "general_heldout", count, seed)


_CARVE_MENDS = {
    "task_dev": "lower `task.dev_examples` or give dev items under `task.dev`",
    "general_heldout": "lower `curation.general_heldout_examples`",
}


def _take_out(
    connection: duckdb.DuckDBPyConnection, source: str, target: str, count: int, seed: int
) -> None:
    """Move ``count`` examples from one part to another, chosen by md5 of their ids."""
    available = fetch_one(connection, "select count(*) from examples where part = ?", [source])
    if available <= count:
        raise DataError(
            f"{source} has {available} examples left after curation; taking {count} of them for"
            f" {target} leaves none to train on. Needed are at least {count + 1}:"
            f" {_CARVE_MENDS[target]}."
        )
    connection.execute(
        "update examples set part = $1 where id in (select id from examples where part = $2"
        " order by md5($3 || '|' || $1 || '|' || example_id), id limit $4)",
        [target, source, str(seed), count],
    )


def _write_tokens(
    connection: duckdb.DuckDBPyConnection,
    tokens: TokenStore,
    renderer: ChatRenderer,
    out: Path,
    report: Progress,
) -> None:
    """Write the tokens of each part beside its corpus, in the order of its rows."""
    num_examples, done = fetch_one(connection, "select count(*) from examples"), 0
    for part in PARTS:
        query = (
            "select place from encoded join examples using (id)"
            f" where part = {quoted(part)} order by id"
        )
        with open_writer(bare_store_path(out / f"{part}.parquet"), renderer.digest) as writer:
            for batch in stream_columns(connection, query, _ENCODE_ROWS):
                report("write tokens", done, num_examples)
                writer.append(tokens.take(batch["place"], is_task=False))
                done += len(batch["place"])
    report("write tokens", done, num_examples)


def _write(connection: duckdb.DuckDBPyConnection, out: Path, report: Progress) -> None:
    for number, part in enumerate(PARTS):
        report("write", number, len(PARTS))
        _copy(
            connection,
            f"""
            select row_number() over (order by id) - 1 as row, name as source, file, line,
                example_id, system, history, prompt, response, extra, num_tokens,
                num_response_tokens
            from examples join encoded using (id) join sources using (source_id)
            where part = {quoted(part)} order by id
            """,
            out / f"{part}.parquet",
        )
    report("write", len(PARTS), len(PARTS))
    _copy(
        connection,
        "select name as source, file, line, reason, detail, value, text from rejects"
        " join sources using (source_id) order by source_id, file, line",
        out / "rejects.parquet",
    )
    _copy(
        connection,
        "select name as source, file, line, example_id, against, matched_source, matched_line,"
        " matched, text, matched_text, dropped from overlap join sources using (source_id)"
        " order by id",
        out / "overlap.parquet",
    )
    _copy(
        connection,
        "select name as source, file, line, example_id, against, matched_source, matched_file,"
        " matched_line, share, num_runs, text, matched_text from flagged"
        " join sources using (source_id) order by id",
        out / "flagged.parquet",
    )
    _copy(
        connection,
        "select dense_rank() over (order by kept_id) as cluster, source, file, line, example_id,"
        " part, kept_source, kept_file, kept_line, kept_example_id, kept_part, similarity, text,"
        " kept_text, dropped from near_duplicates order by kept_id, id",
        out / "near_duplicates.parquet",
    )


def _copy(connection: duckdb.DuckDBPyConnection, query: str, path: Path) -> None:
    try:
        connection.execute(
            f"copy ({query}) to {quoted(str(path))} (format parquet, compression zstd)"
        )
    except duckdb.IOException as error:
        raise StoreError(
            f"cannot write {path}: {error}. Free some space or choose another --out, then run the"
            " same command again."
        ) from error


def _profile(
    connection: duckdb.DuckDBPyConnection,
    sources: Sequence[ResolvedSource],
    layouts: Sequence[Layout],
    renderer: ChatRenderer,
) -> dict[str, Any]:
    return {
        "sources": [
            profile_source(connection, source, source_id, layout)
            for source_id, (source, layout) in enumerate(zip(sources, layouts, strict=True))
        ],
        "tokenizer_digest": renderer.tokenizer_digest,
        "template_digest": renderer.template_digest,
    }
