"""The request ledger: one SQLite file, one row per request, from which every gate reads."""

from __future__ import annotations

import json
import re
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from importlib import resources
from pathlib import Path
from typing import Any, Final

from rl_actors.contracts import BadInputError, InfrastructureError, PlanRevision
from rl_actors.durable import file_lock
from serving.contracts import (
    EventKind,
    ReleaseChannel,
    RequestCompletion,
    RequestEvent,
    RequestRecord,
    RequestSample,
    Success,
    TrafficWindow,
)

_BUSY_TIMEOUT_MS: Final = 10_000
_CREATED: Final = re.compile(r"^CREATE [\w ]+ IF NOT EXISTS (\w+)", re.MULTILINE)
_RECORD_FIELDS: Final = tuple(field.name for field in fields(RequestRecord))
# What becomes known later is appended in tables of its own, and the view `run_records` joins it.
_LATER: Final = ("human_override", "critic_score")

_COMPLETE: Final = """
UPDATE runs SET status = :status, success = :success, tool_calls_count = :tool_calls_count,
    tool_error_count = :tool_error_count, tokens_in = :tokens_in, tokens_out = :tokens_out, duration_ms = :duration_ms,
    cost = :cost, policy_checks = :policy_checks, failed_checks_count = :failed_checks_count, completed_at = :at
WHERE run_id = :run_id AND status = 'running'"""

_WINDOW: Final = """
FROM run_records WHERE policy_version = :policy_version AND release_channel = :channel
    AND (:epoch IS NULL OR split_epoch = :epoch)"""


