from pathlib import Path

import httpx
import pytest
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES

from tasks.progress import TOTAL, Watch, announce, announce_total, listen
from tell_core.lanes import ProgressFile


def test_a_listener_hears_until_it_is_stopped():
    heard = []
    stop = listen(lambda *state: heard.append(state))

    announce("cell", "training", 1, 2)
    announce_total(9)
    stop()
    announce("cell", "training", 2, 2)

    assert heard == [("cell", "training", 1, 2), (TOTAL, "cells", 0, 9)]


def test_a_watch_passes_on_what_the_file_says(tmp_path: Path):
    file = ProgressFile(tmp_path / "p.json")
    heard = []
    stop = listen(lambda *state: heard.append(state))
    watch = Watch("tell", file)

    watch()
    file("training", 5, 10)
    watch()
    stop()

    assert heard == [("tell", "training", 5, 10)]


def test_the_time_left_is_reckoned_from_the_work_and_not_from_the_waiting(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr("tasks.progress.time.monotonic", lambda: now)
    file = ProgressFile(tmp_path / "p.json")
    watch = Watch("tell", file, num_tokens=5000)
    now = 2000.0
    file("training", 10, 100)
    watch()
    now = 2010.0
    file("training", 30, 100)

    said = watch.describe("training", 30, 100)

    assert said == "tell: training 30 of 100, 1,500 of 5,000 tokens, about 35 s left"


def test_a_phase_that_has_just_begun_promises_no_time(tmp_path: Path):
    watch = Watch("tell", ProgressFile(tmp_path / "p.json"))

    assert watch.describe("scoring", 0, 4) == "tell: scoring 0 of 4"


@pytest.mark.parametrize("error", [httpx.ConnectError("away"), RuntimeError("Failed to reach API")])
def test_a_page_that_is_away_costs_its_news_and_not_the_work(error, tmp_path, monkeypatch, caplog):
    tries = []

    def fail(**_what: object) -> None:
        tries.append(PREFECT_CLIENT_MAX_RETRIES.value())
        raise error

    monkeypatch.setattr("tasks.progress.create_progress_artifact", fail)
    monkeypatch.setattr("tasks.progress._ARTIFACT_AFTER_SECONDS", 0.0)
    monkeypatch.setattr("tasks.progress.TaskRunContext.get", lambda: True)
    file = ProgressFile(tmp_path / "p.json")
    watch = Watch("tell", file)
    file("training", 5, 10)

    watch()
    watch()
    watch.close("trained")

    assert tries == [0]
    assert "could not be shown" in caplog.text
