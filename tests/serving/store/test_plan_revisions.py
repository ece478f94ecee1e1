"""Every plan of a live run is kept with its cause: plan, act, observe, replan, read back from the ledger."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from rl_actors.agent.executor import MAX_STEP_CHARS
from rl_actors.contracts.errors import BadInputError, EngineError
from rl_actors.contracts.rollouts import Completion, PlanRevision, SamplingParams, ToolResult
from rl_actors.contracts.tasks import AgentLimits
from rl_actors.environment.tools import PLAN_ACCEPTED, render_error
from serving.gateway.answer import LiveRequests
from serving.gateway.openai_api import ApiError
from serving.store.ledger import RequestLedger
from tests.serving.fakes import START, make_completion, make_record, record_run
from tests.serving.gateway.live_fakes import HELLO, STABLE, MemoryWorlds, Rig, live_request, make_rig, renderer

ROOMY = AgentLimits(max_turns=8, max_tool_calls=4, max_tokens_per_turn=200, max_context_tokens=3_000, timeout_s=20.0)
LONG = "look " * 100
BROKEN = "tool_failure"


@dataclass
class FlakyWorlds(MemoryWorlds):
    """A world whose first calls fail, as many as `failures` says; what is observed says so."""

    failures: int = 0

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> ToolResult:
        result = await super().call(tool, arguments)
        if len(self.calls) > self.failures:
            return result
        return ToolResult(content=render_error(BROKEN), error=BROKEN, duration_ms=1.0)


@dataclass
class ReplanningEngine:
    """A policy that plans, pays, plans again after each error it reads, and answers once the payment went through.

    `dies_after` is the number of turns after which the engine itself breaks.
    """

    dies_after: int = 99
    step: str = "pay the order"
    num_turns: int = field(default=0)

    async def __call__(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        self.num_turns += 1
        if self.num_turns > self.dies_after:
            raise EngineError("the engine is dead")
        text = renderer().decode(prompt_token_ids)
        num_plans, num_errors = text.count(PLAN_ACCEPTED), text.count(render_error(BROKEN))
        if num_plans <= num_errors:
            arguments = {"steps": [self.step, f"after {num_errors} errors"], "tool_budget": 2 + num_plans}
            ids = renderer().call("plan", arguments)
        elif '{"ok":1}' in text:
            ids = renderer().final("It is paid.")
        else:
            ids = renderer().call("pay", {"order": "48213"})
        return Completion(
            token_ids=tuple(ids), logprobs=(0.0,) * len(ids), weights_version=0, finished=True, cached_tokens=0
        )


def answered(tmp_path: Path, engine: Any, *, failures: int) -> Rig:
    """A gateway that was asked once, on a world that fails so many times."""
    rig = make_rig(tmp_path, config={"limits": ROOMY})
    rig.engines[STABLE] = engine
    rig.ports = replace(rig.ports, worlds=FlakyWorlds(failures=failures))
    asyncio.run(LiveRequests(rig.ports).answer(live_request(request_id="ask-1", session_key="ann")))
    return rig


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_a_tool_failure_leads_to_a_replan_and_both_plans_are_in_the_ledger(tmp_path: Path):
    rig = answered(tmp_path, ReplanningEngine(), failures=1)
    (row,) = rig.rows()
    assert (row.status, row.tool_calls_count, row.tool_error_count) == ("ok", 2, 1)
    assert rig.ledger.plans(row.run_id) == (
        PlanRevision(
            revision=0, after_calls=0, cause="request", steps=("pay the order", "after 0 errors"), tool_budget=2
        ),
        PlanRevision(
            revision=1, after_calls=1, cause="tool_error", steps=("pay the order", "after 1 errors"), tool_budget=3
        ),
    )


def test_without_the_failure_the_same_policy_keeps_to_its_plan(tmp_path: Path):
    rig = answered(tmp_path, ReplanningEngine(), failures=0)
    (row,) = rig.rows()
    assert (row.status, row.tool_calls_count, row.tool_error_count) == ("ok", 1, 0)
    (only,) = rig.ledger.plans(row.run_id)
    assert (only.revision, only.cause) == (0, "request")


def test_every_failure_has_a_replan_of_its_own(tmp_path: Path):
    rig = answered(tmp_path, ReplanningEngine(), failures=2)
    plans = rig.ledger.plans("run-ask-1")
    assert [(plan.revision, plan.after_calls, plan.cause) for plan in plans] == [
        (0, 0, "request"),
        (1, 1, "tool_error"),
        (2, 2, "tool_error"),
    ]


def test_a_budget_is_kept_as_it_was_granted(tmp_path: Path):
    rig = answered(tmp_path, ReplanningEngine(), failures=3)
    assert [plan.tool_budget for plan in rig.ledger.plans("run-ask-1")] == [2, 3, ROOMY.max_tool_calls, 4]


def test_a_run_that_dies_keeps_the_plans_it_made(tmp_path: Path):
    with pytest.raises(ApiError) as caught:
        answered(tmp_path, ReplanningEngine(dies_after=3), failures=1)
    assert caught.value.status == 503
    with closing(RequestLedger(tmp_path / "ledger.sqlite", owner="reader")) as ledger:
        (row,) = ledger.rows()
        assert row.status == "engine_error"
        assert [plan.cause for plan in ledger.plans(row.run_id)] == ["request", "tool_error"]


def test_a_run_without_a_plan_has_none(tmp_path: Path):
    rig = make_rig(tmp_path, scripts={STABLE: HELLO})
    rig = answered(tmp_path / "other", rig.engines[STABLE], failures=0)
    assert rig.ledger.plans("run-ask-1") == ()


def test_long_text_of_a_policy_is_cut_where_it_is_kept(tmp_path: Path):
    rig = answered(tmp_path, ReplanningEngine(step=LONG), failures=0)
    (plan,) = rig.ledger.plans("run-ask-1")
    assert plan.steps == (f"{LONG[: MAX_STEP_CHARS - 1]}…", "after 0 errors")
    assert len(plan.steps[0]) == MAX_STEP_CHARS


# --- the ledger -------------------------------------------------------------------------------------------------------

FIRST = PlanRevision(revision=0, after_calls=0, cause="request", steps=("look",), tool_budget=2)
SECOND = PlanRevision(revision=1, after_calls=1, cause="observation", steps=(), tool_budget=0)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[RequestLedger]:
    with closing(RequestLedger(tmp_path / "ledger.sqlite", owner="gateway-1")) as opened:
        yield opened


def raw(path: Path) -> sqlite3.Connection:
    """A connection beside the API, as a careless script would open one."""
    return sqlite3.connect(path, isolation_level=None)


def test_plans_come_back_in_order_and_only_those_of_the_run(ledger: RequestLedger):
    record_run(ledger, 0, plans=(FIRST, SECOND))
    record_run(ledger, 1, plans=(FIRST,))
    assert ledger.plans("run-0") == (FIRST, SECOND)
    assert ledger.plans("run-1") == (FIRST,)
    assert ledger.plans("run-2") == ()


@pytest.mark.parametrize("text", ["", "\ud800", "\x00", '"]', "'; DROP TABLE runs; --", "naïve 計画"])
def test_any_text_of_a_step_comes_back(ledger: RequestLedger, text: str):
    plan = replace(FIRST, steps=(text, "look"))
    record_run(ledger, 0, plans=(plan,))
    assert ledger.plans("run-0") == (plan,)


def test_a_replan_has_the_time_at_which_its_run_ended(ledger: RequestLedger):
    record_run(ledger, 0, at=START + 7, plans=(FIRST, SECOND))
    with closing(raw(ledger.path)) as beside:
        assert beside.execute("SELECT DISTINCT at FROM plan_revisions").fetchall() == [(START + 7,)]


@pytest.mark.parametrize(
    "plans",
    [
        (FIRST, FIRST),
        (replace(FIRST, cause="boredom"),),  # type: ignore[arg-type]
        (replace(FIRST, tool_budget=-1),),
        (replace(FIRST, after_calls=-1),),
        (replace(FIRST, revision=-1),),
    ],
)
def test_a_row_and_its_plans_are_written_together_or_not_at_all(ledger: RequestLedger, plans: tuple[PlanRevision, ...]):
    ledger.start(make_record())
    with pytest.raises(BadInputError, match="schema refuses it"):
        ledger.complete("run-0", make_completion(plans=plans), at=START)
    assert next(ledger.rows()).status == "running"
    assert ledger.plans("run-0") == ()
    ledger.complete("run-0", make_completion(plans=(FIRST,)), at=START)
    assert ledger.plans("run-0") == (FIRST,)


def test_a_second_completion_adds_no_plan(ledger: RequestLedger):
    record_run(ledger, 0, plans=(FIRST,))
    with pytest.raises(BadInputError, match="already ended"):
        ledger.complete("run-0", make_completion(plans=(SECOND,)), at=START)
    with pytest.raises(BadInputError, match="start it first"):
        ledger.complete("run-9", make_completion(plans=(FIRST,)), at=START)
    assert ledger.plans("run-0") == (FIRST,)
    assert ledger.plans("run-9") == ()


@pytest.mark.parametrize("change", ["DELETE FROM plan_revisions", "UPDATE plan_revisions SET cause = 'observation'"])
def test_a_plan_is_never_changed_or_deleted(ledger: RequestLedger, change: str):
    record_run(ledger, 0, plans=(FIRST,))
    with closing(raw(ledger.path)) as beside, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        beside.execute(change)
    assert ledger.plans("run-0") == (FIRST,)


def test_a_ledger_of_an_older_version_gets_the_table_and_keeps_its_rows(ledger: RequestLedger):
    record_run(ledger, 0)
    ledger.close()
    with closing(raw(ledger.path)) as beside:
        beside.execute("DROP TABLE plan_revisions")
    with closing(RequestLedger(ledger.path, owner="gateway-2")) as opened:
        assert opened.plans("run-0") == ()
        record_run(opened, 1, plans=(FIRST,))
        assert opened.plans("run-1") == (FIRST,)
        assert len(list(opened.rows())) == 2
    with closing(raw(ledger.path)) as beside, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        beside.execute("DELETE FROM plan_revisions")
