"""Deny by default: what may run, what is counted, and what the policy hears."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_actors.agent.executor import MAX_STEP_CHARS, PLAN_ACCEPTED, Executor, Toolset
from rl_actors.contracts.rollouts import ToolCall, ToolResult
from rl_actors.environment.tools import ToolSpec
from tests.rl_actors.fakes import TOOLS, FakeWorld, executor

ORDER = {"order": "48213"}


def tool(name: str, arguments: Any = None, *, raw: str = "") -> ToolCall:
    return ToolCall(name=name, arguments=ORDER if arguments is None else arguments, raw=raw)


def planned(budget: Any, steps: Any = ("look",)) -> ToolCall:
    return ToolCall(name="plan", arguments={"steps": list(steps), "tool_budget": budget}, raw="")


def run(one: Executor, *calls: ToolCall) -> list[ToolResult]:
    async def all_of_them() -> list[ToolResult]:
        return [one.accept_plan(call) if call.name == "plan" else await one.execute(call) for call in calls]

    return asyncio.run(all_of_them())


def errors(one: Executor, *calls: ToolCall) -> list[str]:
    return [result.error for result in run(one, *calls)]


# --- the allow-list and the schemas ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "refusal"),
    [
        ("look", ORDER, ""),
        ("pay", ORDER, ""),
        ("plan", {"steps": [], "tool_budget": 0}, ""),
        ("refund", ORDER, "unknown_tool"),
        ("", ORDER, "unknown_tool"),
        ("Look", ORDER, "unknown_tool"),
        ("look ", ORDER, "unknown_tool"),
        ("__class__", ORDER, "unknown_tool"),
        ("look", {}, "bad_arguments"),
        ("look", {"order": 48213}, "bad_arguments"),
        ("look", {"order": "48213", "force": True}, "bad_arguments"),
        ("look", {"order": "48213; drop table orders"}, "bad_arguments"),
        ("look", {"order": None}, "bad_arguments"),
    ],
)
def test_only_listed_tools_with_valid_arguments_may_run(name: str, arguments: dict[str, Any], refusal: str):
    assert Toolset(TOOLS).refusal(ToolCall(name=name, arguments=arguments, raw="")) == refusal


def test_a_call_whose_text_was_no_object_is_refused():
    assert Toolset(TOOLS).refusal(ToolCall(name="look", arguments=None, raw="{")) == "bad_arguments"
    assert Toolset(TOOLS).refusal(ToolCall(name="gone", arguments=None, raw="{")) == "unknown_tool"


def test_a_workflow_cannot_replace_the_planner():
    """A tool that is called `plan` would be a door around the budget: the reserved schema wins."""
    impostor = ToolSpec(name="plan", description="", parameters={"type": "object"}, side_effect="write")
    assert Toolset([impostor]).refusal(ToolCall(name="plan", arguments={"x": 1}, raw="")) == "bad_arguments"


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"steps": ["look"]},
        {"tool_budget": 1},
        {"steps": "look", "tool_budget": 1},
        {"steps": [1], "tool_budget": 1},
        {"steps": [], "tool_budget": -1},
        {"steps": [], "tool_budget": 1.5},
        {"steps": [], "tool_budget": "3"},
        {"steps": [], "tool_budget": True},
        {"steps": [], "tool_budget": float("inf")},
        {"steps": ["x"] * 17, "tool_budget": 1},
        {"steps": [], "tool_budget": 1, "approve": True},
        None,
    ],
)
def test_a_plan_that_breaks_its_schema_is_refused_and_grants_nothing(arguments: Any):
    one = executor()
    answer = one.accept_plan(ToolCall(name="plan", arguments=arguments, raw=""))
    assert answer.error == "bad_arguments"
    assert not one.has_plan
    assert errors(one, tool("look")) == ["no_plan"]


# --- plan and budget ------------------------------------------------------------------------------


def test_an_approved_call_reaches_the_world_with_its_arguments():
    world = FakeWorld(content='{"status":"open"}')
    accepted, answer = run(executor(world), planned(1), tool("look"))
    assert (accepted.content, accepted.error) == (PLAN_ACCEPTED, "")
    assert (answer.content, answer.error) == ('{"status":"open"}', "")
    assert world.calls == [("look", ORDER)]


@pytest.mark.parametrize("call", [tool("refund"), tool("look", {}), ToolCall(name="look", arguments=None, raw="x")])
def test_a_refused_call_never_reaches_the_world(call: ToolCall):
    world = FakeWorld()
    one = executor(world)
    refusals = errors(one, planned(3), call)
    assert refusals[1] in {"unknown_tool", "bad_arguments"}
    assert world.calls == []
    assert (one.tool_calls_count, one.tool_error_count) == (1, 1)


def test_nothing_runs_without_a_plan():
    world = FakeWorld()
    assert errors(executor(world), tool("look"), planned(3), tool("look")) == ["no_plan", "", ""]
    assert len(world.calls) == 1


def test_the_plans_budget_bounds_the_calls():
    world = FakeWorld()
    assert errors(executor(world), planned(1), tool("look"), tool("pay")) == ["", "", "over_budget"]
    assert world.calls == [("look", ORDER)]


def test_a_budget_of_zero_allows_nothing():
    assert errors(executor(), planned(0), tool("look")) == ["", "over_budget"]


def test_a_refused_call_uses_up_budget():
    """Else a policy could probe tool names for free."""
    assert errors(executor(), planned(1), tool("refund"), tool("look")) == ["", "unknown_tool", "over_budget"]


@pytest.mark.parametrize("greedy", [4, 10**9])
def test_no_plan_can_raise_the_hard_cap(greedy: int):
    one = executor(max_tool_calls=2)
    calls = (planned(greedy), tool("look"), tool("look"), planned(greedy), tool("look"))
    assert errors(one, *calls) == ["", "", "", "", "over_budget"]
    assert one.budget == 2


def test_a_replan_is_counted_and_replaces_the_budget():
    one = executor()
    assert errors(one, planned(1), tool("look"), tool("look"), planned(3), tool("look")) == [
        "",
        "",
        "over_budget",
        "",
        "",
    ]
    assert len(one.plans) - 1 == 1


def test_a_replan_may_lower_the_budget_below_what_was_used():
    one = executor()
    assert errors(one, planned(3), tool("look"), tool("look"), planned(1), tool("look"))[-1] == "over_budget"


def test_a_refused_replan_changes_nothing():
    one = executor()
    assert errors(one, planned(2), planned(-1), tool("look")) == ["", "bad_arguments", ""]
    assert (len(one.plans) - 1, one.budget) == (0, 2)


def test_plans_are_kept_with_what_caused_them():
    one = executor(FakeWorld())
    run(one, planned(2, ["look"]), tool("look"), planned(5, ["pay"]), tool("refund"), planned(1, []))
    assert [(plan.revision, plan.after_calls, plan.cause, plan.steps, plan.tool_budget) for plan in one.plans] == [
        (0, 0, "request", ("look",), 2),
        (1, 1, "observation", ("pay",), 3),
        (2, 2, "tool_error", (), 1),
    ]
    assert len(one.plans) - 1 == 2


def test_the_first_plan_answers_the_request_whatever_was_refused_before_it():
    one = executor()
    run(one, tool("look"), planned(1))
    assert [(plan.revision, plan.after_calls, plan.cause) for plan in one.plans] == [(0, 1, "request")]
    assert len(one.plans) - 1 == 0


def test_a_refused_plan_is_not_kept():
    one = executor()
    run(one, planned(-1), planned(2), planned(-1))
    assert len(one.plans) == 1


@pytest.mark.parametrize("length", [0, MAX_STEP_CHARS, MAX_STEP_CHARS + 1, 100_000])
def test_a_long_step_is_cut_and_says_so(length: int):
    one = executor()
    run(one, planned(1, ["x" * length]))
    (kept,) = one.plans[0].steps
    assert len(kept) == min(length, MAX_STEP_CHARS)
    assert kept.endswith("…") == (length > MAX_STEP_CHARS)


# --- counts and the log ---------------------------------------------------------------------------


def test_the_hard_cap_counts_refused_calls_too():
    one = executor(max_tool_calls=2)
    assert not one.exhausted
    run(one, planned(2), tool("refund"))
    assert not one.exhausted
    run(one, tool("look"))
    assert one.exhausted


def test_an_error_of_the_tool_itself_is_counted():
    one = executor(FakeWorld(content='{"error":"no such order"}', error="tool_failure"))
    assert errors(one, planned(2), tool("look")) == ["", "tool_failure"]
    assert (one.tool_calls_count, one.tool_error_count) == (1, 1)


def test_the_last_calls_error_is_kept():
    one = executor()
    seen = []
    for call in (planned(2), tool("look"), ToolCall(name="pay", arguments=None, raw="{"), tool("pay")):
        (answer,) = run(one, call)
        seen.append((answer.error, one.last_error))
    assert seen == [("", ""), ("", ""), ("bad_arguments", "bad_arguments"), ("over_budget", "over_budget")]


def test_a_plan_is_no_tool_call():
    one = executor()
    run(one, planned(2), planned(-1))
    assert (one.tool_calls_count, one.tool_error_count, one.last_error) == (0, 0, "")


def test_a_denial_is_an_observation_the_policy_can_read():
    (answer,) = run(executor(), tool("look"))
    assert json.loads(answer.content) == {"error": "no_plan"}
    assert answer.duration_ms == 0.0


def test_two_requests_share_a_toolset_and_nothing_else():
    toolset = Toolset(TOOLS)
    first = Executor(toolset=toolset, world=FakeWorld(), max_tool_calls=3)
    second = Executor(toolset=toolset, world=FakeWorld(), max_tool_calls=3)
    run(first, planned(2), tool("look"))
    assert not second.has_plan
    assert (second.tool_calls_count, second.last_error) == (0, "")


kinds = st.sampled_from(["plan", "bad_plan", "look", "bad_look", "refund"])


@settings(deadline=None, max_examples=80)
@given(script=st.lists(st.tuples(kinds, st.integers(0, 5)), max_size=14), cap=st.integers(0, 4))
def test_whatever_a_policy_tries_the_world_sees_only_approved_calls(script: list[tuple[str, int]], cap: int):
    """Calls in the world never exceed the cap, each had a plan before it, and every attempt is counted once."""
    world = FakeWorld()
    one = executor(world, max_tool_calls=cap)
    made = {
        "plan": planned,
        "bad_plan": lambda budget: planned(-budget - 1),
        "look": lambda _: tool("look"),
        "bad_look": lambda _: tool("look", {}),
        "refund": lambda _: tool("refund"),
    }
    results = errors(one, *(made[kind](budget) for kind, budget in script))
    attempts = [(kind, error) for (kind, _), error in zip(script, results, strict=True) if "plan" not in kind]
    assert one.tool_calls_count == len(attempts)
    assert one.tool_error_count == sum(bool(error) for _, error in attempts)
    assert len(world.calls) == sum(not error for _, error in attempts) <= cap
    assert all(kind == "look" for kind, error in attempts if not error)
    if not any(kind == "plan" for kind, _ in script):
        assert world.calls == []
