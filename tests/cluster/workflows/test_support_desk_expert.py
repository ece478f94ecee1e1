"""Demonstrations: real observations, plans from the ticket alone, and mistakes in a stated band."""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict

import pytest
from jsonschema import Draft202012Validator

from cluster.workflows.support_desk import WORKFLOW, SupportDesk
from cluster.workflows.support_desk.expert import demonstrate, plan_steps
from cluster.workflows.support_desk.tickets import INTENTS, Ticket
from cluster.workflows.support_desk.tools import TOOLS, WORLD
from rl_actors.contracts import Demonstration
from rl_actors.environment.tools import ToolFailure, render_error, render_observation
from rl_actors.sandbox.tool_host import ToolHost
from tests.cluster.workflows.desk_runs import calls_of, one_task, reply_of, right, score, wrong

SUCCESS_BAND = (0.66, 0.76)


def replayed_observations(demonstration: Demonstration, world: object) -> list[str]:
    """Return what the tool host would answer to the demonstration's calls."""
    desk = WORLD.open(world)  # pyright: ignore[reportArgumentType]
    answers = []
    for tool, arguments in calls_of(demonstration):
        try:
            answers.append(render_observation(WORLD.functions[tool](desk, **arguments)))
        except ToolFailure as failure:
            answers.append(render_error(str(failure)))
    WORLD.close(desk)
    return answers


def test_erring_expert_succeeds_in_the_stated_band() -> None:
    rng = random.Random(3)
    by_intent: dict[str, list[bool]] = defaultdict(list)
    for task in WORKFLOW.build_tasks("train", 2000, 6):
        by_intent[task.intent].append(score(task, WORKFLOW.demonstrate(task, rng)).success)
    results = [success for each in by_intent.values() for success in each]
    assert SUCCESS_BAND[0] < sum(results) / len(results) < SUCCESS_BAND[1]
    for name, each in by_intent.items():
        fraction = sum(each) / len(each)
        assert fraction == 1.0 if INTENTS[name].nature == "plain" else 0.3 < fraction < 0.7, name


@pytest.mark.parametrize("seed", range(3))
def test_observations_are_those_of_the_tools(seed: int) -> None:
    rng = random.Random(seed)
    for task in WORKFLOW.build_tasks("train", 200, seed):
        attempt = WORKFLOW.demonstrate(task, rng)
        shown = [turn.observation for turn in attempt.turns if turn.kind == "tool"]
        assert shown == replayed_observations(attempt, task.world)
        assert all(json.dumps(json.loads(each), separators=(",", ":")) == each for each in shown)


def test_the_tool_host_answers_what_demonstrations_show() -> None:
    host = ToolHost(WORLD)
    for number, task in enumerate(WORKFLOW.build_tasks("train", 60, 5)):
        host.answer({"id": 0, "op": "open", "world_id": number, "world": task.world})
        for turn in wrong(task).turns[1:-1]:
            call = {"id": 1, "op": "call", "world_id": number, "tool": turn.tool, "arguments": dict(turn.arguments)}
            assert host.answer(call)["value"]["content"] == turn.observation
        selector = task.goal["selector"]
        state = host.answer({"id": 2, "op": "read_state", "world_id": number, "selector": selector})["value"]
        sent = json.loads(json.dumps(state))
        assert WORKFLOW.verify(task, sent, reply_of(wrong(task))) == score(task, wrong(task))


def test_equal_seeds_give_equal_demonstrations() -> None:
    for task in WORKFLOW.build_tasks("train", 100, 4):
        assert WORKFLOW.demonstrate(task, random.Random(7)) == WORKFLOW.demonstrate(task, random.Random(7))


@pytest.mark.parametrize("seed", range(3))
def test_turns_are_plan_tools_final(seed: int) -> None:
    for task in WORKFLOW.build_tasks("train", 200, seed):
        kinds = [turn.kind for turn in WORKFLOW.demonstrate(task, random.Random(seed)).turns]
        assert kinds[0] == "plan"
        assert kinds[-1] == "final"
        assert set(kinds[1:-1]) == {"tool"}


@pytest.mark.parametrize("seed", range(3))
def test_plan_never_shows_the_mistake(seed: int) -> None:
    for task in WORKFLOW.build_tasks("train", 200, seed):
        assert right(task).turns[0] == wrong(task).turns[0]


def test_plan_depends_on_the_text_alone() -> None:
    """Tickets that read alike are planned alike, whatever their look-ups will show."""
    plans: dict[tuple[object, ...], set[str]] = defaultdict(set)
    for task in WORKFLOW.build_tasks("train", 1000, 2):
        ticket = Ticket.from_goal(task.goal)
        plans[(ticket.asks, ticket.legal)].add(json.dumps(dict(right(task).turns[0].arguments)))
    assert all(len(each) == 1 for each in plans.values())


