"""BLEU, GLEU, chrF, ROUGE-L and character errors against their references."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF

from tell_core.evaluation.overlap import common_length, edit_distance, lower_words
from tests.tell_core.evaluation.examples import TOLERANCE, items_of, metric_of, score

few = settings(max_examples=40, deadline=None)

words = st.sampled_from(["a", "ab", "(ab)", "the", "cat.", "sat", "!", "-", "Ísland,", "5.5", "' "])
sentences = st.lists(words, max_size=9).map(" ".join)
text_pairs = st.lists(st.tuples(sentences, sentences), min_size=1, max_size=6)


@few
@given(text_pairs)
def test_bleu_equals_sacrebleu(pairs: list[tuple[str, str]]) -> None:
    predictions, references = zip(*pairs, strict=True)

    expected = BLEU().corpus_score(list(predictions), [list(references)]).score

    assert score(metric_of("bleu"), items_of(pairs)) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(("name", "word_order"), [("chrf", 0), ("chrf++", 2)])
@few
@given(pairs=text_pairs)
def test_chrf_equals_sacrebleu(name: str, word_order: int, pairs: list[tuple[str, str]]) -> None:
    predictions, references = zip(*pairs, strict=True)

    expected = CHRF(word_order=word_order).corpus_score(list(predictions), [list(references)]).score

    assert score(metric_of(name), items_of(pairs)) == pytest.approx(expected, abs=TOLERANCE)


@given(st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), min_size=1, max_size=4))
def test_bleu_and_chrf_equal_sacrebleu_on_any_text(pairs: list[tuple[str, str]]) -> None:
    predictions, references = map(list, zip(*pairs, strict=True))

    for name, oracle in (("bleu", BLEU()), ("chrf++", CHRF(word_order=2))):
        expected = oracle.corpus_score(predictions, [references]).score
        assert score(metric_of(name), items_of(pairs)) == pytest.approx(expected, abs=TOLERANCE)


def test_signatures_are_sacrebleus() -> None:
    signatures = {name: metric_of(name).signature for name in ("bleu", "chrf", "chrf++")}

    assert "tok:13a" in str(signatures["bleu"])
    assert "nc:6|nw:0" in str(signatures["chrf"])
    assert "nc:6|nw:2" in str(signatures["chrf++"])


@given(st.text(max_size=12), st.text(max_size=12))
def test_edit_distance_equals_its_definition(first: str, second: str) -> None:
    row = list(range(len(second) + 1))
    for i, character in enumerate(first, start=1):
        previous, row[0] = row[0], i
        for j, other in enumerate(second, start=1):
            previous, row[j] = (
                row[j],
                min(row[j] + 1, row[j - 1] + 1, previous + (character != other)),
            )

    assert edit_distance(first, second) == row[-1]


@given(st.text("ab", max_size=200), st.text("ab", max_size=200))
def test_edit_distance_of_long_texts_is_symmetric_and_bounded(first: str, second: str) -> None:
    distance = edit_distance(first, second)

    assert distance == edit_distance(second, first)
    assert abs(len(first) - len(second)) <= distance <= max(len(first), len(second))


def gleu_by_definition(predicted: list[str], reference: list[str]) -> tuple[int, int]:
    """Matched and all n-grams, counted by removing each match from a list."""
    matched = num_predicted = num_reference = 0
    for n in range(1, 5):
        left = [reference[i : i + n] for i in range(len(reference) - n + 1)]
        grams = [predicted[i : i + n] for i in range(len(predicted) - n + 1)]
        num_predicted, num_reference = num_predicted + len(grams), num_reference + len(left)
        for gram in grams:
            if gram in left:
                left.remove(gram)
                matched += 1
    return matched, max(num_predicted, num_reference)


plain = st.lists(st.sampled_from(["a", "the", "cat", "sat", "on"]), max_size=9)


@few
@given(st.lists(st.tuples(plain, plain), min_size=1, max_size=6))
def test_gleu_equals_its_definition(pairs: list[tuple[list[str], list[str]]]) -> None:
    counts = [gleu_by_definition(predicted, reference) for predicted, reference in pairs]
    matched, total = (sum(column) for column in zip(*counts, strict=True))

    found = score(metric_of("gleu"), items_of([(" ".join(p), " ".join(r)) for p, r in pairs]))

    assert found == pytest.approx(matched / total if total else 0.0, abs=TOLERANCE)


@few
@given(st.lists(st.tuples(plain, plain), min_size=1, max_size=6))
def test_gleu_equals_nltk(pairs: list[tuple[list[str], list[str]]]) -> None:
    gleu = pytest.importorskip("nltk.translate.gleu_score")

    found = score(metric_of("gleu"), items_of([(" ".join(p), " ".join(r)) for p, r in pairs]))

    expected = gleu.corpus_gleu([[reference] for _, reference in pairs], [p for p, _ in pairs])
    assert found == pytest.approx(expected, abs=TOLERANCE)


def test_gleu_is_the_smaller_of_precision_and_recall() -> None:
    short, long = "the cat", "the cat sat on the mat"
    metric = metric_of("gleu")

    assert score(metric, items_of([(short, long)])) == score(metric, items_of([(long, short)]))
    assert score(metric, items_of([(short, long)])) == pytest.approx(3 / 18)


@given(st.text("abc", max_size=10), st.text("abc", max_size=10))
def test_common_subsequence_equals_its_definition(first: str, second: str) -> None:
    row = [0] * (len(second) + 1)
    for unit in first:
        before = row[:]
        for j, other in enumerate(second, start=1):
            row[j] = before[j - 1] + 1 if unit == other else max(before[j], row[j - 1])

    assert common_length(first, second) == row[-1]


ascii_text = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30)


@few
@given(st.lists(st.tuples(ascii_text | sentences, ascii_text | sentences), min_size=1, max_size=5))
def test_rouge_l_equals_the_rouge_score_package(pairs: list[tuple[str, str]]) -> None:
    package = pytest.importorskip("rouge_score.rouge_scorer")

    class Words:
        def tokenize(self, text: str) -> list[str]:
            return lower_words(text)

    scorer = package.RougeScorer(["rougeL"], tokenizer=Words())
    expected = [scorer.score(reference, text)["rougeL"].fmeasure for text, reference in pairs]

    found = score(metric_of("rouge_l"), items_of(pairs))

    assert found == pytest.approx(sum(expected) / len(pairs), abs=TOLERANCE)


@given(ascii_text)
def test_words_of_plain_english_are_those_of_the_rouge_score_package(text: str) -> None:
    package = pytest.importorskip("rouge_score.tokenize")

    assert lower_words(text) == package.tokenize(text, None)


def test_rouge_l_keeps_letters_of_every_script() -> None:
    assert lower_words("Ísland, हिन्दी!") == ["ísland", "हिन्दी"]
