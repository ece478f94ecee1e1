"""The traffic split: sticky routing as a pure function, and the small durable record that gateways poll.

New sessions are dealt out in permuted blocks (Zelen 1974): of each twenty that arrive, one falls into every twentieth
of [0, 1), of each hundred one into every hundredth, in an order that a keyed hash shuffles. One record rules all
gateways; replacing it atomically is the whole of a roll back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Final

from rl_actors.contracts import BadInputError, StageRefusedError, TamperedError
from rl_actors.durable import ChainedLog, disk_errors, file_lock, write_atomic
from serving.contracts import ReleaseChannel, SplitRecord

# A coin per session would make the first 50 canary sessions at a share of 5 % anything from 3.6 to 6.4 % of all (two
# standard deviations); blocks keep to the record, also in the first minute.
BLOCK: Final = 20  # sessions dealt out together: larger is nearer to a coin, smaller nearer to a pattern
FINE: Final = 5  # blocks whose finer places, for shares that are no multiple of 1 / BLOCK, are dealt out together


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where one session goes. `split_epoch` is 0 when no valid split decided: such runs enter no comparison."""

    policy_version: str
    release_channel: ReleaseChannel
    split_epoch: int


def slot_position(slot: int, salt: str) -> float:
    """Place the session that came `slot`-th (from 0) into a release in [0, 1): fixed for ever, fresh for each salt.

    Of the slots of a block each gets another of BLOCK equal parts of [0, 1); of the sessions that get one part in FINE
    consecutive blocks, each gets another fifth of it.
    """
    block, index = divmod(slot, BLOCK)
    part = _order(f"{salt}\x00{block}\x00part", BLOCK)[index]
    group, member = divmod(block, FINE)
    fine = _order(f"{salt}\x00{group}\x00{part}\x00fine", FINE)[member]
    return (part + (fine + _uniform(f"{salt}\x00{slot}\x00within")) / FINE) / BLOCK


@lru_cache(maxsize=1024)
def _order(key: str, count: int) -> tuple[int, ...]:
    """Shuffle 0 to count - 1 by a keyed hash."""
    return tuple(sorted(range(count), key=lambda rank: _uniform(f"{key}\x00{rank}")))


def _uniform(text: str) -> float:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def route(record: SplitRecord, position: float, now: float, stale_after_s: float) -> Route:
    """Choose the version for a session. A raised share keeps its sessions; a stale record means share 0."""
    # Nobody refreshes the record of a dead controller: its candidate loses the traffic without anybody's help.
    if now - record.updated_at > stale_after_s:
        return Route(policy_version=record.stable, release_channel="general", split_epoch=0)
    if position < record.share:
        return Route(policy_version=record.candidate, release_channel="canary", split_epoch=record.epoch)
    return Route(policy_version=record.stable, release_channel="general", split_epoch=record.epoch)


class SplitStore:
    """The durable split of one directory: `split.json` is the record in force, `split_history.jsonl` all before it.

    Nothing is created before the first write.
    """

    def __init__(self, directory: Path) -> None:
        self.path, self._history = directory / "split.json", ChainedLog(directory / "split_history.jsonl")
        self._lock_path = directory / "split.lock"

    def read(self) -> SplitRecord | None:
        """Return the record in force, or None before the first. Raises TamperedError when it cannot be parsed."""
        with disk_errors(self.path):
            text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        return _parse_record(text, self.path) if text else None

    def compare_and_set(self, record: SplitRecord) -> None:
        """Put a record with the next epoch in force. Repeating the record in force changes nothing.

        Raises StageRefusedError when the epoch is not the next one: someone else changed the split meanwhile.
        """
        with file_lock(self._lock_path):
            current = self.read()
            if current is not None and replace(current, updated_at=record.updated_at) == record:
                return
            expected = current.epoch + 1 if current else 1
            if record.epoch != expected:
                raise StageRefusedError(f"{self.path}: epoch {record.epoch} offered, {expected} is next; read it again")
            write_atomic(self.path, json.dumps(asdict(record)))
            # Logged after the switch, never before it; a record whose own logging was killed is made up for.
            if current is not None and current.epoch not in {logged.epoch for logged in self._read_log()}:
                self._history.append(asdict(current))
            self._history.append(asdict(record))

    def refresh(self, now: float) -> SplitRecord | None:
        """Say that the record in force still holds, so that it does not go stale; returns it."""
        with file_lock(self._lock_path):
            current = self.read()
            if current is None:
                return None
            fresh = replace(current, updated_at=now)
            write_atomic(self.path, json.dumps(asdict(fresh)))
            return fresh

    def history(self) -> Mapping[int, SplitRecord]:
        """Return every record ever in force by epoch, the current one included even if the log missed it."""
        current = self.read()  # before the log: read after it, two switches in between would hide an epoch
        records = (*self._read_log(), *([current] if current else []))
        return {record.epoch: record for record in records}

    def _read_log(self) -> list[SplitRecord]:
        return [_parse_record(json.dumps(row), self._history.path) for row in self._history.rows()]


def _parse_record(text: str, path: Path) -> SplitRecord:
    try:
        return SplitRecord(**json.loads(text))
    except (ValueError, TypeError, BadInputError) as error:
        raise TamperedError(f"{path} is not a split record ({error}); restore it from split_history.jsonl") from error
