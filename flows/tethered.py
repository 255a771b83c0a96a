"""Run a command that ends with another process: ``python -m flows.tethered PID COMMAND...``.

A server started for a run must not outlive it, also when the run is killed and cannot clean up.
"""

import os
import signal
import subprocess
import sys
import threading
import time

_LOOK_EVERY_SECONDS = 1.0


def main() -> int:
    """Start the command in this process group; end the group when PID is gone."""
    owner, command = int(sys.argv[1]), sys.argv[2:]
    threading.Thread(target=_watch, args=(owner,), daemon=True).start()
    return subprocess.call(command)


def _watch(owner: int) -> None:
    while os.getppid() == owner:
        time.sleep(_LOOK_EVERY_SECONDS)
    os.killpg(0, signal.SIGTERM)
    time.sleep(5.0)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
