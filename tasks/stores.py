"""Where runs are recorded: the server a user named, or an SQLite file beside the run."""

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

SQLITE = "sqlite:///"


def tracking_uri(root: Path) -> str:
    """The MLflow server named by MLFLOW_TRACKING_URI, or an SQLite file beside the run.

    A password in the address moves to where the client looks for it in the environment, so that no
    record, error message or log can hold it.
    """
    if named := os.environ.get("MLFLOW_TRACKING_URI"):
        return _with_password_apart(named)
    return f"{SQLITE}{root.absolute().parent / 'mlflow.db'}"


def _with_password_apart(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.password is None:
        return uri
    if parts.scheme in ("http", "https"):
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username or "")
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password)
        return without_password(uri)
    if parts.scheme.startswith("postgresql"):
        os.environ["PGPASSWORD"] = unquote(parts.password)
        place = parts.netloc.rpartition("@")[2]
        return urlunsplit(parts._replace(netloc=f"{parts.username}@{place}"))
    return uri


def without_password(uri: str) -> str:
    """The address as it may be shown and stored."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
