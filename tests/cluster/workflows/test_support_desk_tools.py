"""Tools on a real database: schemas, refusals, what they write, and the shared live file."""

from __future__ import annotations

import inspect
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from cluster.workflows.support_desk import WORKFLOW, database
from cluster.workflows.support_desk.database import ARTICLES, Desk, transaction
from cluster.workflows.support_desk.tools import TOOLS, WORLD
from rl_actors.contracts.errors import BadInputError
from rl_actors.contracts.tasks import Task
from rl_actors.environment.tools import PLAN_ACCEPTED, ToolFailure, render_error, render_observation
from tests.cluster.workflows.desk_runs import calls_of, outcome_of, reply_of, right, try_call

ORDERS = ("O48-213", "O48-214", "O48-215")


def tracking_of(order_id: str) -> str:
    """Return the tracking code these tests give an order."""
    return f"T{order_id.replace('-', '/')}"


ROWS = {
    "customers": [
        {"customer_id": "C20_41", "email": "a@example.com"},
        {"customer_id": "C90_00", "email": "b@example.com"},
    ],
    "orders": [
        {
            "order_id": order_id,
            "customer_id": customer_id,
            "status": status,
            "days": 3,
            "return_window": "open",
            "tier": "standard",
            "total": 45,
            "address": "1 Oak Street",
        }
        for order_id, customer_id, status in (
            ("O48-213", "C20_41", "delivered"),
            ("O48-214", "C20_41", "placed"),
            ("O48-215", "C90_00", "shipped"),
        )
    ],
    "shipments": [{"order_id": o, "tracking": tracking_of(o), "remark": ""} for o in ORDERS],
    "payments": [
        {"order_id": o, "amount": 45, "status": "paid", "refunded": 0, "invoices": 0}
        for o in ("O48-213", "O48-214", "O48-215")
    ],
    "notes": [
        {"order_id": "O48-213", "author": "customer", "text": "older"},
        {"order_id": "O48-213", "author": "customer", "text": "newer"},
    ],
}
SELECTOR = {"orders": ["O48-213", "O48-214", "O48-215"], "customers": ["C20_41", "C90_00"]}
GOOD: Mapping[str, Mapping[str, Any]] = {
    "get_order": {"order_id": "O48-213", "customer_id": "C20_41"},
    "get_shipment": {"order_id": "O48-213"},
    "get_payment": {"order_id": "O48-213"},
    "search_policy": {"topic": "returns"},
    "refund_order": {"order_id": "O48-213", "amount": 45},
    "cancel_order": {"order_id": "O48-214"},
    "change_address": {"order_id": "O48-214", "address": "7 Elm Street"},
    "send_invoice": {"order_id": "O48-213"},
    "add_note": {"order_id": "O48-213", "text": "damaged"},
    "escalate": {"order_id": "O48-213", "reason": "limit"},
}
ANSWERS: Mapping[str, str] = {
    "get_order": '{"owner":"yes","status":"delivered","window":"open","tier":"standard","total":45,"note":"newer"}',
    "get_shipment": '{"tracking":"TO48/213","remark":""}',
    "get_payment": '{"amount":45,"status":"paid"}',
    "search_policy": '{"text":"Returns are accepted for 30 days."}',
    "refund_order": '{"refunded":45}',
    "cancel_order": '{"status":"cancelled"}',
    "change_address": '{"address":"updated"}',
    "send_invoice": '{"invoice":"sent"}',
    "add_note": '{"note":"saved"}',
    "escalate": '{"case":"open"}',
}


@pytest.fixture
def desk() -> Iterator[Desk]:
    """A private desk with three orders of two customers."""
    opened = WORLD.open(ROWS)
    yield opened
    WORLD.close(opened)


def schema_of(tool: str) -> Draft202012Validator:
    """Return the argument validator of a tool."""
    return Draft202012Validator(next(dict(spec.parameters) for spec in TOOLS if spec.name == tool))


