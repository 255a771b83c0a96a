"""Test items under TELL and the best SFT side by side, as data for the report's item browser."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from tell_core.report.carried import carried_size
from tell_core.report.curves import (
    arm_label,
    headline_general_budget,
    headline_rows,
    is_higher_better,
    primary_metric,
)
from tell_core.report.formats import as_number, clip, metric_title
from tell_core.report.reading import (
    CellRecord,
    Json,
    RunFiles,
    has_predictions,
    read_items,
    read_predictions,
)
from tell_core.spec.arms import SFT_ARMS

MAX_TEXT = 2_000
_RIGHT_METRICS = ("exact_match", "accuracy")


@dataclass(frozen=True)
class PairedItem:
    """One test item under two trainings; scores by metric, None where there is none.

    Attributes:
        item_id: Identifier of the item.
        prompt: Bare prompt, cut after MAX_TEXT characters.
        reference: Gold response, likewise.
        tell_text: TELL's parsed answer, likewise; the raw one where nothing was parsed.
        sft_text: SFT's.
        tell_scores: Score of TELL by metric.
        sft_scores: Score of SFT by metric.
        tell_right: Whether TELL's answer is right: see `right_rule`.
        sft_right: Whether SFT's is.
        tell_gold: Log-probability of the reference under TELL, in nats per token.
        sft_gold: Under SFT.
    """

    item_id: str
    prompt: str
    reference: str
    tell_text: str
    sft_text: str
    tell_scores: Mapping[str, float | None]
    sft_scores: Mapping[str, float | None]
    tell_right: bool
    sft_right: bool
    tell_gold: float | None
    sft_gold: float | None

    @property
    def gain(self) -> float:
        """Gold log-probability per token, TELL minus SFT; zero where either is missing."""
        if self.tell_gold is None or self.sft_gold is None:
            return 0.0
        return self.tell_gold - self.sft_gold

    @property
    def differs(self) -> bool:
        """Whether the two answers differ."""
        return self.tell_text != self.sft_text


@dataclass(frozen=True)
class Pair:
    """TELL and the best SFT at one task budget, general budget and seed."""

    run: RunFiles
    tell: CellRecord
    sft: CellRecord

    @property
    def is_stored(self) -> bool:
        """Whether the predictions of both cells are there."""
        return has_predictions(self.run, self.tell.name) and has_predictions(
            self.run, self.sft.name
        )

    @cached_property
    def items(self) -> tuple[PairedItem, ...]:
        """Items that both cells answered, those that TELL gains most on first."""
        ours = read_predictions(self.run, self.tell.name)
        theirs = read_predictions(self.run, self.sft.name)
        prompts = read_items(self.tell)
        items = [
            _paired_item(item_id, prompts.get(item_id) or {}, ours[item_id], theirs[item_id])
            for item_id in ours
            if item_id in theirs
        ]
        return tuple(sorted(items, key=lambda item: (-item.gain, item.item_id)))


def pairs(run: RunFiles) -> list[Pair]:
    """Return the pairs of finished cells, the most telling first.

    First come the task budgets by falling leverage at the headline's general budget and first
    seed, then other seeds, then other general budgets. SFT is the better of ``sft`` and
    ``sft_matched`` at the same budgets by the mean of the primary metric over seeds.
    """
    ranked = {budget: place for place, budget in enumerate(_budgets_to_compare(run))}
    headline = headline_general_budget(run)
    cells = sorted(
        run.cells_of("tell"),
        key=lambda cell: (
            cell.general_budget_tokens != headline,
            cell.general_budget_tokens or 0,
            cell.seed,
            ranked.get(cell.task_budget_tokens or 0, len(ranked)),
        ),
    )
    found = ((cell, _best_sft(run, cell)) for cell in cells)
    return [Pair(run, tell, sft) for tell, sft in found if sft is not None]


def right_rule(items: Iterable[PairedItem]) -> str:
    """Say what makes an answer right."""
    metric = _right_metric(name for item in items for name in item.tell_scores)
    return f"{metric_title(metric)} is 1" if metric else "it equals the reference"


def browser_data(run: RunFiles, shown: Sequence[Pair], max_bytes: int) -> dict[str, Any]:
    """Return what the item browser reads, at most ``max_bytes`` long as JSON in the page.

    Pairs are taken in their order while they fit. When not even the first fits, its items of the
    largest difference are taken.

    Returns:
        ``metrics``: name, title and direction; ``items``: id, prompt, reference; ``pairs``: labels,
        budgets, seed and ``rows`` of [place of the item, TELL's answer, SFT's, TELL's scores,
        SFT's, TELL's gold log-probability, SFT's, TELL right, SFT right]; ``num_pairs`` and
        ``num_items``: how many there are in the run.
    """
    data: dict[str, Any] = {
        "metrics": _metric_rows(run, shown),
        "items": [],
        "pairs": [],
        "num_pairs": len(shown),
        "num_items": len(shown[0].items) if shown else 0,
        "max_text": MAX_TEXT,
    }
    places: dict[str, int] = {}
    room = max_bytes - carried_size(data)
    for pair in shown:
        new, entry = _pair_rows(pair, pair.items, data["metrics"], places)
        if (size := carried_size([new, entry])) > room:
            break
        room -= size
        _take(data, places, new, entry)
    if not data["pairs"] and shown:
        _take(data, places, *_largest_part(shown[0], data["metrics"], room))
    return data


def _take(data: dict[str, Any], places: dict[str, int], new: list[list[str]], entry: Json) -> None:
    for row in new:
        places[row[0]] = len(data["items"])
        data["items"].append(row)
    if entry["rows"]:
        data["pairs"].append(entry)


def _largest_part(pair: Pair, metrics: Sequence[Json], room: int) -> tuple[list[list[str]], Json]:
    """Keep the items of largest difference, as many as fit."""
    ranked = sorted(pair.items, key=lambda item: (-abs(item.gain), not item.differs, item.item_id))
    count = len(ranked)
    while True:
        new, entry = _pair_rows(pair, ranked[:count], metrics, {})
        size = carried_size([new, entry])
        if size <= room or not count:
            return new, entry
        count = min(count - 1, int(count * room / size)) if room > 0 else 0


def _pair_rows(
    pair: Pair, items: Iterable[PairedItem], metrics: Sequence[Json], places: Mapping[str, int]
) -> tuple[list[list[str]], Json]:
    """Return the items that are not known yet, and the pair's entry."""
    names = [str(metric["name"]) for metric in metrics]
    new: list[list[str]] = []
    rows = []
    for item in items:
        place = places.get(item.item_id)
        if place is None:
            place = len(places) + len(new)
            new.append([item.item_id, item.prompt, item.reference])
        rows.append(
            [
                place,
                item.tell_text,
                item.sft_text,
                [_rounded(item.tell_scores.get(name)) for name in names],
                [_rounded(item.sft_scores.get(name)) for name in names],
                _rounded(item.tell_gold),
                _rounded(item.sft_gold),
                int(item.tell_right),
                int(item.sft_right),
            ]
        )
    entry = {
        "task": pair.tell.task_budget_tokens,
        "general": pair.tell.general_budget_tokens,
        "seed": pair.tell.seed,
        "sft": arm_label(pair.sft.arm),
        "rows": rows,
    }
    return new, entry


def _metric_rows(run: RunFiles, shown: Sequence[Pair]) -> list[Json]:
    """Return the metrics that score single items, without the gold log-probability."""
    names = dict.fromkeys(
        name
        for pair in shown[:1]
        for item in pair.items
        for name, score in item.tell_scores.items()
        if score is not None and name != "log_probability"
    )
    return [
        {"name": name, "title": metric_title(name), "higher": is_higher_better(run, name)}
        for name in names
    ]


def _rounded(score: float | None) -> float | None:
    """Keep four digits: the page writes three."""
    return None if score is None else float(f"{score:.4g}")


def _budgets_to_compare(run: RunFiles) -> list[int]:
    """Return the task budgets: leverage shown above 1 first, then by size, then the middle."""
    ranked = sorted(
        (row for row in headline_rows(run) if as_number(row.get("ratio")) is not None),
        key=lambda row: ((as_number(row.get("low")) or 0.0) <= 1, -float(row["ratio"])),
    )
    budgets = sorted({c.task_budget_tokens for c in run.cells_of("tell") if c.task_budget_tokens})
    middle = budgets[len(budgets) // 2 :] + budgets[: len(budgets) // 2]
    return list(dict.fromkeys([row["task_budget_tokens"] for row in ranked] + middle))


def _best_sft(run: RunFiles, tell: CellRecord) -> CellRecord | None:
    """Return the cell of the better SFT arm at the same budgets and seed."""
    found = [cell for arm in SFT_ARMS for cell in run.cells_of(arm) if _fits(cell, tell)]
    return max(found, key=lambda cell: _quality(run, cell), default=None)


def _fits(sft: CellRecord, tell: CellRecord) -> bool:
    same = (sft.task_budget_tokens, sft.seed) == (tell.task_budget_tokens, tell.seed)
    return same and sft.general_budget_tokens in (None, tell.general_budget_tokens)


def _quality(run: RunFiles, cell: CellRecord) -> float:
    """Mean primary metric over the seeds of a cell's arm at its budgets, negated if lower wins."""
    metric = primary_metric(run)
    scores = [
        score
        for row in run.results
        if row["metric"] == metric
        and row["arm"] == cell.arm
        and row["task_budget_tokens"] == cell.task_budget_tokens
        and row["general_budget_tokens"] == cell.general_budget_tokens
        and (score := as_number(row.get("score"))) is not None
    ]
    sign = 1.0 if is_higher_better(run, metric) else -1.0
    return sign * fmean(scores) if scores else float("-inf")


def _paired_item(item_id: str, item: Json, ours: Json, theirs: Json) -> PairedItem:
    tell_scores, sft_scores = _scores(ours), _scores(theirs)
    metric = _right_metric(tell_scores)
    return PairedItem(
        item_id=item_id,
        prompt=clip(item.get("prompt") or "(prompt not stored)", MAX_TEXT),
        reference=clip(ours.get("reference"), MAX_TEXT),
        tell_text=_answer_text(ours),
        sft_text=_answer_text(theirs),
        tell_scores=tell_scores,
        sft_scores=sft_scores,
        tell_right=_is_right(ours, tell_scores, metric),
        sft_right=_is_right(theirs, sft_scores, metric),
        tell_gold=_gold(ours),
        sft_gold=_gold(theirs),
    )


def _scores(row: Json) -> dict[str, float | None]:
    return {str(name): as_number(score) for name, score in row["scores"].items()}


def _right_metric(names: Iterable[str]) -> str | None:
    known = set(names)
    return next((name for name in _RIGHT_METRICS if name in known), None)


def _is_right(row: Json, scores: Mapping[str, float | None], metric: str | None) -> bool:
    if metric is not None:
        return scores.get(metric) == 1.0
    return _answer_text(row).strip() == str(row.get("reference") or "").strip()


def _gold(row: Json) -> float | None:
    """Return the reference's log-probability per token, from the negative log-likelihood."""
    nll, tokens = as_number(row.get("nll")), as_number(row.get("num_tokens"))
    return -nll / tokens if nll is not None and tokens else None


def _answer_text(row: Json) -> str:
    parsed = row.get("parsed")
    if parsed is None and row.get("prediction") is None:
        return "(no text was generated)"
    return clip(row.get("prediction") if parsed in (None, "") else parsed, MAX_TEXT)
