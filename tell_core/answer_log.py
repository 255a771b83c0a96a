"""Answers on their way to a table: kept on disk batch by batch, so that a kill costs one batch.

The table of answers is written at the end, in one step and in any format. Until then every batch is
a line of a file beside it; the same question goes on from there.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from filelock import FileLock, Timeout

from tell_core.errors import StoreError
from tell_core.store import explain_disk_errors


class AnswerLog:
    """The answers so far, each batch on disk as soon as it is there.

    Attributes:
        answers: Those of whole batches, in the order of the prompts.
    """

    def __init__(self, file: TextIO, path: Path, answers: Sequence[str]) -> None:
        self._file = file
        self._path = path
        self.answers = list(answers)

    def add(self, batch: Sequence[str]) -> None:
        """Keep a batch of answers.

        Raises:
            StoreError: It cannot be written.
        """
        with explain_disk_errors(self._path):
            _write_line(self._file, list(batch))
        self.answers.extend(batch)


def log_path(out: Path) -> Path:
    """Where answers are kept that are to become the table ``out``."""
    return out.with_name(f".{out.name}.answers")


@contextmanager
def open_answers(out: Path, asked: str) -> Iterator[AnswerLog]:
    """The answers that an earlier attempt kept, and room for more; gone when the block ends well.

    Args:
        out: The table that they are to become.
        asked: What was asked of whom, as a digest; answers to anything else are thrown away.

    Raises:
        StoreError: Another process writes the same table, or the file cannot be written.
    """
    path = log_path(out)
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StoreError(
            f"another process is writing {out}: wait for it to end, or give another --output"
        ) from error
    try:
        with explain_disk_errors(path):
            batches, num_bytes = _read(path, asked)
            file = path.open("a", encoding="utf-8")
        with file:
            file.truncate(num_bytes)
            if not num_bytes:
                _write_line(file, asked)
            yield AnswerLog(file, path, [answer for batch in batches for answer in batch])
        path.unlink()
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _read(path: Path, asked: str) -> tuple[list[list[str]], int]:
    """Whole batches of answers to this question, and how many bytes of the file hold them.

    A batch that was being written when the process or the machine stopped does not count, nor does
    what follows it.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    if not lines or lines[0] != _line(asked):
        return [], 0
    batches, num_bytes = [], len(lines[0])
    for line in lines[1:]:
        try:
            batches.append(json.loads(line))
        except ValueError:
            break
        if not line.endswith(b"\n"):
            batches.pop()
            break
        num_bytes += len(line)
    return batches, num_bytes


def _line(value: str | list[str]) -> bytes:
    return f"{json.dumps(value)}\n".encode()


def _write_line(file: TextIO, value: str | list[str]) -> None:
    file.write(_line(value).decode())
    file.flush()
    os.fsync(file.fileno())
