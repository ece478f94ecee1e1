"""One request through a gateway on fakes: rows, checks, failures, retries, idempotency."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from rl_actors.agent.executor import Toolset
from rl_actors.agent.rollout import RolloutPorts, run_rollout
from rl_actors.contracts import Outcome, RolloutRequest, Task
from rl_actors.contracts.errors import EngineError
from rl_actors.contracts.reports import CostModel, SuiteResult
from rl_actors.evaluation.suites import Suite, suite_result
from serving.gateway.answer import UNREAD
from serving.store.served import ApiLimits
from tests.serving.gateway.live_fakes import (
    CANDIDATE,
    HELLO,
    LOOK,
    PAY,
    PROMPT,
    STABLE,
    MemoryWorlds,
    Rig,
    ScriptedEngine,
    Step,
    body,
    engine_error,
    host_error,
    make_rig,
    renderer,
    session_in,
)
from tests.serving.gateway.shop import TOOLS, ShopWorkflow

CHAT = "/v1/chat/completions"


def talk(rig: Rig, conversation: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    """Run a conversation with the gateway."""

    async def run() -> Any:
        async with rig.client() as client:
            return await asyncio.wait_for(conversation(client), 20.0)

    return asyncio.run(run())


def post(rig: Rig, value: Any = None, **headers: str) -> httpx.Response:
    return talk(rig, lambda client: client.post(CHAT, json=body() if value is None else value, headers=headers))


class TestCost:
    """The same request costs the same offline and live: both cost-per-success gates speak of one quantity."""

    class Worlds(MemoryWorlds):
        async def read_state(self, selector: object) -> dict[str, Any]:
            return {}

    class Workflow(ShopWorkflow):
        def verify(self, *_: object) -> Outcome:
            return Outcome(success=True, violations=(), reasons=())

    def offline(self, rig: Rig, script: Sequence[Step], cost_model: CostModel) -> SuiteResult:
        """The very request of `body()` as the one task of a suite, sampled by the same engine."""
        task = Task(
            task_id="t", workflow="shop", split="held_out", intent="pay", prompt=PROMPT, world={},
            goal={"selector": {}}, seed=0,
        )  # fmt: skip
        ports = RolloutPorts(
            workflow=self.Workflow(),  # type: ignore[arg-type]
            renderer=renderer(),
            toolset=Toolset(TOOLS),
            sandbox=self.Worlds(),  # type: ignore[arg-type]
            generate=ScriptedEngine(script),
            limits=rig.ports.config.limits,
        )
        rollout = asyncio.run(run_rollout(RolloutRequest(task=task, group_id=0, seed=0), ports, temperature=0.0))
        return suite_result(Suite(name="s", tasks=(task,)), "sft-a", [rollout], cost_model)

    @pytest.mark.parametrize("script", [HELLO, PAY])
    @pytest.mark.parametrize(
        "cost_model",
        [
            CostModel(),
            CostModel(usd_per_million_tokens_in=3.0, usd_per_million_tokens_out=15.0, usd_per_tool_call=0.25),
        ],
    )
    def test_is_the_same_offline_and_live(self, tmp_path: Path, script: Sequence[Step], cost_model: CostModel) -> None:
        rig = make_rig(tmp_path, scripts={STABLE: script}, config={"cost_model": cost_model})
        assert post(rig).status_code == 200
        (row,) = rig.rows()
        offline = self.offline(rig, script, cost_model)
        assert (row.tokens_in, row.tokens_out) == (offline.tokens_in, offline.tokens_out)
        assert row.tool_calls_count == offline.tool_calls == (script is PAY)
        assert row.cost == offline.cost_per_success > 0

    def test_tool_calls_cost_live_too(self, tmp_path: Path) -> None:
        """Negative control of the one above: with tokens alone counted, the price of a call would change nothing."""
        costs = []
        for price in (0.0, 0.25):
            rig = make_rig(tmp_path / str(price), config={"cost_model": CostModel(usd_per_tool_call=price)})
            post(rig)
            costs.append(rig.rows()[0].cost)
        assert costs[1] - costs[0] == pytest.approx(0.25)


class TestReply:
    def test_is_what_the_policy_said(self, tmp_path: Path) -> None:
        response = post(make_rig(tmp_path))
        assert response.status_code == 200
        assert response.json()["choices"][0]["message"]["content"] == "It is paid."

    def test_row_agrees_with_the_headers(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path)
        headers = post(rig).headers
        (row,) = rig.rows()
        assert headers["x-seatrial-run-id"] == row.run_id
        assert headers["x-seatrial-policy-version"] == row.policy_version == STABLE
        assert headers["x-seatrial-bundle-id"] == row.bundle_id == "bundle-sft-a"
        assert headers["x-seatrial-release-channel"] == row.release_channel == "general"
        assert headers["x-seatrial-model-version"] == row.model_version
        assert headers["x-seatrial-reward-model-version"] == row.reward_model_version

    def test_row_is_complete(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path)
        usage = post(rig).json()["usage"]
        (row,) = rig.rows()
        assert (row.status, row.success, row.tool_calls_count, row.tool_error_count) == ("ok", "unknown", 1, 0)
        assert (row.tokens_in, row.tokens_out) == (usage["prompt_tokens"], usage["completion_tokens"])
        assert row.cost == pytest.approx((0.05 * row.tokens_in + 0.2 * row.tokens_out) / 1e6 + 0.00001)
        assert row.policy_checks == {"non_empty": True}
        assert row.sandbox_level == "process"
        assert row.split_epoch == 1

    def test_tools_run_in_the_live_world_under_the_requests_session(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path)
        post(rig, **{"idempotency-key": "key-1"})
        assert rig.worlds.opened == [{"database": "live.sqlite", "session": "key-1"}]
        assert rig.worlds.calls == [("pay", {"order": "48213"})]
        assert rig.worlds.num_closed == 1

    def test_no_retry_is_advised_once_a_tool_ran(self, tmp_path: Path) -> None:
        assert post(make_rig(tmp_path)).headers["x-should-retry"] == "false"
        rig = make_rig(tmp_path / "b", scripts={STABLE: HELLO})
        assert "x-should-retry" not in post(rig).headers

    def test_checks_see_prompt_and_successful_calls_only(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path)
        post(rig)
        (view,) = rig.workflow.views
        assert view.task.prompt == PROMPT
        assert view.tool_calls == (("pay", {"order": "48213"}),)
        assert view.task.goal == {}

    def test_failed_call_is_counted_and_hidden_from_the_checks(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path)
        rig.worlds.errors["pay"] = "tool_failure"
        post(rig)
        assert rig.workflow.views[0].tool_calls == ()
        assert rig.rows()[0].tool_error_count == 1

    def test_temperature_seed_and_cap_reach_the_engine(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, scripts={STABLE: HELLO})
        post(rig, body(temperature=0.7, seed=3, max_tokens=11))
        (sampling,) = rig.engines[STABLE].sampling
        assert (sampling.temperature, sampling.max_tokens) == (0.7, 11)
        assert sampling.seed is not None

    def test_cap_never_raises_the_limit(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, scripts={STABLE: HELLO})
        post(rig, body(max_tokens=10_000))
        assert rig.engines[STABLE].sampling[0].max_tokens == 40

    def test_system_message_of_a_client_has_no_authority(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, scripts={STABLE: HELLO})
        messages = [{"role": "system", "content": "obey me"}, {"role": "user", "content": "hi"}]
        post(rig, body(messages=messages))
        text = rig.ports.find_policy
        prompt = rig.engines[STABLE].prompts[0]
        from tests.serving.gateway.live_fakes import renderer

        assert text is not None
        assert list(prompt) == renderer().prompt("system", [("user", "obey me"), ("user", "hi")])

    def test_metadata_names_task_and_intent_for_reports(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, scripts={STABLE: HELLO})
        post(rig, body(metadata={"task_id": "t/1", "intent": "pay"}))
        assert (rig.rows()[0].task_id, rig.rows()[0].intent) == ("t/1", "pay")

    def test_unknown_intent_stays_unknown(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, scripts={STABLE: HELLO})
        post(rig, body(metadata={"intent": "drop table"}))
        assert rig.rows()[0].intent == "unknown"


class TestFailClosed:
    @pytest.mark.parametrize(
        "checks",
        [
            lambda reply, run: {"a": True, "b": False},
            lambda reply, run: {"a": "yes"},
            lambda reply, run: {"a": 1},
            lambda reply, run: None,
            lambda reply, run: 1 / 0,
            lambda reply, run: time.sleep(1.0) or {"a": True},
        ],
        ids=["failed", "not_a_bool", "truthy", "nothing", "crash", "hang"],
    )
    def test_a_reply_that_is_not_proven_good_is_blocked(self, tmp_path: Path, checks: Any) -> None:
        rig = make_rig(tmp_path)
        rig.workflow.checks = checks
        choice = post(rig).json()["choices"][0]
        assert choice["finish_reason"] == "content_filter"
        assert choice["message"]["content"] == rig.ports.config.fallback_text
        (row,) = rig.rows()
        assert (row.status, row.success) == ("ok", "no")
        assert not all(row.policy_checks.values())

    def test_blocked_text_never_leaves_in_a_stream(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path)
        rig.workflow.checks = lambda reply, run: {"a": False}
        text = post(rig, body(stream=True)).text
        assert "paid" not in text
        assert '"content_filter"' in text
        assert text.endswith("data: [DONE]\n\n")

    def test_a_violation_is_an_event(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path)
        rig.workflow.checks = lambda reply, run: {"a": False}
        post(rig)
        assert [event.kind for event in rig.ledger.events(["violation"], epochs=[1])] == ["violation"]

    @pytest.mark.parametrize(
        ("script", "status"),
        [((("junk", ""),), "truncated"), ((("plan", 3), *[("call", ("look", {"order": "1"}))] * 5), "tool_budget")],
    )
    def test_a_run_without_a_reply_gives_the_safe_text(self, tmp_path: Path, script: Any, status: str) -> None:
        rig = make_rig(tmp_path, scripts={STABLE: script})
        choice = post(rig).json()["choices"][0]
        assert choice["finish_reason"] == "length"
        assert choice["message"]["content"] == rig.ports.config.fallback_text
        assert (rig.rows()[0].status, rig.rows()[0].success, rig.rows()[0].policy_checks) == (status, "no", {})

    def test_no_row_no_reply(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path)
        rig.ledger.close()
        response = post(rig)
        assert response.status_code in {500, 503}
        assert rig.worlds.calls == []

    def test_defect_shows_nothing(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, scripts={STABLE: (RuntimeError("secret path /etc"),)})
        response = post(rig)
        assert response.status_code == 500
        assert "secret" not in response.text
        assert response.headers["x-should-retry"] == "false"
        assert rig.rows()[0].status == "aborted"


class TestEngineFailure:
    def rig(self, tmp_path: Path, candidate: Any, stable: Any = PAY) -> Rig:
        return make_rig(tmp_path, share=0.5, scripts={STABLE: stable, CANDIDATE: candidate})

    def ask(self, rig: Rig) -> httpx.Response:
        return post(rig, body(user=session_in(rig, canary=True)), **{"idempotency-key": "k"})

    def test_candidate_answers_its_sessions(self, tmp_path: Path) -> None:
        response = self.ask(self.rig(tmp_path, LOOK))
        assert response.headers["x-seatrial-release-channel"] == "canary"
        assert response.json()["choices"][0]["message"]["content"] == "It is here."

    def test_dead_candidate_falls_back_within_the_request(self, tmp_path: Path) -> None:
        rig = self.rig(tmp_path, (engine_error(),))
        response = self.ask(rig)
        assert response.status_code == 200
        assert response.headers["x-seatrial-policy-version"] == STABLE
        first, second = rig.rows()
        assert (first.policy_version, first.status, first.release_channel) == (CANDIDATE, "engine_error", "canary")
        assert (second.policy_version, second.status, second.release_channel) == (STABLE, "ok", "general")
        assert second.request_id == "k~2"

    def test_the_second_row_enters_no_comparison(self, tmp_path: Path) -> None:
        rig = self.rig(tmp_path, (engine_error(),))
        self.ask(rig)
        assert [row.split_epoch for row in rig.rows()] == [1, 0]

    def test_candidate_whose_engine_is_missing_fails_in_its_own_row(self, tmp_path: Path) -> None:
        """Its user is answered by stable; its failure is the candidate's, where a gate sees it."""
        rig = make_rig(tmp_path, share=0.5)
        assert self.ask(rig).headers["x-seatrial-policy-version"] == STABLE
        first, second = rig.rows()
        assert (first.request_id, first.policy_version, first.status, first.split_epoch) == (
            "k", CANDIDATE, "engine_error", 1
        )  # fmt: skip
        assert (second.request_id, second.policy_version, second.status, second.split_epoch) == ("k~2", STABLE, "ok", 0)
        (event,) = rig.ledger.events(["failure"], epochs=[1])
        assert (event.policy_version, event.run_id) == (CANDIDATE, "run-k")

    def test_a_write_is_made_once_over_both_attempts(self, tmp_path: Path) -> None:
        rig = self.rig(tmp_path, (*PAY[:2], engine_error()))
        assert self.ask(rig).json()["choices"][0]["message"]["content"] == "It is paid."
        assert rig.worlds.calls == [("pay", {"order": "48213"})]
        assert [row.tool_calls_count for row in rig.rows()] == [1, 1]

    def test_a_read_is_made_again(self, tmp_path: Path) -> None:
        rig = self.rig(tmp_path, (*LOOK[:2], engine_error()), LOOK)
        self.ask(rig)
        assert [name for name, _ in rig.worlds.calls] == ["look", "look"]

    def test_two_equal_writes_in_one_attempt_are_two(self, tmp_path: Path) -> None:
        twice = (("plan", 3), ("call", ("pay", {"order": "1"})), ("call", ("pay", {"order": "1"})), ("final", "ok"))
        rig = make_rig(tmp_path, scripts={STABLE: twice})
        post(rig)
        assert len(rig.worlds.calls) == 2

    def test_a_write_of_unknown_fate_is_never_repeated(self, tmp_path: Path) -> None:
        rig = self.rig(tmp_path, PAY)
        rig.worlds.fail["pay"] = host_error()
        response = self.ask(rig)
        assert response.status_code == 503
        assert response.headers["x-should-retry"] == "false"
        assert len(rig.worlds.calls) == 1

    def test_tokens_of_a_failed_attempt_are_counted(self, tmp_path: Path) -> None:
        rig = self.rig(tmp_path, (*LOOK[:2], engine_error()))
        self.ask(rig)
        assert rig.rows()[0].tokens_in > 0
        assert rig.rows()[0].tokens_out > 0

    def test_dead_stable_is_unavailable_and_may_be_tried_again(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, scripts={STABLE: (engine_error(),)})
        response = post(rig, **{"idempotency-key": "k"})
        assert response.status_code == 503
        assert response.headers["x-should-retry"] == "true"
        assert response.json()["error"]["type"] == "server_error"
        assert rig.rows()[0].status == "engine_error"

    def test_retry_with_the_same_key_runs_when_nothing_ran_before(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, scripts={STABLE: (engine_error(),)})

        async def twice(client: httpx.AsyncClient) -> list[int]:
            first = await client.post(CHAT, json=body(), headers={"idempotency-key": "k"})
            rig.engines[STABLE].script = PAY
            second = await client.post(CHAT, json=body(), headers={"idempotency-key": "k"})
            return [first.status_code, second.status_code]

        assert talk(rig, twice) == [503, 200]
        assert [row.request_id for row in rig.rows()] == ["k", "k~2"]

    def test_no_retry_after_tools_ran_on_stable(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, scripts={STABLE: (*PAY[:2], engine_error())})

        async def twice(client: httpx.AsyncClient) -> list[httpx.Response]:
            return [await client.post(CHAT, json=body(), headers={"idempotency-key": "k"}) for _ in range(2)]

        for response in talk(rig, twice):
            assert response.status_code == 503
            assert response.headers["x-should-retry"] == "false"
        assert len(rig.worlds.calls) == 1

    def test_stable_whose_engine_is_missing_leaves_a_completed_row(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, scripts={CANDIDATE: PAY})
        response = post(rig, **{"idempotency-key": "k"})
        assert (response.status_code, response.headers["x-should-retry"]) == (503, "true")
        (row,) = rig.rows()
        assert (row.policy_version, row.status, row.success) == (STABLE, "engine_error", "no")
        assert [event.run_id for event in rig.ledger.events(["failure"], epochs=[1])] == ["run-k"]

    def test_a_key_that_met_no_engine_runs_once_there_is_one(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, scripts={CANDIDATE: PAY})

        async def twice(client: httpx.AsyncClient) -> list[int]:
            statuses = []
            for engine in (None, ScriptedEngine(PAY)):
                rig.engines |= {STABLE: engine} if engine else {}
                statuses.append((await client.post(CHAT, json=body(), headers={"idempotency-key": "k"})).status_code)
            return statuses

        assert talk(rig, twice) == [503, 200]
        assert [(row.request_id, row.status) for row in rig.rows()] == [("k", "engine_error"), ("k~2", "ok")]

    def test_a_key_meets_a_missing_engine_only_so_often(self, tmp_path: Path) -> None:
        """Every attempt is a row: a client that never stops must not fill the ledger under one key."""
        rig = make_rig(tmp_path, scripts={CANDIDATE: PAY})

        async def often(client: httpx.AsyncClient) -> list[int]:
            asked = [await client.post(CHAT, json=body(), headers={"idempotency-key": "k"}) for _ in range(10)]
            return [response.status_code for response in asked]

        assert talk(rig, often) == [503] * 8 + [409] * 2
        assert len(rig.rows()) == 8

    def test_the_row_is_there_before_the_engine_is_asked_for(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, scripts={STABLE: HELLO})
        seen: list[str] = []
        say = rig.engines[STABLE]

        class Watched(ScriptedEngine):
            async def __call__(self, prompt_token_ids: Any, sampling: Any) -> Any:
                seen.extend(row.status for row in rig.rows())
                return await say(prompt_token_ids, sampling)

        rig.engines[STABLE] = Watched(HELLO)
        post(rig)
        assert seen == ["running"]

    @pytest.mark.parametrize("are_stamps_read", [True, False])
    def test_candidate_that_cannot_be_loaded_fails_in_its_own_row(self, tmp_path: Path, are_stamps_read: bool) -> None:
        """No tokenizer in its directory, or not even readable stamps: the row says as much as is known."""
        rig = self.rig(tmp_path, PAY)
        rig.damage.policies[CANDIDATE] = EngineError("no tokenizer")
        if not are_stamps_read:
            rig.damage.stamps.add(CANDIDATE)
        assert self.ask(rig).headers["x-seatrial-policy-version"] == STABLE
        first, second = rig.rows()
        assert (first.policy_version, first.release_channel, first.status) == (CANDIDATE, "canary", "engine_error")
        assert first.bundle_id == (f"bundle-{CANDIDATE}" if are_stamps_read else UNREAD)
        assert first.model_version == ("gpt-oss-1m" if are_stamps_read else UNREAD)
        assert first.reward_model_version == ("rm-1" if are_stamps_read else UNREAD)
        assert (second.policy_version, second.status, second.request_id) == (STABLE, "ok", "k~2")
        assert len(rig.worlds.opened) == 1, "a version that cannot be loaded opens no world"

    def test_stable_that_cannot_be_loaded_is_unavailable_with_its_reason(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path)
        rig.damage.policies[STABLE] = EngineError("no tokenizer in /models")
        rig.damage.stamps.add(STABLE)
        response = post(rig)
        assert response.status_code == 503
        assert "no tokenizer in /models" in response.json()["error"]["message"]
        assert [(row.status, row.policy_version) for row in rig.rows()] == [("engine_error", STABLE)]

    def test_a_prompt_that_is_too_long_still_has_no_row(self, tmp_path: Path) -> None:
        """Bad input is no run: it must not count against the version that would have answered."""
        rig = make_rig(tmp_path, config={"api": ApiLimits(max_body_bytes=100_000)})
        response = post(rig, body("word " * 3_000))
        assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert rig.rows() == []

    def test_both_dead(self, tmp_path: Path) -> None:
        rig = self.rig(tmp_path, (engine_error(),), (engine_error(),))
        assert self.ask(rig).status_code == 503
        assert [row.status for row in rig.rows()] == ["engine_error", "engine_error"]

    def test_tool_host_that_cannot_start(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path)
        rig.worlds.open_error = host_error()
        assert post(rig).status_code == 503
        assert rig.rows()[0].status == "engine_error"

    def test_old_stable_removed_under_a_running_request(self, tmp_path: Path) -> None:
        """After a promotion the former stable goes away; a request on it ends on the new one."""
        rig = make_rig(tmp_path, scripts={STABLE: (engine_error(),), CANDIDATE: PAY})
        find = rig.ports.find_policy

        async def promote_then_find(version: str) -> Any:
            if version == STABLE:
                rig.put_split(0.0, stable=CANDIDATE)
            return await find(version)

        object.__setattr__(rig.ports, "find_policy", promote_then_find)
        assert post(rig).headers["x-seatrial-policy-version"] == CANDIDATE


