"""Sections on what went in: token ledgers, curation, the shuffle proof, sample prompts."""

from collections.abc import Iterable, Sequence
from functools import partial

from matplotlib.figure import Figure

from tell_core.report import figures
from tell_core.report.blocks import (
    Block,
    Chart,
    Entry,
    Fold,
    Panels,
    Section,
    Table,
    Text,
    Tokens,
    missing,
)
from tell_core.report.charts import describe_lines, legend_of, make_chart
from tell_core.report.curves import arm_label, arm_place
from tell_core.report.emergence import cell_title, shown_cells
from tell_core.report.figure_data import line_data, share_data
from tell_core.report.formats import (
    MISSING,
    as_number,
    clip,
    format_count,
    format_megabytes,
    format_rate,
    format_score,
    format_seconds,
    format_share,
    plural,
)
from tell_core.report.palette import Palette
from tell_core.report.reading import (
    CellRecord,
    Json,
    RunFiles,
    read_cell_json,
    read_ledger,
    read_training_log,
)
from tell_core.report.source_use import corpus_link, source_use

MAX_LEDGER_ROWS = 300
MAX_REJECTS = 40
MAX_TEXT = 600
MAX_SAMPLES = 3
MAX_SAMPLE_TOKENS = 500
MAX_LOSS_POINTS = 150
_PARTS = {"task_test": "test set", "task_dev": "dev items", "task_train": "task training data"}
_NO_OVERLAP = (
    "No training example shares its prompt with a test or dev item, and no general example with"
    " the task's training data."
)


def ledger(run: RunFiles) -> Section:
    """Account for tokens and steps of every cell, and for the choice of learning rates."""
    title = "Token ledger and training"
    if not run.cells:
        return Section("ledger", title, (missing("No cell of this run is finished yet."),))
    cells = sorted(run.cells, key=lambda c: (arm_place(c.arm), c.task_budget_tokens or 0, c.seed))
    blocks: list[Block] = [Text(_LEDGER_INTRO), _ledger_table(cells)]
    if sources := source_use(cells):
        blocks.append(sources)
    if losses := _loss_panels(run):
        blocks.append(losses)
    blocks += [_training_table(cells), _tuning(run)]
    return Section("ledger", title, blocks)


def curation(run: RunFiles) -> Section:
    """Show what was read, kept and set aside, with examples and overlaps between data sets."""
    title = "What curation set aside"
    if run.profile is None:
        return Section("curation", title, (missing("No profile of the sources was found."),))
    sources: Sequence[Json] = run.profile.get("sources") or ()
    blocks: list[Block] = [Text(_curation_sentence(sources)), _sources_table(sources)]
    blocks.append(_rejects(run))
    blocks += _overlap(run)
    if link := corpus_link(run):
        blocks.append(link)
    return Section("curation", title, blocks)


def shuffle(run: RunFiles) -> Section:
    """Prove that task examples are spread evenly over the training order."""
    mixed = _proofs(shown_cells(run, run.cells))
    title = "Shuffle proof"
    if not mixed:
        return Section("shuffle", title, (missing(_NO_SHUFFLE),))
    charts = [_share_chart(cell, proof) for cell, proof in mixed]
    table = _shuffle_table(_proofs(run.cells))
    return Section(
        "shuffle",
        title,
        (Text(_SHUFFLE_INTRO), Panels(tuple(charts)), Fold("Every mixed cell", (table,))),
    )


def prompts(run: RunFiles) -> Section:
    """Show rendered examples token by token, the supervised ones marked."""
    folds = []
    for cell in shown_cells(run, run.cells):
        samples = read_cell_json(cell.mix, "samples.json") or ()
        shown = [_tokens_of(sample) for sample in samples[:MAX_SAMPLES]]
        if shown:
            folds.append(Fold(cell_title(cell), tuple(shown), is_open=cell.arm == "tell"))
    title = "Sample prompts with the label mask"
    if not folds:
        return Section("prompts", title, (missing("No sample prompts were stored in this run."),))
    return Section("prompts", title, (*_anchor_note(run), Text(_PROMPTS_INTRO), *folds))


