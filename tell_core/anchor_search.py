"""The search for an anchor prompt: drawn from the base model, chosen on dev, tested on dev.

Candidates are chosen on one half of the dev items and tested on the other; test items play no part.
A search with another seed or other settings is another try on the same items: all of them are kept
in a record, and p-values are corrected for all of them.
The score of an anchor is the gold log-probability per token of dev responses on the base model,
zero-shot and with solved examples before the prompt. Where it is wished, the chosen candidate is
trained with too, beside the controls, and scored in the same way.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tell_core.analysis.anchor_candidates import (
    Proposing,
    Rejected,
    draw_candidates,
    filter_candidates,
)
from tell_core.analysis.anchor_scores import (
    CANDIDATE,
    GIVEN,
    NONE,
    RANDOM,
    Difference,
    across_tries,
    as_rows,
    compare,
    judge_search,
    judge_training,
)
from tell_core.analysis.resampling import FloatArray, Resampling
from tell_core.anchor_tries import family_of
from tell_core.data.anchors import Anchor, random_anchor, resolve_anchor
from tell_core.data.encoding import IntArray, from_lists
from tell_core.data.pools import Look, Pools, open_pools
from tell_core.data.seeding import choose_rows, seeded_generator
from tell_core.errors import InputError
from tell_core.pipeline import (
    Stage,
    base_digest,
    context_of,
    mix_stage,
    number_format,
    renderer_of,
    settled,
    train_stage,
)
from tell_core.spec.cells import Cell
from tell_core.spec.identity import fingerprint
from tell_core.spec.model import AnchorSpec, ExperimentSpec
from tell_core.store import MARKER, find_stage, read_json, stage_path, write_json, write_stage
from tell_core.training.devices import cpu_threads, resolve_device
from tell_core.training.probes import load_probe

if TYPE_CHECKING:
    import torch
    from torch import nn

RESULT_FILE = "anchors.json"
MIN_DEV_ITEMS = 8
_VERSION = 1
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Searching:
    """How anchors are searched for.

    Attributes:
        proposing: How candidates are drawn.
        num_shots: Solved examples before the prompt in the second of the two scores; 0: one score.
        num_random: Meaningless texts of the chosen candidate's length that it is compared with.
    """

    proposing: Proposing = field(default_factory=Proposing)
    num_shots: int = 2
    num_random: int = 8


def search_anchors(
    spec: ExperimentSpec,
    curated: Stage,
    how: Searching,
    *,
    is_trained: bool = False,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Search, or find that it was done; written to ``anchors.json`` of the run directory too.

    Its comparisons are recorded in ``anchor_tries.json`` before, and corrected for all searches on
    the same dev items in this run directory.

    Args:
        spec: The experiment.
        curated: Its curated data.
        how: How many candidates, from what.
        is_trained: Whether to train with the chosen candidate and with its controls, at the
            smallest task budget and the largest general budget, with every seed and the first of
            several learning rates.
        on_progress: Called with what is done, how much of it and of how much.

    Returns:
        The content of ``anchors.json``.

    Raises:
        InputError: There are too few dev items, prompts with solved examples exceed the model's
            context, or training is wished without general data.
    """
    identity = fingerprint(
        "anchors", _VERSION, curated.fingerprint, base_digest(spec.model.id, spec.model.revision),
        number_format(spec), asdict(how), list(Resampling.of(spec.analysis)),
    )  # fmt: skip
    path = find_stage(curated.root, "anchors", identity)
    if path is None:
        threads = cpu_threads(spec.training.threads)
        with threads, write_stage(curated.root, "anchors", identity) as out:
            write_json(out / RESULT_FILE, _search(spec, curated, how, on_progress))
        path = stage_path(curated.root, "anchors", identity)
    found: dict[str, Any] = read_json(path / RESULT_FILE)
    if is_trained and found["chosen"] is not None:
        found["trained"] = _train(spec, curated, found, on_progress)
    found = _corrected(found, spec, curated, identity)
    write_json(curated.root / RESULT_FILE, found)
    return found


