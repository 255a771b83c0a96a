"""Section on the mechanism: the predictions of the quantization hypothesis and their verdicts."""

from collections.abc import Sequence

from tell_core.report.blocks import Block, Entry, Fold, Section, Table, Text, missing
from tell_core.report.formats import as_number, format_count, format_p_value, format_score, plural
from tell_core.report.prediction_charts import figures_of, number_entry
from tell_core.report.q_sequence import q_sequence
from tell_core.report.reading import Json, RunFiles, read_optional_json

_TITLE = "The mechanism: seven predictions"
_NOT_TESTED = (
    "The predictions of the quantization hypothesis were not tested on this run. "
    "`tell quanta predictions` with the run directory does so and draws this report again."
)
_INTRO = (
    "The quantization hypothesis reads leverage as the learning of discrete skills (quanta) in the "
    "order of their use. Each prediction that follows from it was fixed beforehand, with the cells "
    "it is read from: {task} task and {general} general tokens where one budget has to be chosen. "
    "p is corrected over the predictions that could be tested (Holm). Supported: every part lies "
    "where it was predicted and the null is excluded. Contradicted: a part lies on the other side "
    "and the null is excluded. Undetermined: these numbers say nothing either way."
)


def mechanism(run: RunFiles) -> Section:
    """Show the verdicts, then for each prediction what it rests on, then the Q sequence."""
    tested = read_optional_json(run.root / "quanta" / "predictions.json")
    if not tested:
        return Section("mechanism", _TITLE, (missing(_NOT_TESTED),))
    intro = _INTRO.format(
        task=format_count(tested["task_budget_tokens"]),
        general=format_count(tested["general_budget_tokens"]),
    )
    rows: list[Json] = tested["predictions"]
    sequence = read_optional_json(run.root / "quanta" / "sequence.json")
    blocks: list[Block] = [Text(intro), _verdicts(rows), *map(_prediction, rows)]
    return Section("mechanism", _TITLE, [*blocks, *q_sequence(sequence)])


def _verdicts(rows: Sequence[Json]) -> Table:
    return Table(
        caption="Predictions and verdicts; estimate and interval are those of the leading measure",
        columns=("", "Prediction", "Verdict", "Estimate", "Interval", "p (Holm)"),
        rows=tuple(
            (
                Entry(row["prediction"]),
                Entry(row["claim"]),
                Entry(row["verdict"]),
                number_entry(row["estimate"]),
                Entry(_interval(row)),
                Entry(format_p_value(row["p_holm"]), value=as_number(row["p_holm"])),
            )
            for row in rows
        ),
        numeric=frozenset({"Estimate", "Interval", "p (Holm)"}),
    )


def _prediction(row: Json) -> Fold:
    """One prediction: the verdict in words, what it rests on, its figures."""
    blocks: list[Block] = [Text(_in_words(row))]
    if row["components"]:
        blocks.append(_parts(row))
    if row["remark"]:
        blocks.append(Text(row["remark"], tone="note"))
    blocks += figures_of(row)
    summary = f"{row['prediction']}: {row['verdict']}. {row['claim']}"
    return Fold(summary, blocks, is_open=len(blocks) > 1)


def _in_words(row: Json) -> str:
    """The verdict as a sentence, with its reason."""
    parts: list[Json] = row["components"]
    p_value = f"p = {format_p_value(row['p_holm'])} after Holm".replace("= <", "<")
    if row["verdict"] == "supported":
        lie = "its measure lies" if len(parts) == 1 else f"all {len(parts)} parts lie"
        return f"Supported: {lie} on the predicted side and chance is excluded ({p_value})."
    if row["verdict"] == "contradicted":
        against = "; ".join(part["name"] for part in parts if not part["is_as_predicted"])
        return f"Contradicted: on the other side, and chance is excluded ({p_value}): {against}."
    if row["p_value"] is None:
        return f"Undetermined: this run lacks what the prediction needs: {row['reason']}."
    held = sum(part["is_as_predicted"] for part in parts)
    return (
        f"Undetermined: {row['reason']} ({p_value}). {held} of "
        f"{plural(len(parts), 'part')} on the predicted side."
    )


def _parts(row: Json) -> Table:
    return Table(
        caption=f"{row['prediction']}: what the verdict rests on; p of each part by itself",
        columns=("Part", "Measurement", "Estimate", "Interval", "p", "As predicted"),
        rows=tuple(
            (
                Entry(str(number)),
                Entry(part["name"]),
                number_entry(part["estimate"]),
                Entry(_interval(part)),
                Entry(format_p_value(part["p_value"]), value=as_number(part["p_value"])),
                Entry("yes" if part["is_as_predicted"] else "no"),
            )
            for number, part in enumerate(row["components"], start=1)
        ),
        numeric=frozenset({"Estimate", "Interval", "p"}),
    )


def _interval(part: Json) -> str:
    low, high = as_number(part.get("low")), as_number(part.get("high"))
    if low is None and high is None:
        return "–" if part["estimate"] is None else "unbounded"
    ends = ("−∞" if low is None else format_score(low), "∞" if high is None else format_score(high))
    return f"[{ends[0]}, {ends[1]}]"
