"""Which kept traces are shown to people: known runs, newest first, overridden ones among them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cluster.registry.traces import feedback_rows, root_span, sampled_traces
from rl_actors.contracts.rollouts import PlanRevision
from serving.store.ledger import RequestLedger
from serving.store.trace_log import LiveTrace
from tests.rl_actors.fakes import make_turn
from tests.serving.fakes import record_run


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[RequestLedger]:
    with closing(RequestLedger(tmp_path / "ledger.sqlite", owner="test")) as made:
        for index in range(10):
            record_run(made, index)
        for index in (1, 2, 3):
            made.override(f"run-{index}", actor="ann", reason="wrong order", at=5.0)
        yield made


def trace(index: int) -> LiveTrace:
    return LiveTrace(run_id=f"run-{index}", request="hi", response="ho", turns=(make_turn((1, 2), (3, 4)),))


def test_half_of_the_places_go_to_overridden_runs_newest_first(ledger: RequestLedger):
    found = sampled_traces([trace(index) for index in range(10)], ledger, 4)
    assert [one.record.run_id for one in found] == ["run-3", "run-2", "run-9", "run-8"]


def test_places_that_no_overridden_run_takes_are_not_lost(ledger: RequestLedger):
    found = sampled_traces([trace(index) for index in (1, 5, 6, 7)], ledger, 4)
    assert [one.record.run_id for one in found] == ["run-1", "run-7", "run-6", "run-5"]


def test_a_trace_without_a_ledger_row_is_not_shown(ledger: RequestLedger):
    assert sampled_traces([trace(77)], ledger, 4) == []


def test_who_overrode_it_and_why_comes_from_the_audit(ledger: RequestLedger):
    one, other = sampled_traces([trace(1), trace(5)], ledger, 2)
    by_human = [row for row in feedback_rows(one) if row.source_kind == "HUMAN"]
    assert [(row.source, row.rationale, row.value) for row in by_human] == [("ann", "wrong order", True)]
    assert not [row for row in feedback_rows(other) if row.source_kind == "HUMAN"]
    assert [span.kind for span in one.spans] == ["LLM"]


def test_why_a_run_planned_again_stands_at_its_root(ledger: RequestLedger):
    first = PlanRevision(revision=0, after_calls=0, cause="request", steps=("look",), tool_budget=2)
    again = PlanRevision(revision=1, after_calls=2, cause="tool_error", steps=("ask",), tool_budget=3)
    record_run(ledger, 10, plans=(first, again))
    replanned, steady = sampled_traces([trace(5), trace(10)], ledger, 2)
    assert root_span(replanned).attributes["seatrial.replan_causes"] == "tool_error after 2 calls"
    assert root_span(steady).attributes["seatrial.replan_causes"] == ""