def test_every_tool_has_a_function_and_the_reverse() -> None:
    assert {spec.name for spec in TOOLS} == set(WORLD.functions) == set(GOOD)
    assert len(TOOLS) >= 8


@pytest.mark.parametrize("spec", TOOLS, ids=lambda spec: spec.name)
def test_schema_matches_the_functions_signature(spec: Any) -> None:
    Draft202012Validator.check_schema(spec.parameters)
    names = list(inspect.signature(WORLD.functions[spec.name]).parameters)[1:]
    assert names == list(spec.parameters["properties"]) == spec.parameters["required"]
    assert spec.parameters["additionalProperties"] is False


@pytest.mark.parametrize("tool", GOOD)
def test_good_arguments_pass_and_answer_exactly(tool: str, desk: Desk) -> None:
    assert schema_of(tool).is_valid(dict(GOOD[tool]))
    assert render_observation(WORLD.functions[tool](desk, **GOOD[tool])) == ANSWERS[tool]


@pytest.mark.parametrize(
    ("tool", "changes"),
    [
        ("get_order", {"order_id": "4821"}),
        ("get_order", {"order_id": 48213}),
        ("get_order", {"customer_id": "2041"}),
        ("refund_order", {"amount": 0}),
        ("refund_order", {"amount": "45"}),
        ("refund_order", {"amount": 10**30}),
        ("escalate", {"reason": "because"}),
        ("add_note", {"text": ""}),
        ("add_note", {"text": "x" * 121}),
        ("add_note", {"text": "\ud800"}),
        ("cancel_order", {"force": True}),
    ],
)
def test_bad_arguments_fail_the_schema(tool: str, changes: dict[str, Any]) -> None:
    assert not schema_of(tool).is_valid({**GOOD[tool], **changes})


@pytest.mark.parametrize("tool", [name for name in GOOD if name != "search_policy"])
def test_unknown_order_is_refused_without_a_trace(tool: str, desk: Desk) -> None:
    before = WORLD.read_state(desk, SELECTOR)
    with pytest.raises(ToolFailure, match="order not found"):
        WORLD.functions[tool](desk, **{**GOOD[tool], "order_id": "O99-999"})
    assert WORLD.read_state(desk, SELECTOR) == before
    assert not desk.connection.in_transaction


@pytest.mark.parametrize(
    ("tool", "arguments", "refusal"),
    [
        ("refund_order", {"order_id": "O48-213", "amount": 46}, "amount above payment"),
        ("cancel_order", {"order_id": "O48-213"}, "already shipped"),
        ("cancel_order", {"order_id": "O48-215"}, "already shipped"),
        ("change_address", {"order_id": "O48-215", "address": "7 Elm Street"}, "already shipped"),
        ("search_policy", {"topic": "weather"}, "no article"),
    ],
)
def test_expected_refusals(tool: str, arguments: dict[str, Any], refusal: str, desk: Desk) -> None:
    before = WORLD.read_state(desk, SELECTOR)
    assert try_call(desk, tool, arguments) == refusal
    assert WORLD.read_state(desk, SELECTOR) == before


def test_second_refund_and_second_cancel_are_refused(desk: Desk) -> None:
    assert try_call(desk, "refund_order", GOOD["refund_order"]) == {"refunded": 45}
    assert try_call(desk, "refund_order", GOOD["refund_order"]) == "already refunded"
    assert try_call(desk, "cancel_order", GOOD["cancel_order"]) == {"status": "cancelled"}
    assert try_call(desk, "cancel_order", GOOD["cancel_order"]) == "already cancelled"


def test_identity_check_hides_everything_else(desk: Desk) -> None:
    assert WORLD.functions["get_order"](desk, "O48-215", "C20_41") == {"owner": "no"}


def test_tools_do_not_enforce_policy(desk: Desk) -> None:
    """A refund on another customer's shipped order goes through: the database must be able to show the violation."""
    assert try_call(desk, "refund_order", {"order_id": "O48-215", "amount": 45}) == {"refunded": 45}