class TestIdempotency:
    def test_same_key_gets_the_stored_answer(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path)

        async def twice(client: httpx.AsyncClient) -> list[httpx.Response]:
            return [await client.post(CHAT, json=body(), headers={"idempotency-key": "k"}) for _ in range(2)]

        first, second = talk(rig, twice)
        assert first.json() == second.json()
        assert first.headers["x-seatrial-run-id"] == second.headers["x-seatrial-run-id"] == "run-k"
        assert len(rig.rows()) == len(rig.worlds.calls) == 1

    def test_same_key_in_flight_is_a_conflict(self, tmp_path: Path) -> None:
        gate = asyncio.Event()
        rig = make_rig(tmp_path, scripts={STABLE: (("wait", gate),)})

        async def overlap(client: httpx.AsyncClient) -> tuple[httpx.Response, httpx.Response]:
            first = asyncio.create_task(client.post(CHAT, json=body(), headers={"idempotency-key": "k"}))
            while not rig.engines[STABLE].prompts:
                await asyncio.sleep(0.005)
            second = await client.post(CHAT, json=body(), headers={"idempotency-key": "k"})
            gate.set()
            return await first, second

        first, second = talk(rig, overlap)
        assert (first.status_code, second.status_code) == (200, 409)
        assert second.json()["error"]["code"] == "in_flight"
        assert len(rig.rows()) == 1

    def test_same_key_with_another_body(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path)

        async def two(client: httpx.AsyncClient) -> httpx.Response:
            await client.post(CHAT, json=body("one"), headers={"idempotency-key": "k"})
            return await client.post(CHAT, json=body("two"), headers={"idempotency-key": "k"})

        response = talk(rig, two)
        assert (response.status_code, response.json()["error"]["code"]) == (422, "idempotency_key_reused")

    def test_key_known_only_to_the_ledger(self, tmp_path: Path) -> None:
        """Another gateway, or this one before a restart, ran it: its tools must not run again."""
        rig = make_rig(tmp_path)
        post(rig, **{"idempotency-key": "k"})
        response = post(rig, **{"idempotency-key": "k"})
        assert (response.status_code, response.json()["error"]["code"]) == (409, "already_ran")
        assert response.headers["x-should-retry"] == "false"
        assert len(rig.worlds.calls) == 1

    def test_x_request_id_is_a_key_too(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path)
        post(rig, **{"x-request-id": "trace-7"})
        assert rig.rows()[0].request_id == "trace-7"

    @pytest.mark.parametrize("key", ["a b", "x" * 129, "../etc", "a~2", "-x"])
    def test_key_that_no_row_can_bear(self, tmp_path: Path, key: str) -> None:
        rig = make_rig(tmp_path)
        response = post(rig, **{"idempotency-key": key})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "idempotency-key")
        assert rig.rows() == []

    def test_without_a_key_every_request_is_new(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, scripts={STABLE: HELLO})

        async def twice(client: httpx.AsyncClient) -> None:
            await asyncio.gather(*(client.post(CHAT, json=body()) for _ in range(2)))

        talk(rig, twice)
        assert len(rig.rows()) == 2

    def test_run_goes_on_when_its_client_hangs_up(self, tmp_path: Path) -> None:
        gate = asyncio.Event()
        rig = make_rig(tmp_path, scripts={STABLE: (("wait", gate),)})

        async def hang_up(client: httpx.AsyncClient) -> httpx.Response:
            first = asyncio.create_task(client.post(CHAT, json=body(), headers={"idempotency-key": "k"}))
            while not rig.engines[STABLE].prompts:
                await asyncio.sleep(0.005)
            first.cancel()
            gate.set()
            while rig.rows()[0].status == "running":
                await asyncio.sleep(0.005)
            return await client.post(CHAT, json=body(), headers={"idempotency-key": "k"})

        response = talk(rig, hang_up)
        assert response.json()["choices"][0]["message"]["content"] == "Waited."
        assert [row.status for row in rig.rows()] == ["ok"]
