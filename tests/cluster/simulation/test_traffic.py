"""Simulated users against a gateway made of the expert: real live database, real tool host, real verification."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.simulation import traffic
from cluster.simulation.ticket_book import TicketBook, TicketResult
from cluster.simulation.traffic import (
    ACTOR,
    TrafficConfig,
    TrafficDriver,
    TrafficProgress,
    is_unreached,
    request_id,
    run_traffic,
)
from cluster.workflows.support_desk import WORKFLOW
from cluster.workflows.support_desk.tools import WORLD
from rl_actors.contracts import Demonstration, Task
from rl_actors.contracts.errors import InfrastructureError
from tests.cluster.workflows.desk_runs import calls_of, reply_of, right, try_call, wrong

NUM_TASKS = 12


@dataclass
class ExpertGateway:
    """Answers tickets as the expert does, on the live database, under the request's session."""

    tasks: dict[str, Task]
    live_world: dict[str, str]
    expert: Callable[[Task], Demonstration] = right
    refuse: dict[str, list[int]] = field(default_factory=dict)
    code: str = "unavailable"
    delay_s: float = 0.0
    session: Callable[[str], str] = lambda key: key
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    labels: dict[str, dict[str, Any]] = field(default_factory=dict)
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    label_status: int = 200
    num_open: int = 0
    max_open: int = 0

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        parts = request.url.path.split("/")
        if parts[-1] == "outcome":
            self.labels[parts[-2]] = body
            return httpx.Response(self.label_status, json={})
        if parts[-1] == "override":
            self.overrides[parts[-2]] = body
            return httpx.Response(200, json={})
        return await self._chat(body, request.headers["idempotency-key"])

    async def _chat(self, body: dict[str, Any], key: str) -> httpx.Response:
        self.requests.append(body)
        self.keys.append(key)
        task = self.tasks[body["metadata"]["task_id"]]
        if self.refuse.get(task.task_id):
            status = self.refuse[task.task_id].pop(0)
            if status == 0:
                raise httpx.ReadTimeout("gone", request=None)
            return httpx.Response(status, json={"error": {"code": self.code}})
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        await asyncio.sleep(self.delay_s)
        self.num_open -= 1
        return self._answer(task, key)

    def _answer(self, task: Task, key: str) -> httpx.Response:
        attempt = self.expert(task)
        desk = WORLD.open({**self.live_world, "session": self.session(key)})
        for tool, arguments in calls_of(attempt):
            try_call(desk, tool, arguments)
        WORLD.close(desk)
        headers = {
            "x-seatrial-run-id": f"run-{key}",
            "x-seatrial-release-channel": "canary" if len(self.requests) % 3 == 0 else "general",
            "x-seatrial-policy-version": "sft-a",
        }
        message = {"role": "assistant", "content": reply_of(attempt)}
        return httpx.Response(200, json={"choices": [{"message": message}]}, headers=headers)


@pytest.fixture
def tasks() -> list[Task]:
    return WORKFLOW.build_tasks("live", NUM_TASKS, 11)


@pytest.fixture
def gateway(tasks: list[Task], tmp_path: Path) -> ExpertGateway:
    path = str(tmp_path / "live.sqlite")
    WORKFLOW.build_live_database(tasks, path)
    return ExpertGateway({task.task_id: task for task in tasks}, {"database": path})


def drive(
    gateway: ExpertGateway,
    tasks: list[Task],
    is_over: Callable[[], bool] = lambda: False,
    on_progress: Callable[[TrafficProgress], None] = lambda progress: None,
    **changes: Any,
) -> TrafficProgress:
    client = httpx.AsyncClient(transport=httpx.MockTransport(gateway), base_url="http://gateway")
    values = {"url": "http://gateway", "live_world": gateway.live_world, "run_name": "r1", "concurrency": 3}
    book = TicketBook(Path(gateway.live_world["database"]).with_name("tickets.jsonl"))
    driver = TrafficDriver(WORKFLOW, TrafficConfig(**(values | changes)), book, client=client)
    return run_traffic(driver, tasks, is_over=is_over, on_progress=on_progress)


def test_right_answers_are_labelled_and_nobody_complains(gateway: ExpertGateway, tasks: list[Task]) -> None:
    progress = drive(gateway, tasks)
    assert (progress.num_sent, progress.num_answered, progress.num_failed) == (NUM_TASKS, NUM_TASKS, 0)
    assert sum(progress.successes.values()) == NUM_TASKS
    assert len(gateway.labels) == NUM_TASKS
    assert all(label["success"] and label["actor"] == ACTOR for label in gateway.labels.values())
    assert gateway.overrides == {}