def test_writes_and_private_reads_are_audited(desk: Desk) -> None:
    for tool in sorted(GOOD, key="cancel_order".__eq__):
        try_call(desk, tool, GOOD[tool])
    audited = {row["tool"] for row in WORLD.read_state(desk, SELECTOR)["audit"]}
    assert audited == set(GOOD) - {"get_order", "search_policy"}


@pytest.mark.parametrize("spec", TOOLS, ids=lambda spec: spec.name)
def test_side_effect_class_is_true(spec: Any, desk: Desk) -> None:
    before = dict(WORLD.read_state(desk, SELECTOR), audit=[])
    try_call(desk, spec.name, GOOD[spec.name])
    assert (dict(WORLD.read_state(desk, SELECTOR), audit=[]) != before) == (spec.side_effect == "write")


def test_read_state_returns_the_worlds_rows_unchanged(desk: Desk) -> None:
    state = WORLD.read_state(desk, SELECTOR)
    assert {table: state[table] for table in ROWS if table != "notes"} == {t: ROWS[t] for t in ROWS if t != "notes"}
    assert sorted(row["text"] for row in state["notes"]) == ["newer", "older"]
    assert state["escalations"] == state["audit"] == []


def test_read_state_is_limited_to_its_selector(desk: Desk) -> None:
    state = WORLD.read_state(desk, {"orders": ["O48-213"], "customers": []})
    assert [row["order_id"] for row in state["orders"]] == ["O48-213"]
    assert state["customers"] == []


def test_private_worlds_are_apart(desk: Desk) -> None:
    other = WORLD.open(ROWS)
    try_call(other, "refund_order", GOOD["refund_order"])
    assert WORLD.functions["get_payment"](desk, "O48-213")["status"] == "paid"
    WORLD.close(other)
    with pytest.raises(sqlite3.ProgrammingError):
        WORLD.read_state(other, SELECTOR)


def test_opening_is_fast() -> None:
    started = time.process_time()
    for _ in range(300):
        WORLD.close(WORLD.open(ROWS))
    assert (time.process_time() - started) / 300 < 0.0015


def test_interrupted_transaction_leaves_nothing(desk: Desk) -> None:
    def interrupted() -> None:
        with transaction(desk.connection):
            desk.connection.execute("UPDATE orders SET status = 'lost'")
            raise TimeoutError

    with pytest.raises(TimeoutError):
        interrupted()
    assert not desk.connection.in_transaction
    assert {row["status"] for row in WORLD.read_state(desk, SELECTOR)["orders"]} == {"delivered", "placed", "shipped"}


def test_observations_are_compact_ordered_json() -> None:
    assert render_observation({"b": 1, "a": "é"}) == '{"b":1,"a":"é"}'
    assert render_error("order not found") == '{"error":"order not found"}'


def test_plan_observation_is_the_one_of_the_agent_loop() -> None:
    assert PLAN_ACCEPTED == '{"plan":"accepted"}'


def test_every_article_can_be_found(desk: Desk) -> None:
    for topic, text in ARTICLES.items():
        assert WORLD.functions["search_policy"](desk, f" {topic.upper()} ") == {"text": text}


@pytest.fixture
def live(tmp_path: Path) -> tuple[list[Task], dict[str, str]]:
    """Live tasks and the database that holds their worlds."""
    tasks = WORKFLOW.build_tasks("live", 60, 3)
    path = str(tmp_path / "live database.sqlite")
    WORKFLOW.build_live_database(tasks, path)
    return tasks, {"database": path}


def test_live_tasks_do_not_interfere(live: tuple[list[Task], dict[str, str]]) -> None:
    tasks, world = live
    for task in tasks:
        attempt = right(task)
        outcome = outcome_of(task, calls_of(attempt), reply_of(attempt), world)
        assert outcome.success, (task, outcome)


