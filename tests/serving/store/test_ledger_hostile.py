"""The ledger against odd names, damaged files and callers in any order; the SQL of the gates, clause by clause."""

from __future__ import annotations

import math
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_actors.contracts.errors import BadInputError, InfrastructureError
from rl_actors.durable.files import file_lock
from serving.contracts.requests import EventKind, RequestEvent, TrafficWindow
from serving.store.ledger import RequestLedger
from tests.serving.fakes import RELEASE, START, make_completion, make_record, record_run

KINDS: tuple[EventKind, ...] = ("violation", "override", "failure")
NAMES = st.text(st.characters(exclude_characters="\x00", exclude_categories=("Cs",)), min_size=1, max_size=300)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[RequestLedger]:
    opened = RequestLedger(tmp_path / "ledger.sqlite", owner="gateway-1")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RequestLedger]:
    """One ledger for all examples of a property: names must not meet by accident either."""
    opened = RequestLedger(tmp_path_factory.mktemp("shared") / "ledger.sqlite", owner="gateway-1")
    yield opened
    opened.close()


def failures(ledger: RequestLedger) -> list[tuple[str, float]]:
    return [(event.run_id, event.at - START) for event in ledger.events(["failure"], epochs=[2])]


def window_of(path: Path) -> TrafficWindow:
    with closing(RequestLedger(path, owner="reader")) as opened:
        return opened.window(RELEASE.candidate, "canary")


class TestNames:
    @settings(max_examples=120, deadline=None)
    @given(name=NAMES, said=NAMES)
    def test_any_name_is_only_a_name(self, shared: RequestLedger, name: str, said: str):
        """Quotes, percent signs, other alphabets and very long ids: found again, and nobody else is."""
        before = len(list(shared.rows()))
        known = shared.find(name) is not None
        record = make_record(run_id=f"run-{name}", request_id=name, session_key=said, task_id=said, intent=said)
        assert shared.start(record) == (not known)
        found = shared.find(name)
        assert found is not None
        assert found.run_id == f"run-{name}"
        shared.override(found.run_id, actor=said, reason=said, at=START)
        entry = shared.audit(found.run_id)[-1]
        assert (entry["actor"], entry["reason"]) == (said, said)
        assert len(list(shared.rows())) == before + (not known)

    @pytest.mark.parametrize("name", ["a%", "a_1", "a'; DROP TABLE runs; --", "ä" * 70, "a~b", '"a"', "💚"])
    def test_a_traffic_run_is_counted_by_its_very_name(self, ledger: RequestLedger, name: str):
        for index, request in enumerate((f"{name}.t1", f"{name}.t2", f"{name}.t2~2", f"x{name}.t1", "a-1.t1", name)):
            record_run(ledger, index, request_id=request)
        expected = 2 if "~" not in name else 0
        assert ledger.count_requests(name) == expected

    def test_a_huge_reason_is_kept_whole(self, ledger: RequestLedger):
        record_run(ledger, 0)
        reason = "because " * 50_000
        ledger.label("run-0", "no", actor="ann", reason=reason, at=START)
        assert ledger.audit("run-0")[0]["reason"] == reason

    def test_checks_come_back_by_name_and_verdict(self, ledger: RequestLedger):
        checks = {"naïve ✓": True, 'quote"d': False, "": False, "x" * 2000: True}
        record_run(ledger, 0, policy_checks=checks)
        assert next(ledger.rows()).policy_checks == checks
        assert ledger.failed_checks(RELEASE.candidate, [2]) == {'quote"d': 1, "": 1}