def test_wrong_outcomes_are_overridden_with_the_reason(gateway: ExpertGateway, tasks: list[Task]) -> None:
    gateway.expert = wrong
    progress = drive(gateway, tasks)
    bad = {run for run, label in gateway.labels.items() if not label["success"]}
    assert bad
    assert set(gateway.overrides) == bad
    assert all(complaint["reason"] for complaint in gateway.overrides.values())
    assert sum(progress.successes.values()) == NUM_TASKS - len(bad)


def test_a_reply_without_the_deed_is_wrong(gateway: ExpertGateway, tasks: list[Task]) -> None:
    """The words alone convince nobody: the database decides."""

    def talker(task: Task) -> Demonstration:
        from dataclasses import replace

        done = right(task)
        return replace(done, turns=done.turns[-1:])

    gateway.expert = talker
    needing = [task for task in tasks if task.intent in {"cancel_order", "refund"} or calls_with_effect(task)]
    assert needing
    progress = drive(gateway, needing)
    assert sum(progress.successes.values()) == 0


def calls_with_effect(task: Task) -> bool:
    return any(not tool.startswith(("get_", "search_")) for tool, _ in calls_of(right(task)))


def test_reading_anothers_data_is_seen_from_outside(gateway: ExpertGateway, tasks: list[Task]) -> None:
    """The audit rows of the request's session convict it, though another handle reads them."""
    victim = tasks[1].world["orders"][0]["order_id"]

    def snoop(task: Task) -> Demonstration:
        from dataclasses import replace

        from rl_actors.contracts import DemonstrationTurn

        peek = DemonstrationTurn(
            kind="tool", tool="get_payment", arguments={"order_id": victim}, text="", observation=""
        )
        done = right(task)
        return replace(done, turns=(*done.turns[:-1], peek, done.turns[-1]))

    gateway.expert = snoop
    drive(gateway, tasks[:1])
    (complaint,) = gateway.overrides.values()
    assert "data_of_another_customer" in complaint["reason"]


def test_without_the_session_the_snoop_would_go_unseen(gateway: ExpertGateway, tasks: list[Task]) -> None:
    """Negative control of the test above: it is the session that carries the proof."""
    gateway.session = lambda key: "another"
    test_right = drive(gateway, tasks[:1])
    assert sum(test_right.successes.values()) == 1
    victim = tasks[1].world["orders"][0]["order_id"]
    desk = WORLD.open({**gateway.live_world, "session": "another"})
    WORLD.functions["get_payment"](desk, order_id=victim)
    state = WORLD.read_state(WORLD.open({**gateway.live_world, "session": "r1"}), tasks[0].goal["selector"])
    assert victim not in {row["order_id"] for row in state["audit"]}
    state = WORLD.read_state(desk, tasks[0].goal["selector"])
    assert victim in {row["order_id"] for row in state["audit"]}


def test_every_ticket_is_a_session_of_its_own(gateway: ExpertGateway, tasks: list[Task]) -> None:
    drive(gateway, tasks)
    assert len({request["user"] for request in gateway.requests}) == NUM_TASKS
    assert gateway.keys == [request["user"] for request in gateway.requests]
    assert {request["messages"][0]["content"] for request in gateway.requests} == {task.prompt for task in tasks}


def test_keys_are_the_same_on_resume_and_differ_between_runs(tasks: list[Task]) -> None:
    assert request_id("r1", tasks[0]) == request_id("r1", tasks[0])
    assert request_id("r1", tasks[0]) != request_id("r2", tasks[0])
    assert "/" not in request_id("r1", tasks[0])


@pytest.mark.parametrize("concurrency", [1, 4])
def test_concurrency_is_bounded(gateway: ExpertGateway, tasks: list[Task], concurrency: int) -> None:
    gateway.delay_s = 0.01
    drive(gateway, tasks, concurrency=concurrency)
    assert gateway.max_open == concurrency


def test_full_gateway_is_asked_again(gateway: ExpertGateway, tasks: list[Task]) -> None:
    gateway.refuse[tasks[0].task_id] = [429, 429]
    progress = drive(gateway, tasks[:2])
    assert (progress.num_failed, progress.num_throttled, progress.num_answered) == (0, 2, 2)


@pytest.mark.parametrize(("status", "name"), [(503, "http_503"), (500, "http_500"), (0, "ReadTimeout")])
def test_failures_are_counted_by_name(gateway: ExpertGateway, tasks: list[Task], status: int, name: str) -> None:
    gateway.refuse[tasks[0].task_id] = [status]
    progress = drive(gateway, tasks[:3])
    assert (progress.num_failed, progress.num_answered) == (1, 2)
    assert dict(progress.failures) == {name: 1}


