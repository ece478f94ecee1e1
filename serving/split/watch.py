"""A gateway's side of the split: poll the record, route by it, and acknowledge the epoch in a file of its own.

`acknowledged_epoch` is the other end: the lowest epoch by which any live gateway routes.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import psutil

from rl_actors.contracts import InfrastructureError, TamperedError
from rl_actors.durable import disk_errors, write_atomic
from serving.contracts import SplitRecord
from serving.split.record import Route, SplitStore, route, slot_position

_HEARTBEAT_S: Final = 1.0
_STABLE: Final = 1.0  # a position that no share reaches

SlotOf = Callable[[str, str], int]
"""(salt, session key) -> its slot in that release, the next free one at its first visit. Durable; may block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """A gateway's acknowledgement: it routes by `epoch` since before `at` (Unix seconds); 0: it has no record yet."""

    gateway: str
    host: str
    pid: int
    epoch: int
    at: float


class SplitWatcher:
    """Holds the record in force and routes sessions by it; `poll` brings it up to date and acknowledges."""

    def __init__(
        self,
        store: SplitStore,
        acks: Path,
        *,
        gateway: str,
        slot_of: SlotOf,
        stale_after_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._store, self._path, self._gateway = store, acks / f"{gateway}.json", gateway
        self._slot_of, self._stale_after_s, self._clock = slot_of, stale_after_s, clock
        self._record: SplitRecord | None = None
        self._last_ack: Ack | None = None

    def poll(self) -> None:
        """Take over the record in force, then acknowledge it: never the other way round."""
        # A record that cannot be read changes nothing: the one held goes stale, and with it the candidate's share.
        with suppress(InfrastructureError, TamperedError):
            self._record = self._store.read() or self._record
            self._acknowledge()

    async def watch(self, poll_s: float) -> None:
        """Poll until cancelled."""
        while True:
            await asyncio.to_thread(self.poll)
            await asyncio.sleep(poll_s)

    async def route(self, session_key: str) -> Route:
        """Return where a session goes now.

        Raises InfrastructureError before the first record, and when a canary is on and its slot cannot be read.
        """
        asked, position = self._require_record(), _STABLE
        if asked.share > 0:  # with no candidate to serve, a ledger that is down stops nobody
            position = slot_position(await asyncio.to_thread(self._slot_of, asked.salt, session_key), asked.salt)
        record = self._require_record()  # the split may have moved while the slot was read
        if record.salt != asked.salt:
            return replace(route(record, _STABLE, self._clock(), self._stale_after_s), split_epoch=0)
        return route(record, position, self._clock(), self._stale_after_s)

    @property
    def stable(self) -> str:
        """The stable version now."""
        return self._require_record().stable

    def is_in_force(self, version: str) -> bool:
        """Whether the record routes anyone to this version."""
        record = self._record
        return record is not None and (version == record.stable or (version == record.candidate and record.share > 0))

    @property
    def epoch(self) -> int:
        """The epoch routed by; 0 before the first record."""
        return self._record.epoch if self._record else 0

    def leave(self) -> None:
        """Withdraw the acknowledgement: this gateway routes no more."""
        self._path.unlink(missing_ok=True)

    def _require_record(self) -> SplitRecord:
        if self._record is None:
            raise InfrastructureError("no split record is in force yet; run `seatrial up` or start a release")
        return self._record

    def _acknowledge(self) -> None:
        """Write when the epoch changed, else once a heartbeat."""
        now, last = self._clock(), self._last_ack
        if last is not None and last.epoch == self.epoch and now - last.at < _HEARTBEAT_S:
            return
        ack = Ack(gateway=self._gateway, host=socket.gethostname(), pid=os.getpid(), epoch=self.epoch, at=now)
        # Not synced: an acknowledgement that a power cut loses belongs to a gateway that it killed.
        write_atomic(self._path, json.dumps(asdict(ack)), is_synced=False)
        self._last_ack = ack


def read_acks(directory: Path) -> tuple[Ack, ...]:
    """Return the last acknowledgement of every gateway that did not leave; one that cannot be read as epoch 0."""
    found = []
    for path in sorted(directory.glob("*.json")):
        with disk_errors(path), suppress(FileNotFoundError):  # a gateway may leave while its file is looked at
            found.append(_parse_ack(path.read_bytes(), path.stem))
    return tuple(found)


def _parse_ack(text: bytes, gateway: str) -> Ack:
    with suppress(ValueError, TypeError):
        ack = Ack(**json.loads(text))
        # Signalling process 0 or -1 would ask about whole groups of processes.
        numbers_fit = type(ack.epoch) is int and type(ack.pid) is int and 0 < ack.pid < 2**31
        time_fits = isinstance(ack.at, int | float) and math.isfinite(ack.at)
        if ack.gateway == gateway and numbers_fit and time_fits and isinstance(ack.host, str):
            return ack
    # As after a power cut: nothing acknowledged, and too long ago to be live.
    return Ack(gateway=gateway, host="", pid=0, epoch=0, at=0.0)


def is_live(ack: Ack, now: float, live_within_s: float) -> bool:
    """Whether this gateway may still be routing: it acknowledged lately and, on this machine, its process exists."""
    # One that fell silent counts until its record is stale: from then on it gives the candidate nothing by itself.
    if now - ack.at > live_within_s:
        return False
    return ack.host != socket.gethostname() or psutil.pid_exists(ack.pid)


def acknowledged_epoch(directory: Path, now: float, live_within_s: float) -> int:
    """Return the lowest epoch by which a live gateway routes. Raises InfrastructureError when none is live."""
    live = [ack.epoch for ack in read_acks(directory) if is_live(ack, now, live_within_s)]
    if not live:
        raise InfrastructureError(f"no gateway is alive (looked in {directory}); run `seatrial up`")
    return min(live)
