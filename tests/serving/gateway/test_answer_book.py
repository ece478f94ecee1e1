"""One key requests once: new, in flight, finished, failed, evicted, full."""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from serving.gateway.http import AnswerBook
from serving.gateway.openai_api import ApiError, ChatAnswer
from tests.serving.fakes import make_record


def answer(name: str = "run-1") -> ChatAnswer:
    return ChatAnswer(
        record=make_record(run_id=name), text="ok", finish_reason="stop", tokens_in=1, tokens_out=1, cached_tokens=0,
        num_tool_calls=0,
    )  # fmt: skip


def unavailable(*, may_retry: bool) -> ApiError:
    return ApiError(503, "down", code="unavailable", may_retry=may_retry)


class Requests:
    """Counts how often each key was really answered; a request waits for its gate when it has one, and may raise."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.gates: dict[str, asyncio.Event] = {}
        self.errors: dict[str, list[Exception]] = {}

    def of(self, key: str) -> Callable[[], Any]:
        async def run() -> ChatAnswer:
            self.counts[key] += 1
            if key in self.gates:
                await self.gates[key].wait()
            if self.errors.get(key):
                raise self.errors[key].pop(0)
            return answer(f"{key}.{self.counts[key]}")

        return run


def play(conversation: Callable[[AnswerBook, Requests], Awaitable[Any]], **limits: int) -> tuple[Any, Requests]:
    async def run() -> tuple[Any, Requests]:
        book, requests = AnswerBook(**({"max_running": 4} | limits)), Requests()
        return await asyncio.wait_for(conversation(book, requests), 10.0), requests

    return asyncio.run(run())


async def fails(waiting: Awaitable[ChatAnswer]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await waiting
    return caught.value


def test_second_call_gets_the_stored_answer() -> None:
    async def twice(book: AnswerBook, requests: Requests) -> list[ChatAnswer]:
        return [await book.once("k", "f", requests.of("k")) for _ in range(2)]

    (first, second), requests = play(twice)
    assert first is second
    assert requests.counts["k"] == 1


def test_keys_do_not_share_answers() -> None:
    async def both(book: AnswerBook, requests: Requests) -> list[str]:
        return [(await book.once(key, "f", requests.of(key))).record.run_id for key in ("a", "b")]

    assert play(both)[0] == ["a.1", "b.1"]


def test_other_body_under_a_finished_key() -> None:
    async def two(book: AnswerBook, requests: Requests) -> ApiError:
        await book.once("k", "one", requests.of("k"))
        return await fails(book.once("k", "two", requests.of("k")))

    error, requests = play(two)
    assert (error.status, error.code) == (422, "idempotency_key_reused")
    assert error.headers["x-should-retry"] == "false"
    assert requests.counts["k"] == 1


def test_other_body_under_a_running_key_is_told_so_too() -> None:
    async def two(book: AnswerBook, requests: Requests) -> ApiError:
        requests.gates["k"] = asyncio.Event()
        first = asyncio.create_task(book.once("k", "one", requests.of("k")))
        await asyncio.sleep(0)
        error = await fails(book.once("k", "two", requests.of("k")))
        requests.gates["k"].set()
        await first
        return error

    assert play(two)[0].status == 422


def test_in_flight_is_a_conflict_that_may_be_retried() -> None:
    async def overlap(book: AnswerBook, requests: Requests) -> tuple[ApiError, ChatAnswer, ChatAnswer]:
        requests.gates["k"] = asyncio.Event()
        first = asyncio.create_task(book.once("k", "f", requests.of("k")))
        await asyncio.sleep(0)
        error = await fails(book.once("k", "f", requests.of("k")))
        requests.gates["k"].set()
        return error, await first, await book.once("k", "f", requests.of("k"))

    (error, first, second), requests = play(overlap)
    assert (error.status, error.headers["x-should-retry"]) == (409, "true")
    assert first is second
    assert requests.counts["k"] == 1


def test_failure_without_tools_may_run_again() -> None:
    async def twice(book: AnswerBook, requests: Requests) -> ChatAnswer:
        requests.errors["k"] = [unavailable(may_retry=True)]
        assert (await fails(book.once("k", "f", requests.of("k")))).status == 503
        await asyncio.sleep(0)
        return await book.once("k", "f", requests.of("k"))

    reply, requests = play(twice)
    assert reply.record.run_id == "k.2"
    assert requests.counts["k"] == 2


def test_failure_after_tools_is_final() -> None:
    async def thrice(book: AnswerBook, requests: Requests) -> list[str]:
        requests.errors["k"] = [unavailable(may_retry=False)]
        return [(await fails(book.once("k", "f", requests.of("k")))).message for _ in range(3)]

    messages, requests = play(thrice)
    assert messages == ["down"] * 3
    assert requests.counts["k"] == 1


def test_defect_is_forgotten_so_that_the_ledger_decides() -> None:
    async def twice(book: AnswerBook, requests: Requests) -> ChatAnswer:
        requests.errors["k"] = [RuntimeError("defect")]
        with pytest.raises(RuntimeError):
            await book.once("k", "f", requests.of("k"))
        await asyncio.sleep(0)
        return await book.once("k", "f", requests.of("k"))

    assert play(twice)[0].record.run_id == "k.2"


def test_client_that_hangs_up_does_not_stop_the_run() -> None:
    async def hang_up(book: AnswerBook, requests: Requests) -> ChatAnswer:
        requests.gates["k"] = asyncio.Event()
        first = asyncio.create_task(book.once("k", "f", requests.of("k")))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert book.num_running == 1
        requests.gates["k"].set()
        await asyncio.sleep(0.01)
        assert book.num_running == 0
        return await book.once("k", "f", requests.of("k"))

    reply, requests = play(hang_up)
    assert reply.record.run_id == "k.1"
    assert requests.counts["k"] == 1


@pytest.mark.parametrize("limit", [1, 3])
def test_too_many_runs(limit: int) -> None:
    async def press(book: AnswerBook, requests: Requests) -> tuple[list[Any], ChatAnswer]:
        gate = asyncio.Event()
        requests.gates = {f"k{i}": gate for i in range(6)}
        waiting = [asyncio.create_task(book.once(f"k{i}", "f", requests.of(f"k{i}"))) for i in range(6)]
        await asyncio.sleep(0.01)
        assert book.num_running == limit
        gate.set()
        replies = await asyncio.gather(*waiting, return_exceptions=True)
        return replies, await book.once("later", "f", requests.of("later"))

    (replies, later), requests = play(press, max_running=limit)
    refused = [reply for reply in replies if isinstance(reply, ApiError)]
    assert len(refused) == 6 - limit
    assert {error.status for error in refused} == {429}
    assert later.record.run_id == "later.1"
    assert sum(requests.counts.values()) == limit + 1


def test_refused_key_is_not_remembered() -> None:
    async def press(book: AnswerBook, requests: Requests) -> ChatAnswer:
        requests.gates["a"] = asyncio.Event()
        first = asyncio.create_task(book.once("a", "f", requests.of("a")))
        await asyncio.sleep(0)
        assert (await fails(book.once("b", "f", requests.of("b")))).status == 429
        requests.gates["a"].set()
        await first
        await asyncio.sleep(0)
        return await book.once("b", "f", requests.of("b"))

    assert play(press, max_running=1)[0].record.run_id == "b.1"


def test_memory_is_bounded_and_oldest_goes_first() -> None:
    async def fill(book: AnswerBook, requests: Requests) -> list[str]:
        for index in range(5):
            await book.once(f"k{index}", "f", requests.of(f"k{index}"))
        newest = await book.once("k4", "f", requests.of("k4"))
        oldest = await book.once("k0", "f", requests.of("k0"))
        return [newest.record.run_id, oldest.record.run_id]

    assert play(fill, capacity=3)[0] == ["k4.1", "k0.2"]


def test_running_entries_are_never_evicted() -> None:
    async def fill(book: AnswerBook, requests: Requests) -> ApiError:
        requests.gates["slow"] = asyncio.Event()
        slow = asyncio.create_task(book.once("slow", "f", requests.of("slow")))
        await asyncio.sleep(0)
        for index in range(5):
            await book.once(f"k{index}", "f", requests.of(f"k{index}"))
        error = await fails(book.once("slow", "f", requests.of("slow")))
        requests.gates["slow"].set()
        await slow
        return error

    error, requests = play(fill, capacity=2)
    assert error.code == "in_flight"
    assert requests.counts["slow"] == 1


def test_exactly_the_capacity_is_remembered() -> None:
    async def fill(book: AnswerBook, requests: Requests) -> list[str]:
        for index in range(3):
            await book.once(f"k{index}", "f", requests.of(f"k{index}"))
        return [(await book.once(f"k{index}", "f", requests.of(f"k{index}"))).record.run_id for index in range(3)]

    assert play(fill, capacity=3)[0] == ["k0.1", "k1.1", "k2.1"]


def test_what_is_too_much_while_all_run_is_forgotten_once_they_end() -> None:
    """Entries in flight may exceed the capacity; the next new key brings the memory back to it, oldest first."""

    async def crowd(book: AnswerBook, requests: Requests) -> list[str]:
        gate = asyncio.Event()
        requests.gates = {f"k{index}": gate for index in range(4)}
        waiting = [asyncio.create_task(book.once(f"k{index}", "f", requests.of(f"k{index}"))) for index in range(4)]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*waiting)
        await book.once("next", "f", requests.of("next"))
        return [(await book.once(key, "f", requests.of(key))).record.run_id for key in ("k3", "next", "k0")]

    assert play(crowd, capacity=2)[0] == ["k3.1", "next.1", "k0.2"]


def test_a_run_that_was_cancelled_is_forgotten() -> None:
    """A gateway that shuts down cancels its requests: the key must not answer with a cancellation for ever."""

    async def cancel(book: AnswerBook, requests: Requests) -> tuple[str, list[Any]]:
        complaints: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))

        async def cancelled() -> ChatAnswer:
            raise asyncio.CancelledError

        asked = asyncio.create_task(book.once("k", "f", cancelled))
        await asyncio.gather(asked, return_exceptions=True)
        assert asked.cancelled()
        await asyncio.sleep(0)
        assert book.num_running == 0
        return (await book.once("k", "f", requests.of("k"))).record.run_id, complaints

    assert play(cancel)[0] == ("k.1", [])


def test_a_run_that_fails_after_its_client_left_is_no_noise() -> None:
    """Its error was looked at: asyncio has nothing to complain of, and the key may run again."""

    async def leave(book: AnswerBook, requests: Requests) -> tuple[str, list[Any]]:
        complaints: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        requests.gates["k"], requests.errors["k"] = asyncio.Event(), [unavailable(may_retry=True)]
        asked = asyncio.create_task(book.once("k", "f", requests.of("k")))
        await asyncio.sleep(0)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        requests.gates["k"].set()
        while book.num_running:
            await asyncio.sleep(0)
        gc.collect()
        return (await book.once("k", "f", requests.of("k"))).record.run_id, complaints

    (name, complaints), _ = play(leave)
    assert (name, complaints) == ("k.2", [])


@pytest.mark.parametrize("seed", range(8))
def test_any_interleaving_runs_a_successful_key_once(seed: int) -> None:
    """Random clients, keys, hang-ups and failures: no key ever succeeds twice, and all clients of a key agree."""

    async def storm(book: AnswerBook, requests: Requests) -> dict[str, set[str]]:
        rng = random.Random(seed)
        seen: dict[str, set[str]] = {}
        for key in "abcde":
            requests.errors[key] = [unavailable(may_retry=True)] * rng.randrange(3)

        async def client(key: str) -> None:
            await asyncio.sleep(rng.random() * 0.02)
            try:
                reply = await asyncio.wait_for(book.once(key, "f", requests.of(key)), rng.choice((0.001, 1.0)))
                seen.setdefault(key, set()).add(reply.record.run_id)
            except (ApiError, TimeoutError):
                return

        await asyncio.gather(*(client(rng.choice("abcde")) for _ in range(60)))
        return seen

    seen, _ = play(storm, max_running=100)
    assert seen
    assert all(len(answers) == 1 for answers in seen.values())