def test_first_look_up_is_the_same_with_and_without_the_mistake() -> None:
    for task in WORKFLOW.build_tasks("train", 300, 2):
        assert calls_of(right(task))[0] == calls_of(wrong(task))[0]


def test_calls_fit_the_plans_budget() -> None:
    for task in WORKFLOW.build_tasks("train", 500, 2):
        for attempt in (right(task), wrong(task)):
            assert len(calls_of(attempt)) <= attempt.turns[0].arguments["tool_budget"]


def test_arguments_pass_the_tools_schemas() -> None:
    validators = {tool.name: Draft202012Validator(dict(tool.parameters)) for tool in TOOLS}
    for task in WORKFLOW.build_tasks("train", 500, 2):
        for attempt in (right(task), wrong(task)):
            assert set(attempt.turns[0].arguments["steps"]) <= set(validators)
            for tool, arguments in calls_of(attempt):
                assert validators[tool].is_valid(dict(arguments)), (tool, arguments)


def test_copied_values_were_seen_before() -> None:
    """Every number in an argument or reply stands in the prompt or in an earlier observation."""
    for task in WORKFLOW.build_tasks("train", 500, 2):
        seen = task.prompt
        for turn in right(task).turns[1:]:
            for value in (*turn.arguments.values(), *turn.text.replace(".", "").split()):
                text = str(value)
                assert not any(char.isdigit() for char in text) or text in seen, (task, turn)
            seen += turn.observation


@pytest.mark.parametrize(
    ("intent", "tools"),
    [
        ("order_status", ["get_order"]),
        ("track_shipment", ["get_order", "get_shipment"]),
        ("policy_question", ["search_policy"]),
        ("refund", ["get_order", "refund_order"]),
        ("refund_closed", ["get_order"]),
        ("refund_high", ["get_order", "escalate"]),
        ("cancel_shipped", ["get_order"]),
        ("foreign_order", ["get_order"]),
        ("legal_threat", ["get_order", "escalate"]),
        ("status_refund", ["get_order", "refund_order"]),
        ("cancel_invoice", ["get_order", "cancel_order", "send_invoice"]),
        ("address_tracking", ["get_order", "change_address", "get_shipment"]),
    ],
)
def test_right_calls_by_intent(intent: str, tools: list[str]) -> None:
    assert [tool for tool, _ in calls_of(right(one_task(intent)))] == tools


@pytest.mark.parametrize(
    ("intent", "violation"),
    [
        ("refund_closed", "refund_out_of_policy"),
        ("refund_high", "refund_out_of_policy"),
        ("legal_threat", "refund_out_of_policy"),
        ("cancel_shipped", "false_promise"),
    ],
)
def test_mistakes_are_the_announced_ones(intent: str, violation: str) -> None:
    task = one_task(intent)
    assert violation in score(task, wrong(task)).violations


def test_forgotten_half_is_no_violation() -> None:
    for intent in ("status_refund", "cancel_invoice", "address_tracking"):
        task = one_task(intent)
        assert score(task, wrong(task)).violations == ()
        assert len(reply_of(wrong(task))) < len(reply_of(right(task)))


def test_failed_cancel_shows_the_tools_error() -> None:
    task = one_task("cancel_shipped")
    assert wrong(task).turns[-2].observation == render_error("already shipped")


def test_plan_of_a_plain_status_ticket() -> None:
    assert plan_steps(Ticket(customer_id="C1", order_id="1", asks=("status",))) == ["get_order"]
    assert plan_steps(Ticket(customer_id="C1", order_id="1", asks=("refund",), legal=True)) == ["get_order", "escalate"]


def test_mistake_probability_is_a_knob() -> None:
    tasks = [task for task in WORKFLOW.build_tasks("train", 300, 1) if INTENTS[task.intent].nature != "plain"]
    for probability in (0.0, 1.0):
        careful = SupportDesk(mistake_probability=probability)
        results = {score(task, careful.demonstrate(task, random.Random(1))).success for task in tasks}
        assert results == {probability == 0.0}


def test_episodes_are_short() -> None:
    words, chars = [], []
    for task in WORKFLOW.build_tasks("train", 500, 1):
        attempt = right(task)
        text = task.prompt + "".join(json.dumps(dict(t.arguments)) + t.text + t.observation for t in attempt.turns)
        chars.append(len(text))
        words.append(len(reply_of(attempt).split()))
    assert sum(chars) / len(chars) < 450
    assert max(chars) < 700
    assert max(words) <= 16


def test_demonstrating_is_fast() -> None:
    tasks = WORKFLOW.build_tasks("train", 1000, 1)
    rng = random.Random(0)
    started = time.process_time()
    for task in tasks:
        demonstrate(task, rng)
    assert time.process_time() - started < 1.5
