"""The users' own record: a kill at any byte leaves a book that knows what was sent and what ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.simulation.ticket_book import TicketBook, TicketResult
from cluster.workflows.support_desk import WORKFLOW
from rl_actors.contracts import Outcome, Task
from rl_actors.contracts.errors import InfrastructureError, TamperedError

WRONG = Outcome(success=False, violations=("refund_out_of_policy",), reasons=())


def result(task_id: str, outcome: Outcome | None = WRONG, failure: str = "") -> TicketResult:
    return TicketResult(
        task_id=task_id,
        run_id=f"run-{task_id}",
        release_channel="canary",
        policy_version="ppo-1",
        failure=failure,
        outcome=outcome,
        duration_ms=12.5,
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "release" / "tickets.jsonl"


@pytest.fixture
def tasks() -> list[Task]:
    return WORKFLOW.build_tasks("live", 4, 3)


def test_a_fresh_book_creates_nothing(path: Path, tasks: list[Task]):
    book = TicketBook(path)
    assert (book.ended, book.waiting(tasks)) == ((), tasks)
    assert not path.parent.exists()


@pytest.mark.parametrize("ended", [result("a"), result("a", None), result("a", None, "http_503")])
def test_what_ended_comes_back_as_it_was(path: Path, ended: TicketResult):
    book = TicketBook(path)
    book.send("a")
    book.end(ended)
    assert TicketBook(path).ended == (ended,)


def test_tickets_in_flight_come_first_and_ended_ones_not_at_all(path: Path, tasks: list[Task]):
    first, second, third, fourth = tasks
    book = TicketBook(path)
    for task in (first, second, fourth):
        book.send(task.task_id)
    book.end(result(first.task_id))
    assert book.waiting(tasks) == TicketBook(path).waiting(tasks) == [second, fourth, third]


def test_every_byte_of_the_last_line_may_be_missing(path: Path, tasks: list[Task]):
    book = TicketBook(path)
    book.send(tasks[0].task_id)
    whole = path.stat().st_size
    book.end(result(tasks[0].task_id))
    data = path.read_bytes()
    for size in range(whole, len(data)):
        path.write_bytes(data[:size])
        torn = TicketBook(path)
        assert torn.ended == ()
        torn.end(result(tasks[0].task_id))
        assert path.read_bytes() == data


@pytest.mark.parametrize("line", ["{}", '{"ended": {}}', "[]", '{"ended": 3}'])
def test_a_line_that_is_no_ticket_is_refused_by_file(path: Path, line: str):
    path.parent.mkdir()
    path.write_text(f"{line}\n")
    with pytest.raises(TamperedError, match=r"tickets\.jsonl.*no ticket"):
        TicketBook(path)


def test_a_book_that_cannot_be_written_is_named(path: Path):
    path.parent.write_text("a file where a folder should be")
    book = TicketBook(path.parent / "deeper" / "tickets.jsonl")
    with pytest.raises(InfrastructureError, match=r"tickets\.jsonl"):
        book.send("a")