def _corrected(
    found: dict[str, Any], spec: ExperimentSpec, curated: Stage, identity: str
) -> dict[str, Any]:
    """The result with p-values and verdicts over the comparisons of all tries."""
    dev_items = open_pools(curated.path, renderer_of(spec)).corpus("task_dev").example_ids
    trained = found["trained"]
    tested = [Difference(**row) for row in found["tested"]]
    after = [Difference(**row) for row in trained["tested"]] if trained else []
    p_values = {"base model": [one.p_value for one in tested]}
    if trained:
        p_values["after training"] = [one.p_value for one in after]
    family = family_of(curated.root, identity, dev_items, p_values)
    both = across_tries([*tested, *after], family.others, family.num_tries)
    tested, after = both[: len(tested)], both[len(tested) :]
    verdict, reason = judge_search(tested, found["confidence"])
    if trained:
        judged = judge_training(after, found["confidence"], trained["num_seeds"])
        trained |= {"verdict": judged[0], "reason": judged[1], "tested": as_rows(after)}
    return found | {
        "verdict": verdict,
        "reason": reason,
        "tested": as_rows(tested),
        "num_tries": family.num_tries,
        "num_comparisons": len(both) + len(family.others),
    }


class Scored(NamedTuple):
    """An anchor text and its scores.

    Attributes:
        kind: A candidate, the given anchor, no anchor or a random text.
        text: The text; "" for none.
        num_tokens: Its length.
        scores: Shape (N,) or (2, N). Gold log-probability per token of each dev item, in nats:
            zero-shot, and with solved examples.
    """

    kind: str
    text: str
    num_tokens: int
    scores: FloatArray

    @property
    def by_item(self) -> FloatArray:
        """Shape (1, N). Mean of zero-shot and few-shot."""
        return np.asarray(self.scores.mean(axis=0, keepdims=True))


@dataclass(frozen=True)
class _Scorer:
    """Scores anchor texts on the dev items of a task.

    Attributes:
        model: The base model.
        pools: The curated data.
        shots: Rows of the training data that stand solved before the prompt.
        context_tokens: Longest sequence that the model takes, or None.
        device: Where the model is.
    """

    model: nn.Module
    pools: Pools
    shots: IntArray
    context_tokens: int | None
    device: torch.device

    def scored(self, kind: str, texts: Iterable[str], say: Progress | None) -> list[Scored]:
        """Score texts, candidates as they would stand in a specification."""
        found = []
        for done, text in enumerate(wanted := list(texts), start=1):
            shown = _anchor(text, self.pools).text if kind == CANDIDATE else text
            num_tokens = self.pools.renderer.num_text_tokens(shown)
            found.append(Scored(kind, text, num_tokens, self._scores(shown)))
            if say:
                say(f"scores: {kind}", done, len(wanted))
        return found

    def _scores(self, text: str) -> FloatArray:
        looks = [Look("random", text)]  # any text, at the anchor's position
        if len(self.shots):
            shown = self.pools.seen("task_train", self.shots, looks[0])
            looks.append(looks[0]._replace(shots=tuple(shown)))
        return np.stack([self._scores_of(look) for look in looks])

    def _scores_of(self, look: Look) -> FloatArray:
        from tell_core.evaluation.likelihood import gold_nll

        rows = np.arange(self.pools.corpus("task_dev").num_examples)
        shown = self.pools.seen("task_dev", rows, look)
        encoded = from_lists(self.pools.renderer.encode(shown), is_task=True)
        if self.context_tokens is not None and encoded.lengths.max() > self.context_tokens:
            raise InputError(
                f"a dev item with {len(look.shots)} solved examples has {encoded.lengths.max()}"
                f" tokens, the model takes {self.context_tokens}; give fewer with --shots, or 0"
            )
        return -gold_nll(self.model, encoded, self.device) / encoded.supervised_counts


