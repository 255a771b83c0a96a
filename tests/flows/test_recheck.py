"""The champion's check-up without a server: what is done in which order, whatever fails."""

import logging
from types import SimpleNamespace

import pytest
from prefect.events.worker import EventsWorker

from flows import recheck as checking
from tasks import registry
from tasks.registry import Recheck
from tell_core.promotion import Comparison

FALLEN = Recheck(
    name="m",
    version="1",
    data="0" * 64,
    is_new=True,
    comparison=Comparison("exact_match", 0.1, 0.9, -0.8, -0.9, -0.7, 0.95, 100, 2000, False),
)


class Registry:
    """Remembers the tags that are set."""

    def __init__(self, done: list[str]) -> None:
        self._done = done

    def set_model_version_tag(self, _name: str, _version: str, key: str, value: str) -> None:
        assert value == FALLEN.data
        self._done.append(key)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a check-up of a fallen champion does, in order."""
    steps: list[str] = []
    monkeypatch.setattr(checking, "end_with_worker", lambda: None, raising=False)
    monkeypatch.setattr(checking, "get_run_logger", lambda: logging.getLogger("recheck"))
    monkeypatch.setattr(checking, "has_champion", lambda _name: True)
    monkeypatch.setattr(checking, "check_champion", lambda *_: FALLEN)
    monkeypatch.setattr(checking, "create_markdown_artifact", lambda **_: None)
    monkeypatch.setattr(registry, "open_registry", lambda: Registry(steps))
    monkeypatch.setattr(checking, "note_check", checking.note_check.fn)
    monkeypatch.setattr(checking, "emit_event", lambda **event: steps.append(event["event"]))
    sending = SimpleNamespace(drain=lambda: steps.append("sent"))
    monkeypatch.setattr(EventsWorker, "instance", lambda: sending)
    return steps


def test_data_count_as_looked_at_only_after_the_fall_was_sent(done: list[str]):
    checking.recheck_champion.fn("m")

    assert done == ["tell.champion.fallen", "sent", "tell.recheck.data"]


def test_data_whose_fall_could_not_be_told_are_looked_at_again(
    done: list[str], monkeypatch: pytest.MonkeyPatch
):
    def fail(**_: object) -> None:
        raise ConnectionError("no server")

    monkeypatch.setattr(checking, "emit_event", fail)

    with pytest.raises(ConnectionError):
        checking.recheck_champion.fn("m")

    assert done == []
