"""The run ledger: written ahead, completed once, never changed or deleted, right under threads, processes and kills."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_actors.contracts.errors import BadInputError, InfrastructureError
from serving.contracts.requests import UNSCORED, RequestRecord
from serving.gates.statistics import reliability_score
from serving.store.ledger import RequestLedger
from tests.serving.fakes import RELEASE, START, make_completion, make_record, record_run


@pytest.fixture
def ledger(tmp_path: Path):
    opened = RequestLedger(tmp_path / "ledger.sqlite", owner="gateway-1")
    yield opened
    opened.close()


def raw(ledger: RequestLedger) -> sqlite3.Connection:
    """A connection beside the API, as a careless script would open one."""
    return sqlite3.connect(ledger.path, isolation_level=None)


def counts(ledger: RequestLedger) -> dict[tuple[str, str], int]:
    return Counter((row.release_channel, row.status) for row in ledger.rows())


class TestStart:
    def test_the_row_exists_before_the_run_ends(self, ledger: RequestLedger):
        assert ledger.start(make_record())
        assert list(ledger.rows()) == [make_record()]
        assert counts(ledger) == {("canary", "running"): 1}

    def test_a_retry_makes_no_second_row(self, ledger: RequestLedger):
        assert ledger.start(make_record())
        assert not ledger.start(make_record())
        assert not ledger.start(make_record(run_id="other-run"))
        assert not ledger.start(make_record(request_id="other-request"))
        assert len(list(ledger.rows())) == 1

    def test_a_retry_finds_its_run(self, ledger: RequestLedger):
        ledger.start(make_record(3))
        assert ledger.find("request-3") == make_record(3)
        assert ledger.find("request-4") is None

    @pytest.mark.parametrize("name", ["run_id", "request_id", "session_key", "policy_version", "bundle_id"])
    @pytest.mark.parametrize("value", ["", None])
    def test_an_identity_is_never_empty_or_null(self, ledger: RequestLedger, name: str, value: Any):
        with pytest.raises(BadInputError, match="the schema refuses it"):
            ledger.start(make_record(**{name: value}))
        assert not list(ledger.rows())

    @pytest.mark.parametrize(
        "name", [f.name for f in fields(RequestRecord) if f.name not in {"human_override", "critic_score"}]
    )
    def test_no_column_takes_null(self, ledger: RequestLedger, name: str):
        ledger.start(make_record())
        columns = [row[1:4] for row in raw(ledger).execute("PRAGMA table_info(runs)")]
        (not_null,) = [required for column, _, required in columns if column == name]
        assert not_null == 1

    @pytest.mark.parametrize("channel", ["prod", "", "CANARY", "general "])
    def test_other_channels_are_refused(self, ledger: RequestLedger, channel: str):
        with pytest.raises(BadInputError, match="schema"):
            ledger.start(make_record(release_channel=channel))

    @pytest.mark.parametrize(
        "change", [{"tool_error_count": 1}, {"tokens_in": -1}, {"cost": -0.1}, {"split_epoch": -1}]
    )
    def test_impossible_numbers_are_refused(self, ledger: RequestLedger, change: dict[str, Any]):
        with pytest.raises(BadInputError, match="schema"):
            ledger.start(make_record(**change))

    def test_a_run_starts_running(self, ledger: RequestLedger):
        with pytest.raises(BadInputError, match="started as 'running'"):
            ledger.start(make_record(status="ok"))


class TestComplete:
    def test_all_fields_come_back(self, ledger: RequestLedger):
        ledger.start(make_record())
        ledger.complete("run-0", make_completion(policy_checks={"a": True, "b": False}), at=START + 9)
        (found,) = ledger.rows()
        assert found == make_record(
            status="ok", success="yes", tool_calls_count=2, tokens_in=100, tokens_out=20, duration_ms=120.0, cost=1.5,
            policy_checks={"a": True, "b": False},
        )  # fmt: skip

    @pytest.mark.parametrize("status", ["ok", "truncated", "tool_budget", "timeout", "engine_error", "aborted"])
    def test_every_ending(self, ledger: RequestLedger, status: str):
        record_run(ledger, 0, status=status)
        assert counts(ledger) == {("canary", status): 1}

    def test_once(self, ledger: RequestLedger):
        record_run(ledger, 0)
        with pytest.raises(BadInputError, match="already ended as 'ok'"):
            ledger.complete("run-0", make_completion(status="timeout"), at=START)
        assert next(ledger.rows()).status == "ok"

    def test_never_a_run_that_was_not_started(self, ledger: RequestLedger):
        with pytest.raises(BadInputError, match="start it first"):
            ledger.complete("run-9", make_completion(), at=START)

    def test_never_back_to_running(self, ledger: RequestLedger):
        ledger.start(make_record())
        with pytest.raises(BadInputError, match="how it ended"):
            ledger.complete("run-0", make_completion(status="running"), at=START)

    @pytest.mark.parametrize(
        "change",
        [
            {"tool_error_count": 3},
            {"tool_error_count": -1},
            {"status": "fine"},
            {"success": "maybe"},
            {"tokens_out": -1},
            {"duration_ms": -1.0},
            {"cost": math.nan},
        ],
    )
    def test_impossible_endings_leave_the_row_running(self, ledger: RequestLedger, change: dict[str, Any]):
        ledger.start(make_record())
        with pytest.raises(BadInputError, match="schema"):
            ledger.complete("run-0", make_completion(**change), at=START)
        assert next(ledger.rows()).status == "running"

    @settings(max_examples=30, deadline=None)
    @given(calls=st.integers(0, 50), errors=st.integers(-2, 55))
    def test_errors_never_exceed_calls(self, tmp_path_factory: pytest.TempPathFactory, calls: int, errors: int):
        ledger = RequestLedger(tmp_path_factory.mktemp("ledger") / "l.sqlite", owner="o")
        ledger.start(make_record())
        completion = make_completion(tool_calls_count=calls, tool_error_count=errors)
        if 0 <= errors <= calls:
            ledger.complete("run-0", completion, at=START)
            assert next(ledger.rows()).tool_error_count == errors
        else:
            with pytest.raises(BadInputError):
                ledger.complete("run-0", completion, at=START)
        ledger.close()


class TestAppendOnly:
    """Negative controls: SQL beside the API must be refused by the file itself."""

    @pytest.mark.parametrize("table", ["runs", "overrides", "labels", "critic_scores"])
    def test_nothing_is_deleted(self, ledger: RequestLedger, table: str):
        self.fill(ledger)
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            raw(ledger).execute(f"DELETE FROM {table}")

    @pytest.mark.parametrize("change", ["cost = 0", "success = 'yes'", "status = 'ok'", "status = 'running'"])
    def test_a_completed_run_never_changes(self, ledger: RequestLedger, change: str):
        self.fill(ledger)
        with pytest.raises(sqlite3.IntegrityError, match="never changes"):
            raw(ledger).execute(f"UPDATE runs SET {change}")

    @pytest.mark.parametrize("name", ["policy_version", "release_channel", "split_epoch", "session_key", "started_at"])
    def test_a_running_run_keeps_its_identity(self, ledger: RequestLedger, name: str):
        ledger.start(make_record())
        with pytest.raises(sqlite3.IntegrityError, match="never changes"):
            raw(ledger).execute(f"UPDATE runs SET {name} = {name}")

    @pytest.mark.parametrize("table", ["overrides", "labels", "critic_scores"])
    def test_what_was_appended_never_changes(self, ledger: RequestLedger, table: str):
        self.fill(ledger)
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            raw(ledger).execute(f"UPDATE {table} SET at = 0")

    def test_a_wrong_type_is_refused(self, ledger: RequestLedger):
        with pytest.raises(BadInputError, match="schema"):
            ledger.start(make_record(split_epoch="two"))

    def fill(self, ledger: RequestLedger) -> None:
        record_run(ledger, 0, success="no")
        ledger.override("run-0", actor="ann", reason="wrong refund", at=START)
        ledger.label("run-0", "no", actor="ann", reason="complaint", at=START)
        ledger.score("run-0", 0.3, reward_model_version="rm-1", at=START)


class TestLateKnowledge:
    def test_an_override_flips_the_run_and_is_audited(self, ledger: RequestLedger):
        record_run(ledger, 0)
        assert not next(ledger.rows()).human_override
        ledger.override("run-0", actor="ann", reason="wrong refund", at=START + 50)
        assert next(ledger.rows()).human_override
        assert ledger.audit("run-0") == (
            {"what": "override", "value": "yes", "actor": "ann", "reason": "wrong refund", "at": START + 50},
        )

    def test_a_running_run_can_be_overridden(self, ledger: RequestLedger):
        ledger.start(make_record())
        ledger.override("run-0", actor="ann", reason="took over", at=START)
        assert next(ledger.rows()).human_override

    def test_two_overrides_of_one_run_count_once(self, ledger: RequestLedger):
        record_run(ledger, 0)
        for actor in ("ann", "bob"):
            ledger.override("run-0", actor=actor, reason="wrong", at=START)
        assert ledger.window(RELEASE.candidate, "canary").num_overrides == 1
        assert len(ledger.events(["override"], epochs=[2])) == 1
        assert len(ledger.audit("run-0")) == 2

    def test_a_late_label_revises_the_metric_and_is_audited(self, ledger: RequestLedger):
        record_run(ledger, 0, success="unknown")
        assert ledger.window(RELEASE.candidate, "canary").num_labelled == 0
        ledger.label("run-0", "yes", actor="verifier", reason="order shipped", at=START + 10)
        assert ledger.window(RELEASE.candidate, "canary").success_rate == 1.0
        ledger.label("run-0", "no", actor="ann", reason="customer complained", at=START + 90)
        window = ledger.window(RELEASE.candidate, "canary")
        assert (window.success_rate, window.cost_per_success) == (0.0, math.inf)
        assert [entry["value"] for entry in ledger.audit("run-0")] == ["yes", "no"]

    def test_the_latest_label_wins_by_order_not_by_clock(self, ledger: RequestLedger):
        record_run(ledger, 0)
        ledger.label("run-0", "no", actor="a", reason="r", at=START + 90)
        ledger.label("run-0", "yes", actor="a", reason="r", at=START + 10)
        assert next(ledger.rows()).success == "yes"

    def test_requests_are_counted_by_traffic_run_and_further_attempts_are_not(self, ledger: RequestLedger):
        names = ("a-0.t1", "a-0.t1~2", "a-0.t2", "a-1.t1", "a-01.t1", "other")
        for index, name in enumerate(names):
            record_run(ledger, index, request_id=name)
        assert [ledger.count_requests(run) for run in ("a-0", "a-1", "a", "none")] == [2, 1, 0, 0]

    def test_a_critic_score_is_logged_beside_the_run(self, ledger: RequestLedger):
        record_run(ledger, 0)
        assert next(ledger.rows()).critic_score == UNSCORED
        ledger.score("run-0", 0.4, reward_model_version="rm-1", at=START)
        ledger.score("run-0", -2.5, reward_model_version="rm-2", at=START)
        assert next(ledger.rows()).critic_score == -2.5

    @pytest.mark.parametrize(("actor", "reason"), [("", "why"), ("who", "")])
    def test_an_override_needs_actor_and_reason(self, ledger: RequestLedger, actor: str, reason: str):
        record_run(ledger, 0)
        with pytest.raises(BadInputError):
            ledger.override("run-0", actor=actor, reason=reason, at=START)
        with pytest.raises(BadInputError):
            ledger.label("run-0", "yes", actor=actor, reason=reason, at=START)

    def test_nothing_is_said_about_unknown_runs(self, ledger: RequestLedger):
        with pytest.raises(BadInputError):
            ledger.override("run-9", actor="ann", reason="why", at=START)
        with pytest.raises(BadInputError):
            ledger.label("run-9", "yes", actor="ann", reason="why", at=START)
        with pytest.raises(BadInputError):
            ledger.score("run-9", 0.5, reward_model_version="rm-1", at=START)

    def test_unknown_is_not_a_label(self, ledger: RequestLedger):
        record_run(ledger, 0)
        with pytest.raises(BadInputError):
            ledger.label("run-0", "unknown", actor="ann", reason="why", at=START)


class TestWindow:
    def test_hand_counted(self, ledger: RequestLedger):
        record_run(ledger, 0, cost=2.0, duration_ms=50.0, tool_calls_count=3, tool_error_count=1)
        record_run(ledger, 1, cost=4.0, success="no", policy_checks={"a": False, "b": False, "c": True})
        record_run(ledger, 2, cost=1.0, success="unknown", policy_checks={"a": False}, session_key="session-1")
        ledger.start(make_record(3))
        ledger.override("run-1", actor="ann", reason="wrong", at=START)
        window = ledger.window(RELEASE.candidate, "canary", epoch=2)
        assert (window.num_runs, window.num_running, window.num_sessions) == (3, 1, 3)
        assert (window.num_labelled, window.num_successes, window.num_overrides) == (2, 1, 1)
        assert (window.tool_calls_count, window.tool_error_count) == (7, 1)
        assert window.failed_checks == {"a": 2, "b": 1}
        assert window.cost_per_success == 7.0
        assert window.success_rate == 0.5
        assert window.human_override_rate == pytest.approx(1 / 3)
        assert window.tool_error_rate == pytest.approx(1 / 7)
        assert [sample.duration_ms for sample in window.samples] == [50.0, 120.0, 120.0]
        assert reliability_score(window.success_rate, window.human_override_rate, window.tool_error_rate) > 0

    def test_an_empty_window_has_defined_rates(self, ledger: RequestLedger):
        window = ledger.window("nobody", "general")
        assert (window.num_runs, window.success_rate, window.human_override_rate, window.tool_error_rate) == (
            0,
            0,
            0,
            0,
        )
        assert window.cost_per_success == math.inf

    @pytest.mark.parametrize(
        "change",
        [
            {"policy_version": "other"},
            {"release_channel": "general"},
            {"release_channel": "offline_eval"},
            {"split_epoch": 3},
        ],
    )
    def test_other_traffic_stays_outside(self, ledger: RequestLedger, change: dict[str, Any]):
        record_run(ledger, 0)
        record_run(ledger, 1, **change)
        assert ledger.window(RELEASE.candidate, "canary", epoch=2).num_runs == 1

    def test_every_epoch(self, ledger: RequestLedger):
        for index in range(6):
            record_run(ledger, index, split_epoch=2 + index % 2)
        assert ledger.window(RELEASE.candidate, "canary").num_runs == 6

    def test_samples_come_in_order_of_completion(self, ledger: RequestLedger):
        for index, ended in enumerate((30.0, 10.0, 20.0)):
            record_run(ledger, index, at=START + ended)
        window = ledger.window(RELEASE.candidate, "canary")
        assert [sample.session_key for sample in window.samples] == ["session-1", "session-2", "session-0"]


class TestEvents:
    def test_each_kind_at_the_moment_it_became_known(self, ledger: RequestLedger):
        record_run(ledger, 0, success="no", at=START + 1)
        record_run(ledger, 1, policy_checks={"polite": False}, at=START + 2)
        record_run(ledger, 2, at=START + 3)
        record_run(ledger, 3, at=START + 4)
        ledger.label("run-2", "no", actor="ann", reason="complaint", at=START + 60)
        ledger.override("run-3", actor="ann", reason="wrong", at=START + 50)
        events = ledger.events(["failure", "violation", "override"], epochs=[2])
        assert [(event.kind, event.run_id, event.at - START) for event in events] == [
            ("failure", "run-0", 1.0),
            ("violation", "run-1", 2.0),
            ("override", "run-3", 50.0),
            ("failure", "run-2", 60.0),
        ]

    @pytest.mark.parametrize("status", ["engine_error", "timeout", "aborted"])
    def test_a_run_that_broke_is_a_failure_whatever_its_label(self, ledger: RequestLedger, status: str):
        record_run(ledger, 0, status=status, success="unknown")
        assert [event.kind for event in ledger.events(["failure"], epochs=[2])] == ["failure"]

    def test_a_running_run_is_no_event_yet(self, ledger: RequestLedger):
        ledger.start(make_record())
        assert ledger.events(["failure", "violation"], epochs=[2]) == ()

    def test_only_the_asked_kinds_and_epochs(self, ledger: RequestLedger):
        record_run(ledger, 0, success="no", policy_checks={"polite": False})
        record_run(ledger, 1, success="no", split_epoch=5)
        assert {event.kind for event in ledger.events(["violation"], epochs=[2])} == {"violation"}
        assert [event.split_epoch for event in ledger.events(["failure"], epochs=[5])] == [5]
        assert ledger.events(["failure"], epochs=[]) == ()

    def test_offline_runs_are_never_events(self, ledger: RequestLedger):
        record_run(ledger, 0, success="no", release_channel="offline_eval")
        assert ledger.events(["failure"], epochs=[2]) == ()

    def test_sessions_by_arm(self, ledger: RequestLedger):
        for index in range(4):
            record_run(ledger, index, session_key=f"canary-{index % 2}")
        for index in range(4, 10):
            record_run(ledger, index, release_channel="general", policy_version="sft-a")
        record_run(ledger, 10, release_channel="offline_eval")
        record_run(ledger, 11, split_epoch=3, session_key="canary-0")
        assert ledger.session_counts([2]) == (2, 8)
        assert ledger.session_counts([2, 3]) == (2, 8)
        assert ledger.session_counts([9]) == (0, 0)

    def test_failed_checks_of_the_canary_only(self, ledger: RequestLedger):
        record_run(ledger, 0, policy_checks={"leak": False, "polite": True})
        record_run(ledger, 1, policy_checks={"leak": False}, split_epoch=3)
        record_run(ledger, 2, policy_checks={"leak": False}, release_channel="offline_eval")
        assert ledger.failed_checks(RELEASE.candidate, [2]) == {"leak": 1}
        assert ledger.failed_checks(RELEASE.candidate, [2, 3]) == {"leak": 2}
        assert ledger.failed_checks("sft-a", [2, 3]) == {}


class TestCrashes:
    def test_orphans_of_one_owner_are_aborted(self, ledger: RequestLedger):
        other = RequestLedger(ledger.path, owner="gateway-2")
        ledger.start(make_record(0))
        other.start(make_record(1))
        record_run(ledger, 2)
        assert ledger.abort_orphans("gateway-2", at=START + 5) == 1
        assert [row.status for row in ledger.rows()] == ["running", "aborted", "ok"]
        assert ledger.abort_orphans("gateway-2", at=START + 5) == 0
        assert [event.run_id for event in ledger.events(["failure"], epochs=[2])] == ["run-1"]
        other.close()

    def test_a_killed_process_leaves_its_row(self, ledger: RequestLedger):
        """kill -9 in the middle of a run: the row is there, and ends as aborted."""
        ready = multiprocessing.get_context("fork").Event()
        victim = multiprocessing.get_context("fork").Process(target=start_and_hang, args=(ledger.path, ready))
        victim.start()
        assert ready.wait(20)
        os.kill(victim.pid or 0, signal.SIGKILL)
        victim.join()
        assert counts(ledger) == {("canary", "running"): 1}
        assert ledger.abort_orphans("victim", at=START) == 1
        assert counts(ledger) == {("canary", "aborted"): 1}

    def test_a_worker_that_comes_back_late_cannot_rewrite_history(self, ledger: RequestLedger):
        ledger.start(make_record())
        ledger.abort_orphans("gateway-1", at=START)
        with pytest.raises(BadInputError, match="already ended as 'aborted'"):
            ledger.complete("run-0", make_completion(), at=START)


def start_and_hang(path: Path, ready) -> None:
    RequestLedger(path, owner="victim").start(make_record())
    ready.set()
    time.sleep(60)


class TestConcurrency:
    def test_threads_share_one_ledger(self, ledger: RequestLedger):
        def work(worker: int) -> None:
            for index in range(40):
                record_run(ledger, worker * 1000 + index)

        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert counts(ledger) == {("canary", "ok"): 240}

    def test_racing_retries_make_one_row(self, ledger: RequestLedger):
        started: list[bool] = []
        threads = [
            threading.Thread(
                target=lambda i=i: started.append(ledger.start(make_record(request_id="same", run_id=f"r{i}")))
            )
            for i in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(started) == [False] * 7 + [True]

    def test_processes_share_one_file(self, ledger: RequestLedger):
        with multiprocessing.get_context("fork").Pool(3) as pool:
            pool.starmap(write_runs, [(ledger.path, worker, 60) for worker in range(3)])
        assert counts(ledger) == {("canary", "ok"): 180}
        assert len({row.run_id for row in ledger.rows()}) == 180

    def test_five_hundred_writes_a_second(self, ledger: RequestLedger):
        begin = time.perf_counter()
        for index in range(500):
            record_run(ledger, index)
        assert 1000 / (time.perf_counter() - begin) > 500

    def test_a_reader_never_blocks_a_writer(self, ledger: RequestLedger):
        record_run(ledger, 0)
        reader = raw(ledger)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM runs").fetchone()
        record_run(ledger, 1)
        reader.execute("COMMIT")
        assert len(list(ledger.rows())) == 2


def write_runs(path: Path, worker: int, num_runs: int) -> None:
    ledger = RequestLedger(path, owner=f"worker-{worker}")
    for index in range(num_runs):
        record_run(ledger, worker * 1000 + index)
    ledger.close()


def take_slots(path: Path, keys: Sequence[str]) -> list[int]:
    ledger = RequestLedger(path, owner=f"worker-{os.getpid()}")
    found = [ledger.session_slot("r1", key) for key in keys]
    ledger.close()
    return found


class TestSessionSlots:
    def test_in_order_of_first_visit_and_kept(self, ledger: RequestLedger):
        assert [ledger.session_slot("r1", key) for key in ("a", "b", "a", "c", "b")] == [0, 1, 0, 2, 1]

    def test_every_release_deals_anew(self, ledger: RequestLedger):
        ledger.session_slot("r1", "a")
        assert [ledger.session_slot("r2", key) for key in ("b", "a")] == [0, 1]
        assert ledger.session_slot("r1", "a") == 0

    def test_a_restarted_gateway_finds_them(self, ledger: RequestLedger):
        before = [ledger.session_slot("r1", f"user-{i}") for i in range(30)]
        ledger.close()
        again = RequestLedger(ledger.path, owner="gateway-2")
        assert [again.session_slot("r1", f"user-{i}") for i in range(30)] == before
        assert again.session_slot("r1", "new") == 30
        again.close()

    def test_two_gateways_deal_from_one_pack(self, ledger: RequestLedger):
        """Every session gets one slot whoever asks first, no slot is given twice, and none is left out."""
        keys = [f"user-{i}" for i in range(60)]
        orders = [(ledger.path, keys), (ledger.path, keys[::-1]), (ledger.path, keys[30:] + keys[:30])]
        with multiprocessing.get_context("fork").Pool(3) as pool:
            found = pool.starmap(take_slots, orders)
        assert sorted(found[0]) == list(range(60))
        assert found[1] == found[0][::-1]
        assert found[2] == found[0][30:] + found[0][:30]

    def test_a_slot_neither_moves_nor_goes(self, ledger: RequestLedger):
        ledger.session_slot("r1", "a")
        for sql in ("UPDATE session_slots SET slot = 7", "DELETE FROM session_slots"):
            with pytest.raises(sqlite3.IntegrityError, match="keeps its slot"):
                raw(ledger).execute(sql)

    def test_a_thousand_new_sessions_a_second(self, ledger: RequestLedger):
        begin = time.perf_counter()
        for index in range(500):
            ledger.session_slot("r1", f"user-{index}")
        assert 500 / (time.perf_counter() - begin) > 1000


class TestInfrastructure:
    def test_a_lock_that_never_ends_is_named(self, ledger: RequestLedger):
        ledger._writer.execute("PRAGMA busy_timeout = 20")
        holder = raw(ledger)
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(InfrastructureError, match=r"ledger\.sqlite: database is locked; .*end the process"):
            ledger.start(make_record())
        holder.execute("ROLLBACK")
        assert ledger.start(make_record())

    def test_a_full_disk_is_named_and_breaks_nothing(self, ledger: RequestLedger):
        record_run(ledger, 0)
        pages = ledger._writer.execute("PRAGMA page_count").fetchone()[0]
        ledger._writer.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(InfrastructureError, match="full; free disk space"):
            record_run(ledger, 1, intent="x" * 500_000)
        ledger._writer.execute("PRAGMA max_page_count = 1000000")
        record_run(ledger, 1000)

    def test_a_file_that_is_no_ledger_is_named(self, tmp_path: Path):
        path = tmp_path / "ledger.sqlite"
        path.write_bytes(b"not a database, but long enough to look like something" * 100)
        with pytest.raises(InfrastructureError, match=r"ledger\.sqlite: file is not a database"):
            RequestLedger(path, owner="o")

    def test_a_place_that_cannot_hold_a_file_is_named(self, tmp_path: Path):
        (tmp_path / "file").write_text("in the way", encoding="utf-8")
        with pytest.raises(InfrastructureError, match="permissions"):
            RequestLedger(tmp_path / "file" / "ledger.sqlite", owner="o")

    def test_reopening_keeps_everything(self, tmp_path: Path):
        path = tmp_path / "deep" / "ledger.sqlite"
        first = RequestLedger(path, owner="o")
        record_run(first, 0)
        before = list(first.rows())
        first.close()
        first.close()
        second = RequestLedger(path, owner="p")
        assert list(second.rows()) == before
        second.close()

    def test_write_ahead_log_is_on(self, ledger: RequestLedger):
        assert raw(ledger).execute("PRAGMA journal_mode").fetchone()[0] == "wal"

    def test_a_record_survives_the_round_trip_for_every_channel(self, ledger: RequestLedger):
        for index, channel in enumerate(("offline_eval", "canary", "general")):
            record = make_record(index, release_channel=channel, task_id="support_desk/held_out/3")
            ledger.start(record)
            assert ledger.find(record.request_id) == replace(record)
