"""The inspector: an interactive offline page of candidate quanta."""

from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tell_core.errors import InputError
from tell_core.report.page import page_script, page_templates
from tell_core.report.palette import css_variables, style_of
from tell_core.report.quantum_times import times_over_seeds
from tell_core.report.svg import SYSTEM_FONTS
from tell_core.store import is_intact, read_json, write_text

# Clusters on the page, largest first; the others are in the stage's files.
MAX_CLUSTERS = 200


def write_inspector(root: Path, name: str) -> Path:
    """Draw ``quanta/<name>.html`` from the quanta that were found last under that name.

    Its timeline has every cluster where it is learned, with an interval over the seeds of the
    cell's arm where the run has loss traces.

    The page holds everything it shows and needs no network. Texts of the data become text, never
    markup, and no script but the page's own can run.

    Args:
        root: Run directory, or where the quanta of a model were written.
        name: Name of the cell or model.

    Raises:
        InputError: No quanta of that name were found, or their stage is damaged.
    """
    link = root / "quanta" / f"{name}.json"
    stage = root / "stages" / str(read_json(link)["stage"]) if link.exists() else None
    if stage is None or not is_intact(stage):
        raise InputError(
            f"{root} holds no whole quanta of {name!r}: run `tell quanta {root}` first"
        )
    clusters = read_json(stage / "clusters.json")
    times = times_over_seeds(root, name, stage / "tokens.parquet")
    for cluster in clusters:
        cluster["over_seeds"] = times.get(cluster["label"])
    page = _page(read_json(stage / "summary.json"), clusters)
    out = link.with_suffix(".html")
    write_text(out, page)
    return out


def _page(summary: dict[str, Any], clusters: list[dict[str, Any]]) -> str:
    script = page_script("inspector")
    shown = clusters[:MAX_CLUSTERS]
    arms = sorted({arm for cluster in shown for arm in cluster["curves"]}, key=_place)
    return (
        page_templates()
        .get_template("inspector.html.j2")
        .render(
            name=summary["name"],
            summary=summary,
            facts=_facts(summary, clusters),
            num_clusters=len(clusters),
            num_shown=len(shown),
            light=css_variables("light"),
            dark=css_variables("dark"),
            fonts=SYSTEM_FONTS,
            carried={
                "clusters": shown,
                "arms": [
                    {"name": arm, "colour": style_of(arm).colour, "dashes": style_of(arm).dashes}
                    for arm in arms
                ],
                "stability": summary["stability"],
            },
            script=Markup(script),
            script_digest=b64encode(sha256(script.encode()).digest()).decode(),
        )
    )


def _place(arm: str) -> int:
    return style_of(arm).place


def _facts(summary: dict[str, Any], clusters: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What stands in the boxes above the map."""
    tokens, ranks = summary["tokens"], summary["ranks"]
    nulls = ranks["null_slopes"]
    in_pairs = sum(cluster["size"] for cluster in clusters)
    return [
        ("tokens looked at", f"{tokens['chosen']:,} of {tokens['supervised']:,}"),
        (
            "candidate quanta",
            f"{summary['num_clusters']}, {len(clusters)} of them not single tokens",
        ),
        ("tokens in these", f"{in_pairs:,}"),
        (
            "agreement of subsamples",
            f"{summary['agreement']:.2f}; without clusters {max(summary['chance']):.2f}",
        ),
        (
            "tokens that are the commonest output of their cluster",
            f"{summary['output_purity']:.0%}",
        ),
        ("agreement with output tokens", f"{summary['output_agreement']:.2f}"),
        (
            "slope of size over rank",
            f"{ranks['slope']:.2f} ({ranks['low']:.2f} to {ranks['high']:.2f}); without clusters"
            f" {min(nulls):.2f} to {max(nulls):.2f}",
        ),
        ("power law of use", ranks["verdict"]),
    ]
