"""``python -m tell_core.bundles run BUNDLE…``: train and measure bundles on this machine.

Works from a plain checkout of the project, with torch, transformers, peft, safetensors and numpy.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tell_core.bundles.layout import find_bundles, read_bundle, read_result, unpack
from tell_core.bundles.running import run_bundle
from tell_core.errors import InputError, TellError

_LINE_EVERY_SECONDS = 15.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or check bundles; returns the exit code."""
    given = _parser().parse_args(arguments)
    _set_defaults()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if given.command == "check":
            return check_all(given.bundles)
        return run_all(given.bundles, given.model, given.device, given.threads, given.share)
    except TellError as error:
        print(f"tell: {error}", file=sys.stderr)
        return error.exit_code


def run_all(
    paths: Sequence[Path],
    model: Path | None,
    device: str | None,
    threads: int | None,
    share: str | None,
) -> int:
    """Run bundles one after another, the base model loaded once; one that fails stops no other.

    Args:
        paths: Bundles, .tar files of them (unpacked beside), or directories that hold them.
        model: Directory of the base model.
        device: auto, cpu or cuda.
        threads: CPU threads.
        share: ``I/N``: only every N-th bundle, beginning with number I, from 0.

    Returns:
        0, or the exit code of the first that failed.

    Raises:
        BundleError: A path holds no bundle.
        PreemptedError: SIGTERM came; the others are left.
    """
    from tell_core.training.trainer import PreemptedError

    chosen = share_of(find_bundles(paths), share)
    code = 0
    for number, path in enumerate(chosen, start=1):
        started = time.monotonic()
        try:
            directory = path if path.is_dir() else unpack(path, path.parent)
            shown = Shown(f"[{number}/{len(chosen)}] {directory.name}")
            result = run_bundle(
                directory, model=model, device=device, threads=threads, on_progress=shown
            )
        except PreemptedError:
            raise
        except TellError as error:
            print(f"tell: {path.name}: {error}", file=sys.stderr)
            code = code or error.exit_code
            continue
        seconds = time.monotonic() - started
        print(f"{shown.label}: {result['outcome']}, {seconds:.1f} s", flush=True)
    return code


def share_of(bundles: Sequence[Path], share: str | None) -> list[Path]:
    """The bundles of one of N workers, by ``I/N`` with I from 0 to N - 1.

    Raises:
        InputError: ``share`` is not written so.
    """
    if share is None:
        return list(bundles)
    index, slash, count = share.partition("/")
    is_fraction = slash and index.isdecimal() and count.isdecimal()
    if not is_fraction or int(index) >= int(count):
        raise InputError(f"--share {share!r}: write it as I/N with I from 0 to N - 1, such as 0/8")
    return list(bundles[int(index) :: int(count)])


def check_all(paths: Sequence[Path]) -> int:
    """Verify every digest of bundles and of what was made of them; 0, or 2 for a damaged one."""
    code = 0
    for path in find_bundles(paths):
        if not path.is_dir():
            print(f"{path.name}: packed; unpack it to check it")
            continue
        try:
            result = read_result(path, read_bundle(path))
        except TellError as error:
            print(f"tell: {error}", file=sys.stderr)
            code = error.exit_code
            continue
        print(f"{path.name}: whole, {result['outcome'] if result else 'not run yet'}")
    return code


class Shown:
    """Progress as lines on stderr, at most one every 15 seconds."""

    def __init__(self, label: str) -> None:
        self.label = label
        self._next = time.monotonic() + _LINE_EVERY_SECONDS

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Say that ``done`` of ``total`` units of ``phase`` are finished."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _LINE_EVERY_SECONDS
            print(f"{self.label}: {phase} {done}/{total}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tell_core.bundles", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and measure; goes on where it was interrupted")
    check = commands.add_parser("check", help="verify every digest")
    for command in (run, check):
        command.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    run.add_argument("--model", type=Path, help="directory of the base model")
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), help="as in the specification")
    run.add_argument("--threads", type=int, help="CPU threads; as in the specification")
    run.add_argument("--share", help="I/N: every N-th bundle, beginning with I, from 0")
    return parser


def _set_defaults() -> None:
    """Offline and quiet unless the user said otherwise, as the command line does it."""
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    sys.exit(main())
