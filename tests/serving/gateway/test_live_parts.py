"""The parts of a live run on their own: writes once over attempts, metering, the critic's queue."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rl_actors.contracts.errors import EngineError, ToolHostError
from rl_actors.contracts.rollouts import Completion, SamplingParams, ToolResult
from serving.gateway.answer import Meter, OnceWorld, RequestMemory
from serving.gateway.critic_queue import CriticQueue
from serving.store.ledger import RequestLedger
from tests.serving.fakes import FakeClock, make_record, record_run

WRITES = frozenset({"pay", "note"})


@dataclass
class CountingWorld:
    """Counts real calls by tool and arguments. `plan` gives the error, or exception, of each real call in turn."""

    plan: list[str | Exception] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> ToolResult:
        self.calls.append((tool, str(arguments.get("order", ""))))
        outcome = self.plan.pop(0) if self.plan else ""
        if isinstance(outcome, Exception):
            raise outcome
        return ToolResult(content=f"result {len(self.calls)}", error=outcome, duration_ms=1.0)


def attempt(world: CountingWorld, memory: RequestMemory, *calls: tuple[str, str]) -> list[ToolResult]:
    """Make calls in a new attempt of the same request."""

    async def run() -> list[ToolResult]:
        once = OnceWorld(world, WRITES, memory)
        return [await once.call(tool, {"order": order}) for tool, order in calls]

    return asyncio.run(run())


class TestOnceWorld:
    def test_first_attempt_runs_everything(self) -> None:
        world = CountingWorld()
        attempt(world, RequestMemory(), ("look", "1"), ("pay", "1"), ("pay", "1"))
        assert len(world.calls) == 3

    def test_second_attempt_gets_the_first_ones_answer(self) -> None:
        world, memory = CountingWorld(), RequestMemory()
        (first,) = attempt(world, memory, ("pay", "1"))
        (second,) = attempt(world, memory, ("pay", "1"))
        assert first is second
        assert len(world.calls) == 1

    def test_other_arguments_are_another_write(self) -> None:
        world, memory = CountingWorld(), RequestMemory()
        attempt(world, memory, ("pay", "1"))
        attempt(world, memory, ("pay", "2"), ("note", "1"))
        assert world.calls == [("pay", "1"), ("pay", "2"), ("note", "1")]

    def test_order_of_arguments_does_not_matter(self) -> None:
        async def run() -> int:
            world, memory = CountingWorld(), RequestMemory()
            await OnceWorld(world, WRITES, memory).call("pay", {"order": "1", "amount": 2})
            await OnceWorld(world, WRITES, memory).call("pay", {"amount": 2, "order": "1"})
            return len(world.calls)

        assert asyncio.run(run()) == 1

    def test_each_write_is_replayed_once(self) -> None:
        """One earlier write answers one later call; a second equal call is the policy's own wish."""
        world, memory = CountingWorld(), RequestMemory()
        attempt(world, memory, ("pay", "1"))
        attempt(world, memory, ("pay", "1"), ("pay", "1"))
        assert len(world.calls) == 2

    def test_third_attempt_knows_both_earlier_ones(self) -> None:
        world, memory = CountingWorld(), RequestMemory()
        attempt(world, memory, ("pay", "1"))
        attempt(world, memory, ("note", "1"))
        attempt(world, memory, ("pay", "1"), ("note", "1"))
        assert len(world.calls) == 2

    def test_refused_write_is_tried_again(self) -> None:
        world, memory = CountingWorld(plan=["tool_failure"]), RequestMemory()
        attempt(world, memory, ("pay", "1"))
        attempt(world, memory, ("pay", "1"))
        assert len(world.calls) == 2

    def test_reads_are_fresh(self) -> None:
        world, memory = CountingWorld(), RequestMemory()
        attempt(world, memory, ("look", "1"))
        attempt(world, memory, ("look", "1"))
        assert len(world.calls) == 2

    @pytest.mark.parametrize(("tool", "is_uncertain"), [("pay", True), ("look", False)])
    def test_fate_of_a_write_is_unknown_when_the_host_dies(self, tool: str, is_uncertain: bool) -> None:
        world, memory = CountingWorld(plan=[ToolHostError("died")]), RequestMemory()
        with pytest.raises(ToolHostError):
            attempt(world, memory, (tool, "1"))
        assert memory.is_uncertain == is_uncertain
        assert memory.num_calls == 1

    def test_a_finished_write_is_certain(self) -> None:
        memory = RequestMemory()
        attempt(CountingWorld(), memory, ("pay", "1"))
        assert not memory.is_uncertain

    def test_replays_do_not_count_as_calls(self) -> None:
        world, memory = CountingWorld(), RequestMemory()
        attempt(world, memory, ("pay", "1"))
        attempt(world, memory, ("pay", "1"))
        assert memory.num_calls == 1

    @pytest.mark.parametrize("seed", range(10))
    def test_no_crash_point_doubles_a_write(self, seed: int) -> None:
        """The same plan of calls, restarted after a crash anywhere between calls, leaves each write made once."""
        rng = random.Random(seed)
        plan = [(rng.choice(("look", "pay", "note")), rng.choice("123")) for _ in range(6)]
        wanted = Counter(call for call in plan if call[0] in WRITES)
        for crash in range(len(plan) + 1):
            world, memory = CountingWorld(), RequestMemory()
            attempt(world, memory, *plan[:crash])
            attempt(world, memory, *plan)
            assert Counter(call for call in world.calls if call[0] in WRITES) == wanted


