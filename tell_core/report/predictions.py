"""Section on single answers: test items on which TELL and SFT differ most, reference beside."""

from collections.abc import Iterable
from dataclasses import dataclass

from tell_core.report.blocks import Answer, Comparison, Section, Text, missing
from tell_core.report.curves import headline_general_budget, headline_rows
from tell_core.report.emergence import cell_title
from tell_core.report.formats import as_number, clip, format_score, plural
from tell_core.report.reading import CellRecord, Json, RunFiles, read_items, read_predictions

MAX_TEXT = 600
NUM_BETTER = 5
NUM_WORSE = 3


def predictions(run: RunFiles) -> Section:
    """Compare TELL's and SFT's answers on the items where they differ most."""
    title = "Predictions where TELL and SFT differ"
    pair = _paired_cells(run)
    if pair is None:
        return Section("predictions", title, (missing(_NO_PAIR),))
    tell, sft = pair
    items = _paired_items(run, tell, sft)
    if not items:
        return Section("predictions", title, (missing(_NO_PREDICTIONS),))
    better = [item for item in items if item.gain > 0]
    worse = [item for item in reversed(items) if item.gain < 0]
    differing = sum(item.tell_text != item.sft_text for item in items)
    intro = (
        f"{cell_title(tell)} against {cell_title(sft)}, the same {plural(len(items), 'test item')}."
        f" The reference is more probable per token under TELL on {len(better):,} and under SFT on"
        f" {len(worse):,}; the parsed answers differ on {differing:,}. Below are the largest"
        " differences on either side, chosen for being extreme: they illustrate, the curves above"
        " measure."
    )
    return Section(
        "predictions",
        title,
        (
            Text(intro),
            *(_comparison(item, "TELL") for item in better[:NUM_BETTER]),
            *(_comparison(item, "SFT") for item in worse[:NUM_WORSE]),
        ),
    )


@dataclass(frozen=True)
class PairedItem:
    """One test item under TELL and SFT; ``gain``: log-probability per token, TELL minus SFT."""

    item_id: str
    prompt: str
    reference: str
    tell_text: str
    sft_text: str
    tell_score: str
    sft_score: str
    gain: float


def _paired_cells(run: RunFiles) -> tuple[CellRecord, CellRecord] | None:
    """Choose TELL and SFT at the budget with the largest leverage, else at the middle one."""
    headline = headline_general_budget(run)
    seeds = sorted({cell.seed for cell in run.cells_of("tell")})
    for budget in _budgets_to_compare(run):
        for seed in seeds:
            sft = _cell_at(run.cells_of("sft"), budget, seed, None)
            tell = _cell_at(run.cells_of("tell"), budget, seed, headline)
            if sft and tell:
                return tell, sft
    return None


def _budgets_to_compare(run: RunFiles) -> list[int]:
    ranked = sorted(
        (row for row in headline_rows(run) if as_number(row.get("ratio")) is not None),
        key=lambda row: -float(row["ratio"]),
    )
    budgets = sorted({c.task_budget_tokens for c in run.cells_of("tell") if c.task_budget_tokens})
    middle = budgets[len(budgets) // 2 :] + budgets[: len(budgets) // 2]
    return [row["task_budget_tokens"] for row in ranked] + middle


def _cell_at(
    cells: Iterable[CellRecord], budget: int, seed: int, general: int | None
) -> CellRecord | None:
    fits = (
        cell
        for cell in cells
        if (cell.task_budget_tokens, cell.seed) == (budget, seed)
        and cell.general_budget_tokens in (None, general)
    )
    return next(fits, None)


def _paired_items(run: RunFiles, tell: CellRecord, sft: CellRecord) -> list[PairedItem]:
    """Return the shared items, those that TELL gains most on first."""
    ours, theirs = read_predictions(run, tell.name), read_predictions(run, sft.name)
    prompts_by_id = read_items(tell)
    items = [
        _paired_item(item_id, prompts_by_id.get(item_id) or {}, ours[item_id], theirs[item_id])
        for item_id in ours
        if item_id in theirs
    ]
    return sorted(items, key=lambda item: (-item.gain, item.item_id))


def _paired_item(item_id: str, item: Json, ours: Json, theirs: Json) -> PairedItem:
    ours_score, theirs_score = _log_probability(ours), _log_probability(theirs)
    has_both = ours_score is not None and theirs_score is not None
    return PairedItem(
        item_id=item_id,
        prompt=clip(item.get("prompt") or "(prompt not stored)", MAX_TEXT),
        reference=clip(ours.get("reference"), MAX_TEXT),
        tell_text=_answer_text(ours),
        sft_text=_answer_text(theirs),
        tell_score=format_score(ours_score),
        sft_score=format_score(theirs_score),
        gain=(ours_score or 0.0) - (theirs_score or 0.0) if has_both else 0.0,
    )


def _log_probability(row: Json) -> float | None:
    """Return the reference's log-probability per token, from the negative log-likelihood."""
    nll, tokens = as_number(row.get("nll")), as_number(row.get("num_tokens"))
    return -nll / tokens if nll is not None and tokens else None


def _answer_text(row: Json) -> str:
    parsed = row.get("parsed")
    if parsed is None and row.get("prediction") is None:
        return "(no text was generated)"
    return clip(row.get("prediction") if parsed in (None, "") else parsed, MAX_TEXT)


def _comparison(item: PairedItem, arm: str) -> Comparison:
    difference = format_score(abs(item.gain))
    return Comparison(
        title=f"{item.item_id}: more probable under {arm} by {difference} nats per token",
        prompt=item.prompt,
        reference=item.reference,
        answers=(
            Answer("tell", item.tell_text, item.tell_score),
            Answer("sft", item.sft_text, item.sft_score),
        ),
    )


_NO_PAIR = "There is no pair of finished TELL and SFT cells at one task budget and seed to compare."
_NO_PREDICTIONS = "No predictions are stored for the TELL and SFT cells that could be compared."
