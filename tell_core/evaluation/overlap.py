"""Metrics that compare texts piece by piece: BLEU, GLEU, chrF, ROUGE-L, character error rate.

Shape letters: N items, K statistics per item, D draws of item weights.
"""

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from tell_core.evaluation.base import (
    FloatArray,
    MeanMetric,
    Metric,
    Payload,
    ScoredItem,
    mean_where,
    ratio,
)


class CharacterErrorRate(Metric):
    """Edit distance in characters over all items, divided by the characters of all references.

    Insertions, deletions and substitutions of Unicode code points cost 1 each (Levenshtein). Can
    exceed 1. An unparsable prediction counts as empty; without any reference character the
    divisor is 1.
    """

    name = "character_error_rate"
    limits = (0.0, math.inf)
    higher_is_better = False

    def payloads(self, items: Sequence[ScoredItem]) -> list[Payload]:
        """Edit distance and length of the reference, in characters."""
        texts = [(item.predicted_text or "", self._reference(item)) for item in items]
        return [[edit_distance(text, reference), len(reference)] for text, reference in texts]

    def _score_sums(self, sums: FloatArray) -> FloatArray:
        return sums[:, 0] / np.maximum(sums[:, 1], 1.0)


class Bleu(Metric):
    """Corpus BLEU as sacreBLEU computes it, 0 to 100: tokenizer 13a, exponential smoothing.

    An unparsable prediction counts as empty. Statistics, K = 10: length of prediction and
    reference in words, then matched and all n-grams of the prediction for n = 1 to 4. No score
    for single items: BLEU of one sentence is another metric.
    """

    name = "bleu"
    limits = (0.0, 100.0)
    has_item_scores = False

    @property
    def signature(self) -> str:
        """SacreBLEU's signature."""
        metric = _sacrebleu().BLEU()
        metric.corpus_score(["x"], [["x"]])
        return str(metric.get_signature())

    def payloads(self, items: Sequence[ScoredItem]) -> list[Payload]:
        """Lengths and n-gram counts, from sacreBLEU."""
        metric = _sacrebleu().BLEU()
        payloads = []
        for item in items:
            counts = metric.corpus_score([item.predicted_text or ""], [[self._reference(item)]])
            payloads.append([counts.sys_len, counts.ref_len, *counts.counts, *counts.totals])
        return payloads

    def _score_sums(self, sums: FloatArray) -> FloatArray:
        predicted, reference = sums[:, 0], sums[:, 1]
        matched, total = sums[:, 2:6], sums[:, 6:10]
        unmatched = (matched == 0) & (total > 0)
        halvings = 2.0 ** np.cumsum(unmatched, axis=1)
        precisions = np.where(unmatched, 1 / halvings, matched) / np.where(total > 0, total, 1)
        penalty = np.exp(np.minimum(0.0, 1 - reference / predicted))
        score = 100 * penalty * np.exp(np.log(precisions).mean(axis=1))
        return np.where(matched.any(axis=1), score, 0.0)


class Gleu(Metric):
    """Google BLEU (Wu et al. 2016): matched n-grams of n = 1 to 4 over all n-grams, 0 to 1.

    "All" are those of the prediction or of the reference, whichever are more, so that the score is
    the smaller of precision and recall. Meant for single sentences; several items are scored by
    the sums over their sentences, as NLTK's ``corpus_gleu`` does. Words are those of sacreBLEU's
    tokenizer 13a, case counts. An unparsable prediction counts as empty; where prediction and
    reference are both empty the score is 0. Not the GLEU of grammatical error correction.

    Statistics, K = 2: matched n-grams, all n-grams.
    """

    name = "gleu"

    @property
    def signature(self) -> str:
        """Tokenizer and longest n-gram, in the form of sacreBLEU's signatures."""
        return f"tok:{_sacrebleu_words().signature()}|order:1-4"

    def payloads(self, items: Sequence[ScoredItem]) -> list[Payload]:
        """Matched and all n-grams."""
        words = _sacrebleu_words()
        payloads = []
        for item in items:
            texts = (item.predicted_text or "", self._reference(item))
            predicted, reference = (tuple(words(text).split()) for text in texts)
            pairs = [(_ngrams(predicted, n), _ngrams(reference, n)) for n in range(1, 5)]
            matched = sum((first & second).total() for first, second in pairs)
            totals = [sum(counts.total() for counts in side) for side in zip(*pairs, strict=True)]
            payloads.append([matched, max(totals)])
        return payloads

    def _score_sums(self, sums: FloatArray) -> FloatArray:
        return ratio(sums[:, 0], sums[:, 1])


class RougeL(MeanMetric):
    """Mean over items of ROUGE-L, the F1 of the longest common subsequence of words.

    2 * common / (words of the prediction + words of the reference), 0 without any word. Words are
    runs of letters, digits and marks in lower case, of any script, without stemming; the whole text
    is one sequence. For plain English that is the package rouge-score's "rougeL"; other letters
    than a to z, which that package drops, are kept here. Text without spaces between words is one
    word. An unparsable prediction scores 0.
    """

    name = "rouge_l"

    def _value(self, item: ScoredItem) -> float:
        prediction = lower_words(item.predicted_text or "")
        reference = lower_words(self._reference(item))
        common = common_length(prediction, reference)
        return 2 * common / (len(prediction) + len(reference)) if common else 0.0


