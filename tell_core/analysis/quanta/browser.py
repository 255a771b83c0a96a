"""What a reader is shown of each candidate quantum: tokens in context, losses, what pushes it.

Shape letters: S tokens, D projected dimensions, P probe steps, E examples that push.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tell_core.analysis.quanta.discovery import Discovery, centres, pushes, strongest
from tell_core.analysis.quanta.tokens import TokenSelection
from tell_core.analysis.sequence import learning_times
from tell_core.analysis.traces import CellTrace
from tell_core.data.encoding import EncodedExamples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tell_core.analysis.quanta.gradients import Float32Array

Json = dict[str, Any]
SHOWN_TOKENS = 24
SHOWN_OUTPUTS = 6
SHOWN_PUSHES = 5
_BEFORE_TOKENS, _AFTER_TOKENS = 40, 8
_SHOWN_CHARACTERS = 300


@dataclass(frozen=True)
class Items:
    """Examples in which tokens are looked at, and who they are.

    Attributes:
        examples: N examples.
        ids: N names.
        roles: N roles: "task", "general" or "retention".
        skills: N names of the skills an item asks for, where the data say so; else "".
    """

    examples: EncodedExamples
    ids: Sequence[str]
    roles: Sequence[str]
    skills: Sequence[str]


def cluster_records(
    found: Discovery,
    items: Items,
    tokenizer: PreTrainedTokenizerBase,
    traces: Mapping[str, CellTrace],
    general: EncodedExamples,
    general_gradients_ED: Float32Array | None,
) -> list[Json]:
    """One record per cluster of two tokens or more, the largest first.

    Args:
        found: The discovery.
        items: What its tokens were chosen from.
        tokenizer: Tokenizer of the model.
        traces: Name of an arm -> losses over its training.
        general: E general examples.
        general_gradients_ED: Their projected gradients; None leaves out what pushes.
    """
    vectors, labels = found.gradients.vectors, found.clustering.labels
    middles = centres(vectors, labels)
    closeness = _closeness(vectors, middles, labels)
    pushing = None if general_gradients_ED is None else pushes(middles, general_gradients_ED)
    records = []
    for label in range(int(labels.max()) + 1):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            continue
        central = members[np.argsort(-closeness[members], kind="stable")]
        record = _composition(found.tokens, central, items, tokenizer)
        record |= {
            "label": label,
            "cohesion": float(closeness[members].mean()),
            "tokens": [
                _token_record(found.tokens, int(place), items, tokenizer)
                for place in central[:SHOWN_TOKENS]
            ],
            "curves": {
                arm: curve
                for arm, trace in traces.items()
                if (curve := _curve(found.tokens, members, items, trace))
            },
            "pushed_by": [
                _pushing_record(general, example, float(pushing[label, example]), tokenizer)
                for example in strongest(pushing[label], SHOWN_PUSHES)
            ]
            if pushing is not None
            else [],
        }
        records.append(record)
    return records


def _closeness(vectors: Float32Array, middles: Float32Array, labels: Any) -> Float32Array:
    """Cosine of each token's gradient with the middle of its cluster, shape (S,)."""
    products = np.einsum("sd,sd->s", vectors, middles[labels])
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(middles, axis=1)[labels]
    return np.asarray(products / np.maximum(norms, 1e-30), dtype=np.float32)


def _composition(
    tokens: TokenSelection, members: Any, items: Items, tokenizer: PreTrainedTokenizerBase
) -> Json:
    """Size, shares of roles, output tokens and skills of a cluster."""
    rows = tokens.examples[members].tolist()
    places = items.examples.offsets[tokens.examples[members]] + tokens.positions[members]
    outputs = Counter(items.examples.tokens[places].tolist()).most_common(SHOWN_OUTPUTS)
    skills = Counter(items.skills[row] for row in rows if items.skills[row])
    return {
        "size": len(members),
        "num_items": len(set(rows)),
        "roles": dict(Counter(items.roles[row] for row in rows)),
        "outputs": [[_text(tokenizer, [token]), count] for token, count in outputs],
        "skills": skills.most_common(SHOWN_OUTPUTS),
        "mean_loss": float(tokens.losses[members].mean()),
    }


def _token_record(
    tokens: TokenSelection, place: int, items: Items, tokenizer: PreTrainedTokenizerBase
) -> Json:
    """A token with the text around it."""
    row, position = int(tokens.examples[place]), int(tokens.positions[place])
    ids = items.examples.example(row).tolist()
    return {
        "item": items.ids[row],
        "role": items.roles[row],
        "before": _text(tokenizer, ids[max(0, position - _BEFORE_TOKENS) : position]),
        "token": _text(tokenizer, ids[position : position + 1]),
        "after": _text(tokenizer, ids[position + 1 : position + 1 + _AFTER_TOKENS]),
        "loss": float(tokens.losses[place]),
    }


def _pushing_record(
    general: EncodedExamples, row: int, push: float, tokenizer: PreTrainedTokenizerBase
) -> Json:
    ids, start = general.example(row).tolist(), int(general.response_starts[row])
    return {
        "push": push,
        "prompt": _text(tokenizer, ids[:start])[-_SHOWN_CHARACTERS:],
        "response": _text(tokenizer, ids[start:])[:_SHOWN_CHARACTERS],
    }


def _curve(tokens: TokenSelection, members: Any, items: Items, trace: CellTrace) -> Json | None:
    """Mean loss of a cluster over a training, and when it is learned.

    Of its own tokens where training traced them; of the items they stand in where it did not. Test
    items are not probed, so a cluster of nothing else has no curve.
    """
    starts = items.examples.response_starts
    places = zip(tokens.examples[members].tolist(), tokens.positions[members].tolist(), strict=True)
    wanted = {(items.ids[row], position - int(starts[row])) for row, position in places}
    traced = zip(trace.token_items.tolist(), trace.token_positions.tolist(), strict=True)
    columns = [
        column
        for column, (item, position) in enumerate(traced)
        if (trace.items[item], position) in wanted
    ]
    is_of_tokens = bool(columns)
    losses_PU = trace.token_losses[:, columns]
    if not is_of_tokens:
        named = {item for item, _ in wanted}
        columns = [place for place, item in enumerate(trace.items) if item in named]
        losses_PU = trace.losses[:, columns]
        if not columns:
            return None
    losses = losses_PU.mean(axis=1)
    learned = learning_times(trace.steps, losses[:, None])
    was_known = bool(learned.was_known[0])
    is_learned = bool(learned.is_learned[0]) and not was_known
    return {
        "of": "tokens" if is_of_tokens else "items",
        "num": len(columns),
        "steps": trace.steps.tolist(),
        "losses": losses.tolist(),
        "learned_step": int(trace.steps[int(learned.probes[0])]) if is_learned else None,
        "was_known": was_known,
    }


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of some tokens, special ones included."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False))
