"""Files that survive kill -9: replaced whole, rows appended, chained where they are evidence; and locks."""

from __future__ import annotations

import fcntl
import hashlib
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

CHAIN: Final = "chain"
_LOCK_POLL_S: Final = 0.02
_BLOCK: Final = 16384  # most lines fit in one read of this


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
    """Wait for, then hold, an exclusive lock.

    Raises:
        InfrastructureError: it is still held after `timeout_s`; names the holder's process id.
    """
    # flock, not a file that exists: the kernel frees it when its process dies, so a kill never leaves it behind.
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
    # A name of its own for each writer: two at once must not write into one temporary file.
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
    """Flush a directory's entries."""
    # fsync of a file keeps its bytes; the entry that a rename or a new file made is kept only by this.
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_row(path: Path, row: Mapping[str, Any], *, is_shared: bool = False) -> None:
    """Append one JSON line; a kill after the call does not lose it, a power cut may."""
    line = json.dumps(row, allow_nan=False).encode() + b"\n"
    with disk_errors(path), open_rows(path, is_shared=is_shared) as file:
        write_all(file, line)


def open_rows(path: Path, *, is_shared: bool = False) -> io.FileIO:
    """Open a file of JSON lines to append to; unless it is shared, a line torn by a kill is cut off first."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = io.FileIO(path, "a+b")
        if not is_shared:  # a torn line may be another process's, half written
            file.truncate(last_line(file)[0])
        return file


def write_all(file: io.FileIO, data: bytes) -> None:
    """Write all bytes, in one call to the system unless the disk takes less."""
    # FileIO has no buffer: what would be flushed later could be lost, or land between another writer's bytes.
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return all complete JSON lines; a torn last line is not a line.

    Raises:
        TamperedError: a line before it is not JSON.
    """
    try:
        return [json.loads(line) for line in complete_lines(path)]
    except ValueError as error:
        raise TamperedError(f"{path} holds a line that is not JSON ({error}); restore it from a copy") from error


def shared_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file that several processes append to; torn lines are skipped."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:  # torn by a kill; whoever appended next went on behind it
                continue
            yield row


def complete_lines(path: Path) -> list[bytes]:
    """Return the lines of a file up to its last newline; none when there is no file."""
    with disk_errors(path):
        data = path.read_bytes() if path.exists() else b""
    return data[: _end_of_last_line(data)].splitlines()


def last_line(file: IO[bytes] | io.FileIO) -> tuple[int, bytes]:
    """Return the offset just after the last newline, and the line that ends there."""
    # Read from the end: appending to a log of months costs what its last line costs.
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
    return data.rfind(b"\n") + 1


class ChainedLog:
    """A file of JSON lines that are evidence, with one writer at a time; it is created with the first row.

    Each row carries the hash of itself and of the chain before it, so one that was changed, removed or moved fits no
    longer. A chain cannot see that its end was cut off; its head, kept elsewhere, can.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> str:
        """Append and sync one row, and return its chain; a line torn by a kill is cut off first."""
        if CHAIN in row:
            raise ValueError(f"a row's own field must not be called {CHAIN!r}: {sorted(row)}")
        body = json.loads(json.dumps(row, allow_nan=False))
        with disk_errors(self.path), open_rows(self.path) as file:
            # Only the last line is judged here; who reads the whole file judges the rest.
            end, line = last_line(file)
            before = str(_parse_row(line, self.path, "the last line").get(CHAIN, "")) if line else ""
            chain = chain_link(before, body)
            try:
                write_all(file, json.dumps({**body, CHAIN: chain}).encode() + b"\n")
                os.fsync(file.fileno())
            except OSError:
                # Else the next writer would chain to a row whose own writer was told that it failed.
                file.truncate(end)
                raise
            if not end:
                sync_directory(self.path.parent)
        return chain

    def rows(self) -> list[dict[str, Any]]:
        """Return all complete rows as they were given; raises as `read` does."""
        return [row for row, _ in self.read()]

    def chains(self) -> list[str]:
        """Return the chain of every complete line, "" for one of an older version; raises as `read` does."""
        return [chain for _, chain in self.read()]

    def read(self) -> list[tuple[dict[str, Any], str]]:
        """Return all complete rows, each with its chain; a torn last line is not a line.

        Raises:
            TamperedError: a chained line was changed, removed or moved, or one without a chain stands behind it.
        """
        rows: list[tuple[dict[str, Any], str]] = []
        before = ""
        for number, line in enumerate(complete_lines(self.path), start=1):
            row = _parse_row(line, self.path, f"line {number}")
            chain = row.pop(CHAIN, "")
            # Older versions wrote no chain: such lines are accepted at the start, never behind one that has it.
            if (before or chain != "") and chain != chain_link(before, row):
                remedy = "this line, or one before it, was changed, removed or moved; restore the file from a copy"
                raise TamperedError(f"{self.path}, line {number}: its chain does not fit; {remedy}")
            rows.append((row, chain))
            before = chain
        return rows


def chain_link(before: str, body: Mapping[str, Any]) -> str:
    """Return the hash of a row without its chain, and of the chain before it."""
    # Unlike `canonical_json` this takes NaN and lone surrogates: a line that was tampered with is judged, not a crash.
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256((before + text).encode("utf-8", "surrogatepass")).hexdigest()


def _parse_row(line: bytes, path: Path, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TamperedError(f"{path}, {place}: is not JSON ({error}); restore the file from a copy") from error
    if not isinstance(row, dict):
        raise TamperedError(f"{path}, {place}: is no JSON object; restore the file from a copy")
    return row
