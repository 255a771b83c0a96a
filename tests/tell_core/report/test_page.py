"""The report as a reader gets it: one offline file that says what the run's files say."""

import json
import re
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tell_core.errors import InputError, StoreError
from tell_core.report import page as page_module
from tell_core.report import write_report
from tell_core.report.blocks import Entry, Table, Text, shortened
from tell_core.report.formats import format_leverage
from tell_core.report.page import page_script, page_templates

BuildRun = Callable[..., Path]

SECTIONS = (
    "answer", "curves", "leverage", "forecast", "price", "uncertainty", "predictions",
    "emergence", "mechanism", "scaling", "ledger", "curation", "shuffle", "prompts",
    "limits", "reproduce",
)  # fmt: skip
MACROS = page_templates().get_template("blocks.html.j2").make_module()
OPTIONAL = frozenset(
    {"leverage", "forecast", "emergence", "curate", "mix", "predictions", "results", "tuning"}
)


class _Reader(HTMLParser):
    """Collects tags, attributes that load something, and text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
                self.loads.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_characters="\r\x00", exclude_categories=["Cs"])))
def test_any_text_comes_out_of_the_page_as_it_went_in(text: str) -> None:
    reader = _Reader(str(MACROS.render_block(Text(text))))  # type: ignore[attr-defined]

    assert reader.tags == ["p"]
    assert text in reader.text


def test_sections_stand_in_their_order(full_page: str) -> None:
    found = re.findall(r'<section id="([a-z]+)">', full_page)

    assert tuple(found) == SECTIONS


def test_contents_link_to_every_section(full_page: str) -> None:
    links = {load for load in _Reader(full_page).loads if load.startswith("#")}

    assert {f"#{name}" for name in SECTIONS} <= links


def test_page_loads_nothing_and_runs_its_own_script_alone(full_page: str) -> None:
    reader = _Reader(full_page)

    assert not [load for load in reader.loads if not load.startswith(("#", "data:image/png"))]
    assert not {"link", "iframe", "object", "embed", "form"} & set(reader.tags)
    assert full_page.count("<script>") == 1
    assert reader.tags.count("script") == 1 + full_page.count('<script type="application/json"')
    assert "http" not in full_page.replace("http-equiv", "")
    assert not re.search(r"@import|url\((?!#)", full_page)


def test_only_the_script_of_this_digest_may_run(full_page: str) -> None:
    script = full_page.split("<script>")[1].split("</script>")[0]

    digest = b64encode(sha256(script.encode()).digest()).decode()
    assert script == page_script()
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:;" in full_page
    assert f"script-src 'sha256-{digest}'" in full_page


def test_page_is_smaller_than_its_limit(full_run: Path, full_page: str) -> None:
    assert len(full_page.encode()) == (full_run / "report.html").stat().st_size < 5_000_000


def test_ids_of_all_drawings_are_unique(full_page: str) -> None:
    ids = _Reader(full_page).ids

    assert len(ids) == len(set(ids))


def test_every_reference_inside_drawings_has_its_target(full_page: str) -> None:
    ids = set(_Reader(full_page).ids)
    used = re.findall(r"url\(#([^)]+)\)", full_page) + re.findall(r'href="#([^"]+)"', full_page)

    assert used
    assert set(used) <= ids


def test_leverage_on_the_page_equals_the_file(full_run: Path, full_page: str) -> None:
    analysed = json.loads((full_run / "leverage.json").read_text())
    rows = [
        row
        for by_general in analysed["metrics"]["log_probability"]["arms"].values()
        for rows in by_general.values()
        for row in rows
    ]

    assert len(rows) == 45
    for row in rows:
        number = row["bound"] if row["ratio"] is None else row["ratio"]
        assert f'<data value="{number}">{format_leverage(row)}</data>' in full_page


def test_drawings_follow_the_theme_of_the_page(full_page: str) -> None:
    drawings = re.findall(r"<svg viewBox.*?</svg>", full_page, re.DOTALL)

    assert len(drawings) > 15
    assert all("var(--muted)" in drawing for drawing in drawings if "<text" in drawing)
    assert not any("#01fe" in drawing for drawing in drawings)


def test_supervised_tokens_are_underlined(full_page: str) -> None:
    assert "<u>bwf</u>" in full_page
    assert "<span> cipher</span>" in full_page


def test_hostile_data_is_only_ever_text(build_run: BuildRun, without_drawing: None) -> None:
    hostile = "<script>alert('x')</script><img src=http://evil.example/x.png>\u2028-->"

    page = write_report(build_run(hostile=hostile)).read_text(encoding="utf-8")

    reader = _Reader(page)
    assert reader.tags.count("script") == 3  # items, data of the figures, our own
    assert "img" not in reader.tags
    assert hostile in reader.text
    assert not [load for load in reader.loads if not load.startswith("#")]


def test_missing_parts_become_sentences(build_run: BuildRun) -> None:
    page = write_report(build_run(without=OPTIONAL)).read_text(encoding="utf-8")

    assert tuple(re.findall(r'<section id="([a-z]+)">', page)) == SECTIONS
    assert page.count('class="missing"') >= 8
    assert "Undetermined. No leverage was analysed" in page


@pytest.mark.parametrize("part", sorted(OPTIONAL))
def test_any_one_part_may_be_missing(build_run: BuildRun, without_drawing: None, part: str) -> None:
    page = write_report(build_run(without=frozenset({part}))).read_text(encoding="utf-8")

    assert tuple(re.findall(r'<section id="([a-z]+)">', page)) == SECTIONS


def test_a_single_seed_is_undetermined_and_says_why(
    build_run: BuildRun, without_drawing: None
) -> None:
    page = write_report(build_run(seeds=(0,))).read_text(encoding="utf-8")

    assert "Undetermined." in page
    assert "point estimate 3.7×" in page
    assert "One training seed" in page


def test_unreached_scores_are_bounds(build_run: BuildRun, without_drawing: None) -> None:
    page = write_report(build_run(lead=4.0)).read_text(encoding="utf-8")

    assert "≥ 64×" in page
    assert "leverage at least 64" in page
    assert "are bounds" in page


def test_limits_name_what_this_run_did_not_count(full_page: str) -> None:
    assert "64 task dev examples (2,688 tokens)" in full_page
    assert "The task budget of 256,000 tokens is above the pool: only 180,000" in full_page
    assert "general budget of" not in full_page.split('id="limits"')[1].split("</section>")[0]


def test_nothing_rejected_is_said(build_run: BuildRun, without_drawing: None) -> None:
    page = write_report(build_run(rejects=False)).read_text(encoding="utf-8")

    assert "Nothing was rejected" in page
    assert "No training example shares its prompt" in page


def test_writing_again_gives_the_same_bytes(build_run: BuildRun, without_drawing: None) -> None:
    run = build_run()
    first = write_report(run).read_bytes()

    assert write_report(run).read_bytes() == first


def test_a_directory_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no manifest"):
        write_report(tmp_path)


def test_too_large_a_page_is_refused_and_the_old_one_stays(
    build_run: BuildRun, without_drawing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build_run()
    (run / "report.html").write_text("old")
    monkeypatch.setattr(page_module, "MAX_BYTES", 1000)

    with pytest.raises(StoreError, match="MB are allowed"):
        write_report(run)

    assert (run / "report.html").read_text() == "old"


@pytest.mark.parametrize("surplus", [1, 10_000, 25_000])
def test_items_make_room_where_the_page_would_be_too_large(
    build_run: BuildRun, without_drawing: None, monkeypatch: pytest.MonkeyPatch, surplus: int
) -> None:
    run = build_run()
    size = write_report(run).stat().st_size
    monkeypatch.setattr(page_module, "MAX_BYTES", size - surplus)

    page = write_report(run).read_text(encoding="utf-8")

    assert len(page.encode()) <= size - surplus
    assert "To stay small this page holds" in page


def test_chapters_of_details_make_room_before_a_finished_run_goes_without_a_report(
    build_run: BuildRun, without_drawing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build_run()
    size = write_report(run).stat().st_size
    monkeypatch.setattr(page_module, "MAX_BYTES", size // 2)

    page = write_report(run).read_text(encoding="utf-8")

    assert len(page.encode()) <= size // 2
    assert "Left out, for with it this page would be larger" in page
    assert 'id="answer"' in page


@given(st.integers(min_value=0, max_value=400), st.integers(min_value=1, max_value=400))
def test_a_shortened_table_counts_what_it_leaves_out(num_rows: int, kept: int) -> None:
    table = Table("numbers", ("n",), tuple((Entry(str(row)),) for row in range(num_rows)))

    short = shortened(table, kept)

    assert len(short.rows) + short.num_omitted == num_rows
    assert short.rows == table.rows[:kept]