class Chrf(Metric):
    """Corpus chrF as sacreBLEU computes it, 0 to 100: character n-grams up to 6, beta 2.

    Character n-grams ignore white space. Orders that prediction or reference cannot fill are left
    out of the mean. An unparsable prediction counts as empty. Statistics, three per order:
    n-grams of the prediction (0 when the reference has none), of the reference, in both.
    """

    name = "chrf"
    limits = (0.0, 100.0)
    word_order: ClassVar[int] = 0

    @property
    def signature(self) -> str:
        """SacreBLEU's signature."""
        metric = _sacrebleu().CHRF(word_order=self.word_order)
        metric.corpus_score(["x"], [["x"]])
        return str(metric.get_signature())

    def payloads(self, items: Sequence[ScoredItem]) -> list[Payload]:
        """N-gram counts per order."""
        texts = [(item.predicted_text or "", self._reference(item)) for item in items]
        return [chrf_counts(text, reference, self.word_order) for text, reference in texts]

    def _score_sums(self, sums: FloatArray) -> FloatArray:
        predicted, reference, matched = sums[:, 0::3], sums[:, 1::3], sums[:, 2::3]
        is_filled = (predicted > 0) & (reference > 0)
        precision = mean_where(ratio(matched, predicted), is_filled)
        recall = mean_where(ratio(matched, reference), is_filled)
        beta_squared = 4.0
        return 100 * ratio(
            (1 + beta_squared) * precision * recall, beta_squared * precision + recall
        )


class ChrfPlusPlus(Chrf):
    """Corpus chrF++ as sacreBLEU computes it: chrF with word n-grams up to 2."""

    name = "chrf++"
    word_order = 2


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance in code points.

    Bit-parallel: a column of the dynamic programme is one long integer, a step per character of
    ``second`` (Myers 1999, in the form of Hyyrö 2003).
    """
    if not first:
        return len(second)
    masks: dict[str, int] = {}
    for position, character in enumerate(first):
        masks[character] = masks.get(character, 0) | (1 << position)
    full, last = (1 << len(first)) - 1, 1 << (len(first) - 1)
    rises, falls, distance = full, 0, len(first)
    for character in second:
        match = masks.get(character, 0)
        diagonal = ((((match & rises) + rises) ^ rises) | match | falls) & full
        right_rises, right_falls = (falls | ~(diagonal | rises)) & full, rises & diagonal
        distance += bool(right_rises & last) - bool(right_falls & last)
        right_rises = ((right_rises << 1) | 1) & full
        right_falls = (right_falls << 1) & full
        rises = (right_falls | ~(diagonal | right_rises)) & full
        falls = right_rises & diagonal
    return distance


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    Bit-parallel: a row of the dynamic programme is one long integer (Hyyrö 2004).
    """
    masks: dict[str, int] = {}
    for position, unit in enumerate(first):
        masks[unit] = masks.get(unit, 0) | (1 << position)
    full = (1 << len(first)) - 1
    row = full
    for unit in second:
        match = row & masks.get(unit, 0)
        row = ((row + match) | (row - match)) & full
    return len(first) - row.bit_count()


def lower_words(text: str) -> list[str]:
    """Runs of letters, digits and marks (Unicode categories L, N, M), in lower case."""
    kept = (c if unicodedata.category(c)[0] in "LNM" else " " for c in text.lower())
    return "".join(kept).split()


def chrf_counts(prediction: str, reference: str, word_order: int) -> list[int]:
    """Counts of `Chrf` for one pair: three per character order, then three per word order."""
    characters = [_joined(text) for text in (prediction, reference)]
    words = [_words(text) for text in (prediction, reference)]
    counts = [_overlap(*(_ngrams(text, n) for text in characters)) for n in range(1, 7)]
    counts += [_overlap(*(_ngrams(text, n) for text in words)) for n in range(1, word_order + 1)]
    return [count for order in counts for count in order]


def _joined(text: str) -> str:
    return "".join(text.split())


def _words(text: str) -> tuple[str, ...]:
    """Words with one punctuation mark split off: the last character, else the first (chrF++)."""
    words: list[str] = []
    for word in text.split():
        if len(word) > 1 and word[-1] in _PUNCTUATION:
            words += [word[:-1], word[-1]]
        elif len(word) > 1 and word[0] in _PUNCTUATION:
            words += [word[0], word[1:]]
        else:
            words.append(word)
    return tuple(words)


_PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


def _ngrams(units: str | tuple[str, ...], n: int) -> Counter[str | tuple[str, ...]]:
    return Counter(units[start : start + n] for start in range(len(units) - n + 1))


def _overlap(
    first: Counter[str | tuple[str, ...]], second: Counter[str | tuple[str, ...]]
) -> tuple[int, int, int]:
    total = second.total()
    return (first.total() if total else 0, total, (first & second).total())


def _sacrebleu_words() -> Any:
    from sacrebleu.tokenizers import tokenizer_13a

    words: Any = tokenizer_13a.Tokenizer13a
    return words()


def _sacrebleu() -> Any:
    from sacrebleu import metrics  # imported here: most runs need neither BLEU nor chrF

    return metrics
