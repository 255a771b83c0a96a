"""Sections that close the report: what its numbers cannot say, and how to make them again."""

from collections import Counter
from collections.abc import Iterator

from tell_core.report.blocks import (
    Block,
    Bullets,
    Code,
    Entry,
    Facts,
    Fold,
    Section,
    Table,
    Text,
    shortened,
)
from tell_core.report.curves import leverage_rows, metrics, primary_metric
from tell_core.report.formats import (
    MISSING,
    as_number,
    format_count,
    format_rate,
    format_time,
    plural,
)
from tell_core.report.reading import Json, RunFiles, read_cell_json, read_ledger

FEW_SEEDS = 5
FEW_ITEMS = 200
_KEPT_OVERLAP = {
    "task_test": "that share a prompt with a test item were kept: scores may be too high.",
    "task_dev": "that share a prompt with a dev item were kept: dev losses may be too low.",
    "task_train": "of general data that share a prompt with the task's training data were kept: "
    "arms with general data may train on task data that no budget counts.",
}


def limits(run: RunFiles) -> Section:
    """List the limits that follow from this run's own files."""
    found = [
        *_adaptive_limits(run),
        *_seed_limits(run),
        *_item_limits(run),
        *_scope_limits(run),
        *_budget_limits(run),
        *_dev_limits(run),
        *_comparison_limits(run),
        *_contamination_limits(run),
    ]
    return Section("limits", "What these numbers cannot say", (Bullets(tuple(found)),))


def reproduce(run: RunFiles) -> Section:
    """Give commands, versions, hardware, fingerprints and the resolved specification."""
    manifest = run.manifest
    blocks: list[Block] = []
    if commands := manifest.get("commands"):
        blocks += [Text("Run again:"), Code("\n".join(_command_lines(commands)))]
    blocks.append(Facts(tuple(_identity_facts(run))))
    if adaptive := manifest.get("adaptive"):
        blocks.append(Fold("How the cells were chosen", (_rounds(adaptive),)))
    versions: Json = manifest.get("versions") or {}
    rows = tuple((Entry(name), Entry(str(value or MISSING))) for name, value in versions.items())
    blocks.append(Fold("Versions", (Table("Versions", ("Package", "Version"), rows),)))
    blocks.append(Fold("Fingerprints and sources", _fingerprints(run)))
    if signatures := _signatures(run):
        blocks.append(Fold("Signatures of the metrics", (Bullets(tuple(signatures)),)))
    if run.spec_text:
        blocks.append(Fold("The resolved specification", (Code(run.spec_text),)))
    return Section("reproduce", "How to reproduce", blocks)


def _rounds(adaptive: Json) -> Table:
    """Return a table of an adaptive run's rounds, and what it left out."""
    rows = [
        (Entry(str(number)), Entry(step["reason"]), Entry(", ".join(step["cells"])))
        for number, step in enumerate(adaptive["rounds"], start=1)
    ]
    left_out = ", ".join(adaptive["left_out"]) or "nothing"
    rows.append((Entry("–"), Entry("left out of the full grid"), Entry(left_out)))
    return Table("Rounds of the adaptive run", ("Round", "Why", "Cells"), tuple(rows))


def _adaptive_limits(run: RunFiles) -> Iterator[str]:
    adaptive: Json = run.manifest.get("adaptive") or {}
    if adaptive:
        yield (
            f"An adaptive run: {plural(len(adaptive['left_out']), 'cell')} of the full grid"
            " were left out because they did not seem to matter to where leverage ends. The budget"
            " was chosen by a seed that is used again, which overstates ratios by a few percent;"
            " budgets with one seed have no interval. “How to reproduce” says what was run and why."
        )


def _seed_limits(run: RunFiles) -> Iterator[str]:
    seeds = sorted({cell.seed for cell in run.cells if cell.train is not None})
    seeds = seeds or sorted({cell.seed for cell in run.cells})
    if len(seeds) == 1:
        yield (
            "One training seed: how much the scores would move in a repeat is unknown, so leverage "
            "ratios have no interval and are “undefined”."
        )
    elif len(seeds) < FEW_SEEDS:
        yield (
            f"{plural(len(seeds), 'training seed')}: the spread between repeats is itself "
            "estimated from few repeats; treat narrow intervals with care."
        )


