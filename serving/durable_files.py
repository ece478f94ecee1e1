"""Files that survive kill -9: replaced whole or not at all, rows appended, locks that die with their process.

Rows that are evidence are chained: each carries the hash of itself and of the chain before it, so that a line that was
changed, removed or moved no longer fits. A chain cannot see that its end was cut off; its head, kept elsewhere, can.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from rl_actors.errors import InfrastructureError, TamperedError

_LOCK_POLL_S: Final = 0.02
_BLOCK: Final = 16384
CHAIN: Final = "chain"


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


def append_chained(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line as `append_durably` does, with the hash of the line and of the chain before it.

    Only the last line is read for that: what lies before it is judged by those who read the whole file.
    """
    if CHAIN in row:
        raise ValueError(f"a row's own field must not be called {CHAIN!r}: {sorted(row)}")
    body = json.loads(json.dumps(row, allow_nan=False))
    with disk_errors(path), open_rows(path) as file:
        line = _last_line(file)[1]
        before = str(_parsed(line, path, "the last line").get(CHAIN, "")) if line else ""
        file.write(json.dumps({**body, CHAIN: chain_link(before, body)}).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def open_rows(path: Path) -> IO[bytes]:
    """Open a file of JSON lines to append to; a line torn by a kill is cut off first."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
        file.truncate(_last_line(file)[0])
        return file


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read all complete JSON lines; a torn last line is not a line. Raises TamperedError for a broken one before it."""
    with disk_errors(path):
        data = path.read_bytes() if path.exists() else b""
    try:
        return [json.loads(line) for line in data[: _end_of_last_line(data)].splitlines()]
    except ValueError as error:
        raise TamperedError(f"{path} holds a line that is not JSON ({error}); restore it from a copy") from error


def read_chained(path: Path) -> list[dict[str, Any]]:
    """Read all complete lines that `append_chained` wrote, as they were given to it.

    Lines without a chain at the start are accepted: older versions wrote them.

    Raises:
        TamperedError: a chained line was changed, removed or moved, or one without a chain stands behind it.
    """
    return [row for row, _ in _chained_rows(path)]


def read_chains(path: Path) -> list[str]:
    """Return the chain of every complete line, "" for one of an older version. Raises as `read_chained` does."""
    return [chain for _, chain in _chained_rows(path)]


def _chained_rows(path: Path) -> list[tuple[dict[str, Any], str]]:
    with disk_errors(path):
        data = path.read_bytes() if path.exists() else b""
    rows: list[tuple[dict[str, Any], str]] = []
    before = ""
    for number, line in enumerate(data[: _end_of_last_line(data)].splitlines(), start=1):
        row = _parsed(line, path, f"line {number}")
        chain = row.pop(CHAIN, "")
        if (before or chain != "") and chain != chain_link(before, row):
            remedy = "this line, or one before it, was changed, removed or moved; restore the file from a copy"
            raise TamperedError(f"{path}, line {number}: its chain does not fit; {remedy}")
        rows.append((row, chain))
        before = chain
    return rows


def _parsed(line: bytes, path: Path, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TamperedError(f"{path}, {place}: is not JSON ({error}); restore the file from a copy") from error
    if not isinstance(row, dict):
        raise TamperedError(f"{path}, {place}: is no JSON object; restore the file from a copy")
    return row


def chain_link(before: str, body: Mapping[str, Any]) -> str:
    """Return the hash of a row without its chain, and of the chain before it; the stage journal has the same rule."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256((before + text).encode("utf-8", "surrogatepass")).hexdigest()


def _last_line(file: IO[bytes]) -> tuple[int, bytes]:
    """Return the offset just after the last newline, and the line that ends there; reads no more than it must."""
    size, block = file.seek(0, os.SEEK_END), _BLOCK
    while True:
        start = max(0, size - block)
        file.seek(start)
        data = file.read(size - start)
        end = _end_of_last_line(data)
        begin = _end_of_last_line(data[: max(end - 1, 0)])
        if begin or not start:
            return start + end, data[begin:end]
        block *= 2


def _end_of_last_line(data: bytes) -> int:
    """Offset just after the last newline."""
    return data.rfind(b"\n") + 1
