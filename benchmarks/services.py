"""What `tell up` takes: seconds until all answers, memory and CPU time while nothing is asked.

    python benchmarks/services.py --minutes 5 --starts 3

Starts everything in a directory of its own on free ports: first without databases (cold), then with
those of before (warm). Memory is the proportional set size, which counts a page that processes
share once. CPU time is told beside the wall's, as the machine may be busy.
"""

import argparse
import json
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from flows import services


def free_ports() -> tuple[int, int]:
    """Two ports that nobody uses."""
    with socket.socket() as first, socket.socket() as second:
        for probe in (first, second):
            probe.bind(("127.0.0.1", 0))
        return int(first.getsockname()[1]), int(second.getsockname()[1])


def family(one: services.Running) -> list[psutil.Process]:
    """A service's processes."""
    process = one.process
    return [process, *process.children(recursive=True)] if process else []


def cpu_seconds(one: services.Running) -> float:
    """CPU time of a service so far, its ended children included."""
    total = 0.0
    for process in family(one):
        with suppress(psutil.Error):
            total += sum(process.cpu_times()[:4])
    return total


def memory_megabytes(one: services.Running) -> float:
    """Proportional set size of a service."""
    total = 0
    for process in family(one):
        with suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total / 1e6


def start(home: Path) -> tuple[list[services.Running], dict[str, float]]:
    """Bring everything up; returns it with what that took, in seconds."""
    began = time.monotonic()
    running = services.up(home, *free_ports(), lambda _line: None)
    taken = {"wall_seconds": time.monotonic() - began}
    return running, taken | {"cpu_seconds": sum(map(cpu_seconds, running))}


def idle(running: Sequence[services.Running], minutes: float) -> list[dict[str, Any]]:
    """A row per service after so many minutes in which nothing is asked of it."""
    before = {one.name: cpu_seconds(one) for one in running}
    began = time.monotonic()
    time.sleep(60 * minutes)
    wall = time.monotonic() - began
    return [
        {
            "service": one.name,
            "processes": len(family(one)),
            "megabytes": round(memory_megabytes(one)),
            "percent_of_a_core": round(100 * (cpu_seconds(one) - before[one.name]) / wall, 2),
        }
        for one in running
    ]


def main() -> None:
    """Print what was measured as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="idle time that is measured")
    parser.add_argument("--starts", type=int, default=3, help="cold and warm starts, each")
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    rows: list[dict[str, Any]] = []
    for number in range(options.starts):
        with tempfile.TemporaryDirectory() as place:
            for kind in found:
                try:
                    running, taken = start(Path(place))
                    found[kind].append(taken)
                    if number == 0 and kind == "warm":
                        rows = idle(running, options.minutes)
                finally:
                    services.down(Path(place))
    medians = {
        kind: {name: statistics.median(one[name] for one in starts) for name in starts[0]}
        for kind, starts in found.items()
    }
    print(json.dumps({"idle": rows, "starts": found, "medians": medians}, indent=1))


if __name__ == "__main__":
    main()
