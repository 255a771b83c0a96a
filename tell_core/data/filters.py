"""Filters: general examples set aside for what they are, each with the value measured.

The measures follow Gopher's rules for web text (Rae et al. 2021, appendix A) where they make sense
for instructions and answers. Only general data is filtered: task data is scarce and was chosen.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tell_core.data.shingles import shared_sizes, word_shingles
from tell_core.data.telling import Progress, silent
from tell_core.data.words import Words, hash_words
from tell_core.data.workspace import fetch_one, insert_table, stream_batches
from tell_core.errors import DataError
from tell_core.spec.model import CurationSpec

RUN_WORDS = 5
MIN_RUNS = 20
MIN_LANGUAGE_WORDS = 20
_BATCH_ROWS = 1024
_REFUSAL_CHARACTERS = 200
_SYMBOLS = re.compile(r"[^\w\s]")
_INK = re.compile(r"\S")
_REFUSALS = re.compile(
    r"\b(as an? (ai|artificial intelligence)( language)?( model| assistant)?\b"
    r"|i('m| am) (sorry|afraid)[, ]+(but )?i|i (cannot|can't|can not|am unable to|'m unable to)"
    r" (assist|help|provide|answer|fulfil|comply|create|generate|do that)"
    r"|i('m| am) (not able|unable) to)",
    re.IGNORECASE,
)
_BOILERPLATE = re.compile(
    r"\b(all rights reserved|terms (of (use|service)|and conditions) apply|privacy policy"
    r"|click here|subscribe to (our|my)|sign up for|enable javascript|cookie policy|lorem ipsum"
    r"|is too long or excessively detailed|this article('s| has| is| may| needs)"
    r"|from wikipedia, the free)\b",
    re.IGNORECASE,
)
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Filter:
    """One reason to set examples aside.

    Attributes:
        reason: Its code in `rejects`.
        what: The measured value in words.
        most: Largest value that stays.
        measure: Values of the examples of a batch; NaN where too little is there to measure.
    """

    reason: str
    what: str
    most: float
    measure: "Callable[[Batch], Values]"


@dataclass(frozen=True)
class Batch:
    """Some examples.

    Attributes:
        prompts: Their prompts.
        responses: Their responses.
        words: Words of prompt and response of each in turn.
    """

    prompts: Sequence[str]
    responses: Sequence[str]
    words: Words


def chosen_filters(curation: CurationSpec) -> list[Filter]:
    """The filters that are switched on, in the order in which they are applied.

    Raises:
        DataError: Languages are asked for, but the package that tells them is not installed.
    """
    found = []
    if curation.max_repetition is not None:
        what = "repeated runs of 5 words in the response"
        found.append(Filter("repetition", what, curation.max_repetition, repetition))
    if curation.max_symbols is not None:
        what = "signs among the response's characters"
        found.append(Filter("symbols", what, curation.max_symbols, symbols))
    if curation.max_copied is not None:
        what = "runs of 5 words of the response that stand in the prompt"
        found.append(Filter("copies_prompt", what, curation.max_copied, copied))
    if curation.drop_refusals:
        found.append(Filter("refusal", "refusing phrases", 0, refusals))
    if curation.drop_boilerplate:
        found.append(Filter("boilerplate", "boilerplate phrases", 0, boilerplate))
    if curation.languages:
        what = f"probability of a language other than {', '.join(curation.languages)}"
        most = curation.max_other_language
        found.append(Filter("language", what, most, other_language(curation.languages)))
    return found


def measure_unfit(
    connection: duckdb.DuckDBPyConnection, filters: Sequence[Filter], report: Progress = silent
) -> None:
    """Fill the table `unfit_general` with the general examples that a filter sets aside.

    The first filter that sets an example aside gives the reason.
    """
    connection.execute(_TABLE)
    query = "select id, prompt, response from examples where part = 'general' order by id"
    num_general, done = fetch_one(connection, _NUM_GENERAL), 0
    for rows in stream_batches(connection, query, _BATCH_ROWS):
        report("filter", done, num_general)
        done += len(rows)
        unfit = list(_unfit(rows, filters))
        if unfit:
            insert_table(connection, "unfit_general", pa.Table.from_pylist(unfit))


_NUM_GENERAL = "select count(*) from examples where part = 'general'"
_TABLE = """
create or replace temp table unfit_general (
    id bigint, reason varchar, detail varchar, value double)