class TestMeter:
    def ask(self, meter: Meter, lengths: Sequence[int], *outcomes: int | Exception) -> None:
        waiting = list(outcomes)

        async def generate(prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Completion:
            outcome = waiting.pop(0)
            if isinstance(outcome, Exception):
                raise outcome
            return Completion(
                token_ids=(1,) * outcome, logprobs=(0.0,) * outcome, weights_version=0, finished=True, cached_tokens=3
            )

        async def run() -> None:
            for length in lengths:
                await meter.sample(generate, (0,) * length, SamplingParams(max_tokens=1))

        asyncio.run(run())

    def test_adds_up_all_model_calls(self) -> None:
        meter = Meter()
        self.ask(meter, (10, 20), 4, 6)
        assert (meter.tokens_in, meter.tokens_out, meter.cached_tokens) == (30, 10, 6)

    def test_keeps_what_was_spent_before_a_failure(self) -> None:
        meter = Meter()
        with pytest.raises(EngineError):
            self.ask(meter, (10, 20), 4, EngineError("dead"))
        assert (meter.tokens_in, meter.tokens_out) == (10, 4)


class TestPatience:
    """A silent engine is waited for only while its version is in force."""

    def wait(self, is_in_force: Any, cancelled: list[bool]) -> Completion:
        async def generate(prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Completion:
            try:
                await asyncio.sleep(0.1)
            except asyncio.CancelledError:
                cancelled.append(True)
                raise
            return Completion(token_ids=(1,), logprobs=(0.0,), weights_version=0, finished=True, cached_tokens=0)

        async def run() -> Completion:
            meter = Meter(is_in_force, patience_s=0.01)
            try:
                return await meter.sample(generate, (1, 2), SamplingParams(max_tokens=1))
            finally:
                await asyncio.sleep(0)

        return asyncio.run(run())

    def test_slow_engine_in_force_is_waited_for(self) -> None:
        cancelled: list[bool] = []
        assert self.wait(lambda: True, cancelled).token_ids == (1,)
        assert cancelled == []

    def test_call_on_a_version_out_of_force_is_given_up_and_cancelled(self) -> None:
        cancelled: list[bool] = []
        with pytest.raises(EngineError, match="taken out of the split"):
            self.wait(lambda: False, cancelled)
        assert cancelled == [True]

    def test_fail_back_in_the_middle_of_a_call(self) -> None:
        answers = iter((True, True, False))
        with pytest.raises(EngineError):
            self.wait(lambda: next(answers), [])

    def test_a_cancelled_run_cancels_its_call(self) -> None:
        cancelled: list[bool] = []

        async def generate(prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Completion:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.append(True)
            raise AssertionError

        async def run() -> None:
            async with asyncio.timeout(0.02):
                await Meter().sample(generate, (1,), SamplingParams(max_tokens=1))

        with pytest.raises(TimeoutError):
            asyncio.run(run())
        assert cancelled == [True]


@pytest.fixture
def ledger(tmp_path: Path) -> RequestLedger:
    return RequestLedger(tmp_path / "ledger.sqlite", owner="gateway")


def offer(queue: CriticQueue, index: int) -> None:
    queue.offer(make_record(index), (index, 1, 2))


class TestCriticQueue:
    def work(self, queue: CriticQueue, until: int) -> None:
        """Let the queue work until so many runs were scored or lost."""

        async def run() -> None:
            task = asyncio.create_task(queue.work())
            async with asyncio.timeout(5):
                while queue.num_scored + queue.num_lost < until:
                    await asyncio.sleep(0.002)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(run())

    def test_scores_reach_their_runs(self, ledger: RequestLedger) -> None:
        async def critic(sequences: Sequence[Sequence[int]]) -> list[float]:
            return [float(sequence[0]) / 10 for sequence in sequences]

        queue = CriticQueue(critic, ledger, size=50, clock=FakeClock())
        for index in range(20):
            record_run(ledger, index)
            offer(queue, index)
        self.work(queue, 20)
        assert [row.critic_score for row in ledger.rows()] == [pytest.approx(index / 10) for index in range(20)]

    def test_batches_are_bounded_and_in_order(self, ledger: RequestLedger) -> None:
        sizes: list[int] = []

        async def critic(sequences: Sequence[Sequence[int]]) -> list[float]:
            sizes.append(len(sequences))
            return [0.0] * len(sequences)

        queue = CriticQueue(critic, ledger, size=50, clock=FakeClock())
        for index in range(40):
            record_run(ledger, index)
            offer(queue, index)
        self.work(queue, 40)
        assert sizes == [16, 16, 8]

    def test_goes_on_after_a_failure(self, ledger: RequestLedger) -> None:
        outcomes: list[Exception | None] = [EngineError("dead"), None]

        async def critic(sequences: Sequence[Sequence[int]]) -> list[float]:
            outcome = outcomes.pop(0)
            if outcome is not None:
                raise outcome
            return [1.0] * len(sequences)

        queue = CriticQueue(critic, ledger, size=50, clock=FakeClock())
        for index in range(20):
            record_run(ledger, index)
            offer(queue, index)
        self.work(queue, 20)
        assert (queue.num_lost, queue.num_scored) == (16, 4)

    def test_run_that_the_ledger_does_not_know_is_lost(self, ledger: RequestLedger) -> None:
        async def critic(sequences: Sequence[Sequence[int]]) -> list[float]:
            return [1.0] * len(sequences)

        queue = CriticQueue(critic, ledger, size=5, clock=FakeClock())
        offer(queue, 99)
        self.work(queue, 1)
        assert (queue.num_lost, queue.num_scored) == (1, 0)

    def test_offer_never_waits(self, ledger: RequestLedger) -> None:
        async def critic(sequences: Sequence[Sequence[int]]) -> list[float]:
            return []

        queue = CriticQueue(critic, ledger, size=3, clock=FakeClock())
        for index in range(10):
            offer(queue, index)
        assert queue.num_lost == 7

    def test_work_ends_at_once_without_a_critic(self, ledger: RequestLedger) -> None:
        asyncio.run(asyncio.wait_for(CriticQueue(None, ledger, size=1, clock=FakeClock()).work(), 1.0))