def _search(
    spec: ExperimentSpec, curated: Stage, how: Searching, say: Progress | None
) -> dict[str, Any]:
    """Draw, filter, score, choose on one half, test on the other."""
    pools = open_pools(curated.path, renderer_of(spec))
    choosing, testing = halves(pools.corpus("task_dev").example_ids, how.proposing.seed)
    scorer = _scorer(spec, pools, how)
    texts, rejected = _candidates(scorer, how.proposing, say)
    candidates = scorer.scored(CANDIDATE, texts, say)
    none = scorer.scored(NONE, [""], say)
    given = scorer.scored(GIVEN, [pools.anchor.text] if pools.anchor.text else [], say)
    best = max(candidates, key=lambda one: float(one.by_item[0, choosing].mean()), default=None)
    random = scorer.scored(RANDOM, _random_texts(pools, best, how), say) if best else []
    resampling = Resampling.of(spec.analysis)
    tested = _tested(best, [*none, *random, *given], testing, resampling) if best else []
    verdict, reason = judge_search(tested, resampling.confidence)
    everything = [*candidates, *given, *none, *random]
    return {
        "settings": asdict(how),
        "confidence": resampling.confidence,
        "num_choosing": len(choosing),
        "num_testing": len(testing),
        "position": pools.anchor.position,
        "own_instruction": pools.anchor.own_instruction,
        "chosen": best.text if best else None,
        "verdict": verdict,
        "reason": reason,
        "tested": as_rows(tested),
        "rows": _rows(everything, none[0], choosing, testing, resampling),
        "rejected": [one._asdict() for one in rejected],
        "trained": None,
    }


