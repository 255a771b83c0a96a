"""What orchestration and tracking cost: `tell run` against the bare stages in one process.

Both do the same cells of the demo on one lane (one CPU): the first through Prefect and MLflow, the
second by calling `tell_core.pipeline` directly. Pairs are run in turn and medians are compared.
Start-up (server, imports) is left out of `tell run` by taking the flow run's own time.

    python benchmarks/orchestration_overhead.py --world runs/demo/stages/world-... --pairs 3
"""

import argparse
import json
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SLICE = ["arms=[base, sft, tell]", "seeds=[0]", "training.learning_rate=0.003"]


def main() -> None:
    """Run the pairs and print medians as JSON."""
    arguments = _parse()
    pairs = [_pair(arguments.world.absolute()) for _ in range(arguments.pairs)]
    bare, run = (statistics.median(pair[name] for pair in pairs) for name in ("bare", "run"))
    stages = pairs[0]["num_stages"]
    training = statistics.median(pair["training"] for pair in pairs)
    tracking = statistics.median(pair["tracking"] for pair in pairs)
    print(
        json.dumps(
            {
                "pairs": pairs,
                "median_bare_seconds": bare,
                "median_run_seconds": run,
                "ratio": run / bare,
                "overhead_seconds_per_stage": (run - bare) / stages,
                "tracking_seconds": tracking,
                "tracking_share_of_training": tracking / training,
            },
            indent=1,
        )
    )


def _pair(world: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        bare = _run([sys.executable, __file__, "--world", str(world), "--bare", str(out / "bare")])
        run = [sys.executable, "-m", "flows.cli", "run", "configs/demo.yaml"]
        _run([*run, "--out", str(out / "runs" / "demo"), *_settings(world)])
        record = json.loads(bare.splitlines()[-1])
        return record | _times(out / "runs" / "demo" / "prefect" / "prefect.db")


def _times(database: Path) -> dict[str, float]:
    """Seconds of the experiment's flow run and of its tracking tasks, from Prefect's records."""
    seconds = "sum((julianday(end_time) - julianday(start_time)) * 86400)"
    with sqlite3.connect(database) as connection:
        flow = connection.execute(
            f"select {seconds} from flow_run where parent_task_run_id is null"
        ).fetchone()[0]
        tracking = connection.execute(
            f"select {seconds} from task_run where name like 'track %' or name like 'register%'"
        ).fetchone()[0]
    return {"run": flow, "tracking": tracking}


def _bare(world: Path, root: Path) -> None:
    from tell_core.analysis.summary import analyse_run
    from tell_core.pipeline import chosen_settings, curate_stage, run_cell, tune
    from tell_core.report.page import write_report
    from tell_core.results import open_run, write_results
    from tell_core.spec.cells import plan_cells
    from tell_core.spec.loading import load_spec
    from tell_core.store import read_json

    spec = load_spec(Path("configs/demo.yaml"), _settings(world)[1::2])
    open_run(spec, root)
    start = time.perf_counter()
    curated = curate_stage(spec, root)
    tuning = tune(spec, curated)
    outcomes = [
        run_cell(spec, cell, curated, chosen_settings(spec, tuning, cell.arm))
        for cell in plan_cells(spec)
    ]
    write_results(spec, root, curated, outcomes, tuning)
    analyse_run([outcome.record() for outcome in outcomes], spec, root)
    write_report(root)
    seconds = time.perf_counter() - start
    trained = [outcome.trained for outcome in outcomes if outcome.trained]
    training = sum(read_json(stage.path / "summary.json")["train_seconds"] for stage in trained)
    num_stages = 3 + 2 * len(outcomes) + len(trained)
    print(json.dumps({"bare": seconds, "training": training, "num_stages": num_stages}))


def _settings(world: Path) -> list[str]:
    settings = [f"world={world}", *SLICE]
    return [word for setting in settings for word in ("--set", setting)]


def _run(command: list[str]) -> str:
    """On one CPU, so that `tell run` has one lane as the bare process has one."""
    pinned = ["taskset", "-c", "0", *command] if shutil.which("taskset") else command
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PREFECT_API_URL", None)
    environment.pop("MLFLOW_TRACKING_URI", None)
    done = subprocess.run(pinned, env=environment, check=True, capture_output=True, text=True)
    return done.stdout


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=Path, required=True, help="a demo's stage world-...")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        _bare(arguments.world, arguments.bare)
        sys.exit()
    return arguments


if __name__ == "__main__":
    main()