def test_interleaved_live_sessions_do_not_interfere(live: tuple[list[Task], dict[str, str]]) -> None:
    tasks, world = live
    desks = [WORLD.open(world) for _ in tasks]
    attempts = [right(task) for task in tasks]
    for position in range(5):
        for desk, attempt in zip(desks, attempts, strict=True):
            for tool, arguments in calls_of(attempt)[position : position + 1]:
                try_call(desk, tool, arguments)
    for task, desk, attempt in zip(tasks, desks, attempts, strict=True):
        assert WORKFLOW.verify(task, WORLD.read_state(desk, task.goal["selector"]), reply_of(attempt)).success
        WORLD.close(desk)


def test_live_action_on_another_tickets_order_is_seen(live: tuple[list[Task], dict[str, str]]) -> None:
    tasks, world = live
    mine = next(task for task in tasks if task.intent == "order_status")
    other = next(task for task in tasks if task.intent == "send_invoice")
    attempt = right(mine)
    stray = ("send_invoice", {"order_id": other.goal["ticket"]["order_id"]})
    outcome = outcome_of(mine, [*calls_of(attempt), stray], reply_of(attempt), world)
    assert outcome.violations == ("action_on_another_customer",)


def test_live_refund_is_paid_once_under_contention(live: tuple[list[Task], dict[str, str]]) -> None:
    tasks, world = live
    task = next(task for task in tasks if task.intent == "refund")
    call = calls_of(right(task))[-1]
    answers: list[Any] = []

    def refund() -> None:
        desk = WORLD.open(world)
        answers.append(try_call(desk, *call))
        WORLD.close(desk)

    threads = [threading.Thread(target=refund) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(answer != "already refunded" for answer in answers) == 1


def test_busy_live_database_is_an_observation(
    live: tuple[list[Task], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, world = live
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.05)
    blocker, desk = WORLD.open(world), WORLD.open(world)
    order_id = tasks[0].world["orders"][0]["order_id"]
    with transaction(blocker.connection):
        assert try_call(desk, "send_invoice", {"order_id": order_id}) == "busy"
    assert try_call(desk, "send_invoice", {"order_id": order_id}) == {"invoice": "sent"}
    WORLD.close(desk)
    WORLD.close(blocker)


def test_live_database_is_in_wal_mode(live: tuple[list[Task], dict[str, str]]) -> None:
    desk = WORLD.open(live[1])
    assert desk.connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert desk.connection.execute("PRAGMA busy_timeout").fetchone() == (5000,)
    WORLD.close(desk)


def test_live_sessions_differ(live: tuple[list[Task], dict[str, str]]) -> None:
    one, two = WORLD.open(live[1]), WORLD.open(live[1])
    assert one.session != two.session
    WORLD.close(one)
    WORLD.close(two)


def test_missing_live_database_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.OperationalError):
        WORLD.open({"database": str(tmp_path / "none.sqlite")})
    assert not (tmp_path / "none.sqlite").exists()


def test_live_database_is_never_overwritten(live: tuple[list[Task], dict[str, str]]) -> None:
    with pytest.raises(BadInputError, match="already there"):
        WORKFLOW.build_live_database(live[0], live[1]["database"])


def test_worlds_that_share_an_order_cannot_be_merged(tmp_path: Path) -> None:
    task = WORKFLOW.build_tasks("live", 1, 3)[0]
    with pytest.raises(sqlite3.IntegrityError):
        WORKFLOW.build_live_database([task, task], str(tmp_path / "live.sqlite"))


def test_named_live_session_is_read_from_another_handle(live: tuple[list[Task], dict[str, str]]) -> None:
    """How a run is verified from outside: whoever knows the session sees what it touched, nobody else does."""
    tasks, world = live
    order = tasks[1].world["orders"][0]["order_id"]
    actor = WORLD.open({**world, "session": "run-7"})
    WORLD.functions["get_payment"](actor, order_id=order)
    WORLD.close(actor)
    for session, is_seen in (("run-7", True), ("run-8", False), ("", False)):
        reader = WORLD.open({**world, "session": session})
        audit = WORLD.read_state(reader, tasks[0].goal["selector"])["audit"]
        WORLD.close(reader)
        assert (order in {row["order_id"] for row in audit}) == is_seen
