"""The model registry: finding versions, comparing them, moving the alias of the champion.

The functions are called by the commands and, through tasks of their own, by the flows. `tracking`
says which modules import mlflow.
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import mlflow
import pandas as pd
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tasks.stores import SQLITE, tracking_uri, without_password
from tasks.tracking import connect
from tell_core.data.sources import resolve_source, source_identity
from tell_core.errors import InputError
from tell_core.promotion import Comparison, Rows, compare_paired, compare_unpaired, same_items
from tell_core.registered import (
    SERVING_FILE,
    RegisteredVersion,
    bare_prompts,
    evaluate_version,
    measured_alike,
    measured_as_today,
    primary_metric,
    read_items,
    resampling_of,
)
from tell_core.spec.identity import fingerprint
from tell_core.spec.model import SourceSpec
from tell_core.store import read_json, write_json

CHAMPION, CHALLENGER = "champion", "challenger"
BASE_MODEL = "the base model"
_RECHECKED_DATA = "tell.recheck.data"
_URI = re.compile(r"models:/(?P<name>[^/@]+)(/(?P<version>\d+)|@(?P<alias>[\w-]+))")
Outcome = Literal["promoted", "refused", "forced", "already champion"]


@dataclass(frozen=True)
class Decision:
    """What became of a promotion.

    Attributes:
        name: The registered model.
        version: Number of the version that was to become champion.
        outcome: promoted, refused, forced, or already champion (nothing was done).
        against: What it was compared with, in words.
        comparison: The comparison; None for one that is champion already.
        reason: Why it was forced, or None.
    """

    name: str
    version: str
    outcome: Outcome
    against: str
    comparison: Comparison | None
    reason: str | None = None

    def sentence(self) -> str:
        """The decision in words."""
        if self.comparison is None:
            return f"{self.name} version {self.version} is champion already"
        compared = self.comparison.sentence(f"version {self.version}", self.against)
        what = {
            "promoted": "champion now: the whole interval lies above 0",
            "refused": "not promoted: the interval does not lie above 0",
            "forced": f"champion now by force ({self.reason})",
        }[self.outcome]
        return f"{self.name} {compared}; {what}"

    def as_json(self) -> dict[str, Any]:
        """All of it, for a file."""
        return {
            "model": self.name,
            "version": self.version,
            "outcome": self.outcome,
            "against": self.against,
            "reason": self.reason,
            "decided": datetime.now(UTC).isoformat(timespec="seconds"),
            "comparison": self.comparison.as_json() if self.comparison else None,
        }


def open_registry(store: str | None = None) -> MlflowClient:
    """The registry of a store: an MLflow server, or the SQLite file that runs leave.

    Args:
        store: Address of the server or path of the file; MLFLOW_TRACKING_URI, or
            ``runs/mlflow.db``, by default.

    Raises:
        InputError: There is none.
    """
    runs = Path("runs") / "registry"
    uri = tracking_uri(runs) if store is None else _store_uri(store)
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():
        raise InputError(
            f"there is no registry at {uri.removeprefix(SQLITE)}: give --store, the address of an"
            " MLflow server or the mlflow.db beside a run directory, or set MLFLOW_TRACKING_URI"
        )
    return connect(runs, uri)


def find_version(client: MlflowClient, uri: str) -> ModelVersion:
    """The version that ``models:/NAME/NUMBER`` or ``models:/NAME@ALIAS`` means.

    Raises:
        InputError: It is no such URI, or there is no such version.
    """
    match = _URI.fullmatch(uri)
    if not match:
        raise InputError(
            f"{uri!r} names no version: write models:/NAME/NUMBER or models:/NAME@ALIAS; there"
            f" are {_known_models(client)}"
        )
    name, number, alias = match["name"], match["version"], match["alias"]
    try:
        if number:
            return client.get_model_version(name, number)
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        raise InputError(
            f"there is no {uri} in {without_password(mlflow.get_tracking_uri())}; there are"
            f" {_known_models(client)}"
        ) from error


def champion_of(client: MlflowClient, name: str) -> ModelVersion | None:
    """The champion of a registered model, or None."""
    number = client.get_registered_model(name).aliases.get(CHAMPION)
    return client.get_model_version(name, str(number)) if number else None


@contextmanager
def fetched(version: ModelVersion) -> Iterator[RegisteredVersion]:
    """The files of a version while the block runs.

    Raises:
        InputError: They are not in the store, or are none of ours.
    """
    uri = f"models:/{version.name}/{version.version}"
    with tempfile.TemporaryDirectory(prefix="tell-version-") as place:
        try:
            directory = Path(mlflow.artifacts.download_artifacts(uri, dst_path=place))
        except (MlflowException, OSError) as error:
            raise InputError(
                f"the files of {uri} cannot be fetched: {error}. Has their directory been moved or"
                " deleted?"
            ) from error
        yield RegisteredVersion.at(
            f"{version.name} version {version.version}", directory / "artifacts"
        )


class Answerer(NamedTuple):
    """A version that is loaded.

    Attributes:
        bare: Takes the task's constant beginning off prompts where all of them have it; to be
            asked once with all prompts, so that no answer depends on how they are batched.
        answer: Answers to bare prompts.
        batch_size: How many it takes side by side.
    """

    bare: Callable[[Sequence[str]], list[str]]
    answer: Callable[[Sequence[str]], list[str]]
    batch_size: int


@contextmanager
def answering(version: ModelVersion, base_model: str | None = None) -> Iterator[Answerer]:
    """A version loaded to answer prompts while the block runs.

    Args:
        version: The version.
        base_model: Directory or hub id of its base model, if that is not where it was.

    Raises:
        InputError: Its files are not in the store.
        ModelError: The base model is missing, or is not the one that was trained on.
    """
    with fetched(version) as registered:
        config = {"base_model": base_model} if base_model else None
        directory = registered.version.parents[1]
        model = mlflow.pyfunc.load_model(str(directory), model_config=config)
        serving = read_json(registered.version / SERVING_FILE)

        def answer(prompts: Sequence[str]) -> list[str]:
            return list(model.predict(pd.DataFrame({"prompt": list(prompts)}))["response"])

        anchor = registered.anchor
        yield Answerer(
            lambda prompts: bare_prompts(prompts, anchor), answer, int(serving["batch_size"])
        )


def promote(
    client: MlflowClient, name: str, number: str, *, force_reason: str | None = None
) -> Decision:
    """Make a version champion if it beats the incumbent, or in any case with a reason.

    Without an incumbent it has to beat the base model. The comparison is kept as an artifact of
    the version's run and in the version's tags, whatever comes out.

    Args:
        client: The registry.
        name: The registered model.
        number: The version.
        force_reason: Why it is promoted in any case; None to let the comparison decide.

    Raises:
        InputError: There is no such version, the reason is blank, or nothing can be compared.
    """
    if force_reason is not None and not force_reason.strip():
        raise InputError("a forced promotion needs its reason: give --reason TEXT with --force")
    version = find_version(client, f"models:/{name}/{number}")
    incumbent = champion_of(client, name)
    if incumbent is not None and str(incumbent.version) == str(version.version):
        return Decision(name, number, "already champion", "itself", None)
    against, compared = compare(version, incumbent)
    outcome: Outcome = "refused"
    if compared.is_better:
        outcome = "promoted"
    elif force_reason is not None:
        outcome = "forced"
    reason = force_reason if outcome == "forced" else None
    decision = Decision(name, number, outcome, against, compared, reason)
    _keep(client, version, decision)
    if outcome != "refused":
        client.set_registered_model_alias(name, CHAMPION, version.version)
    return decision


def compare(version: ModelVersion, incumbent: ModelVersion | None) -> tuple[str, Comparison]:
    """A version against the incumbent, or against the base model, on the version's test items.

    Results that were kept are used where they are on the same items and were measured in the same
    way; else the incumbent is evaluated on these items, as the version was. So is the version
    itself where a metric of the user's own has changed since.

    Returns:
        What it was compared with, in words, and the comparison.
    """
    with fetched(version) as candidate, tempfile.TemporaryDirectory(prefix="tell-") as place:
        metric, resampling = primary_metric(candidate), resampling_of(candidate)
        rows = candidate.results()
        if incumbent is None:
            others = candidate.base_results()
            if others is None:
                others = evaluate_version(
                    candidate, candidate.items, Path(place) / "base", base_only=True
                )
                rows = _rows_of_today(candidate, rows, Path(place))
            return BASE_MODEL, compare_paired(metric, rows, others, resampling)
        with fetched(incumbent) as champion:
            others = champion.results()
            if not (same_items(rows, others) and measured_alike(candidate, champion)):
                others = evaluate_version(
                    champion, candidate.items, Path(place) / "incumbent", evaluate_as=candidate
                )
                rows = _rows_of_today(candidate, rows, Path(place))
        return f"version {incumbent.version}", compare_paired(metric, rows, others, resampling)


def _rows_of_today(candidate: RegisteredVersion, rows: Rows, place: Path) -> Rows:
    """Kept results of a version, or new ones if metrics of the user's own have changed since."""
    if measured_as_today(candidate):
        return rows
    return evaluate_version(candidate, candidate.items, place / "candidate")


