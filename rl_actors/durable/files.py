"""Files that survive kill -9: replaced whole or not at all, rows appended, locks that die with their process."""

from __future__ import annotations

import fcntl
import io
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final

from rl_actors.contracts import InfrastructureError, TamperedError

_LOCK_POLL_S: Final = 0.02
_BLOCK: Final = 16384


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
    remedy: str = "let it finish or end it, then repeat the command",
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[None]:
    """Wait for, then hold, an exclusive lock; it dies with its process, so a kill never leaves it behind.

    Raises InfrastructureError, with the holder's process id, when it is still held after `timeout_s`: one stuck process
    must not stop all others.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    with file:
        deadline = clock() + timeout_s
        while not _is_locked(file, path):
            if clock() >= deadline:
                waited = f" (waited {timeout_s:g} s)" if timeout_s else ""
                raise InfrastructureError(f"{path}: in use by process {_holder(path)}{waited}; {remedy}")
            sleep(_LOCK_POLL_S)
        # The name is a courtesy: on a full disk a lock must still be had, for a roll back too.
        with suppress(OSError):
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"{os.getpid()}\n".encode())
        yield


def _holder(path: Path) -> str:
    with disk_errors(path):
        return path.read_text(encoding="utf-8", errors="replace").strip() or "unknown"


def _is_locked(file: IO[str], path: Path) -> bool:
    """Take the lock without waiting; False when someone else holds it."""
    with disk_errors(path):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def write_atomic(path: Path, data: bytes | str, *, is_synced: bool = True) -> None:
    """Replace a file so that a reader sees the old or the new content, never a part; a power cut too if `is_synced`."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_new(temporary, data.encode() if isinstance(data, str) else data, is_synced=is_synced)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        if is_synced:
            sync_directory(path.parent)


def _write_new(path: Path, data: bytes, *, is_synced: bool) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        if is_synced:
            os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value atomically, indented, keys in the order given."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries: a rename or a new file is durable only after this."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_row(path: Path, row: Mapping[str, Any], *, is_shared: bool = False) -> None:
    """Append one JSON line; a kill after the call does not lose it, a power cut may.

    A line torn by a kill is cut off first, but not where other processes append too: it may be one of theirs, half
    written.
    """
    line = json.dumps(row, allow_nan=False).encode() + b"\n"
    with disk_errors(path), open_rows(path, is_shared=is_shared) as file:
        write_all(file, line)


def open_rows(path: Path, *, is_shared: bool = False) -> io.FileIO:
    """Open a file of JSON lines to append to; unless it is shared, a line torn by a kill is cut off first."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = io.FileIO(path, "a+b")
        if not is_shared:
            file.truncate(last_line(file)[0])
        return file


def write_all(file: io.FileIO, data: bytes) -> None:
    """Write without a buffer that could be written later; one call to the system unless the disk takes less."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read all complete JSON lines; a torn last line is not a line. Raises TamperedError for a broken one before it."""
    try:
        return [json.loads(line) for line in complete_lines(path)]
    except ValueError as error:
        raise TamperedError(f"{path} holds a line that is not JSON ({error}); restore it from a copy") from error


def shared_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file that several processes append to; lines that a kill tore are skipped, wherever."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            yield row


def complete_lines(path: Path) -> list[bytes]:
    """Return the lines of a file up to its last newline; none when there is no file."""
    with disk_errors(path):
        data = path.read_bytes() if path.exists() else b""
    return data[: _end_of_last_line(data)].splitlines()


def last_line(file: IO[bytes] | io.FileIO) -> tuple[int, bytes]:
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
