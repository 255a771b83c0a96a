"""JSON inside the page: it reads back as it was, and never ends its element."""

import json
import math
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tell_core.report.carried import carried_json, carried_size

HOSTILE = st.text(
    alphabet=st.one_of(
        st.characters(), st.sampled_from("</>&!-\"'\\scriptSCRIPT\u2028\u2029\ud800\udfff\x00\r")
    )
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), HOSTILE),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(HOSTILE, inner)),
    max_leaves=8,
)


class _Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.carried = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        if self.tags == ["script"]:
            self.carried += data


@given(VALUES)
def test_what_is_carried_reads_back_and_stays_in_its_element(value: Any) -> None:
    text = carried_json(value)

    page = _Elements(f'<script type="application/json">{text}</script><p>')

    assert page.tags == ["script", "p"]
    assert json.loads(page.carried) == value
    assert not set(text) & set("<>&\u2028\u2029")


@given(VALUES)
def test_size_is_that_of_the_page_in_utf_8(value: Any) -> None:
    assert carried_size(value) == len(str(carried_json(value)).encode("utf-8"))


def test_numbers_that_json_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        carried_json([math.nan])