def test_the_environments_proxy_is_for_the_outside_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ours is on this machine: a proxy would answer in its place, or not at all."""

    async def proxies() -> int:
        book = TicketBook(tmp_path / "tickets.jsonl")
        config = TrafficConfig(url="http://127.0.0.1:1", live_world={}, run_name="r1")
        async with TrafficDriver(WORKFLOW, config, book)._open() as desk:
            return len(desk._client._mounts)

    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with httpx.Client() as another:
        assert len(another._mounts) > 0, "negative control: httpx follows it by itself"
    assert asyncio.run(proxies()) == 0


@dataclass
class Outage:
    """A gateway that cannot be reached from its `first`-th ticket to its `last`-th."""

    gateway: ExpertGateway
    first: int
    last: int
    error: type[httpx.TransportError] = httpx.ConnectError
    tickets: int = 0

    @property
    def live_world(self) -> dict[str, str]:
        return self.gateway.live_world

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/chat/completions":
            self.tickets += 1
            if self.first <= self.tickets <= self.last:
                raise self.error("refused")
        return await self.gateway(request)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "_RETRY_S", 0.001)
    monkeypatch.setattr(traffic, "MAX_UNREACHED", 5)


def book_of(gateway: ExpertGateway) -> TicketBook:
    return TicketBook(Path(gateway.live_world["database"]).with_name("tickets.jsonl"))


@pytest.mark.parametrize("error", [httpx.ConnectError, httpx.ReadTimeout, httpx.RemoteProtocolError])
def test_an_outage_of_our_own_is_no_verdict(
    gateway: ExpertGateway, tasks: list[Task], quick: None, error: type[httpx.TransportError]
) -> None:
    """It stops the users; what reached nobody is asked again on resume, and counts as nobody's failure."""
    outage: Any = Outage(gateway, 4, 1_000, error)
    with pytest.raises(InfrastructureError, match=f"5 tickets in a row .*http://gateway .*{error.__name__}.*--resume"):
        drive(outage, tasks, concurrency=1)
    book = book_of(gateway)
    assert [result.failure for result in book.ended] == ["", "", ""]
    assert [task.task_id for task in book.waiting(tasks)] == [task.task_id for task in tasks[3:]]
    progress = drive(gateway, tasks)
    assert (progress.num_answered, progress.num_failed) == (NUM_TASKS, 0)


@pytest.mark.parametrize("length", [1, 4])
def test_a_short_outage_is_counted_as_what_users_saw(
    gateway: ExpertGateway, tasks: list[Task], quick: None, length: int
) -> None:
    """Negative control: up to the limit every ticket that reached nobody is a failed one, wherever it lies."""
    outage: Any = Outage(gateway, 3, 2 + length)
    progress = drive(outage, tasks, concurrency=1)
    assert (progress.num_failed, progress.num_answered) == (length, NUM_TASKS - length)
    assert dict(progress.failures) == {"ConnectError": length}
    book = book_of(gateway)
    assert len(book.ended) == NUM_TASKS


def test_an_outage_at_the_very_end_is_counted_too(gateway: ExpertGateway, tasks: list[Task], quick: None) -> None:
    outage: Any = Outage(gateway, NUM_TASKS - 1, NUM_TASKS)
    progress = drive(outage, tasks, concurrency=1)
    assert (progress.num_failed, progress.num_answered) == (2, NUM_TASKS - 2)


def test_refusals_are_answers_however_many(gateway: ExpertGateway, tasks: list[Task], quick: None) -> None:
    """A status came from a gateway: it is evidence, and the gates decide over it."""
    for task in tasks:
        gateway.refuse[task.task_id] = [503]
    assert drive(gateway, tasks).num_failed == NUM_TASKS


def test_after_the_decision_silence_is_nobodys_outage(gateway: ExpertGateway, tasks: list[Task], quick: None) -> None:
    """The service goes down when the release is over, with tickets in flight."""
    outage: Any = Outage(gateway, 1, 1_000)
    progress = drive(outage, tasks, is_over=lambda: True, concurrency=8)
    assert progress.num_failed == 8


@pytest.mark.parametrize(
    ("failure", "expected"),
    [("ConnectError", True), ("ReadTimeout", True), ("http_503", False), ("already_ran", False), ("", False),
     ("DecodingError", False), ("Client", False)],
)  # fmt: skip
def test_only_errors_of_the_connection_reached_nobody(failure: str, expected: bool) -> None:
    result = TicketResult(
        task_id="a", run_id="", release_channel="", policy_version="", failure=failure, outcome=None, duration_ms=1.0
    )
    assert is_unreached(result) == expected


