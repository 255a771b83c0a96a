from pathlib import Path
from unittest.mock import Mock

import pytest

from tasks.stores import tracking_uri, without_password
from tasks.tracking import _log_curated, connect, run_url
from tell_core.errors import InputError


def test_the_store_lies_beside_the_run_unless_a_server_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(tmp_path / "run") == f"sqlite:///{tmp_path / 'mlflow.db'}"

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_uri(tmp_path / "run") == "http://127.0.0.1:5000"


def test_a_page_is_only_named_for_a_server():
    record = {"experiment_id": "3", "parent": "abc"}

    assert run_url(record | {"uri": "sqlite:///x.db"}) is None
    assert run_url(record | {"uri": "http://host/"}) == "http://host/#/experiments/3/runs/abc"


def test_a_server_that_is_not_there_is_explained(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    with pytest.raises(InputError, match="--no-track"):
        connect(tmp_path)


def test_the_page_of_the_corpus_is_logged_and_its_tokens_are_not(tmp_path: Path):
    for name in ("corpus.html", "general.parquet", "general.tokens.arrow", "rejects.parquet"):
        (tmp_path / name).touch()
    client = Mock()

    _log_curated(client, "run", tmp_path)

    logged = [Path(call.args[1]).name for call in client.log_artifact.call_args_list]
    assert logged == ["corpus.html", "general.parquet", "rejects.parquet"]
    assert {call.args[2] for call in client.log_artifact.call_args_list} == {"curate"}


def test_a_password_is_never_shown():
    assert without_password("http://me:secret@host:5000/x") == "http://host:5000/x"
    assert without_password("sqlite:////tmp/mlflow.db") == "sqlite:////tmp/mlflow.db"
