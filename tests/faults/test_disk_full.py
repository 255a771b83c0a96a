"""A disk that is full: said with the mend, nothing lost, and with space the same bits.

A limit on the size of files stands in for the full disk. It needs no disk of its own and no
rights, and strikes where a full disk does: in the middle of a file.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.whole_run import differences, outputs, run_whole

# Runs the experiment with files of at most so many bytes; prints our own error.
LIMITED = """
import resource, signal, sys
from pathlib import Path
from tell_core.errors import StoreError
from tests.faults.whole_run import run_whole

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), -1))
try:
    run_whole(Path(sys.argv[1]), Path(sys.argv[2]))
except StoreError as error:
    sys.exit(str(error))
"""


def largest(root: Path, pattern: str) -> int:
    return max(path.stat().st_size for path in root.glob(pattern) if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("struck", "limit"),
    [
        ("curate", lambda root: largest(root, "stages/curate-*/*") // 2),
        # A checkpoint holds the weights and two moments of each, so the model itself would fit.
        ("train", lambda root: 2 * largest(root, "stages/train-*/model/*.safetensors")),
    ],
)
def test_a_full_disk_loses_nothing_and_is_told_with_the_mend(
    struck: str, limit: Callable[[Path], int], drill_spec: Path, unbroken: Path, tmp_path: Path
):
    root = tmp_path / "tiny"
    arguments = [str(drill_spec), str(root), str(limit(unbroken))]
    command = [sys.executable, "-c", LIMITED, *arguments]

    stopped = subprocess.run(command, capture_output=True, text=True, check=False)
    sealed = {path.parent.name for path in root.glob("stages/*/_SUCCESS")}
    run_whole(drill_spec, root)

    assert stopped.returncode == 1, stopped.stderr
    assert "File too large" in stopped.stderr
    assert "free some space" in stopped.stderr.replace("\n", " ")
    assert "Traceback" not in stopped.stderr
    assert not any(name.startswith(f"{struck}-") for name in sealed if "partial" not in name)
    assert differences(outputs(root), outputs(unbroken)) == []
