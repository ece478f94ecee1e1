"""What users sent, written by their side as it happens: a driver that was killed is followed by one that knows it all.

One line when a ticket is sent and one when it ended, so that `requests` can be held against the ledger, which the other
side writes. A line reaches the file before the next act; kill -9 loses none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from rl_actors.contracts import Outcome, TamperedError, Task
from rl_actors.durable import append_row, decode, encode, read_rows

_SENT: Final = "sent"


@dataclass(frozen=True, slots=True, kw_only=True)
class TicketResult:
    """What became of one ticket. `failure` is empty when answered; `outcome` is None when not verified."""

    task_id: str
    run_id: str
    release_channel: str
    policy_version: str
    failure: str
    outcome: Outcome | None
    duration_ms: float


class TicketBook:
    """The tickets of one release: those that ended, those in flight when the last driver died, and the rest."""

    def __init__(self, path: Path) -> None:
        """Read what earlier drivers wrote; nothing is created before the first ticket.

        Raises:
            TamperedError: for a line that is neither a sent nor an ended ticket.
        """
        self._path = path
        self._ended: dict[str, TicketResult] = {}
        self._sent: set[str] = set()
        # Rows, not a state file: a kill in the middle of a line loses that line and no other.
        for row in read_rows(path):
            self._read(row)

    @property
    def ended(self) -> tuple[TicketResult, ...]:
        """Results of all tickets that ended, in order."""
        return tuple(self._ended.values())

    @property
    def num_in_flight(self) -> int:
        """Tickets that went out and did not end."""
        return len(self._sent - self._ended.keys())

    def waiting(self, tasks: Iterable[Task]) -> list[Task]:
        """Return the tickets still to be served, those in flight when the last driver died first."""
        # They may have run: asked again at once, the gateway still knows their keys.
        left = [task for task in tasks if task.task_id not in self._ended]
        return sorted(left, key=lambda task: task.task_id not in self._sent)

    def send(self, task_id: str) -> None:
        """Write that a ticket goes out; to be called before it does."""
        # Before: a kill in between leaves a ticket that may have run, never one that nobody knows of.
        self._sent.add(task_id)
        append_row(self._path, {_SENT: task_id})

    def end(self, result: TicketResult) -> None:
        """Write how a ticket ended."""
        self._ended[result.task_id] = result
        append_row(self._path, {"ended": encode(result)})

    def _read(self, row: dict[str, Any]) -> None:
        try:
            if _SENT in row:
                self._sent.add(str(row[_SENT]))
            else:
                result = decode(TicketResult, row["ended"])
                self._ended[result.task_id] = result
        except (KeyError, TypeError, ValidationError) as error:
            raise TamperedError(f"{self._path} holds a line that is no ticket ({error}); restore it") from error
