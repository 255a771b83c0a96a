"""What the commands do: settle the specification, bring a server, run the flow, say the answer.

Prefect reads its settings when it is imported, so what imports it is imported late, when the
server's address is known.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows.curation_progress import shown_progress
from flows.demo_files import demo_settings, demo_spec
from flows.local_server import prefect_server
from flows.runners import LOCAL, check_runner
from tasks.stores import SQLITE, tracking_uri
from tell_core.analysis.adaptive import contest
from tell_core.analysis.sentences import forecast_sentences
from tell_core.analysis.summary import FORECAST_FILE, verdict_sentence
from tell_core.demo import find_world
from tell_core.doctor import Check, Sample, check_environment, check_experiment
from tell_core.pipeline import CORPUS_PAGE, Stage, curate_stage, mix_stage
from tell_core.plan import make_plan, plan_rows, shortages
from tell_core.planner import Design, designs
from tell_core.results import default_root, is_finished, open_run, sole_owner, source_rows
from tell_core.spec.cells import plan_cells
from tell_core.spec.loading import load_spec
from tell_core.spec.model import ExperimentSpec
from tell_core.store import read_json


def launch_experiment(
    spec_file: Path,
    settings: Sequence[str],
    out: Path | None,
    *,
    is_tracked: bool,
    is_adaptive: bool,
    runner: str = LOCAL,
) -> dict[str, Any]:
    """Run an experiment, or find that it is finished; returns the answer and where things are."""
    check_runner(runner)
    spec, root = _open(spec_file, settings, out)
    if is_adaptive:
        contest(spec)  # says what is missing before a server is started
    tracked_at = tracking_uri(root) if is_tracked else None
    if not is_finished(spec, root, tracked_at=tracked_at, is_adaptive=is_adaptive):
        with _orchestrated(root) as begin:
            from flows.experiment import run_experiment

            begin()
            run_experiment(
                spec_file.absolute(),
                list(settings),
                root.absolute(),
                is_tracked,
                is_adaptive,
                runner,
            )
    return _outcome(root)


def launch_demo(out: Path, *, is_tracked: bool) -> dict[str, Any]:
    """Run the demo, or find that it is finished; returns the answer and where things are."""
    world = find_world(out)
    load_spec(demo_spec(), demo_settings(world or out))
    if world:
        spec, _ = _open(demo_spec(), demo_settings(world), out)
        if is_finished(spec, out, tracked_at=tracking_uri(out) if is_tracked else None):
            return _outcome(out)
    with _orchestrated(out) as begin:
        from flows.demo import run_demo

        begin()
        run_demo(out.absolute(), is_tracked)
    return _outcome(out)


def plan_experiment(
    spec_file: Path, settings: Sequence[str], out: Path | None, hours: float | None = None
) -> dict[str, Any]:
    """What an experiment will do; curation is kept and reused by the run.

    Args:
        spec_file: The experiment's YAML.
        settings: ``name=value`` for its variables and fields.
        out: Run directory; ``runs/<experiment name>`` by default.
        hours: Also say which part of it fits into so many hours.
    """
    spec, root = _open(spec_file, settings, out)
    with sole_owner(root):
        plan = make_plan(spec, _curated(spec, root))
    planned = {
        "experiment": spec.name,
        "num_cells": len(plan_cells(spec)),
        "rendered_tokens": plan.rendered_tokens,
        "training_seconds": plan.training_seconds,
        "evaluation_seconds": plan.evaluation_seconds,
        "wall_seconds": plan.wall_seconds,
        "num_lanes": plan.cost.num_lanes,
        "is_speed_measured": plan.cost.is_measured,
        "disk_bytes": plan.disk_bytes,
        "power": plan.power,
        "shortages": shortages(plan),
        "cells": plan_rows(plan),
    }
    if hours is None:
        return planned
    unit = spec.analysis.primary_metric if plan.noise else "seed sd"
    return planned | _fitting(designs(spec, plan), hours, unit)


def _fitting(parts: Sequence[Design], hours: float, unit: str) -> dict[str, Any]:
    """The parts of an experiment, and the largest that fits; half widths are in ``unit``."""
    fitting = next((part for part in parts if part.hours <= hours), None)
    return {
        "hours": hours,
        "designs": [
            {
                "hours": round(part.hours, 3),
                "cells": part.num_cells,
                "seeds": len(part.spec.seeds),
                f"half width, {unit}": part.half_width,
                "leaves out": part.left_out[-1] if part.left_out else "nothing",
                "fits": "<-" if part is fitting else "",
            }
            for part in parts
        ],
        "left_out": list(fitting.left_out) if fitting else None,
        "settings": list(fitting.settings) if fitting else None,
    }


def curate_experiment(spec_file: Path, settings: Sequence[str], out: Path | None) -> dict[str, Any]:
    """Curate; returns a row per source and where the examples are."""
    spec, root = _open(spec_file, settings, out)
    with sole_owner(root):
        curated = _curated(spec, root)
    return {
        "directory": str(curated.path),
        "profile": str(curated.path / CORPUS_PAGE),
        "sources": source_rows(curated.path),
    }


def mix_experiment(
    spec_file: Path, settings: Sequence[str], out: Path | None
) -> list[dict[str, Any]]:
    """Lay out every cell's mixture; returns a row per cell."""
    spec, root = _open(spec_file, settings, out)
    with sole_owner(root):
        curated = _curated(spec, root)
        mixtures = {cell: mix_stage(spec, cell, curated) for cell in plan_cells(spec)}
    return [
        {"cell": cell.label, **read_json(mixed.path / "ledger.json"), "directory": mixed.path.name}
        for cell, mixed in mixtures.items()
    ]


