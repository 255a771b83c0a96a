"""The profile of a corpus: says what the files say, and shows hostile rows as text."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tell_core.data.curation import curate
from tell_core.report.corpus_page import source_tree, write_corpus_page
from tell_core.store import read_json
from tests.tell_core.data.test_near_duplicates import long_text
from tests.tell_core.data.tiny_tokenizers import CHATML, build_tokenizer
from tests.tell_core.data.worlds import (
    general_rows,
    make_spec,
    task_rows,
    write_rows,
    write_world,
)

HOSTILE = (
    "<script>alert(1)</script>",
    "</td></table></main><h1>gone</h1>",
    '"><img src=x onerror=alert(2)>',
    "{{ 7 * 7 }} {% raise %} ${7*7}",
    "&amp; &#60;b&#62; \u202e\u2066 \x07 ]]>",
)


class Reader(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hostile rows kept, set aside, near-duplicated and leaked."""
    directory = tmp_path_factory.mktemp("hostile")
    write_world(directory)
    test = task_rows(3, start=10_000)
    test[0]["response"] = HOSTILE[2]
    write_rows(directory / "test.jsonl", test)
    text = f"{HOSTILE[0]} {long_text(0)}"
    name = "<b>chat<i>.jsonl"
    rows = [
        *general_rows(20, "chat"),
        *({"prompt": hostile, "response": hostile} for hostile in HOSTILE),
        *({"prompt": hostile, "response": ""} for hostile in HOSTILE),
        {"prompt": text, "response": HOSTILE[1]},
        {"prompt": f"{text} indeed", "response": HOSTILE[1]},
        {"prompt": test[0]["prompt"], "response": HOSTILE[3]},
    ]
    write_rows(directory / name, rows)
    spec = make_spec(
        directory,
        general=[str(directory / "general.jsonl"), str(directory / name)],
        curation={"max_tokens": 4000, "general_heldout_examples": 8},
    )
    curate(spec, build_tokenizer(CHATML), directory / "out")
    return directory / "out"


@pytest.fixture(scope="module")
def page(curated: Path) -> Reader:
    path = write_corpus_page(curated, curated / "corpus.html", "0123456789abcdef")
    return Reader(path.read_text(encoding="utf-8"))


def test_hostile_rows_are_shown_as_text_and_never_as_markup(page: Reader) -> None:
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert page.tags.count("h1") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    for hostile in HOSTILE[:4]:
        assert hostile in page.text


def test_page_needs_no_network(page: Reader) -> None:
    loads = [value for name, value in page.attributes if name in ("src", "href", "srcset")]

    assert all(value and value.startswith("#") for value in loads)
    policy = dict(page.attributes)["content"]
    assert page.tags.count("meta") == 5 and policy is not None


def test_counts_are_those_of_the_profile(curated: Path, page: Reader) -> None:
    sources = read_json(curated / "profile.json")["sources"]

    read = sum(source["num_read"] for source in sources)
    kept = sum(source["num_kept"] for source in sources)
    assert f"{read:,} rows read from {len(sources)} sources, {kept:,} kept" in page.text
    assert f"{read - kept:,} set aside" in page.text


def test_every_reason_is_there_with_its_number(curated: Path, page: Reader) -> None:
    counts: dict[str, int] = {}
    for source in read_json(curated / "profile.json")["sources"]:
        for reason, number in source["rejects"].items():
            counts[reason] = counts.get(reason, 0) + number

    assert set(counts) == {"empty_response", "near_duplicate", "test_overlap"}
    for reason, number in counts.items():
        assert f"{reason.replace('_', ' ')}: {number} row" in page.text


def test_pairs_show_both_texts(page: Reader) -> None:
    assert "indeed" in page.text
    assert "the same prompt; set aside" in page.text
    assert "test set: test, line 1" in page.text


def test_directories_of_the_reader_of_the_data_are_left_out(curated: Path, page: Reader) -> None:
    assert str(curated.parent) not in page.text


def test_tree_names_roles_sources_and_files_with_tokens_and_fingerprints(curated: Path) -> None:
    sources = read_json(curated / "profile.json")["sources"]

    tree = source_tree(sources)

    general = [source for source in sources if source["role"] == "general"]
    total = sum(source["num_tokens"] for source in general)
    assert f"general data: {total:,} tokens" in tree
    for source in sources:
        assert source["fingerprint"] in tree
        assert source["files"][0]["sha256"][:16] in tree


def test_corpus_without_anything_set_aside_says_so(tmp_path: Path) -> None:
    write_world(tmp_path)
    curate(make_spec(tmp_path), build_tokenizer(CHATML), tmp_path / "out")

    path = write_corpus_page(tmp_path / "out", tmp_path / "corpus.html", "f")

    text = Reader(path.read_text(encoding="utf-8")).text
    assert "Nothing was set aside." in text
    assert "No example is a copy" in text
    assert "No training example stands in" in text


def test_missing_languages_say_what_to_install(curated: Path, tmp_path: Path) -> None:
    profile = read_json(curated / "profile.json")
    for source in profile["sources"]:
        source["languages"] = None
    for path in curated.glob("*.parquet"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "profile.json").write_text(json.dumps(profile))

    path = write_corpus_page(tmp_path, tmp_path / "corpus.html", "f")

    assert "tell[language]" in path.read_text(encoding="utf-8")