def test_failed_label_leaves_the_run_unlabelled(gateway: ExpertGateway, tasks: list[Task]) -> None:
    gateway.label_status = 500
    progress = drive(gateway, tasks[:2])
    assert (progress.num_answered, progress.num_unlabelled, progress.num_failed) == (2, 2, 0)


def test_unreadable_database_leaves_the_run_unlabelled(gateway: ExpertGateway, tasks: list[Task]) -> None:
    progress = drive(gateway, tasks[:1], live_world={"database": "/nowhere/live.sqlite"})
    assert (progress.num_unlabelled, gateway.labels) == (1, {})


def test_stops_when_the_controller_has_decided(gateway: ExpertGateway, tasks: list[Task]) -> None:
    seen: list[int] = []
    progress = drive(gateway, tasks, is_over=lambda: len(seen) >= 4, on_progress=lambda p: seen.append(p.num_sent))
    assert 4 <= progress.num_sent < NUM_TASKS
    assert gateway.num_open == 0
    assert len(gateway.labels) == progress.num_sent


def test_progress_counts_by_channel(gateway: ExpertGateway, tasks: list[Task]) -> None:
    progress = drive(gateway, tasks, concurrency=1)
    assert dict(progress.answered) == {"general": 8, "canary": 4}
    assert progress.success_rate("canary") == progress.success_rate("general") == 1.0
    assert progress.success_rate("offline_eval") == 0.0
    assert progress.requests_per_s > 0
    assert len(progress.durations_ms) == NUM_TASKS


def test_no_tickets(gateway: ExpertGateway) -> None:
    progress = drive(gateway, [])
    assert (progress.num_sent, progress.requests_per_s) == (0, 0.0)


def test_ticket_served_before_a_kill_is_neither_sent_nor_failed(gateway: ExpertGateway, tasks: list[Task]) -> None:
    gateway.refuse[tasks[0].task_id], gateway.code = [409], "already_ran"
    progress = drive(gateway, tasks[:3])
    assert (progress.num_repeated, progress.num_sent, progress.num_answered, progress.num_failed) == (1, 2, 2, 0)


def test_other_conflicts_are_failures(gateway: ExpertGateway, tasks: list[Task]) -> None:
    gateway.refuse[tasks[0].task_id], gateway.code = [409], "in_flight"
    progress = drive(gateway, tasks[:1])
    assert (progress.num_repeated, dict(progress.failures)) == (0, {"http_409": 1})


class Killed(BaseException):
    """kill -9 of the driver, as seen from inside."""


def killed_after(count: int) -> Callable[[TrafficProgress], None]:
    def on_progress(progress: TrafficProgress) -> None:
        if progress.num_answered == count:
            raise Killed

    return on_progress


def test_a_driver_after_a_kill_knows_all_that_was_sent(gateway: ExpertGateway, tasks: list[Task]) -> None:
    """Each ticket reaches the gateway under one key, and the counts are those of both drivers together."""
    gateway.delay_s = 0.01
    with pytest.raises(Killed):
        drive(gateway, tasks, on_progress=killed_after(4))
    known = set(gateway.keys)
    progress = drive(gateway, tasks)
    assert (progress.num_answered, progress.num_failed, progress.num_requests) == (NUM_TASKS, 0, NUM_TASKS)
    assert set(gateway.keys) == {request_id("r1", task) for task in tasks}
    assert len(known) == len(gateway.keys[: len(known)]) < NUM_TASKS


def test_a_resumed_driver_first_asks_for_what_was_in_flight(gateway: ExpertGateway, tasks: list[Task]) -> None:
    gateway.delay_s = 0.01
    with pytest.raises(Killed):
        drive(gateway, tasks, on_progress=killed_after(4))
    first, gateway.code = list(gateway.keys), "already_ran"
    for task in tasks:
        if request_id("r1", task) in first:
            gateway.refuse[task.task_id] = [409]
    progress = drive(gateway, tasks, is_over=lambda: True)
    again = gateway.keys[len(first) :]
    assert set(again) <= set(first)
    # Three at a time; answers that came in one turn of the loop had been followed by others before the kill.
    assert 0 < progress.num_repeated == len(again) <= 6
    assert progress.num_requests == len(set(gateway.keys)) < NUM_TASKS


def test_the_rate_is_that_of_the_driver_at_work(gateway: ExpertGateway, tasks: list[Task]) -> None:
    drive(gateway, tasks)
    progress = drive(gateway, tasks)
    assert (progress.num_answered, progress.requests_per_s) == (NUM_TASKS, 0.0)
