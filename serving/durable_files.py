"""Files that survive kill -9: replaced whole or not at all, rows appended, locks that die with their process."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from rl_actors.errors import InfrastructureError, TamperedError

_LOCK_POLL_S: Final = 0.02


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError on `path` into an InfrastructureError that names it and the remedy."""
    try:
        yield
    except OSError as error:
        raise InfrastructureError(f"{path}: {error}; free disk space or check its permissions") from error


@contextmanager
def file_lock(
    path: Path,
    *,
    timeout_s: float = 60.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[None]:
    """Wait for, then hold, an exclusive lock; it dies with its process, so a kill never leaves it behind.

    Raises InfrastructureError when it is still held after `timeout_s`: one stuck process must not stop all others.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    with file:
        deadline = clock() + timeout_s
        while not _is_locked(file, path):
            if clock() >= deadline:
                remedy = f"let that process finish or end it (`fuser {path}` shows its pid), then repeat the command"
                raise InfrastructureError(f"{path}: locked by another process for {timeout_s:g} s; {remedy}")
            sleep(_LOCK_POLL_S)
        yield


def _is_locked(file: IO[str], path: Path) -> bool:
    """Take the lock without waiting; False when someone else holds it."""
    with disk_errors(path):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def replace_durably(path: Path, text: str) -> None:
    """Replace a file so that a reader, or a restart after kill -9, sees the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def append_durably(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line and sync it; a line torn by a kill is cut off first."""
    with disk_errors(path), open_rows(path) as file:
        file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def open_rows(path: Path) -> IO[bytes]:
    """Open a file of JSON lines to append to; a line torn by a kill is cut off first."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
        file.truncate(_end_of_last_line(path.read_bytes()))
        return file


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read all complete JSON lines; a torn last line is not a line. Raises TamperedError for a broken one before it."""
    with disk_errors(path):
        data = path.read_bytes() if path.exists() else b""
    try:
        return [json.loads(line) for line in data[: _end_of_last_line(data)].splitlines()]
    except ValueError as error:
        raise TamperedError(f"{path} holds a line that is not JSON ({error}); restore it from a copy") from error


def _end_of_last_line(data: bytes) -> int:
    """Offset just after the last newline."""
    return data.rfind(b"\n") + 1
