"""Where the cells of a run are computed: in lanes of this machine, or on a Dask or Ray cluster.

Prefect is imported late: `check_runner` is called before its server's address is known.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from tell_core.errors import InputError
from tell_core.lanes import VISIBLE_GPUS, gpus_of_lanes, num_lanes, open_lanes
from tell_core.spec.model import TrainingSpec

if TYPE_CHECKING:
    from prefect.task_runners import TaskRunner

LOCAL, DASK, RAY = "local", "dask", "ray"
_PACKAGES = {DASK: "prefect_dask", RAY: "prefect_ray"}


def check_runner(runner: str) -> tuple[str, str | None]:
    """Split ``kind`` or ``kind=address``, before anything is started.

    Returns:
        local, dask or ray; and the address of a cluster that runs already, if one was given.

    Raises:
        InputError: There is no such runner, or what it needs is not installed.
    """
    kind, _, address = runner.partition("=")
    if kind not in (LOCAL, DASK, RAY) or (kind == LOCAL and address):
        raise InputError(
            f"--runner {runner!r}: there are local, dask and ray; dask=ADDRESS and ray=ADDRESS use"
            " a cluster that runs already"
        )
    package = _PACKAGES.get(kind)
    if package and importlib.util.find_spec(package) is None:
        raise InputError(
            f"--runner {kind} needs {package.replace('_', '-')}, which is not installed: install"
            f" the extra with `pip install 'tell[{kind}]'`, or use --runner local"
        )
    return kind, address or None


@contextmanager
def open_runner(runner: str, training: TrainingSpec) -> Iterator[TaskRunner[Any]]:
    """A task runner for the cells, one at a time on each worker; what it starts ends with it.

    On a cluster a cell is computed in the worker process itself; workers must see the run
    directory and the base model under the same paths.

    Args:
        runner: As of `check_runner`.
        training: Threads and device of a training.

    Raises:
        InputError: As of `check_runner`.
    """
    kind, address = check_runner(runner)
    with _OPENERS[kind](num_lanes(training), address, training) as opened:
        yield opened


@contextmanager
def _lanes(count: int, _: str | None, training: TrainingSpec) -> Iterator[TaskRunner[Any]]:
    from prefect.task_runners import ThreadPoolTaskRunner

    with open_lanes(count, gpus_of_lanes(training)):
        yield ThreadPoolTaskRunner(max_workers=count)


def _dask(
    count: int, address: str | None, training: TrainingSpec
) -> AbstractContextManager[TaskRunner[Any]]:
    from prefect_dask.task_runners import DaskTaskRunner

    if address:
        return nullcontext(DaskTaskRunner(address=address))
    cluster = {
        "n_workers": count,
        "threads_per_worker": 1,
        "processes": True,
        "dashboard_address": None,
        "host": "127.0.0.1",
        "env": {"OMP_NUM_THREADS": str(training.threads)},
    }
    if gpus := gpus_of_lanes(training):
        cluster["preload"] = _TAKE_GPUS.format(variable=VISIBLE_GPUS, gpus=gpus)
    return nullcontext(DaskTaskRunner(cluster_kwargs=cluster))


# What a worker of a local Dask cluster, named 0, 1, ..., runs when it starts.
_TAKE_GPUS = """import os
def dask_setup(worker):
    os.environ[{variable!r}] = {gpus!r}[int(worker.name)]
"""


@contextmanager
def _ray(count: int, address: str | None, training: TrainingSpec) -> Iterator[TaskRunner[Any]]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported
    from prefect_ray import RayTaskRunner
    from prefect_ray.context import remote_options

    cpus = training.threads * training.num_ranks
    local = {} if address else {"num_cpus": count * cpus, "include_dashboard": False}
    # A Ray task that asks for no GPU sees none, another those that Ray gives it.
    with remote_options(num_cpus=cpus, num_gpus=_gpus_per_training(training)):
        yield RayTaskRunner(address=address, init_kwargs=local | {"log_to_driver": False})


def _gpus_per_training(training: TrainingSpec) -> int:
    is_wanted = training.device == "cuda" or bool(gpus_of_lanes(training))
    return training.num_ranks if is_wanted else 0


_Opener = Callable[[int, str | None, TrainingSpec], "AbstractContextManager[TaskRunner[Any]]"]
_OPENERS: dict[str, _Opener] = {LOCAL: _lanes, DASK: _dask, RAY: _ray}