def halves(example_ids: Sequence[str], seed: int) -> tuple[IntArray, IntArray]:
    """Dev items by which a candidate is chosen, and those by which it is tested.

    Raises:
        InputError: There are fewer than `MIN_DEV_ITEMS`.
    """
    if len(example_ids) < MIN_DEV_ITEMS:
        raise InputError(
            f"{len(example_ids)} dev items; a choice on one half of them and a test on the other"
            f" need at least {MIN_DEV_ITEMS}: raise `task.dev_examples`"
        )
    choosing = choose_rows(example_ids, len(example_ids) // 2, seed, "anchor choice")
    return choosing, np.setdiff1d(np.arange(len(example_ids)), choosing)


def _scorer(spec: ExperimentSpec, pools: Pools, how: Searching) -> _Scorer:
    from tell_core.training.models import load_model

    device = resolve_device(spec.training.device)
    loaded = load_model(
        spec.model.id, revision=spec.model.revision, dtype=spec.model.dtype, device=device
    )
    num_train = pools.corpus("task_train").num_examples
    order = seeded_generator(how.proposing.seed, "anchor shots").permutation(num_train)
    shots = order[: how.num_shots].astype(np.int64)
    return _Scorer(loaded.model, pools, shots, context_of(spec), device)


def _candidates(
    scorer: _Scorer, how: Proposing, say: Progress | None
) -> tuple[list[str], list[Rejected]]:
    """Texts that the model writes for training examples of the task, filtered."""
    corpus, renderer = scorer.pools.corpus("task_train"), scorer.pools.renderer
    pool = corpus.examples(np.arange(corpus.num_examples))
    drawn = draw_candidates(scorer.model, renderer, pool, how, scorer.device)
    if say:
        say("candidates written", len(drawn), how.num_candidates)
    return filter_candidates(drawn, renderer, how.max_tokens)


def _anchor(text: str, pools: Pools) -> Anchor:
    """A candidate as the anchor of the curated data, at their anchor's position."""
    asked = AnchorSpec(source="given", text=text, position=pools.anchor.position)
    anchor = resolve_anchor(asked, [], None)
    return Anchor(
        anchor.text,
        anchor.position,
        pools.anchor.own_instruction,
        pools.renderer.num_text_tokens(anchor.text),
    )


def _random_texts(pools: Pools, best: Scored, how: Searching) -> list[str]:
    tokenizer = pools.renderer.tokenizer
    seeds = range(how.proposing.seed, how.proposing.seed + how.num_random)
    return [random_anchor(tokenizer, best.num_tokens, seed) for seed in seeds]


def _tested(
    best: Scored, others: Sequence[Scored], testing: IntArray, resampling: Resampling
) -> list[Difference]:
    """The chosen candidate against the other anchors, on items that it was not chosen by."""
    kinds = dict.fromkeys(one.kind for one in others)
    against = {
        kind: np.concatenate([one.by_item for one in others if one.kind == kind])[:, testing]
        for kind in kinds
    }
    return compare(best.by_item[:, testing], against, resampling)


def _rows(
    everything: Sequence[Scored],
    none: Scored,
    choosing: IntArray,
    testing: IntArray,
    resampling: Resampling,
) -> list[dict[str, Any]]:
    """Every text with its mean scores, and on the choosing half its difference from no anchor."""
    rows = []
    for one in everything:
        against = {NONE: none.by_item[:, choosing]}
        (difference,) = compare(one.by_item[:, choosing], against, resampling)
        rows.append(
            {
                "kind": one.kind,
                "text": one.text,
                "num_tokens": one.num_tokens,
                "zero_shot": float(one.scores[0, choosing].mean()),
                "few_shot": float(one.scores[-1, choosing].mean()) if len(one.scores) > 1 else None,
                "choosing": float(one.by_item[0, choosing].mean()),
                "testing": float(one.by_item[0, testing].mean()),
                "over_none": difference.estimate,
                "low": difference.low,
                "high": difference.high,
            }
        )
    return rows


def _train(
    spec: ExperimentSpec, curated: Stage, found: dict[str, Any], say: Progress | None
) -> dict[str, Any]:
    """Train TELL with the chosen candidate and its controls; compare them on the testing half."""
    if not (spec.general and spec.budgets.general_tokens):
        raise InputError(
            "--train mixes in general data: it needs sources under `general` and a number under"
            " `budgets.general_tokens`"
        )
    pools = open_pools(curated.path, renderer_of(spec))
    _, testing = halves(
        pools.corpus("task_dev").example_ids, found["settings"]["proposing"]["seed"]
    )
    changed = _under_anchor(curated, _anchor(found["chosen"], pools))
    arms = {
        CANDIDATE: ("tell", changed),
        NONE: ("tell_no_anchor", curated),
        RANDOM: ("tell_random_anchor", changed),
        **({GIVEN: ("tell", curated)} if pools.anchor.text else {}),
    }
    scores = {}
    for done, (kind, (arm, data)) in enumerate(arms.items(), start=1):
        rows = [_dev_scores(spec, _cell(spec, arm, seed), data) for seed in spec.seeds]
        scores[kind] = np.stack(rows)[:, testing]
        if say:
            say(f"trained: {kind}", done, len(arms))
    resampling = Resampling.of(spec.analysis)
    tested = compare(scores.pop(CANDIDATE), scores, resampling)
    verdict, reason = judge_training(tested, resampling.confidence, len(spec.seeds))
    cell = _cell(spec, "tell", 0)
    return {
        "task_budget_tokens": cell.task_budget_tokens,
        "general_budget_tokens": cell.general_budget_tokens,
        "learning_rate": spec.training.candidates[0].learning_rate,
        "num_seeds": len(spec.seeds),
        "verdict": verdict,
        "reason": reason,
        "tested": as_rows(tested),
    }


def _cell(spec: ExperimentSpec, arm: str, seed: int) -> Cell:
    return Cell(arm, min(spec.budgets.task_tokens), max(spec.budgets.general_tokens), seed)


def _dev_scores(spec: ExperimentSpec, cell: Cell, curated: Stage) -> FloatArray:
    """Gold log-probability per token of each dev item after the last step, shape (N,).

    Of the last step, not of the one with the best dev loss: that one was chosen by these items.
    """
    spec = settled(spec, spec.training.candidates[0])
    mixed = mix_stage(spec, cell, curated)
    trained = train_stage(spec, cell, mixed)
    _, losses = load_probe(trained.path / "probe.npz")
    lines = (mixed.path / "probe_items.jsonl").read_text(encoding="utf-8").splitlines()
    is_task = np.array([json.loads(line)["role"] == "task" for line in lines])
    return np.asarray(-losses[-1, is_task])


def _under_anchor(curated: Stage, anchor: Anchor) -> Stage:
    """The same curated data with another anchor prompt; their files are shared on disk."""
    identity = fingerprint("curate", curated.fingerprint, anchor.record())
    stage = Stage("curate", identity, curated.root, reused=False)
    if find_stage(curated.root, "curate", identity) is None:
        with write_stage(curated.root, "curate", identity) as out:
            shutil.copytree(
                curated.path, out, copy_function=_link, dirs_exist_ok=True,
                ignore=shutil.ignore_patterns(MARKER),
            )  # fmt: skip
            write_json(out / "anchor.json", anchor.record())  # replaces the link, not the original
    return stage


def _link(source: str, target: str) -> None:
    """Share a file where the file system can, else copy it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