"""


def repetition(batch: Batch) -> Values:
    """Share of the response's runs of 5 words that are repeats of an earlier one."""
    distinct = word_shingles(batch.words, RUN_WORDS).sizes[1::2]
    every = np.maximum(np.diff(batch.words.offsets)[1::2] - RUN_WORDS + 1, 0)
    return _share(every - distinct, every)


def copied(batch: Batch) -> Values:
    """Share of the response's distinct runs of 5 words that stand in the prompt too."""
    sets = word_shingles(batch.words, RUN_WORDS)
    prompts = np.arange(0, len(sets.sizes), 2)
    return _share(shared_sizes(sets, prompts, prompts + 1), sets.sizes[1::2])


def symbols(batch: Batch) -> Values:
    """Share of the response's characters, white space left out, that are no letters or digits."""
    found = [len(_SYMBOLS.findall(response)) for response in batch.responses]
    every = [len(_INK.findall(response)) for response in batch.responses]
    return _share(np.asarray(found), np.asarray(every))


def refusals(batch: Batch) -> Values:
    """Refusing phrases in the first 200 characters of the response."""
    return _phrases(_REFUSALS, [text[:_REFUSAL_CHARACTERS] for text in batch.responses])


def boilerplate(batch: Batch) -> Values:
    """Phrases of web pages in the response."""
    return _phrases(_BOILERPLATE, batch.responses)


def other_language(languages: Sequence[str]) -> Callable[[Batch], Values]:
    """Measures how probable it is that prompt and response are in none of ``languages``.

    Raises:
        DataError: The package ``py3langid`` is not installed, or does not know a language.
    """
    try:
        identifier = _identifier()
    except ImportError as error:
        raise DataError(
            "curation.languages needs the package py3langid: install it with"
            " `pip install 'tell[language]'`, or leave `languages` out."
        ) from error
    unknown = sorted(set(languages) - set(identifier.labels))
    if unknown:
        raise DataError(
            f"curation.languages: {unknown[0]!r} is not known; needed are ISO 639-1 codes, one of"
            f" {', '.join(sorted(identifier.labels))}."
        )

    def measure(batch: Batch) -> Values:
        values = np.full(len(batch.prompts), np.nan)
        num_words = np.diff(batch.words.offsets[::2])
        for at in np.flatnonzero(num_words >= MIN_LANGUAGE_WORDS).tolist():
            ranked = dict(identifier.rank(f"{batch.prompts[at]}\n{batch.responses[at]}"))
            values[at] = 1 - sum(float(ranked[language]) for language in languages)
        return values

    return measure


def likeliest_languages(texts: Sequence[str]) -> list[str] | None:
    """The likeliest language of each text of at least 20 words, as ISO 639-1 codes.

    Returns:
        One code per text that is long enough; None when the package ``py3langid`` is missing.
    """
    try:
        identifier = _identifier()
    except ImportError:
        return None
    num_words = np.diff(hash_words(texts).offsets)
    long_enough = np.flatnonzero(num_words >= MIN_LANGUAGE_WORDS).tolist()
    return [str(identifier.classify(texts[at])[0]) for at in long_enough]


def _identifier() -> Any:
    """What tells languages; reading its model takes half a second, so it is kept.

    Raises:
        ImportError: The package ``py3langid`` is not installed.
    """
    return _read_identifier(import_module("py3langid.langid"))


@lru_cache(maxsize=1)
def _read_identifier(langid: Any) -> Any:
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def _unfit(rows: list[dict[str, Any]], filters: Sequence[Filter]) -> Iterator[dict[str, Any]]:
    prompts = [row["prompt"] for row in rows]
    responses = [row["response"] for row in rows]
    texts = [text for pair in zip(prompts, responses, strict=True) for text in pair]
    batch = Batch(prompts, responses, hash_words(texts))
    measured = [(filter_, filter_.measure(batch)) for filter_ in filters]
    for at, row in enumerate(rows):
        for filter_, values in measured:
            if values[at] > filter_.most:
                detail = f"{filter_.what}: {values[at]:.3g}, at most {filter_.most:g} allowed"
                value = float(values[at])
                yield {"id": row["id"], "reason": filter_.reason, "detail": detail, "value": value}
                break


def _share(part: npt.NDArray[np.int64], whole: npt.NDArray[np.int64]) -> Values:
    """``part / whole``; NaN where the whole is too little to tell."""
    return np.where(whole >= MIN_RUNS, part / np.maximum(whole, 1), np.nan)


def _phrases(pattern: re.Pattern[str], texts: Sequence[str]) -> Values:
    return np.asarray([sum(1 for _ in pattern.finditer(text)) for text in texts], dtype=np.float64)