def _item_limits(run: RunFiles) -> Iterator[str]:
    metric = primary_metric(run)
    counts = {int(row["num_items"]) for row in run.results
              if row["metric"] == metric and row.get("num_items")}  # fmt: skip
    if not counts:
        return
    few = " Small differences cannot be told from chance." if max(counts) < FEW_ITEMS else ""
    yield (
        f"{plural(max(counts), 'test item')} of one test set: the intervals speak for items like"
        f" these, not for other test sets.{few}"
    )


def _scope_limits(run: RunFiles) -> Iterator[str]:
    model = (run.spec.get("model") or {}).get("id")
    task = (run.spec.get("task") or {}).get("name")
    about = f" ({model}; {task})" if model and task else ""
    yield (
        f"One base model and one task{about}. Nothing here says that the leverage carries over to"
        " a larger model, another task or other general data."
    )
    if "general_log_probability" in metrics(run):
        yield (
            "General ability is measured by the log-probability of held-out general data from the "
            "same sources; abilities outside those sources were not tested."
        )


def _budget_limits(run: RunFiles) -> Iterator[str]:
    task: set[tuple[float, float]] = set()
    general: set[tuple[float, float]] = set()
    for cell in run.cells:
        found = read_ledger(cell)
        for kind, over in (("task", task), ("general", general)):
            budget = as_number(found.get(f"{kind}_budget_tokens"))
            available = as_number(found.get(f"{kind}_available_tokens"))
            is_used = bool(as_number(found.get(f"num_{kind}_examples")))
            if is_used and budget and available is not None and available < budget:
                over.add((budget, available))
    for kind, over in (("task", task), ("general", general)):
        for budget, available in sorted(over):
            yield (
                f"The {kind} budget of {format_count(budget)} tokens is above the pool: only"
                f" {format_count(available)} were available, and they were not repeated to fill it."
            )
    yield from _bound_limits(run)


def _bound_limits(run: RunFiles) -> Iterator[str]:
    rows = [
        row
        for by_general in leverage_rows(run, primary_metric(run)).values()
        for entries in by_general.values()
        for row in entries
    ]
    bounds = sum(row.get("censored") in ("above", "below") for row in rows)
    undefined = sum(row.get("censored") == "undefined" for row in rows)
    if bounds:
        yield (
            f"{bounds} of {plural(len(rows), 'leverage entry').replace('entrys', 'entries')} of the"
            " primary metric are bounds: the score lies outside what SFT reached at the budgets"
            " tried, and nothing was extrapolated."
        )
    if undefined:
        reasons = {str(row.get("reason") or "no reason recorded") for row in rows
                   if row.get("censored") == "undefined"}  # fmt: skip
        yield f"{undefined} of {len(rows)} are undefined: {'; '.join(sorted(reasons))}."


def _dev_limits(run: RunFiles) -> Iterator[str]:
    tuning: Json = run.manifest.get("tuning") or {}
    chosen = [_tuned_words(tuning).lower()] if tuning else []
    if (run.spec.get("training") or {}).get("keep", "best_dev") == "best_dev":
        chosen.insert(0, "the checkpoints that are kept")
    if chosen:
        size = f"all {format_count(run.num_dev_examples)} " if run.num_dev_examples else ""
        tokens = f" ({format_count(run.num_dev_tokens)} tokens)" if run.num_dev_tokens else ""
        what = " and ".join(chosen)
        yield (
            f"{what[0].upper()}{what[1:]} are chosen on {size}task dev examples{tokens}. They are "
            "labelled task data which the task budget does not count, for every arm alike."
        )
    if tuning:
        budgets = {entry.get("task_budget_tokens") for entry in tuning.values()} - {None}
        where = ", ".join(format_count(budget) for budget in budgets)
        yield (
            f"{_tuned_words(tuning)} were compared at one task budget ({where} tokens) and one "
            "seed, then used at every budget; other budgets may have had better ones."
        )
    else:
        yield "Learning rates were not tuned: an arm may do better with another one."