def examine(
    spec_file: Path | None, settings: Sequence[str], out: Path | None
) -> tuple[list[Check], list[Sample]]:
    """Check the machine and, with a specification, the invariants of its training."""
    if spec_file is None:
        return check_environment(out or Path("runs")), []
    spec, root = _open(spec_file, settings, out)
    with sole_owner(root):
        checks, samples = check_experiment(spec, root)
    return [*check_environment(root), *checks], samples


def _curated(spec: ExperimentSpec, root: Path) -> Stage:
    """The curated data, with progress on the console while they are made."""
    with shown_progress() as on_progress:
        return curate_stage(spec, root, on_progress)


def _open(
    spec_file: Path, settings: Sequence[str], out: Path | None
) -> tuple[ExperimentSpec, Path]:
    spec = load_spec(spec_file, settings)
    root = out or default_root(spec)
    open_run(spec, root)
    return spec, root


@contextmanager
def _orchestrated(root: Path) -> Iterator[Callable[[], None]]:
    """Bring a Prefect server up while the flow is imported; the yielded function waits for it."""
    with prefect_server(root / "prefect") as wait_until_ready:
        from flows.console import ConsoleProgress

        with ConsoleProgress():
            yield wait_until_ready


def _outcome(root: Path) -> dict[str, Any]:
    places = {"report": str(root / "report.html"), "results": str(root / "results.parquet")}
    if (root / "tracking.json").exists():
        record = read_json(root / "tracking.json")
        is_file = record["uri"].startswith(SQLITE)
        uri = record["uri"]
        places["mlflow"] = f"mlflow ui --backend-store-uri {uri}" if is_file else uri
        places["model"] = str(record.get("model_uri") or "none registered")
    if (root / "prefect").exists() and "PREFECT_API_URL" not in os.environ:
        places["prefect"] = f"PREFECT_HOME={root.absolute() / 'prefect'} prefect server start"
    leverage = read_json(root / "leverage.json")
    forecast = read_json(root / FORECAST_FILE)
    return {
        "answer": verdict_sentence(leverage),
        "forecast": forecast_sentences(forecast, leverage),
        "places": places,
    }