@dataclass(frozen=True)
class Recheck:
    """A champion on the data of today.

    Attributes:
        name: The registered model.
        version: Its champion.
        data: Digest of the data.
        is_new: Whether these data had not been looked at before.
        comparison: Its score on them against the one it was registered with; None when they had.
    """

    name: str
    version: str
    data: str
    is_new: bool
    comparison: Comparison | None

    @property
    def has_fallen(self) -> bool:
        """Whether the whole interval of the change lies below 0."""
        return self.comparison is not None and self.comparison.is_worse

    def sentence(self) -> str:
        """The finding in words."""
        champion = f"{self.name} version {self.version}"
        if self.comparison is None:
            return f"{champion}: these data ({self.data[:12]}) were looked at before"
        compared = self.comparison.sentence(f"{champion} today", "when it was registered")
        return f"{compared}; {'it has fallen' if self.has_fallen else 'it has not fallen'}"


def recheck(
    client: MlflowClient, name: str, data: SourceSpec | None = None, *, again: bool = False
) -> Recheck:
    """Evaluate the champion on fresh data and compare with the score it was registered with.

    Until `note_recheck` is called with the finding, the same data are looked at again.

    Args:
        client: The registry.
        name: The registered model.
        data: The data; by default whatever lies today where its test items came from.
        again: Also when these data were looked at before.

    Raises:
        InputError: There is no champion.
        DataError: The data cannot be read.
    """
    version = champion_of(client, name)
    if version is None:
        raise InputError(f"{name} has no champion to check: `tell promote {name} VERSION` first")
    with fetched(version) as champion, tempfile.TemporaryDirectory(prefix="tell-") as place:
        source = resolve_source(data or champion.spec().task.test, "task_test", "data")
        digest = fingerprint(source_identity(source))
        if version.tags.get(_RECHECKED_DATA) == digest and not again:
            return Recheck(name, str(version.version), digest, False, None)
        items = Path(place) / "items.parquet"
        read_items(source, champion.anchor, items)
        rows = evaluate_version(champion, items, Path(place) / "evaluated")
        before, metric = champion.results(), primary_metric(champion)
        how = compare_paired if same_items(rows, before) else compare_unpaired
        found = how(metric, rows, before, resampling_of(champion))
    checked = Recheck(name, str(version.version), digest, True, found)
    _keep_recheck(client, version, checked)
    return checked


