"""Section on single answers: test items under TELL and the best SFT, to browse and to search."""

from tell_core.report.blocks import Answer, Browser, Comparison, Section, Text, missing
from tell_core.report.carried import carried_size
from tell_core.report.curves import arm_label
from tell_core.report.emergence import cell_title
from tell_core.report.formats import clip, format_score, plural
from tell_core.report.pairs import MAX_TEXT, Pair, PairedItem, browser_data, pairs, right_rule
from tell_core.report.reading import Json, RunFiles

TITLE = "TELL and SFT, item by item"
MAX_SAMPLE_TEXT = 600
NUM_BETTER = 5
NUM_WORSE = 3
BROWSER_BYTES = 3_000_000


def predictions(run: RunFiles, max_bytes: int = BROWSER_BYTES) -> Section:
    """Let the reader compare TELL's and SFT's answers, item by item.

    Args:
        run: The files of a run.
        max_bytes: Bytes of the page that the items may take. What does not fit is left out, and
            the section says so.
    """
    found = pairs(run)
    if not found:
        return Section("predictions", TITLE, (missing(_NO_PAIR),))
    shown = [pair for pair in found if pair.is_stored]
    if not shown or not shown[0].items:
        return Section("predictions", TITLE, (missing(_NO_PREDICTIONS),))
    data = browser_data(run, shown, max_bytes)
    lead = shown[0]
    blocks = (
        Text(_lead_sentence(lead)),
        Text(f"{_shown_sentence(data)} {_rules(lead)}", "note"),
        Browser(data, (Text(_SAMPLE_NOTE, "note"), *_sample(lead))),
    )
    return Section("predictions", TITLE, blocks)


def item_bytes(section: Section) -> int:
    """Return the bytes of the page that the items of the section take."""
    return sum(carried_size(block.items) for block in section.blocks if isinstance(block, Browser))


def _lead_sentence(pair: Pair) -> str:
    better = sum(item.gain > 0 for item in pair.items)
    worse = sum(item.gain < 0 for item in pair.items)
    differing = sum(item.differs for item in pair.items)
    return (
        f"{cell_title(pair.tell)} against {cell_title(pair.sft)}, the same "
        f"{plural(len(pair.items), 'test item')}: the reference is more probable per token under "
        f"TELL on {better:,} and under {arm_label(pair.sft.arm)} on {worse:,}; the parsed answers "
        f"differ on {differing:,}. Single items illustrate; the curves above measure."
    )


def _shown_sentence(data: Json) -> str:
    """Say how many of how many comparisons and items the page holds."""
    held, everything = len(data["pairs"]), data["num_pairs"]
    rows = max((len(pair["rows"]) for pair in data["pairs"]), default=0)
    if held == everything and rows == data["num_items"]:
        return (
            f"This page holds all {plural(everything, 'comparison')} (task budget, general budget "
            f"and seed) of {plural(rows, 'item')}."
        )
    return (
        f"To stay small this page holds {held:,} of {plural(everything, 'comparison')} (task "
        f"budget, general budget and seed) and {rows:,} of {plural(data['num_items'], 'item')} in "
        "each; predictions/ in the run directory holds all."
    )


def _rules(pair: Pair) -> str:
    return (
        f"The best SFT is the better of the SFT arms run at the same budgets, on average over "
        f"seeds. An answer counts as right when {right_rule(pair.items)}. Texts end after "
        f"{MAX_TEXT:,} characters."
    )


def _sample(pair: Pair) -> list[Comparison]:
    """Return the items of largest difference on either side, for readers without scripts."""
    better = [item for item in pair.items if item.gain > 0]
    worse = [item for item in reversed(pair.items) if item.gain < 0]
    sft = arm_label(pair.sft.arm)
    return [
        *(_comparison(item, "TELL", sft) for item in better[:NUM_BETTER]),
        *(_comparison(item, sft, sft) for item in worse[:NUM_WORSE]),
    ]


def _comparison(item: PairedItem, winner: str, sft: str) -> Comparison:
    difference = format_score(abs(item.gain))
    return Comparison(
        title=f"{item.item_id}: more probable under {winner} by {difference} nats per token",
        prompt=clip(item.prompt, MAX_SAMPLE_TEXT),
        reference=clip(item.reference, MAX_SAMPLE_TEXT),
        answers=(
            Answer("tell", "TELL", clip(item.tell_text, MAX_SAMPLE_TEXT), _gold(item.tell_gold)),
            Answer("sft", sft, clip(item.sft_text, MAX_SAMPLE_TEXT), _gold(item.sft_gold)),
        ),
    )


def _gold(score: float | None) -> str:
    return f"reference {format_score(score)} nats per token"


_NO_PAIR = "There is no pair of finished TELL and SFT cells at one task budget and seed to compare."
_NO_PREDICTIONS = "No predictions are stored for the TELL and SFT cells that could be compared."
_SAMPLE_NOTE = (
    "The largest differences on either side, chosen for being extreme. Every item can be browsed, "
    "filtered and searched where scripts run."
)