class RequestLedger:
    """One open ledger, for any number of threads. `owner` names the writing process.

    Raises InfrastructureError, naming the file and the remedy, when the file cannot be opened, locked or written.
    """

    def __init__(self, path: Path, *, owner: str) -> None:
        self.path, self.owner = path, owner
        # Two connections, so that a long read never blocks a write.
        self._write_lock, self._read_lock = threading.Lock(), threading.Lock()
        # SQLite switches a new file to WAL without waiting: of two that open it at once, one would find it locked.
        with file_lock(path.with_name(f"{path.name}.lock")):
            self._writer, self._reader = self._connect(), self._connect()
            with self._writing() as writer:
                schema = resources.files("serving.store").joinpath("schema.sql").read_text(encoding="utf-8")
                present = {row["name"] for row in writer.execute("SELECT name FROM sqlite_master")}
                # Also for a file of an older version, which lacks what was added since.
                if not present.issuperset(_CREATED.findall(schema)):
                    writer.executescript(schema)

    def close(self) -> None:
        """Close both connections; a second call does nothing."""
        self._reader.close()
        self._writer.close()

    # --- writes -------------------------------------------------------------------------------------------------------

    def start(self, record: RequestRecord) -> bool:
        """Write a request ahead. False when it already has a row: a retry never makes a second one."""
        if record.status != "running":
            raise BadInputError("record.status", record.status, "a request is started as 'running' and completed later")
        row = {name: value for name, value in asdict(record).items() if name not in _LATER}
        row |= _checks_columns(record.policy_checks) | {"owner": self.owner, "completed_at": 0.0}
        with self._writing() as writer:
            return writer.execute(f"{_insert('runs', row)} ON CONFLICT DO NOTHING", row).rowcount == 1

    def session_slot(self, salt: str, session_key: str) -> int:
        """Return a session's slot in the release of this salt: the next free one at its first visit, the same after."""
        find = "SELECT slot FROM session_slots WHERE salt = ? AND session_key = ?"
        if known := self._read(find, (salt, session_key)):
            return known[0]["slot"]
        sql = """INSERT INTO session_slots SELECT ?1, ?2, COALESCE(MAX(slot) + 1, 0) FROM session_slots WHERE salt = ?1
            ON CONFLICT (salt, session_key) DO NOTHING"""
        with self._writing() as writer:
            writer.execute(sql, (salt, session_key))
            return writer.execute(find, (salt, session_key)).fetchone()["slot"]

    def complete(self, run_id: str, completion: RequestCompletion, *, at: float) -> None:
        """End a request, exactly once, its plans with it.

        Raises BadInputError for an unknown request and for one that already ended.
        """
        if completion.status == "running":
            raise BadInputError("completion.status", "running", "complete a request with how it ended")
        key = {"run_id": run_id, "at": at}
        row = asdict(completion) | _checks_columns(completion.policy_checks) | key
        with self._writing() as writer, writer:
            # At once for writing: a read that turns into a write fails where another process wrote in between.
            writer.execute("BEGIN IMMEDIATE")
            if writer.execute(_COMPLETE, row).rowcount == 1:
                for plan in completion.plans:
                    row = asdict(plan) | {"steps": json.dumps(plan.steps)} | key
                    writer.execute(_insert("plan_revisions", row), row)
                return
            found = writer.execute("SELECT status FROM runs WHERE run_id = ?", (run_id,)).fetchone()
        remedy = f"it already ended as '{found['status']}'" if found else "start it first"
        raise BadInputError("run_id", run_id, f"a request is completed once: {remedy}")

    def override(self, run_id: str, *, actor: str, reason: str, at: float) -> None:
        """Record that a human overrode the reply to a request."""
        self._append("overrides", run_id=run_id, actor=actor, reason=reason, at=at)

    def label(self, run_id: str, success: Success, *, actor: str, reason: str, at: float) -> None:
        """Record, maybe late, whether a request succeeded. The latest label wins; the earlier ones stay readable."""
        self._append("labels", run_id=run_id, success=success, actor=actor, reason=reason, at=at)

    def score(self, run_id: str, score: float, *, reward_model_version: str, at: float) -> None:
        """Log the critic's score of a finished request. It is never read by a gate."""
        self._append("critic_scores", run_id=run_id, score=score, reward_model_version=reward_model_version, at=at)

    def abort_orphans(self, owner: str, *, at: float) -> int:
        """End the requests a dead process left open as `aborted`; returns how many."""
        # Its user got no reply, so it is a failure.
        sql = """UPDATE runs SET status = 'aborted', success = 'no', completed_at = ?
            WHERE owner = ? AND status = 'running'"""
        with self._writing() as writer:
            return writer.execute(sql, (at, owner)).rowcount

    # --- reads --------------------------------------------------------------------------------------------------------

    def find(self, request_id: str) -> RequestRecord | None:
        """Return the row of this idempotency key, if there is one."""
        found = self._read("SELECT * FROM run_records WHERE request_id = ?", (request_id,))
        return _record(found[0]) if found else None

    def plans(self, run_id: str) -> tuple[PlanRevision, ...]:
        """Return the plans of a request, first to last; none before it has ended, or when it never planned."""
        sql = """SELECT revision, after_calls, cause, steps, tool_budget FROM plan_revisions
            WHERE run_id = ? ORDER BY revision"""
        return tuple(
            PlanRevision(**{**dict(row), "steps": tuple(json.loads(row["steps"]))})
            for row in self._read(sql, (run_id,))
        )

    def rows(self) -> Iterator[RequestRecord]:
        """Yield all rows in the order they started."""
        yield from map(_record, self._read("SELECT * FROM run_records ORDER BY seq"))

    def count_requests(self, run_name: str) -> int:
        """Count the requests of one traffic run, by the prefix of their keys."""
        # Further attempts at one (`~2`) are rows, not requests.
        sql = "SELECT COUNT(*) AS n FROM runs WHERE substr(request_id, 1, ?) = ? AND instr(request_id, '~') = 0"
        prefix = f"{run_name}."
        return self._read(sql, (len(prefix), prefix))[0]["n"]

    def window(self, policy_version: str, channel: ReleaseChannel, *, epoch: int | None = None) -> TrafficWindow:
        """Aggregate the requests of one version in one channel; `epoch` None means every split epoch."""
        keys = {"policy_version": policy_version, "channel": channel, "epoch": epoch}
        sql = f"SELECT session_key, duration_ms, cost, success, completed_at {_WINDOW} AND status <> 'running'"
        samples = tuple(RequestSample(**dict(row)) for row in self._read(f"{sql} ORDER BY completed_at, seq", keys))
        totals = self._read(f"""SELECT COALESCE(SUM(status = 'running'), 0) AS num_running,
            COUNT(DISTINCT session_key) AS num_sessions,
            COALESCE(SUM(human_override AND status <> 'running'), 0) AS num_overrides,
            COALESCE(SUM(tool_calls_count), 0) AS tool_calls_count,
            COALESCE(SUM(tool_error_count), 0) AS tool_error_count {_WINDOW}""", keys)[0]  # fmt: skip
        failed = self._read(f"SELECT policy_checks {_WINDOW} AND failed_checks_count > 0", keys)
        return TrafficWindow(
            policy_version=policy_version,
            release_channel=channel,
            split_epoch=epoch or 0,
            num_runs=len(samples),
            num_labelled=sum(sample.success != "unknown" for sample in samples),
            num_successes=sum(sample.success == "yes" for sample in samples),
            failed_checks=_count_failed(row["policy_checks"] for row in failed),
            samples=samples,
            **dict(totals),
        )

    def events(self, kinds: Iterable[EventKind], *, epochs: Iterable[int]) -> tuple[RequestEvent, ...]:
        """Return the bad events of live requests in some split epochs, ordered by the moment they became known."""
        kind_marks, epoch_marks = json.dumps(list(kinds)), json.dumps(list(epochs))
        sql = """SELECT at, kind, run_id, session_key, policy_version, split_epoch FROM run_events
            WHERE kind IN (SELECT value FROM json_each(?)) AND split_epoch IN (SELECT value FROM json_each(?))
            AND release_channel <> 'offline_eval' ORDER BY at, run_id, kind"""
        return tuple(RequestEvent(**dict(row)) for row in self._read(sql, (kind_marks, epoch_marks)))

    def session_counts(self, epochs: Iterable[int]) -> tuple[int, int]:
        """Return (canary sessions, all live sessions) of some split epochs, whatever became of their requests."""
        sql = """SELECT COUNT(DISTINCT CASE WHEN release_channel = 'canary' THEN session_key END) AS canary,
            COUNT(DISTINCT session_key) AS total FROM runs
            WHERE split_epoch IN (SELECT value FROM json_each(?)) AND release_channel <> 'offline_eval'"""
        row = self._read(sql, (json.dumps(list(epochs)),))[0]
        return row["canary"], row["total"]

    def failed_checks(self, policy_version: str, epochs: Iterable[int]) -> Mapping[str, int]:
        """Count the canary requests of a version in some split epochs by the policy check that failed in them."""
        sql = """SELECT policy_checks FROM runs WHERE policy_version = ? AND release_channel = 'canary'
            AND failed_checks_count > 0 AND split_epoch IN (SELECT value FROM json_each(?))"""
        found = self._read(sql, (policy_version, json.dumps(list(epochs))))
        return _count_failed(row["policy_checks"] for row in found)

    def audit(self, run_id: str) -> tuple[Mapping[str, Any], ...]:
        """Return every override and label of a request, oldest first, with actor, reason and time."""
        sql = """SELECT 'override' AS what, 'yes' AS value, actor, reason, at FROM overrides WHERE run_id = :run_id
            UNION ALL SELECT 'label', success, actor, reason, at FROM labels WHERE run_id = :run_id ORDER BY at"""
        return tuple(dict(row) for row in self._read(sql, {"run_id": run_id}))

    # --- SQLite -------------------------------------------------------------------------------------------------------

    def _connect(self) -> sqlite3.Connection:
        with self._translated():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            connection.row_factory = sqlite3.Row
            connection.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
            # A killed process loses nothing; a power cut may lose the last commits but never breaks the file.
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA foreign_keys = ON")
            return connection

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._write_lock, self._translated():
            yield self._writer

    def _read(self, sql: str, parameters: tuple[Any, ...] | Mapping[str, Any] = ()) -> list[sqlite3.Row]:
        with self._read_lock, self._translated():
            return self._reader.execute(sql, parameters).fetchall()

    def _append(self, table: str, **row: object) -> None:
        with self._writing() as writer:
            writer.execute(_insert(table, row), row)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn what SQLite refuses into BadInputError, and what it cannot do into InfrastructureError."""
        try:
            yield
        except sqlite3.IntegrityError as error:
            raise BadInputError("ledger row", str(error), "the schema refuses it (serving/store/schema.sql)") from error
        except (sqlite3.Error, OSError) as error:
            remedy = "free disk space, check its permissions, or end the process that holds it locked"
            raise InfrastructureError(f"ledger {self.path}: {error}; {remedy}") from error


def _insert(table: str, row: Iterable[str]) -> str:
    return f"INSERT INTO {table} ({', '.join(row)}) VALUES ({', '.join(f':{name}' for name in row)})"


def _checks_columns(policy_checks: Mapping[str, bool]) -> dict[str, object]:
    return {
        "policy_checks": json.dumps(dict(policy_checks), sort_keys=True),
        "failed_checks_count": sum(not held for held in policy_checks.values()),
    }


def _record(row: sqlite3.Row) -> RequestRecord:
    values = {name: row[name] for name in _RECORD_FIELDS}
    values |= {"policy_checks": json.loads(row["policy_checks"]), "human_override": bool(row["human_override"])}
    return RequestRecord(**values)


def _count_failed(policy_checks: Iterable[str]) -> Mapping[str, int]:
    """Count requests by the policy check that failed in them."""
    counts: Counter[str] = Counter()
    for text in policy_checks:
        counts.update(name for name, held in json.loads(text).items() if not held)
    return counts
