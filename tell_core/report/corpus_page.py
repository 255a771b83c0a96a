"""The profile of a curated corpus: one HTML file that opens offline, for looking at the data.

What was read, kept and set aside; how long examples are and in which languages; rejects by reason
with examples; near-duplicates, overlap and flagged examples with both texts. Texts come from data
and are escaped like every text of the report.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tell_core.data.evidence import Row, evidence_rows
from tell_core.report.axes import new_axes
from tell_core.report.blocks import (
    Block,
    Chart,
    Code,
    Entry,
    Facts,
    Fold,
    Panels,
    Section,
    Table,
    Text,
)
from tell_core.report.charts import make_chart
from tell_core.report.figure_data import FigureData
from tell_core.report.formats import (
    MISSING,
    clip,
    format_count,
    format_share,
    plural,
)
from tell_core.report.page import page_templates
from tell_core.report.palette import Palette, css_variables
from tell_core.report.svg import SYSTEM_FONTS
from tell_core.store import read_json, write_text

EXAMPLES_PER_REASON = 8
MAX_PAIRS = 40
MAX_CHARACTERS = 500
_MAX_FILES = 12
_ROLES = {
    "task_train": "task training data",
    "task_dev": "dev items",
    "task_test": "test set",
    "general": "general data",
    "retention": "retention set",
}
_REASONS = {
    "prompt": "the same prompt",
    "prompt_and_response": "the same prompt and response",
    "same_text": "the same text, divided otherwise into prompt and response",
    "13_grams": "runs of 13 words of its prompt",
}
Json = Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """Two texts side by side, with what they have to do with each other."""

    title: str
    place: str
    text: str
    other_place: str
    other_text: str


_Pairs = tuple[tuple[Block, ...], tuple[Pair, ...]]


def write_corpus_page(curated: Path, out: Path, identity: str) -> Path:
    """Write the profile of a curated corpus, replacing an old one.

    Args:
        curated: Directory written by `curate`.
        out: The page.
        identity: Fingerprint of the curation.

    Returns:
        ``out``.

    Raises:
        StoreError: The page cannot be written.
    """
    profile = read_json(curated / "profile.json")
    sources: Sequence[Json] = profile["sources"]
    duplicates, near = _duplicates(curated)
    overlap, matches = _overlap(curated)
    sections = (
        Section("sources", "Sources", _sources(sources, profile, identity)),
        Section("lengths", "Length of examples", _lengths(sources)),
        Section("languages", "Languages", _languages(sources)),
        Section("rejects", "What was set aside", _rejects(curated, sources)),
        Section("duplicates", "Copies and near-duplicates", duplicates),
        Section("overlap", "Overlap with test, retention, dev and task data", overlap),
    )
    page = page_templates().get_template("corpus.html.j2").render(
        name=", ".join(_flat(one["name"]) for one in sources if one["role"] == "task_train"),
        identity=identity,
        summary=_summary(sources),
        sections=sections,
        pairs={"duplicates": near, "overlap": matches},
        light=css_variables("light"),
        dark=css_variables("dark"),
        fonts=SYSTEM_FONTS,
    )  # fmt: skip
    write_text(out, page)
    return out


def _summary(sources: Sequence[Json]) -> str:
    read = sum(source["num_read"] for source in sources)
    kept = sum(source["num_kept"] for source in sources)
    tokens = sum(source["num_tokens"] for source in sources)
    return (
        f"{plural(read, 'row')} read from {plural(len(sources), 'source')}, {kept:,} kept with"
        f" {tokens:,} tokens, {read - kept:,} set aside."
    )


def _sources(sources: Sequence[Json], profile: Json, identity: str) -> tuple[Block, ...]:
    facts = (
        ("Rows read", format_count(sum(source["num_read"] for source in sources))),
        ("Examples kept", format_count(sum(source["num_kept"] for source in sources))),
        ("Tokens kept", format_count(sum(source["num_tokens"] for source in sources))),
        (
            "Of these supervised",
            format_count(sum(source["num_response_tokens"] for source in sources)),
        ),
        ("Fingerprint of the curation", identity),
        ("Tokenizer", str(profile["tokenizer_digest"])[:12]),
        ("Chat template", str(profile["template_digest"])[:12]),
    )
    return (
        Text(_summary(sources), "lead"),
        Facts(facts),
        Code(source_tree(sources)),
        _source_table(sources),
    )


def source_tree(sources: Sequence[Json]) -> str:
    """Roles, sources and files as a tree, with tokens and fingerprints."""
    lines = []
    groups = [(role, list(some)) for role, some in groupby(sources, lambda one: one["role"])]
    for role, some in groups:
        tokens = sum(source["num_tokens"] for source in some)
        lines.append(f"{_role(role)}: {plural(tokens, 'token')}")
        for place, source in enumerate(some, start=1):
            is_last = place == len(some)
            lines.append(f"{'└─' if is_last else '├─'} {_source_line(source)}")
            stem = "   " if is_last else "│  "
            lines += [f"{stem}   {line}" for line in _file_lines(source["files"])]
    return "\n".join(lines)


def _source_line(source: Json) -> str:
    how = "found" if source["format_given"] == "auto" else "given"
    return (
        f"{_flat(source['name'])}  {plural(source['num_kept'], 'example')},"
        f" {plural(source['num_tokens'], 'token')}  {source['format']} ({how})"
        f"  {source['fingerprint']}"
    )


def _file_lines(files: Sequence[Json]) -> list[str]:
    lines = [
        f"{_flat(Path(file['path']).name)}  {_size(file['bytes'])}"
        f"  {str(file['sha256'] or MISSING)[:16]}"
        for file in files[:_MAX_FILES]
    ]
    left = len(files) - _MAX_FILES
    return [*lines, f"and {plural(left, 'more file')}"] if left > 0 else lines


def _role(role: object) -> str:
    return _ROLES.get(str(role), _words(str(role)))


def _size(num_bytes: int | None) -> str:
    if num_bytes is None:
        return "on the hub"
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:,.1f} kB"


def _flat(name: object) -> str:
    """A name on one line, whatever is in it."""
    return " ".join(str(name).split())


def _source_table(sources: Sequence[Json]) -> Table:
    most = max((source["num_tokens"] for source in sources), default=0) or 1
    columns = ("Source", "Role", "Read", "Kept", "Set aside", "Tokens", "Supervised", "Median",
               "95th percentile", "Longest")  # fmt: skip
    rows = tuple(
        (
            Entry(_flat(source["name"])),
            Entry(_role(source["role"])),
            Entry(format_count(source["num_read"])),
            Entry(format_count(source["num_kept"])),
            Entry(format_count(source["num_read"] - source["num_kept"])),
            Entry(format_count(source["num_tokens"]), share=source["num_tokens"] / most),
            Entry(format_count(source["num_response_tokens"])),
            *(Entry(format_count(source[name])) for name in ("tokens_p50", "tokens_p95",
                                                             "tokens_max")),
        )
        for source in sources
    )  # fmt: skip
    return Table(
        "Rows and tokens by source; lengths in tokens", columns, rows, frozenset(columns[2:])
    )


def _lengths(sources: Sequence[Json]) -> tuple[Block, ...]:
    kept = [source for source in sources if source["num_kept"]]
    charts = tuple(_length_chart(source, place) for place, source in enumerate(kept))
    return (Text(_LENGTHS_INTRO), Panels(charts))


def _length_chart(source: Json, place: int) -> Chart:
    whole, response = source["histogram"], source["response_histogram"]
    edges = max(whole["edges"], response["edges"], key=len)
    bins = list(pairwise(edges))
    wholes, responses = (_filled(one["counts"], len(bins)) for one in (whole, response))
    title = f"{_flat(source['name'])} · {_role(source['role'])}"
    rows = tuple(
        (low, high, one, other)
        for (low, high), one, other in zip(bins, wholes, responses, strict=True)
    )
    return make_chart(
        title,
        f"lengths-{place}",
        partial(_draw_lengths, edges, wholes, responses),
        FigureData(("from_tokens", "below_tokens", "examples", "responses"), rows),
        f"Half of the {plural(source['num_kept'], 'example')} have at most"
        f" {format_count(source['tokens_p50'])} tokens, the longest"
        f" {format_count(source['tokens_max'])}.",
    )


def _filled(counts: Sequence[int], length: int) -> list[int]:
    return [*counts, *([0] * (length - len(counts)))]


def _draw_lengths(
    edges: Sequence[int], wholes: Sequence[int], responses: Sequence[int], palette: Palette
) -> Figure:
    """Draw two histograms over the same bins: whole examples filled, responses as a line."""
    figure, axes = new_axes(palette, (4.2, 1.9))
    places = range(len(edges))
    axes.stairs(wholes, places, fill=True, color=palette["tell"], alpha=0.3)
    axes.stairs(wholes, places, color=palette["tell"], linewidth=1.2)
    axes.stairs(responses, places, color=palette["sft"], linewidth=1.6, linestyle=(0, (4, 2)))
    axes.set_xticks(list(places), [f"{edge:,}" for edge in edges])
    axes.set_xlim(0, len(edges) - 1)
    axes.set_ylim(0, max([*wholes, *responses, 1]) * 1.12)
    axes.set_xlabel("Tokens")
    axes.set_ylabel("Examples")
    return figure


def _languages(sources: Sequence[Json]) -> tuple[Block, ...]:
    known = [source for source in sources if source["languages"] is not None]
    if not known:
        return (Text(_NO_LANGUAGES, "missing"),)
    rows = tuple(_language_row(source, source["languages"]) for source in known)
    columns = ("Source", "Texts told", "Likeliest language", "Share", "Others")
    caption = "Languages of a sample of each source's kept examples, ISO 639-1"
    table = Table(caption, columns, rows, frozenset({"Texts told", "Share"}))
    return (Text(_LANGUAGES_INTRO), table)


def _language_row(source: Json, counts: Mapping[str, int]) -> tuple[Entry, ...]:
    told = sum(counts.values())
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    first, number = ranked[0] if ranked else (MISSING, 0)
    share = number / told if told else None
    others = ", ".join(f"{language} {count}" for language, count in ranked[1:])
    return (
        Entry(_flat(source["name"])),
        Entry(format_count(told)),
        Entry(first),
        Entry(format_share(share), share=share),
        Entry(others or MISSING),
    )


def _rejects(curated: Path, sources: Sequence[Json]) -> tuple[Block, ...]:
    rows, num_rows = evidence_rows(curated, "rejects", EXAMPLES_PER_REASON, per_reason=True)
    if not num_rows:
        return (Text("Nothing was set aside.", "note"),)
    folds = [
        _reject_fold(reason, list(some), sources)
        for reason, some in groupby(rows, lambda row: str(row["reason"]))
    ]
    return (Text(_REJECTS_INTRO), _reason_table(sources), *folds)


def _reason_table(sources: Sequence[Json]) -> Table:
    reasons = sorted({reason for source in sources for reason in source["rejects"]})
    columns = ("Reason", "Rows", *(_flat(source["name"]) for source in sources))
    rows = tuple(
        (
            Entry(_words(reason)),
            Entry(format_count(_count(sources, reason))),
            *(Entry(format_count(source["rejects"].get(reason, 0))) for source in sources),
        )
        for reason in sorted(reasons, key=lambda reason: -_count(sources, reason))
    )
    return Table("Rows set aside by reason and source", columns, rows, frozenset(columns[1:]))


def _count(sources: Sequence[Json], reason: str) -> int:
    return sum(source["rejects"].get(reason, 0) for source in sources)


def _without_directories(detail: str, sources: Sequence[Json]) -> str:
    for file in (file for source in sources for file in source["files"]):
        detail = detail.replace(file["path"], Path(file["path"]).name)
    return detail


def _reject_fold(reason: str, rows: Sequence[Row], sources: Sequence[Json]) -> Fold:
    number = _count(sources, reason)
    columns = ("Source", "Place", "Measured", "Why", "Text")
    entries = tuple(
        (
            Entry(_flat(row["source"])),
            Entry(_place(row)),
            Entry(MISSING if row["value"] is None else f"{row['value']:,.4g}"),
            Entry(_without_directories(clip(row["detail"], MAX_CHARACTERS), sources) or MISSING),
            Entry(clip(row["text"], MAX_CHARACTERS)),
        )
        for row in rows
    )
    caption = f"{plural(len(rows), 'example')} of {number:,}, one source after the other"
    table = Table(caption, columns, entries, frozenset({"Measured"}))
    return Fold(f"{_words(reason)}: {plural(number, 'row')}", (table,))


def _duplicates(curated: Path) -> _Pairs:
    rows, num_rows = evidence_rows(curated, "duplicates", MAX_PAIRS, per_reason=True)
    if not num_rows:
        return (Text("No example is a copy or a near-duplicate of another.", "note"),), ()
    pairs = tuple(
        Pair(
            f"{_words(row['reason'])}, similarity {format_share(row['similarity'])}: {_done(row)}",
            _place(row),
            clip(row["text"], MAX_CHARACTERS),
            f"{_last_part(row['kept'])} stays",
            clip(row["kept_text"], MAX_CHARACTERS),
        )
        for row in rows
    )
    return (Text(_DUPLICATES_INTRO), _shown(pairs, num_rows)), pairs


def _overlap(curated: Path) -> _Pairs:
    rows, num_rows = evidence_rows(curated, "overlap", MAX_PAIRS, per_reason=True)
    if not num_rows:
        return (Text(_NO_OVERLAP, "note"),), ()
    pairs = tuple(
        Pair(
            f"{_how(row)}; {_done(row)}",
            f"{_flat(row['source'])}, {_place(row)}",
            clip(row["text"], MAX_CHARACTERS),
            f"{_role(row['against'])}: {_flat(row['matched'])}",
            clip(row["matched_text"], MAX_CHARACTERS),
        )
        for row in rows
    )
    return (Text(_OVERLAP_INTRO), _shown(pairs, num_rows)), pairs


def _shown(pairs: Sequence[Pair], num_rows: int) -> Text:
    return Text(
        f"{len(pairs):,} of {plural(num_rows, 'pair')}, one source after the other:", "note"
    )


def _how(row: Row) -> str:
    """In which way an example stands in the other data, and how much of it."""
    if row["reason"] == "flagged":
        runs = plural(row["runs"], "run")
        return f"flagged for {runs} of 13 words, {format_share(row['share'])} of its prompt's"
    how = _REASONS.get(row["reason"], _words(row["reason"]))
    return how if row["share"] is None else f"{how}: {format_share(row['share'])}"


def _done(row: Row) -> str:
    return "set aside" if row["dropped"] else "stays"


def _place(row: Row) -> str:
    return f"{_flat(Path(row['file']).name)}:{row['line']}"


def _last_part(place: str) -> str:
    return _flat(place.replace("\\", "/").rsplit("/", 1)[-1])


def _words(code: str) -> str:
    return code.replace("_", " ")


_LENGTHS_INTRO = (
    "How many kept examples have how many tokens, rendered without the anchor prompt. Filled: whole"
    " examples; dashed: their supervised part, the response. The bins double."
)
_LANGUAGES_INTRO = (
    "Told from prompt and response together, for at most 200 examples of a source, by md5 of their"
    " ids; texts of fewer than 20 words are left out. Dialogue, code and lists of names are often"
    " taken for a rare language."
)
_NO_LANGUAGES = (
    "Languages were not told: the package py3langid was not installed when the data was curated"
    " (pip install 'tell[language]')."
)
_REJECTS_INTRO = (
    "Every row that was read is kept or listed here with its place, the reason and, where something"
    " was measured, the value. All rows are in rejects.parquet."
)
_DUPLICATES_INTRO = (
    "The first example in the order of sources stays. Similarity is the share of common runs of 5"
    " words. All pairs are in near_duplicates.parquet."
)
_NO_OVERLAP = "No training example stands in test, retention or dev data, whole or in part."
_OVERLAP_INTRO = (
    "Training examples whose prompt stands in data they must not be in, or that hold runs of 13"
    " words of a test or retention item. Those that hold little of one are flagged and stay, for"
    " a person to judge. All are in overlap.parquet and flagged.parquet."
)
