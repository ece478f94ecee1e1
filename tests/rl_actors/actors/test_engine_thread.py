"""The engine's thread over a fake vLLM: whatever happens, everyone who waits hears of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rl_actors.actors import vllm_engine
from rl_actors.actors.vllm_engine import VllmEngine
from rl_actors.contracts.errors import AttestationError, EngineError
from rl_actors.contracts.rollouts import Completion, SamplingParams

SAMPLING = SamplingParams(max_tokens=3, seed=5)
WAIT_S = 20.0


class FakeLlm:
    """Finishes a request after `rounds` steps with its prompt reversed; prompts over ten tokens are refused."""

    def __init__(self, rounds: int = 1) -> None:
        self.llm_engine = self
        self.rounds, self.left = rounds, {}
        self.most_at_once = self.num_steps = 0
        self.prompts: dict[str, list[int]] = {}
        self.error: BaseException | None = None
        self.routes: Any = None
        self.calls: list[Any] = []
        self.aborted: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.thread_names: set[str] = set()

    def add_request(self, request_id: str, prompt: dict[str, Any], params: Any) -> None:
        if len(prompt["prompt_token_ids"]) > 10:
            raise ValueError("longer than the maximum model length of 10")
        self.left[request_id], self.prompts[request_id] = self.rounds, prompt["prompt_token_ids"]

    def abort_request(self, request_ids: list[str]) -> None:
        self.aborted += request_ids
        for request_id in request_ids:
            del self.left[request_id]

    def step(self) -> list[Any]:
        self.thread_names.add(threading.current_thread().name)
        assert self.gate.wait(WAIT_S)
        if self.error:
            raise self.error
        self.num_steps += 1
        self.most_at_once = max(self.most_at_once, len(self.left))
        self.left = {name: rounds - 1 for name, rounds in self.left.items()}
        outputs = [self._output(name, rounds == 0) for name, rounds in self.left.items()]
        self.left = {name: rounds for name, rounds in self.left.items() if rounds}
        return outputs

    def _output(self, name: str, finished: bool) -> Any:
        ids = self.prompts[name][::-1]
        logprobs = [{token: SimpleNamespace(logprob=-float(token)), 999: SimpleNamespace(logprob=0.0)} for token in ids]
        reason = "stop" if ids[-1] == 1 else "length"
        sampled = SimpleNamespace(token_ids=ids, logprobs=logprobs, finish_reason=reason, routed_experts=self.routes)
        return SimpleNamespace(
            request_id=name, finished=finished, outputs=[sampled], num_cached_tokens=None, prompt_token_ids=[1]
        )

    def start_weight_update(self) -> None:
        self.calls.append("start")

    def update_weights(self, update: Any) -> None:
        self.calls.append(update)

    def finish_weight_update(self, *, weight_version: str) -> None:
        self.calls.append(weight_version)

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset")


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[VllmEngine, FakeLlm]]]:
    """Start engines over a fake; all are closed afterwards."""
    made: list[VllmEngine] = []
    monkeypatch.setattr(vllm_engine, "_vllm_params", lambda sampling: sampling)

    def starter(rounds: int = 1) -> tuple[VllmEngine, FakeLlm]:
        llm = FakeLlm(rounds)
        monkeypatch.setattr(vllm_engine, "_load", lambda *_: llm)
        made.append(VllmEngine("model", max_model_len=10))
        return made[-1], llm

    yield starter
    for engine in made:
        engine.close()
        assert not engine._thread.is_alive()


def generate(engine: VllmEngine, *prompts: list[int]) -> list[Any]:
    """Ask for all at once; returns completions and exceptions."""

    async def ask() -> list[Any]:
        asked = [engine.generate(prompt, SAMPLING) for prompt in prompts]
        return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), WAIT_S)

    return asyncio.run(ask())


def test_a_completion_holds_the_sampled_tokens_and_their_own_logprobs(start: Any):
    engine, _ = start()
    (done,) = generate(engine, [1, 2, 3])
    assert done == Completion(
        token_ids=(3, 2, 1), logprobs=(-3.0, -2.0, -1.0), weights_version=0, finished=True, cached_tokens=0
    )
    (cut,) = generate(engine, [2, 3])
    assert not cut.finished, "negative control: only a stop token finishes"


def test_requests_run_together_and_get_their_own_answers(start: Any):
    engine, llm = start(3)
    llm.gate.clear()
    threading.Timer(0.2, llm.gate.set).start()
    prompts = [[number, 1] for number in range(2, 10)]
    answers = generate(engine, *prompts)
    assert [answer.token_ids[::-1] for answer in answers] == [tuple(prompt) for prompt in prompts]
    assert llm.most_at_once == 8
    assert llm.thread_names == {"vllm-engine"}


def test_an_idle_engine_does_not_spin(start: Any):
    engine, llm = start()
    generate(engine, [1])
    steps = llm.num_steps
    time.sleep(0.1)
    assert llm.num_steps == steps


def test_a_refused_request_costs_only_itself(start: Any):
    engine, _ = start()
    refused, well = generate(engine, [1] * 11, [2, 1])
    assert isinstance(refused, EngineError)
    assert "request refused: longer than the maximum" in str(refused)
    assert well.token_ids == (1, 2)
    assert generate(engine, [3, 1])[0].token_ids == (1, 3)


def test_a_dying_engine_ends_every_waiting_request_and_every_later_one(start: Any):
    engine, llm = start()
    llm.error = RuntimeError("out of memory")
    for outcome in generate(engine, [1], [2, 1]):
        assert isinstance(outcome, EngineError)
        assert "out of memory" in str(outcome)
    (late,) = generate(engine, [1])
    assert isinstance(late, EngineError)
    assert "dead: RuntimeError('out of memory')" in str(late)
    with pytest.raises(EngineError, match="dead"):
        engine.call(lambda: 1)


def test_an_output_that_cannot_be_read_is_told_to_its_caller(start: Any):
    """It ends the engine; whoever waits for that very output must hear of it, and not wait for ever."""
    engine, fake = start()
    fake.routes = np.zeros((9, 1, 1), dtype=np.uint8)
    (found,) = generate(engine, [5, 6])
    assert isinstance(found, EngineError)
    assert "routes of 9 tokens" in str(found)


def test_closing_fails_what_waits_and_what_comes_after(start: Any):
    engine, llm = start(10**9)
    outcomes: list[Any] = []
    waiting = threading.Thread(target=lambda: outcomes.extend(generate(engine, [1], [2])))
    waiting.start()
    while len(llm.left) < 2:
        time.sleep(0.01)
    engine.close()
    waiting.join(WAIT_S)
    assert [type(outcome) for outcome in outcomes] == [EngineError, EngineError]
    assert "closed" in str(outcomes[0])
    (late,) = generate(engine, [1])
    assert isinstance(late, EngineError)
    engine.close()


def test_a_cancelled_request_disturbs_no_other(start: Any):
    engine, llm = start(3)
    llm.gate.clear()

    async def ask() -> Any:
        given_up = asyncio.create_task(engine.generate([5, 1], SAMPLING))
        kept = asyncio.create_task(engine.generate([6, 1], SAMPLING))
        await asyncio.sleep(0.1)
        given_up.cancel()
        await asyncio.sleep(0.05)
        llm.gate.set()
        return await asyncio.wait_for(kept, WAIT_S)

    assert asyncio.run(ask()).token_ids == (1, 6)
    assert generate(engine, [7, 1])[0].token_ids == (1, 7)
    assert llm.aborted == ["1"], "nobody waits for it: it must not keep its slot"


def test_a_request_that_is_cancelled_and_then_refused_disturbs_no_other(start: Any):
    engine, _ = start()
    asyncio.run(_while_the_thread_is_busy(engine, [1] * 11, cancel=True))
    assert generate(engine, [7, 1])[0].token_ids == (1, 7)


def test_a_request_that_comes_while_the_engine_closes_is_answered(start: Any):
    engine, _ = start()
    (outcome,) = asyncio.run(_while_the_thread_is_busy(engine, [7, 1], close=True))
    assert isinstance(outcome, EngineError)


async def _while_the_thread_is_busy(
    engine: VllmEngine, prompt: list[int], *, cancel: bool = False, close: bool = False
) -> list[Any]:
    """Send a request that the thread sees only after it was cancelled, or after the engine was told to close."""
    release = threading.Event()
    busy = asyncio.create_task(asyncio.to_thread(engine.call, lambda: release.wait(WAIT_S)))
    await asyncio.sleep(0.05)
    closing = asyncio.create_task(asyncio.to_thread(engine.close)) if close else asyncio.create_task(asyncio.sleep(0))
    await asyncio.sleep(0.05)
    asked = asyncio.create_task(engine.generate(prompt, SAMPLING))
    await asyncio.sleep(0.05)
    if cancel:
        asked.cancel()
        await asyncio.sleep(0.05)
    release.set()
    await asyncio.gather(busy, closing)
    return await asyncio.wait_for(asyncio.gather(asked, return_exceptions=True), 1.0)


def test_a_call_runs_on_the_engines_thread_and_returns(start: Any):
    engine, _ = start()
    assert engine.call(lambda: threading.current_thread().name) == "vllm-engine"


def test_what_a_call_raises_belongs_to_its_caller(start: Any):
    engine, _ = start()

    def broken() -> None:
        raise KeyError("sinks")

    with pytest.raises(KeyError, match="sinks"):
        engine.call(broken)
    assert generate(engine, [2, 1])[0].token_ids == (1, 2)


def test_a_call_is_bounded(start: Any):
    engine, _ = start()
    release = threading.Event()
    with pytest.raises(EngineError, match="did not answer within 0 s"):
        engine.call(lambda: release.wait(WAIT_S), timeout_s=0.05)
    release.set()


def test_publishing_goes_through_the_transfer_api_and_drops_the_cache(start: Any):
    engine, llm = start()
    weights: Any = {"w": 1}
    engine.publish(weights, 3)
    assert llm.calls == ["start", {"update_info": {"named_tensors": weights}}, "3", "reset"]
    assert engine.weights_version == 3
    assert generate(engine, [1])[0].weights_version == 3


def test_publishing_into_running_requests_is_refused(start: Any):
    """A rollout half made by old weights and half by new ones would carry one version for both."""
    engine, llm = start(3)
    llm.gate.clear()

    async def ask() -> tuple[Any, Any]:
        running = asyncio.create_task(engine.generate([2, 1], SAMPLING))
        while not llm.left:
            await asyncio.sleep(0.01)
        publishing = asyncio.create_task(asyncio.to_thread(engine.publish, {}, 4))
        await asyncio.sleep(0.05)
        llm.gate.set()
        return await asyncio.gather(running, publishing, return_exceptions=True)

    done, refused = asyncio.run(ask())
    assert isinstance(refused, EngineError)
    assert "1 requests in flight" in str(refused)
    assert (done.weights_version, engine.weights_version, llm.calls) == (0, 0, [])


def test_a_probe_among_running_requests_is_refused(start: Any):
    """The probe steps the engine itself and would swallow what others wait for."""
    engine, llm = start(3)
    llm.gate.clear()

    async def ask() -> tuple[Any, Any]:
        running = asyncio.create_task(engine.generate([2, 1], SAMPLING))
        while not llm.left:
            await asyncio.sleep(0.01)
        probing = asyncio.create_task(asyncio.to_thread(engine.probe_logprobs, [[1, 2]]))
        await asyncio.sleep(0.05)
        llm.gate.set()
        return await asyncio.gather(running, probing, return_exceptions=True)

    done, refused = asyncio.run(ask())
    assert isinstance(refused, EngineError)
    assert "1 requests in flight: probe between rollouts only" in str(refused)
    assert done.token_ids == (1, 2)


def test_a_publish_that_breaks_half_way_ends_the_engine(start: Any):
    """Half old, half new: it may answer neither under the old version nor under the new one."""
    engine, llm = start()

    def broken(update: Any) -> None:
        raise KeyError("model.layers.0.self_attn.sinks")

    llm.update_weights = broken
    with pytest.raises(EngineError, match=r"weights version 2 broke the engine half-way: KeyError\('model\.layers"):
        engine.publish({}, 2)
    assert engine.weights_version == 0
    with pytest.raises(EngineError, match="sinks"):
        engine.call(lambda: 1)


def test_an_incomplete_publish_is_refused_before_anything_is_touched(start: Any):
    engine, llm = start()
    engine._shapes = {"embed": (2, 3), "sinks": (4,)}
    with pytest.raises(AttestationError, match="1 tensors were not published and would stay old: sinks"):
        engine.publish({"embed": torch.zeros(2, 3)}, 5)
    assert (llm.calls, engine.weights_version) == ([], 0)
    engine.publish({"embed": torch.zeros(2, 3), "sinks": torch.zeros(4)}, 6)
    assert engine.weights_version == 6, "and the engine lives on"


def test_an_engine_that_cannot_load_says_why(monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any) -> None:
        raise OSError("no such model")

    monkeypatch.setattr(vllm_engine, "_load", broken)
    with pytest.raises(OSError, match="no such model"):
        VllmEngine("nowhere", max_model_len=10)
