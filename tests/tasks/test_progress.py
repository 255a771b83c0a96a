from pathlib import Path

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