def _ledger_table(cells: Sequence[CellRecord]) -> Table:
    columns = ("Cell", "Task budget", "Task used", "Task available", "Task rendered",
               "Task examples", "Task epochs", "General budget", "General used",
               "General available", "General examples", "Supervised tokens", "Rendered tokens",
               "Steps")  # fmt: skip
    rows = tuple(_ledger_row(cell) for cell in cells[:MAX_LEDGER_ROWS])
    omitted = max(0, len(cells) - MAX_LEDGER_ROWS)
    caption = "Tokens by cell. Supervised and rendered tokens count the whole training."
    return Table(caption, columns, rows, frozenset(columns[1:]), omitted)


def _ledger_row(cell: CellRecord) -> tuple[Entry, ...]:
    found = read_ledger(cell)
    available = as_number(found.get("task_available_tokens"))
    is_used = bool(found.get("num_task_examples"))
    is_short = is_used and (available or 0.0) < (cell.task_budget_tokens or 0)
    remark = "the whole pool: less than the budget" if is_short else ""
    epochs = as_number(found.get("task_epochs"))
    return (
        Entry(cell_title(cell)),
        Entry(format_count(found.get("task_budget_tokens"))),
        Entry(format_count(found.get("task_tokens")), remark=remark),
        Entry(format_count(found.get("task_available_tokens"))),
        Entry(format_count(found.get("task_rendered_tokens"))),
        Entry(format_count(found.get("num_task_examples"))),
        Entry(MISSING if epochs is None else f"{epochs:.3g}"),
        Entry(format_count(found.get("general_budget_tokens")), remark=_general_remark(found)),
        Entry(format_count(found.get("general_tokens"))),
        Entry(format_count(found.get("general_available_tokens"))),
        Entry(format_count(found.get("num_general_examples"))),
        Entry(format_count(found.get("supervised_tokens"))),
        Entry(format_count(found.get("rendered_tokens"))),
        Entry(format_count(found.get("steps"))),
    )


def _general_remark(found: Json) -> str:
    """Say that SFT matched takes only its number of steps from the general budget."""
    has_budget = as_number(found.get("general_budget_tokens")) is not None
    return "sets the steps only" if has_budget and not found.get("num_general_examples") else ""


def _training_table(cells: Sequence[CellRecord]) -> Block:
    rows = []
    for cell in cells[:MAX_LEDGER_ROWS]:
        if summary := read_cell_json(cell.train, "summary.json"):
            rows.append(_training_row(cell, summary))
    if not rows:
        return missing("No training summaries were found in this run.")
    columns = ("Cell", "Learning rate", "Kept step", "Dev loss kept", "Final loss", "Time",
               "Tokens per s", "Supervised per s", "Padding", "Peak memory", "Device",
               "Number format")  # fmt: skip
    table = Table("Training by cell", columns, tuple(rows), frozenset(columns[1:10]))
    return Fold("Training by cell: kept step, losses, time, memory", (table,))


def _training_row(cell: CellRecord, summary: Json) -> tuple[Entry, ...]:
    kept = f"{format_count(summary.get('kept_step'))} of {format_count(summary.get('steps'))}"
    return (
        Entry(cell_title(cell)),
        Entry(format_rate(cell.learning_rate)),
        Entry(kept),
        Entry(format_score(summary.get("kept_dev_loss"))),
        Entry(format_score(summary.get("final_loss"))),
        Entry(format_seconds(summary.get("train_seconds"))),
        Entry(format_count(summary.get("tokens_per_second"))),
        Entry(format_count(summary.get("supervised_tokens_per_second"))),
        Entry(format_share(summary.get("padding_share"))),
        Entry(format_megabytes(summary.get("peak_memory_bytes"))),
        Entry(str(summary.get("device") or MISSING)),
        Entry(str(summary.get("dtype") or MISSING)),
    )


