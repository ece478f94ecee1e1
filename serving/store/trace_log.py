"""A sampled share of live requests from within, one JSON line each; never read by a gate."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rl_actors.contracts import InfrastructureError, Turn
from rl_actors.durable import append_row, decode, encode, shared_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveTrace:
    """One sampled request: the user's text, the released reply, and every turn between the two."""

    run_id: str
    request: str
    response: str
    turns: tuple[Turn, ...]


class TraceLog:
    """An append-only file of sampled requests; several gateways may share it. `num_lost` counts failed writes."""

    def __init__(self, path: Path, fraction: float) -> None:
        self._path, self._fraction, self._lock = path, fraction, threading.Lock()
        self.num_lost = 0

    def wants(self, run_id: str) -> bool:
        """Whether this request belongs to the sample."""
        # By its id alone, so that every gateway and every retry chooses the same.
        digest = hashlib.sha256(run_id.encode()).digest()
        return int.from_bytes(digest[:8], "big") < self._fraction * 2**64

    def write(self, trace: LiveTrace) -> None:
        """Append one trace as one line."""
        try:
            with self._lock:
                append_row(self._path, encode(trace), is_shared=True)
        # A full disk costs a trace, never an answer.
        except InfrastructureError:
            self.num_lost += 1


def read_traces(path: Path) -> Iterator[LiveTrace]:
    """Return the traces of a file in order; a line that a kill cut off is skipped."""
    return (decode(LiveTrace, row) for row in shared_rows(path))