class TestFailures:
    @pytest.mark.parametrize("status", ["engine_error", "timeout", "aborted"])
    def test_a_kind_word_does_not_mend_a_broken_run(self, ledger: RequestLedger, status: str):
        """The user saw it break; a late label says what the answer would have been worth, not that it came."""
        record_run(ledger, 0, status=status, success="no", at=START + 1)
        ledger.label("run-0", "yes", actor="ann", reason="never mind", at=START + 70)
        assert failures(ledger) == [("run-0", 70.0)]

    def test_a_label_that_takes_a_failure_back_takes_its_event_back(self, ledger: RequestLedger):
        record_run(ledger, 0, success="no", at=START + 1)
        assert failures(ledger) == [("run-0", 1.0)]
        ledger.label("run-0", "yes", actor="ann", reason="the verifier was wrong", at=START + 60)
        assert failures(ledger) == []

    def test_a_label_that_changes_its_mind_is_known_from_the_change_on(self, ledger: RequestLedger):
        record_run(ledger, 0, success="unknown", at=START + 1)
        ledger.label("run-0", "yes", actor="ann", reason="looked", at=START + 50)
        ledger.label("run-0", "no", actor="ann", reason="looked again", at=START + 80)
        assert failures(ledger) == [("run-0", 80.0)]

    def test_a_check_that_failed_is_an_event_only_once_its_run_ended(self, ledger: RequestLedger):
        ledger.start(make_record(policy_checks={"polite": False}))
        assert ledger.events(["violation"], epochs=[2]) == ()
        ledger.complete("run-0", make_completion(policy_checks={"polite": False}), at=START + 7)
        assert [event.at for event in ledger.events(["violation"], epochs=[2])] == [START + 7]

    def test_a_label_given_before_the_end_counts_from_the_end(self, ledger: RequestLedger):
        """Nothing is known of a run before it ended: an event may not lie before the look that could first see it."""
        ledger.start(make_record())
        ledger.label("run-0", "no", actor="ann", reason="I stopped it", at=START + 5)
        assert failures(ledger) == []
        ledger.complete("run-0", make_completion(success="unknown"), at=START + 30)
        assert failures(ledger) == [("run-0", 30.0)]

    def test_truncated_and_out_of_budget_fail_only_by_their_label(self, ledger: RequestLedger):
        for index, status in enumerate(("truncated", "tool_budget", "ok")):
            record_run(ledger, index, status=status, success="unknown")
        assert failures(ledger) == []

    def test_an_override_is_known_from_its_first_word(self, ledger: RequestLedger):
        record_run(ledger, 0)
        for at in (90.0, 40.0, 60.0):
            ledger.override("run-0", actor="ann", reason="wrong", at=START + at)
        (event,) = ledger.events(["override"], epochs=[2])
        assert event == RequestEvent(
            at=START + 40, kind="override", run_id="run-0", session_key="session-0", policy_version="ppo-b",
            split_epoch=2,
        )  # fmt: skip

    def test_events_of_one_moment_have_an_order(self, ledger: RequestLedger):
        """The gates keep the first event of a session: two readers must agree which one that is."""
        for index in (3, 1, 2):
            record_run(ledger, index, success="no", policy_checks={"polite": False}, at=START + 9)
            ledger.override(f"run-{index}", actor="ann", reason="wrong", at=START + 9)
        found = [(event.run_id, event.kind) for event in ledger.events(KINDS, epochs=[2])]
        assert found == [(f"run-{n}", kind) for n in (1, 2, 3) for kind in ("failure", "override", "violation")]

    def test_one_run_may_be_all_three(self, ledger: RequestLedger):
        record_run(ledger, 0, success="no", policy_checks={"a": False, "b": False})
        ledger.override("run-0", actor="ann", reason="wrong", at=START + 50)
        assert {event.kind for event in ledger.events(KINDS, epochs=[2])} == set(KINDS)
        assert len(ledger.events(KINDS, epochs=[2])) == 3


