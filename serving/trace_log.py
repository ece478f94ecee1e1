"""What happened inside a sampled share of live runs, one JSON line each: exact token ids, tool calls and results.

For people who analyse failures, never for gates. A trace that cannot be written is counted and costs nobody an answer.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rl_actors.contracts import Completion, Routes, ToolCall, ToolResult, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveTrace:
    """One sampled run: what was asked, what was released, and every turn between the two."""

    run_id: str
    request: str
    response: str
    turns: tuple[Turn, ...]


class TraceLog:
    """An append-only file of sampled runs; several gateways may share it. `num_lost` counts failed writes."""

    def __init__(self, path: Path, fraction: float) -> None:
        """Touch nothing. `fraction` is the share of runs that is kept, chosen by run id: the same on every gateway."""
        self._path, self._fraction, self._lock = path, fraction, threading.Lock()
        self.num_lost = 0

    def wants(self, run_id: str) -> bool:
        """Whether this run belongs to the sample."""
        digest = hashlib.sha256(run_id.encode()).digest()
        return int.from_bytes(digest[:8], "big") < self._fraction * 2**64

    def write(self, trace: LiveTrace) -> None:
        """Append one trace as one line."""
        line = json.dumps(asdict(trace), separators=(",", ":")) + "\n"
        try:
            with self._lock, self._path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError:
            self.num_lost += 1


def read_traces(path: Path) -> Iterator[LiveTrace]:
    """Yield the traces of a file in order; a line that a kill cut off is skipped."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            yield LiveTrace(**{**row, "turns": tuple(map(_turn, row["turns"]))})


def _turn(row: dict[str, Any]) -> Turn:
    completion = {**row["completion"], **_tuples(row["completion"], ("token_ids", "logprobs")), "routes": Routes()}
    return Turn(
        kind=row["kind"],
        prompt_token_ids=tuple(row["prompt_token_ids"]),
        completion=Completion(**completion),
        tool_call=ToolCall(**row["tool_call"]) if row["tool_call"] else None,
        tool_result=ToolResult(**row["tool_result"]) if row["tool_result"] else None,
    )


def _tuples(row: dict[str, Any], names: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    return {name: tuple(row[name]) for name in names}