def _tuning(run: RunFiles) -> Block:
    tuning: dict[str, Json] = run.manifest.get("tuning") or {}
    rows = [
        _tuning_row(arm, compared, candidate)
        for arm, compared in sorted(tuning.items(), key=lambda item: arm_place(item[0]))
        for candidate in compared.get("candidates") or ()
    ]
    if not rows:
        rates = {cell.learning_rate for cell in run.cells if cell.learning_rate is not None}
        used = ", ".join(format_rate(rate) for rate in sorted(rates)) or "unknown"
        return Text(f"Learning rates were not tuned in this run; every arm used {used}.", "note")
    columns = ("Arm", "Learning rate", "Epochs", "Dev loss", "Chosen", "Task budget", "Seed")
    caption = "Settings compared: the same candidates for every trained arm, judged on dev"
    return Table(caption, columns, tuple(rows), frozenset(columns[1:4] + columns[5:]))


def _tuning_row(arm: str, compared: Json, candidate: Json) -> tuple[Entry, ...]:
    chosen = compared.get("chosen")
    if not isinstance(chosen, dict):  # runs of version 0.1.0 compared learning rates only
        chosen = {"learning_rate": chosen}
    is_chosen = all(candidate.get(name) == value for name, value in chosen.items())
    return (
        Entry(arm_label(arm)),
        Entry(format_rate(candidate.get("learning_rate"))),
        Entry(format_count(candidate.get("epochs"))),
        Entry(format_score(candidate.get("dev_loss"))),
        Entry("✓ chosen" if is_chosen else ""),
        Entry(format_count(compared.get("task_budget_tokens"))),
        Entry(str(compared.get("seed", MISSING))),
    )


def _loss_panels(run: RunFiles) -> Panels | None:
    charts = []
    shown = shown_cells(run, run.cells)
    for key, title in (("task_loss", "Training loss on task data"),
                       ("general_loss", "Training loss on general data")):  # fmt: skip
        lines = {cell.arm: points for cell in shown if (points := _smoothed(cell, key))}
        if lines:
            charts.append(_loss_panel(title, key, lines))
    if not charts:
        return None
    caption = f"Middle task budget, first seed; averaged over up to {MAX_LOSS_POINTS} stretches."
    return Panels(tuple(charts), caption)


def _loss_panel(title: str, key: str, lines: dict[str, list[tuple[float, float]]]) -> Chart:
    return make_chart(
        title,
        f"training-{key}",
        partial(figures.loss_curves, lines, y_label="Nats per token"),
        line_data(lines, ("arm", "step", key)),
        f"Nats per token by optimiser step. {describe_lines(lines, 'step')}",
        legend=legend_of(lines),
    )