class TestWindowBounds:
    def test_what_is_still_running_is_no_run_but_a_session(self, ledger: RequestLedger):
        """Its override is kept for later: an overridden fraction above 1 would say nothing."""
        ledger.start(make_record(0))
        ledger.override("run-0", actor="ann", reason="took over", at=START)
        window = ledger.window(RELEASE.candidate, "canary")
        assert (window.num_runs, window.num_running, window.num_sessions, window.num_overrides) == (0, 1, 1, 0)
        ledger.complete("run-0", make_completion(), at=START + 1)
        window = ledger.window(RELEASE.candidate, "canary")
        assert (window.num_runs, window.num_running, window.num_overrides) == (1, 0, 1)

    def test_runs_that_end_together_stay_in_the_order_they_started(self, ledger: RequestLedger):
        for index in (2, 0, 1):
            record_run(ledger, index, at=START + 50)
        keys = [sample.session_key for sample in ledger.window(RELEASE.candidate, "canary").samples]
        assert keys == ["session-2", "session-0", "session-1"]

    def test_rows_come_in_the_order_they_started_and_each_with_its_own_score(self, ledger: RequestLedger):
        for index, score in ((2, 0.2), (0, 0.9), (1, -0.5)):
            record_run(ledger, index)
            ledger.score(f"run-{index}", score, reward_model_version="rm-1", at=START)
        assert [(row.run_id, row.critic_score) for row in ledger.rows()] == [
            ("run-2", 0.2), ("run-0", 0.9), ("run-1", -0.5),
        ]  # fmt: skip
        with pytest.raises(BadInputError, match="schema"):
            ledger.score("run-0", 0.1, reward_model_version="", at=START)

    def test_an_audit_tells_overrides_and_labels_as_they_happened(self, ledger: RequestLedger):
        record_run(ledger, 0)
        ledger.label("run-0", "no", actor="ann", reason="first", at=START + 1)
        ledger.override("run-0", actor="bob", reason="second", at=START + 2)
        ledger.label("run-0", "yes", actor="ann", reason="third", at=START + 3)
        assert [(entry["what"], entry["reason"]) for entry in ledger.audit("run-0")] == [
            ("label", "first"), ("override", "second"), ("label", "third"),
        ]  # fmt: skip

    def test_no_epoch_is_no_session(self, ledger: RequestLedger):
        record_run(ledger, 0)
        assert ledger.session_counts([]) == (0, 0)
        assert ledger.failed_checks(RELEASE.candidate, []) == {}

    @settings(max_examples=30, deadline=None)
    @given(
        st.lists(
            st.tuples(st.sampled_from(["yes", "no", "unknown"]), st.floats(0, 100), st.integers(0, 5)), max_size=12
        )
    )
    def test_a_window_is_the_sum_of_its_rows(
        self, tmp_path_factory: pytest.TempPathFactory, runs: list[tuple[str, float, int]]
    ):
        """Counted a second time in Python, from the rows that people see."""
        ledger = RequestLedger(tmp_path_factory.mktemp("ledger") / "l.sqlite", owner="o")
        for index, (success, cost, calls) in enumerate(runs):
            changes: Mapping[str, Any] = {"success": success, "cost": cost, "tool_calls_count": calls}
            record_run(ledger, index, session_key=f"s{index % 3}", **changes)
        window, rows = ledger.window(RELEASE.candidate, "canary", epoch=2), list(ledger.rows())
        ledger.close()
        assert window.num_runs == len(rows)
        assert window.num_labelled == sum(row.success != "unknown" for row in rows)
        assert window.tool_calls_count == sum(row.tool_calls_count for row in rows)
        assert window.num_sessions == len({row.session_key for row in rows})
        wins = sum(row.success == "yes" for row in rows)
        expected = sum(row.cost for row in rows) / wins if wins else math.inf
        assert window.cost_per_success == pytest.approx(expected)


class TestFiles:
    def test_opening_waits_for_another_that_opens(self, tmp_path: Path):
        """SQLite switches a new file to WAL without waiting: two gateways that start together must take turns."""
        path, opened = tmp_path / "ledger.sqlite", threading.Event()
        thread = threading.Thread(target=lambda: (RequestLedger(path, owner="two").close(), opened.set()))
        with file_lock(tmp_path / "ledger.sqlite.lock"):
            thread.start()
            assert not opened.wait(0.1)
        assert opened.wait(10)
        thread.join()

    def test_an_open_ledger_keeps_nobody_from_opening(self, ledger: RequestLedger):
        other = RequestLedger(ledger.path, owner="gateway-2")
        assert other.start(make_record(0))
        assert not ledger.start(make_record(0))
        other.close()

    def test_a_damaged_page_is_named_not_counted(self, ledger: RequestLedger):
        """Windows of a broken file must not look like little traffic."""
        for index in range(200):
            record_run(ledger, index, session_key=f"session-{index}" * 20)
        ledger.close()
        whole = ledger.path.read_bytes()
        ledger.path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
        with pytest.raises(InfrastructureError, match=r"ledger\.sqlite: .*malformed"):
            window_of(ledger.path)

    def test_the_schema_is_made_once(self, ledger: RequestLedger):
        """A second process must not need, nor take, the write lock for it."""
        holder = sqlite3.connect(ledger.path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        RequestLedger(ledger.path, owner="reader").close()
        holder.execute("ROLLBACK")
        holder.close()

    def test_what_is_closed_says_so_for_reads_and_writes(self, ledger: RequestLedger):
        ledger.close()
        for act in (lambda: ledger.start(make_record()), lambda: ledger.find("x"), lambda: list(ledger.rows())):
            with pytest.raises(InfrastructureError, match="closed"):
                act()

    def test_an_orphan_of_nobody_stays_open(self, ledger: RequestLedger):
        ledger.start(make_record())
        assert ledger.abort_orphans("", at=START) == ledger.abort_orphans("gateway", at=START) == 0
        assert next(ledger.rows()).status == "running"

    @pytest.mark.parametrize("score", [math.nan, None, "high"])
    def test_a_score_that_is_no_number_is_refused(self, ledger: RequestLedger, score: float):
        record_run(ledger, 0)
        with pytest.raises(BadInputError, match="schema"):
            ledger.score("run-0", score, reward_model_version="rm-1", at=START)
        assert next(ledger.rows()).critic_score == -1.0
