"""Promotion with approval without a server: what a person answers, and what is shown of it."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from flows import promotion

REASON = "[half the size](javascript:steal())"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a promotion by force leaves on its page, Markdown first."""
    texts: list[Any] = []
    answer = promotion.Approval(approve=True, force_reason=REASON)
    decision = SimpleNamespace(sentence=lambda: f"champion now by force ({REASON})", as_json=dict)
    monkeypatch.setattr(promotion, "end_with_worker", lambda: None)
    monkeypatch.setattr(promotion, "get_run_logger", lambda: logging.getLogger("promotion"))
    monkeypatch.setattr(promotion, "compare_with_champion", lambda *_: "2 to 1")
    monkeypatch.setattr(promotion, "pause_flow_run", lambda **_: answer)
    monkeypatch.setattr(promotion, "decide", lambda *_: decision)
    monkeypatch.setattr(
        promotion, "create_markdown_artifact", lambda markdown, **_: texts.append(markdown)
    )
    monkeypatch.setattr(promotion, "create_table_artifact", lambda table, **_: texts.append(table))
    return texts


def test_a_reason_that_a_person_gave_is_shown_in_a_table_and_never_as_markdown(shown: list[Any]):
    promotion.promote_with_approval.fn("m", 2)

    assert shown == ["2 to 1", [{"decision": f"champion now by force ({REASON})"}]]
