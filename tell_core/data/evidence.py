"""Evidence: what curation set aside or flagged, as rows for people, with both texts of a pair."""

from pathlib import Path
from typing import Any, Literal, get_args

import duckdb

from tell_core.data.workspace import fetch_one, quoted
from tell_core.errors import InputError

EvidenceKind = Literal["rejects", "duplicates", "overlap"]
EVIDENCE_KINDS: tuple[str, ...] = get_args(EvidenceKind)
Row = dict[str, Any]


def evidence_rows(
    curated: Path, kind: str, limit: int | None = None, *, per_reason: bool = False
) -> tuple[list[Row], int]:
    """Rows of one kind of evidence, and how many there are in all.

    Args:
        curated: Directory written by `curate`.
        kind: ``rejects``: every row set aside, with reason and measured value. ``duplicates``:
            copies and near-duplicates, with the example that stayed. ``overlap``: examples that
            stand in test, retention, dev or task data, and those flagged for holding a little of
            a test or retention item, with the other example: ``runs`` of 13 words in common, and
            ``share`` of those that begin in the item's prompt.
        limit: Most rows returned, in the order of the data; None returns all.
        per_reason: Whether ``limit`` holds for each reason, source by source in turn, instead of
            for all rows together.

    Returns:
        The rows as mappings of plain values; the number of all of them.

    Raises:
        InputError: There is no such kind.
    """
    if kind not in EVIDENCE_KINDS:
        raise InputError(
            f"there is nothing to show under {kind!r}; needed is one of {', '.join(EVIDENCE_KINDS)}"
        )
    query = _QUERIES[kind].format(
        **{name: f"read_parquet({quoted(str(curated / name))[:-1]}.parquet')" for name in _FILES}
    )
    with duckdb.connect() as connection:
        connection.execute(f"create view evidence as {query}")
        num_rows = fetch_one(connection, "select count(*) from evidence")
        chosen = _PER_REASON if per_reason else _FIRST
        most = num_rows if limit is None else limit
        found = connection.execute(chosen, [most])
        names = [column[0] for column in found.description or ()]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()], num_rows


_FILES = ("rejects", "near_duplicates", "overlap", "flagged")
_QUERIES = {
    "rejects": "select source, file, line, reason, value, detail, text from {rejects}",
    "duplicates": """
        select source, file, line, 'duplicate' as reason, 1.0 as similarity,
            regexp_replace(detail, '^same as ', '') as kept, true as dropped, text,
            text as kept_text
        from {rejects} where reason = 'duplicate'
        union all
        select source, file, line, 'near_duplicate', similarity,
            kept_file || ', line ' || kept_line, dropped, text, kept_text
        from {near_duplicates}""",
    "overlap": """
        select source, file, line, matched as reason, null::double as share,
            null::bigint as runs, against,
            matched_source || ', line ' || matched_line as matched, dropped, text, matched_text
        from {overlap}
        union all
        select source, file, line, 'flagged', share, num_runs, against,
            matched_source || ', line ' || matched_line, false, text, matched_text
        from {flagged}""",
}
_FIRST = "select * from evidence limit ?"
# First of every source, then the second of every source, and so on: no source hides the others.
_PER_REASON = """
select * exclude (turn, place, rank) from (
    select *, row_number() over (partition by reason order by turn, place) as rank from (
        select *, row_number() over (partition by reason, source order by place) as turn
        from (select *, row_number() over () as place from evidence)))
where rank <= ? order by reason, rank
"""
