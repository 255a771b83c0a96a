"""The experiment flow: from raw data to a report and a registered model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.exceptions import TerminationSignal

from flows.cells import run_cells
from flows.last_words import end_with_worker, note_if_killed
from flows.runners import LOCAL, check_runner
from tasks.artifacts import show_curation, show_plan, show_results
from tasks.recording import recorded_meanwhile
from tasks.stages import analyse, curate, report, value_of
from tasks.stores import tracking_uri
from tasks.tracking import (
    close_experiment,
    end_experiment,
    explained_recording,
    open_experiment,
    run_url,
    track_cells,
)
from tell_core.analysis.adaptive import contest
from tell_core.plan import make_plan
from tell_core.results import (
    default_root,
    note_runs,
    open_run,
    seal_run,
    sole_owner,
    write_spec,
)
from tell_core.spec.loading import load_spec
from tell_core.spec.model import ExperimentSpec


@flow(name="experiment", flow_run_name="experiment · {spec_file.stem}")
def run_experiment(
    spec_file: Path,
    settings: Sequence[str] = (),
    out: Path | None = None,
    track: bool = True,
    adaptive: bool = False,
    runner: str = LOCAL,
) -> dict[str, Any]:
    """Curate once, tune, then mix, train and evaluate every cell; analyse, report, register.

    Args:
        spec_file: The experiment's YAML.
        settings: ``name=value`` for its variables and fields.
        out: Run directory; ``runs/<experiment name>`` by default.
        track: Whether to record the run in MLflow.
        adaptive: Run only the cells needed to find where leverage ends.
        runner: Where the cells are computed: local, dask or ray, or dask=ADDRESS, ray=ADDRESS.
    """
    end_with_worker()
    check_runner(runner)
    spec = load_spec(spec_file, settings)
    root = out or default_root(spec)
    open_run(spec, root)
    with sole_owner(root):
        write_spec(spec, root)
        return _run(spec, root, track, adaptive, runner)


def _run(
    spec: ExperimentSpec, root: Path, track: bool, is_adaptive: bool, runner: str
) -> dict[str, Any]:
    curated = value_of(curate(spec, root))
    show_curation(curated)
    show_plan(make_plan(contest(spec) if is_adaptive else spec, curated))
    record = open_experiment(spec, root, curated) if track else None
    uri = None
    with _ending_tracked(root if record else None):
        with recorded_meanwhile(root, record):
            outcomes, tuning, rounds = run_cells(
                spec, curated, is_adaptive=is_adaptive, runner=runner
            )
            leverage = analyse(spec, root, curated, outcomes, tuning, rounds if is_adaptive else ())
            report(root)
        if record:
            with explained_recording(root):
                run_ids = track_cells(root, record, outcomes)
                note_runs(root, run_ids)
                uri = close_experiment(spec, root, record, curated, outcomes)
    show_results(root, uri, run_url(record) if record else None)
    tracked_at = tracking_uri(root) if track else None
    seal_run(spec, root, curated, outcomes, tracked_at=tracked_at, is_adaptive=is_adaptive)
    return {"root": str(root), "model_uri": uri, "leverage": leverage}


@contextmanager
def _ending_tracked(root: Path | None) -> Iterator[None]:
    """Leave no MLflow run of this directory as running, however the block ends.

    Args:
        root: The run directory, or None when nothing is tracked.
    """
    if root is None:
        yield
        return
    with note_if_killed(root):
        try:
            yield
        except (KeyboardInterrupt, TerminationSignal):
            end_experiment(root, "KILLED")
            raise
        except BaseException:
            end_experiment(root, "FAILED")
            raise