def _smoothed(cell: CellRecord, key: str) -> list[tuple[float, float]]:
    """Average a training log over at most MAX_LOSS_POINTS stretches of equal length."""
    log = [
        (float(line["step"]) + 1, value)
        for line in read_training_log(cell)
        if (value := as_number(line.get(key))) is not None
    ]
    width = -(-len(log) // MAX_LOSS_POINTS) or 1
    stretches = [log[start : start + width] for start in range(0, len(log), width)]
    return [
        (stretch[-1][0], sum(value for _, value in stretch) / len(stretch)) for stretch in stretches
    ]


def _curation_sentence(sources: Sequence[Json]) -> str:
    read = sum(int(source.get("num_read") or 0) for source in sources)
    kept = sum(int(source.get("num_kept") or 0) for source in sources)
    if read == kept:
        return f"All {plural(read, 'row')} read were kept."
    return (
        f"{plural(read, 'row')} read, {kept:,} kept, {read - kept:,} set aside with file, line and"
        " reason. The counts of each source add up."
    )


def _sources_table(sources: Sequence[Json]) -> Table:
    reasons = sorted({reason for source in sources for reason in source.get("rejects") or {}})
    columns = ("Source", "Role", "Read", "Kept", *(reason.replace("_", " ") for reason in reasons),
               "Tokens kept", "Response tokens", "Median length", "95th percentile",
               "Longest")  # fmt: skip
    rows = tuple(_source_row(source, reasons) for source in sources)
    caption = "Rows by source: read, kept, and set aside by reason; lengths in tokens"
    return Table(caption, columns, rows, frozenset(columns[2:]))


def _source_row(source: Json, reasons: Sequence[str]) -> tuple[Entry, ...]:
    rejects: Json = source.get("rejects") or {}
    names = ("num_tokens", "num_response_tokens", "tokens_p50", "tokens_p95", "tokens_max")
    return (
        Entry(str(source.get("name"))),
        Entry(str(source.get("role", MISSING)).replace("_", " ")),
        Entry(format_count(source.get("num_read"))),
        Entry(format_count(source.get("num_kept"))),
        *(Entry(format_count(rejects.get(reason) or 0)) for reason in reasons),
        *(Entry(format_count(source.get(name))) for name in names),
    )


def _rejects(run: RunFiles) -> Block:
    if not run.rejects:
        return Text("Nothing was rejected, so there are no examples of rejects.", "note")
    rows = tuple(
        (
            Entry(str(row["source"])),
            Entry(str(row["reason"]).replace("_", " ")),
            Entry(f"{_file_name(row['file'])}:{row['line']}"),
            Entry(str(row["detail"] or "")),
            Entry(clip(row["text"], 200)),
        )
        for row in run.rejects[:MAX_REJECTS]
    )
    columns = ("Source", "Reason", "File and line", "Detail", "Text")
    caption = "Examples of rejects, the first of each source and reason"
    table = Table(caption, columns, rows, num_omitted=max(0, len(run.rejects) - MAX_REJECTS))
    return Fold("Examples of what was set aside", (table,))


def _overlap(run: RunFiles) -> list[Block]:
    if not run.overlap_counts:
        return [Text(_NO_OVERLAP, "note")]
    counts = tuple(
        (
            Entry(str(row["source"])),
            Entry(_PARTS.get(str(row["against"]), str(row["against"]))),
            Entry(str(row["matched_source"])),
            Entry(str(row["matched"]).replace("_", " ")),
            Entry(format_count(row["num_examples"])),
            Entry("dropped" if row["dropped"] else "kept"),
        )
        for row in run.overlap_counts
    )
    columns = ("Source", "Also in", "There in source", "Matched", "Examples", "What was done")
    table = Table("Overlap with test, dev and task data", columns, counts, frozenset({"Examples"}))
    examples = tuple(_overlap_row(row) for row in run.overlap)
    names = ("File and line", "Also in", "Line there", "Matched", "Text")
    shown = Table("Examples of overlap", names, examples, frozenset({"Line there"}))
    return [table, Fold("Examples of overlap", (shown,))]


def _overlap_row(row: Json) -> tuple[Entry, ...]:
    return (
        Entry(f"{_file_name(row['file'])}:{row['line']}"),
        Entry(_PARTS.get(str(row["against"]), str(row["against"]))),
        Entry(format_count(row["matched_line"])),
        Entry(str(row["matched"]).replace("_", " ")),
        Entry(clip(row["text"], 200)),
    )


def _proofs(cells: Iterable[CellRecord]) -> list[tuple[CellRecord, Json]]:
    """Return the shuffle proofs of the cells that mix task and general data."""
    found = [
        (cell, read_cell_json(cell.mix, "shuffle_proof.json"))
        for cell in cells
        if cell.arm.startswith("tell")
    ]
    return [(cell, proof) for cell, proof in found if proof]


def _share_chart(cell: CellRecord, proof: Json) -> Chart:
    shares = [as_number(share) or 0.0 for share in proof["task_share_per_window"]]
    expected = sum(shares) / len(shares) if shares else None
    draw = partial(_draw_shares, shares, expected, cell.arm)
    gap = format_count(proof.get("largest_gap"))
    caption = (
        f"Largest gap {gap} examples; runs test p = {format_rate(proof.get('runs_p_value'))}."
        " Dashed: mean share."
    )
    return make_chart(
        cell_title(cell),
        f"share-{cell.name}",
        draw,
        share_data(shares),
        f"Share of task examples in {plural(len(shares), 'window')} of the training order: between "
        f"{format_share(min(shares, default=None))} and {format_share(max(shares, default=None))}.",
        caption=caption,
        legend=legend_of([cell.arm]),
    )


def _draw_shares(
    shares: Sequence[float], expected: float | None, arm: str, palette: Palette
) -> Figure:
    return figures.task_share_strip(shares, expected, arm, palette)


def _shuffle_table(proofs: Iterable[tuple[CellRecord, Json]]) -> Table:
    columns = ("Cell", "Largest gap", "Mean gap", "Window", "Runs", "Runs expected", "p-value",
               "Digest of the order")  # fmt: skip
    rows = tuple(
        (
            Entry(cell_title(cell)),
            Entry(format_count(proof.get("largest_gap"))),
            Entry(format_score(proof.get("mean_gap"))),
            Entry(format_count(proof.get("window"))),
            Entry(format_count(proof.get("runs"))),
            Entry(format_count(proof.get("expected_runs"))),
            Entry(format_rate(proof.get("runs_p_value"))),
            Entry(str(proof.get("order_digest") or MISSING)[:16]),
        )
        for cell, proof in list(proofs)[:MAX_LEDGER_ROWS]
    )
    return Table("Shuffle proof by cell", columns, rows, frozenset(columns[1:7]))


def _tokens_of(sample: Json) -> Tokens:
    pieces = tuple((str(text), bool(marked)) for text, marked in sample.get("pieces") or ())
    supervised = sum(marked for _, marked in pieces)
    title = f"{str(sample.get('role', '')).capitalize()} example, {plural(len(pieces), 'token')}"
    if len(pieces) > MAX_SAMPLE_TOKENS:
        pieces = (*pieces[:MAX_SAMPLE_TOKENS], (" …", False))
        title += f", the first {MAX_SAMPLE_TOKENS} shown"
    return Tokens(f"{title}, {supervised:,} supervised", pieces)


def _anchor_note(run: RunFiles) -> tuple[Block, ...]:
    anchor = run.anchor or {}
    if not anchor.get("text"):
        return (Text("This run used no anchor prompt.", "note"),)
    tokens = plural(int(anchor.get("num_anchor_tokens") or 0), "token")
    position = str(anchor.get("position", "before"))
    place = {"before": "before the prompt", "after": "after the prompt"}.get(
        position, "as the system message"
    )
    text = clip(anchor["text"], MAX_TEXT)
    return (Text(f"Anchor prompt ({tokens}, {place}): “{text}”"),)


def _file_name(path: object) -> str:
    return str(path).replace("\\", "/").rsplit("/", 1)[-1]


_LEDGER_INTRO = (
    "What each cell was allowed and what it really used. The task budget counts task tokens before "
    "the anchor prompt is added; rendered tokens include template and anchor prompt; supervised "
    "tokens are those that enter the loss."
)
_SHUFFLE_INTRO = (
    "Extensive shuffle means that task examples lie uniformly at random among the general ones. "
    "The share of task examples per window of the training order should wobble around one "
    "constant; a very small p-value of the runs test says that the order is not random. Ordered "
    "arms are expected to fail it."
)
_NO_SHUFFLE = (
    "No shuffle proof was found: this run has no arm that mixes task and general data, or its "
    "mixtures are not stored here."
)
_PROMPTS_INTRO = (
    "Rendered examples as the model saw them, token by token. Underlined, tinted tokens are "
    "supervised: only they enter the loss."
)