def _tuned_words(tuning: Json) -> str:
    epochs = {
        candidate.get("epochs")
        for compared in tuning.values()
        for candidate in compared.get("candidates") or ()
    }
    return "Learning rates and epochs" if len(epochs) > 1 else "Learning rates"


def _comparison_limits(run: RunFiles) -> Iterator[str]:
    arms = {cell.arm for cell in run.cells}
    if "tell" in arms and "sft_matched" not in arms:
        yield (
            "There is no SFT matched in optimiser steps: part of what looks like leverage may be "
            "longer training."
        )
    if "tell" in arms and "tell_random_anchor" not in arms:
        yield (
            "There is no arm with a random anchor prompt, so the anchor's share in the result is "
            "not separated from the general data's."
        )
    if run.leverage is not None:
        yield (
            "Intervals hold for one comparison at a time; with many arms, budgets and metrics some "
            "will miss by chance. The p-values marked Holm allow for the comparisons of one metric "
            "with one baseline. The primary metric was fixed in the specification."
        )


def _contamination_limits(run: RunFiles) -> Iterator[str]:
    kept: Counter[str] = Counter()
    for row in run.overlap_counts:
        if not row["dropped"]:
            kept[str(row["against"])] += int(row["num_examples"])
    for against, consequence in _KEPT_OVERLAP.items():
        if kept[against]:
            yield f"{plural(kept[against], 'example')} {consequence}"
    yield (
        "Overlap with the test data is looked for in the training sources only; what the base "
        "model read in pre-training is unknown."
    )


def _command_lines(commands: object) -> list[str]:
    return [str(line) for line in commands] if isinstance(commands, list) else [str(commands)]


def _identity_facts(run: RunFiles) -> Iterator[tuple[str, str]]:
    manifest = run.manifest
    yield "Experiment", run.name
    yield "Created", format_time(str(manifest.get("created") or MISSING))
    yield "Commit", str(manifest.get("git_commit") or "not a checkout")
    hardware: Json = manifest.get("hardware") or {}
    if hardware:
        yield "Hardware", _hardware_sentence(hardware)
    seeds = sorted({cell.seed for cell in run.cells})
    yield "Seeds", ", ".join(map(str, seeds)) or MISSING
    rates = sorted({cell.learning_rate for cell in run.cells if cell.learning_rate is not None})
    yield "Learning rates", ", ".join(map(format_rate, rates)) or MISSING


def _hardware_sentence(hardware: Json) -> str:
    memory = as_number(hardware.get("memory_bytes"))
    parts = [str(hardware[key]) for key in ("system", "machine") if hardware.get(key)]
    if hardware.get("cpu_count"):
        parts.append(plural(int(hardware["cpu_count"]), "CPU"))
    if memory:
        parts.append(f"{memory / 1e9:.0f} GB memory")
    return ", ".join([*parts, *map(str, hardware.get("gpus") or ["no GPU"])])


def _fingerprints(run: RunFiles) -> tuple[Table, ...]:
    stages = [("curate", str((run.manifest.get("stages") or {}).get("curate") or MISSING))]
    for cell in run.cells:
        for name, path in (("mix", cell.mix), ("train", cell.train), ("evaluate", cell.evaluate)):
            if path is not None:
                stages.append((f"{cell.name} · {name}", path.name))
    rows = tuple((Entry(label), Entry(name)) for label, name in stages)
    files = tuple(
        (
            Entry(str(source.get("name"))),
            Entry(str(file.get("path"))),
            Entry(str(file.get("sha256") or MISSING)),
        )
        for source in (run.profile or {}).get("sources") or ()
        for file in source.get("files") or ()
    )
    return (
        shortened(Table("Stage directories", ("Stage", "Directory"), rows)),
        shortened(Table("Source files", ("Source", "File", "sha256"), files)),
    )


def _signatures(run: RunFiles) -> list[str]:
    found = {}
    for cell in run.cells:
        for metric, entry in (read_cell_json(cell.evaluate, "scores.json") or {}).items():
            if isinstance(entry, dict) and entry.get("signature"):
                found[metric] = str(entry["signature"])
    return [f"{metric}: {signature}" for metric, signature in sorted(found.items())]
