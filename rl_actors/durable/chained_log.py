"""Rows that are evidence: each carries the hash of itself and of the chain before it.

A line that was changed, removed or moved no longer fits. A chain cannot see that its end was cut off; its head, kept
elsewhere, can.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from rl_actors.contracts import TamperedError
from rl_actors.durable.files import complete_lines, disk_errors, last_line, open_rows, sync_directory, write_all

CHAIN: Final = "chain"


class ChainedLog:
    """A file of chained JSON lines with one writer at a time."""

    def __init__(self, path: Path) -> None:
        """Name the file; it is created with the first row."""
        self.path = path

    def append(self, row: Mapping[str, Any]) -> str:
        """Append and sync one row, and return its chain; a line torn by a kill is cut off first.

        Only the last line is read for that: what lies before it is judged by those who read the whole file. A row that
        could not be synced is taken back.
        """
        if CHAIN in row:
            raise ValueError(f"a row's own field must not be called {CHAIN!r}: {sorted(row)}")
        body = json.loads(json.dumps(row, allow_nan=False))
        with disk_errors(self.path), open_rows(self.path) as file:
            end, line = last_line(file)
            before = str(_parsed(line, self.path, "the last line").get(CHAIN, "")) if line else ""
            chain = chain_link(before, body)
            try:
                write_all(file, json.dumps({**body, CHAIN: chain}).encode() + b"\n")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
            if not end:
                sync_directory(self.path.parent)
        return chain

    def rows(self) -> list[dict[str, Any]]:
        """Return all complete rows as they were given. Raises as `read` does."""
        return [row for row, _ in self.read()]

    def chains(self) -> list[str]:
        """Return the chain of every complete line, "" for one of an older version. Raises as `read` does."""
        return [chain for _, chain in self.read()]

    def read(self) -> list[tuple[dict[str, Any], str]]:
        """Return all complete rows, each with its chain; a torn last line is not a line.

        Lines without a chain at the start are accepted: older versions wrote them.

        Raises:
            TamperedError: a chained line was changed, removed or moved, or one without a chain stands behind it.
        """
        rows: list[tuple[dict[str, Any], str]] = []
        before = ""
        for number, line in enumerate(complete_lines(self.path), start=1):
            row = _parsed(line, self.path, f"line {number}")
            chain = row.pop(CHAIN, "")
            if (before or chain != "") and chain != chain_link(before, row):
                remedy = "this line, or one before it, was changed, removed or moved; restore the file from a copy"
                raise TamperedError(f"{self.path}, line {number}: its chain does not fit; {remedy}")
            rows.append((row, chain))
            before = chain
        return rows


def chain_link(before: str, body: Mapping[str, Any]) -> str:
    """Return the hash of a row without its chain, and of the chain before it."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256((before + text).encode("utf-8", "surrogatepass")).hexdigest()


def _parsed(line: bytes, path: Path, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TamperedError(f"{path}, {place}: is not JSON ({error}); restore the file from a copy") from error
    if not isinstance(row, dict):
        raise TamperedError(f"{path}, {place}: is no JSON object; restore the file from a copy")
    return row