def note_recheck(client: MlflowClient, found: Recheck) -> None:
    """Remember that these data were looked at: the last step, after all that follows from it.

    A check-up that is stopped before is made again, so that no fall stays untold.
    """
    client.set_model_version_tag(found.name, found.version, _RECHECKED_DATA, found.data)


def _keep(client: MlflowClient, version: ModelVersion, decision: Decision) -> None:
    """The comparison as a file of the version's run and as tags of the version."""
    compared = decision.comparison
    assert compared is not None, "there is a comparison to keep"
    against = decision.against.replace(" ", "-")
    file = f"{version.name}-version-{version.version}-against-{against}.json"
    _log_file(client, version, file, "promotions", decision.as_json())
    _tag(
        client,
        version,
        {
            "tell.promotion": decision.outcome,
            "tell.promotion.against": decision.against,
            "tell.promotion.metric": compared.metric,
            "tell.promotion.difference": f"{compared.difference:.6g}",
            "tell.promotion.interval": json.dumps([compared.low, compared.high]),
            "tell.promotion.confidence": f"{compared.confidence:g}",
            "tell.promotion.items": str(compared.num_items),
            "tell.promotion.file": f"promotions/{file}",
            "tell.promotion.reason": decision.reason or "",
        },
    )


def _keep_recheck(client: MlflowClient, version: ModelVersion, checked: Recheck) -> None:
    compared = checked.comparison
    assert compared is not None, "there is a comparison to keep"
    moment = datetime.now(UTC).isoformat(timespec="seconds")
    record: dict[str, Any] = {
        "model": checked.name,
        "version": checked.version,
        "data": checked.data,
    }
    record |= {"checked": moment, "has_fallen": checked.has_fallen, **compared.as_json()}
    file = f"{version.name}-version-{version.version}-{checked.data[:12]}.json"
    _log_file(client, version, file, "rechecks", record)
    _tag(
        client,
        version,
        {
            "tell.recheck": "fallen" if checked.has_fallen else "held",
            "tell.recheck.score": f"{compared.score:.6g}",
            "tell.recheck.interval": json.dumps([compared.low, compared.high]),
            "tell.recheck.checked": moment,
        },
    )


def _log_file(
    client: MlflowClient, version: ModelVersion, file: str, folder: str, content: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory(prefix="tell-") as place:
        path = Path(place) / file
        write_json(path, content)
        client.log_artifact(version.run_id, str(path), folder)


def _tag(client: MlflowClient, version: ModelVersion, tags: dict[str, str]) -> None:
    for key, value in tags.items():
        client.set_model_version_tag(version.name, version.version, key, value)


def _known_models(client: MlflowClient) -> str:
    names = [model.name for model in client.search_registered_models(max_results=20)]
    return ", ".join(names) or "none"


def _store_uri(store: str) -> str:
    if "://" in store:
        return store
    return f"{SQLITE}{Path(store).absolute()}"
