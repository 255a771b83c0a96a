"""Where runs are recorded: the server a user named, or an SQLite file beside the run."""

import os
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

SQLITE = "sqlite:///"


def tracking_uri(root: Path) -> str:
    """The MLflow server named by MLFLOW_TRACKING_URI, or an SQLite file beside the run."""
    if named := os.environ.get("MLFLOW_TRACKING_URI"):
        return named
    return f"{SQLITE}{root.absolute().parent / 'mlflow.db'}"


def without_password(uri: str) -> str:
    """The address as it may be shown and stored."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
