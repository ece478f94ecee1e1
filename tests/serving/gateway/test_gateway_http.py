"""The gateway's other doors and its life: streams, sizes, routing, overrides, labels, health, overload, the critic."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from rl_actors.contracts.errors import EngineError
from serving.gateway.answer import LiveRequests
from serving.gateway.openai_api import ApiError
from tests.serving.gateway.live_fakes import (
    CANDIDATE,
    HELLO,
    LOOK,
    PAY,
    STABLE,
    Rig,
    body,
    live_request,
    make_rig,
    session_in,
)

CHAT = "/v1/chat/completions"
ARMS = {STABLE: HELLO, CANDIDATE: LOOK}


def talk(rig: Rig, conversation: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with rig.client() as client:
            return await asyncio.wait_for(conversation(client), 20.0)

    return asyncio.run(run())


def get(rig: Rig, path: str) -> httpx.Response:
    return talk(rig, lambda client: client.get(path))


def post(rig: Rig, path: str = CHAT, value: Any = None, **headers: str) -> httpx.Response:
    return talk(rig, lambda client: client.post(path, json=body() if value is None else value, headers=headers))


class TestStream:
    def test_is_server_sent_events_with_stamps(self, tmp_path: Path) -> None:
        response = post(make_rig(tmp_path), value=body(stream=True))
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-seatrial-policy-version"] == STABLE
        assert response.text.endswith("data: [DONE]\n\n")

    def test_text_and_usage(self, tmp_path: Path) -> None:
        response = post(make_rig(tmp_path), value=body(stream=True))
        lines = [line for line in response.text.split("\n\n") if line and "[DONE]" not in line]
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "It is paid."
        assert chunks[-1]["usage"]["completion_tokens"] > 0

    def test_error_comes_before_the_200(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, scripts={STABLE: (EngineError("dead"),)})
        response = post(rig, value=body(stream=True))
        assert response.status_code == 503
        assert response.headers["content-type"] == "application/json"

    def test_streamed_and_whole_answer_of_one_key_agree(self, tmp_path: Path) -> None:
        """The stored answer is the reply, not its transport; another body needs another key."""
        rig = make_rig(tmp_path)

        async def two(client: httpx.AsyncClient) -> list[httpx.Response]:
            return [await client.post(CHAT, json=body(stream=True), headers={"idempotency-key": "k"}) for _ in range(2)]

        first, second = talk(rig, two)
        assert first.text == second.text


class TestRouting:
    def test_share_decides_by_session(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, share=0.3, scripts=ARMS)

        async def many(client: httpx.AsyncClient) -> list[str]:
            replies = [await client.post(CHAT, json=body(user=f"user-{i}")) for i in range(60)]
            return [reply.headers["x-seatrial-release-channel"] for reply in replies]

        assert 8 <= talk(rig, many).count("canary") <= 28

    @pytest.mark.parametrize("place", ["user", "header", "conversation"])
    def test_a_session_sticks(self, tmp_path: Path, place: str) -> None:
        rig = make_rig(tmp_path, share=0.5, scripts=ARMS)
        value = body(user="someone") if place == "user" else body("the same start")
        headers = {"x-session-key": "someone"} if place == "header" else {}

        async def many(client: httpx.AsyncClient) -> set[str]:
            replies = [await client.post(CHAT, json=value, headers=headers) for _ in range(6)]
            return {reply.headers["x-seatrial-policy-version"] for reply in replies}

        assert len(talk(rig, many)) == 1
        assert len({row.session_key for row in rig.rows()}) == 1

    def test_user_wins_over_the_header(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path)
        post(rig, value=body(user="a"), **{"x-session-key": "b"})
        assert rig.rows()[0].session_key == "a"

    def test_a_later_message_keeps_the_session(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, scripts={STABLE: HELLO})
        later = body()
        later["messages"] = [
            *later["messages"], {"role": "assistant", "content": "yes"}, {"role": "user", "content": "and?"},
        ]  # fmt: skip

        async def both(client: httpx.AsyncClient) -> None:
            await client.post(CHAT, json=body())
            await client.post(CHAT, json=later)

        talk(rig, both)
        assert len({row.session_key for row in rig.rows()}) == 1

    def test_stale_record_gives_the_candidate_nothing(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, share=0.5, scripts=ARMS)
        session = session_in(rig, canary=True)
        assert post(rig, value=body(user=session)).headers["x-seatrial-release-channel"] == "canary"
        rig.clock.sleep(rig.ports.config.stale_after_s + 1)
        assert post(rig, value=body(user=session)).headers["x-seatrial-release-channel"] == "general"
        assert rig.rows()[-1].split_epoch == 0

    def test_fail_back_is_one_record(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, share=0.5, scripts=ARMS)
        session = session_in(rig, canary=True)

        async def fail_back(client: httpx.AsyncClient) -> list[str]:
            first = await client.post(CHAT, json=body(user=session))
            rig.put_split(0.0)
            second = await client.post(CHAT, json=body(user=session))
            return [reply.headers["x-seatrial-policy-version"] for reply in (first, second)]

        assert talk(rig, fail_back) == [CANDIDATE, STABLE]

    def test_fail_back_frees_whoever_waits_for_a_silent_candidate(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, share=0.5, scripts={STABLE: HELLO, CANDIDATE: (("wait", asyncio.Event()),)})

        async def ask(client: httpx.AsyncClient) -> httpx.Response:
            waiting = asyncio.create_task(client.post(CHAT, json=body(user=session_in(rig, canary=True))))
            while not rig.engines[CANDIDATE].prompts:
                await asyncio.sleep(0.005)
            rig.put_split(0.0)
            return await waiting

        assert talk(rig, ask).headers["x-seatrial-policy-version"] == STABLE
        assert [row.status for row in rig.rows()] == ["engine_error", "ok"]

    def test_the_gateway_polls_by_itself(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path)

        async def wait(client: httpx.AsyncClient) -> int:
            rig.put_split(0.2, poll=False)
            while (await client.get("/healthz")).json()["split_epoch"] != 2:
                await asyncio.sleep(0.01)
            return rig.ports.splits.epoch

        assert talk(rig, wait) == 2

    def test_without_a_split_nothing_is_served(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, share=None)
        response = post(rig)
        assert response.status_code == 503
        assert "no split record" in response.json()["error"]["message"]
        assert rig.rows() == []

    def test_caller_cannot_choose_the_channel(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, share=0.5, scripts=ARMS)
        headers = {"x-seatrial-release-channel": "canary", "x-seatrial-policy-version": CANDIDATE}
        response = post(rig, value=body(user=session_in(rig, canary=False)), **headers)
        assert response.headers["x-seatrial-release-channel"] == "general"


class TestLimits:
    def test_large_body_is_cut_off(self, tmp_path: Path) -> None:
        assert post(make_rig(tmp_path), value=body("x" * 30_000)).status_code == 413

    def test_prompt_that_does_not_fit_the_context(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path)
        response = post(rig, value=body("7" * 2_500))
        assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert rig.rows() == []

    def test_overload_is_told_at_once(self, tmp_path: Path) -> None:
        gate = asyncio.Event()
        rig = make_rig(tmp_path, scripts={STABLE: (("wait", gate),)}, config={"max_concurrency": 2})

        async def press(client: httpx.AsyncClient) -> list[httpx.Response]:
            tasks = [asyncio.create_task(client.post(CHAT, json=body())) for _ in range(5)]
            done, _ = await asyncio.wait(tasks, timeout=0.5)
            gate.set()
            return [*(task.result() for task in done), *await asyncio.gather(*set(tasks) - done)]

        replies = talk(rig, press)
        assert sorted(reply.status_code for reply in replies) == [200, 200, 429, 429, 429]
        full = next(reply for reply in replies if reply.status_code == 429)
        assert full.headers["retry-after"] == "1"
        assert len(rig.rows()) == 2

    def test_bad_input_writes_no_row(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path)
        for value in ({}, {"model": "shop"}, body(n=3), body(model="x")):
            response = post(rig, value=value)
            assert response.status_code in {400, 404}
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert rig.rows() == []

    @pytest.mark.parametrize(("method", "path"), [("GET", "/nowhere"), ("GET", CHAT), ("DELETE", "/v1/models")])
    def test_the_frameworks_refusals_have_our_shape(self, tmp_path: Path, method: str, path: str) -> None:
        response = talk(make_rig(tmp_path), lambda client: client.request(method, path))
        assert response.status_code in {404, 405}
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


class TestRequests:
    def test_older_clients_find_the_same_under_runs(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path)
        run_id = post(rig).headers["x-seatrial-run-id"]
        said = {"actor": "ann", "reason": "wrong order"}
        assert post(rig, f"/v1/runs/{run_id}/override", said).json() == {"run_id": run_id, "human_override": True}
        assert post(rig, f"/v1/runs/{run_id}/outcome", said | {"success": False}).json()["success"] == "no"
        shown = get(rig, f"/v1/runs/{run_id}").json()
        assert shown == get(rig, f"/v1/requests/{run_id}").json()
        assert [entry["what"] for entry in shown["audit"]] == ["override", "label"]

    def test_show(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path)

        async def ask_and_show(client: httpx.AsyncClient) -> dict[str, Any]:
            run_id = (await client.post(CHAT, json=body())).headers["x-seatrial-run-id"]
            return (await client.get(f"/v1/requests/{run_id}")).json()

        shown = talk(rig, ask_and_show)
        assert (shown["status"], shown["policy_version"], shown["audit"]) == ("ok", STABLE, [])

    @pytest.mark.parametrize("run_id", ["run-none", "none", "run-", "run-k~9"])
    def test_unknown_request(self, tmp_path: Path, run_id: str) -> None:
        rig = make_rig(tmp_path)
        said = {"actor": "a", "reason": "r"}
        assert get(rig, f"/v1/requests/{run_id}").json()["error"]["code"] == "run_not_found"
        assert post(rig, f"/v1/requests/{run_id}/override", said).status_code == 404
        assert post(rig, f"/v1/requests/{run_id}/outcome", said | {"success": True}).status_code == 404

    def test_override_is_kept_with_actor_and_reason(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path)
        run_id = post(rig).headers["x-seatrial-run-id"]
        assert (
            post(rig, f"/v1/requests/{run_id}/override", {"actor": "ann", "reason": "wrong order"}).status_code == 200
        )
        assert rig.rows()[0].human_override
        (entry,) = rig.ledger.audit(run_id)
        assert (entry["actor"], entry["reason"], entry["what"]) == ("ann", "wrong order", "override")

    def test_latest_label_wins(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path)
        run_id = post(rig).headers["x-seatrial-run-id"]
        for success in (False, True):
            said = {"actor": "ann", "reason": "looked again", "success": success}
            post(rig, f"/v1/requests/{run_id}/outcome", said)
        assert rig.rows()[0].success == "yes"
        assert len(rig.ledger.audit(run_id)) == 2

    def test_override_and_outcome_reach_the_gates(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path)
        run_id = post(rig).headers["x-seatrial-run-id"]
        post(rig, f"/v1/requests/{run_id}/override", {"actor": "a", "reason": "r"})
        post(rig, f"/v1/requests/{run_id}/outcome", {"actor": "a", "reason": "r", "success": False})
        kinds = {event.kind for event in rig.ledger.events(["override", "failure"], epochs=[1])}
        assert kinds == {"override", "failure"}

    @pytest.mark.parametrize(
        "said",
        [{}, {"actor": "", "reason": "r"}, {"actor": "a"}, {"actor": "a", "reason": ""}, {"actor": 3, "reason": "r"}],
    )
    def test_override_needs_actor_and_reason(self, tmp_path: Path, said: dict[str, Any]) -> None:
        rig = make_rig(tmp_path)
        run_id = post(rig).headers["x-seatrial-run-id"]
        assert post(rig, f"/v1/requests/{run_id}/override", said).status_code == 400
        assert not rig.rows()[0].human_override

    def test_row_of_the_retry_can_be_shown(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, share=0.5, scripts={STABLE: PAY, CANDIDATE: (EngineError("dead"),)})
        run_id = post(rig, value=body(user=session_in(rig, canary=True))).headers["x-seatrial-run-id"]
        assert run_id.endswith("~2")
        assert get(rig, f"/v1/requests/{run_id}").json()["run_id"] == run_id


class TestHealthAndModels:
    def test_models(self, tmp_path: Path) -> None:
        (model,) = get(make_rig(tmp_path), "/v1/models").json()["data"]
        assert model["id"] == "shop"

    def test_healthy(self, tmp_path: Path) -> None:
        response = get(make_rig(tmp_path), "/healthz")
        assert response.status_code == 200
        assert response.json()["split_epoch"] == 1

    def test_no_split_is_not_healthy(self, tmp_path: Path) -> None:
        assert get(make_rig(tmp_path, share=None), "/healthz").status_code == 503

    def test_leaving_withdraws_the_acknowledgement(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path)
        ack = rig.ports.config.files.acks / "gateway-1.json"
        assert ack.exists()
        get(rig, "/healthz")
        assert not ack.exists()

    def test_leaving_ends_what_is_still_open(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path)
        from tests.serving.fakes import make_record

        rig.ledger.start(make_record(1))
        get(rig, "/healthz")
        assert rig.rows()[0].status == "aborted"


class TestCritic:
    def test_scores_a_run_later(self, tmp_path: Path) -> None:
        seen: list[Sequence[int]] = []

        async def critic(sequences: Sequence[Sequence[int]]) -> list[float]:
            seen.extend(sequences)
            return [0.75] * len(sequences)

        rig = make_rig(tmp_path, critic=critic)

        async def ask(client: httpx.AsyncClient) -> None:
            await client.post(CHAT, json=body())
            while rig.ports.critic.num_scored == 0:
                await asyncio.sleep(0.005)

        talk(rig, ask)
        assert rig.rows()[0].critic_score == 0.75
        prompt = rig.engines[STABLE].prompts[-1]
        assert tuple(seen[0][: len(prompt)]) == prompt
        assert len(seen[0]) > len(prompt)

    def test_never_gates(self, tmp_path: Path) -> None:
        async def critic(sequences: Sequence[Sequence[int]]) -> list[float]:
            return [-1e9] * len(sequences)

        assert post(make_rig(tmp_path, critic=critic)).json()["choices"][0]["finish_reason"] == "stop"

    @pytest.mark.parametrize("error", [EngineError("dead"), TimeoutError(), ValueError("nan")])
    def test_failure_is_counted_and_harms_nobody(self, tmp_path: Path, error: Exception) -> None:
        async def critic(sequences: Sequence[Sequence[int]]) -> list[float]:
            raise error

        rig = make_rig(tmp_path, critic=critic)

        async def ask(client: httpx.AsyncClient) -> Any:
            status = (await client.post(CHAT, json=body())).status_code
            while rig.ports.critic.num_lost == 0:
                await asyncio.sleep(0.005)
            return status, (await client.get("/healthz")).json()["critic"]

        assert talk(rig, ask) == (200, {"scored": 0, "lost": 1})

    def test_full_queue_is_counted(self, tmp_path: Path) -> None:
        hang = asyncio.Event()

        async def critic(sequences: Sequence[Sequence[int]]) -> list[float]:
            await hang.wait()
            return [0.0] * len(sequences)

        rig = make_rig(tmp_path, critic=critic)

        async def ask(client: httpx.AsyncClient) -> int:
            for _ in range(8):
                assert (await client.post(CHAT, json=body())).status_code == 200
            return rig.ports.critic.num_lost

        assert talk(rig, ask) >= 1

    def test_too_few_scores_are_a_loss(self, tmp_path: Path) -> None:
        async def critic(sequences: Sequence[Sequence[int]]) -> list[float]:
            return []

        rig = make_rig(tmp_path, critic=critic)

        async def ask(client: httpx.AsyncClient) -> None:
            await client.post(CHAT, json=body())
            while rig.ports.critic.num_lost == 0:
                await asyncio.sleep(0.005)

        talk(rig, ask)
        assert rig.rows()[0].critic_score == -1.0

    def test_without_a_critic_nothing_is_lost(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path)
        post(rig)
        assert (rig.ports.critic.num_scored, rig.ports.critic.num_lost) == (0, 0)


def test_too_many_attempts_under_one_key(tmp_path: Path) -> None:
    """Each retry is allowed, because nothing ran; the ninth is not."""
    rig = make_rig(tmp_path, scripts={STABLE: (EngineError("dead"),)})

    async def many(client: httpx.AsyncClient) -> list[int]:
        replies = [await client.post(CHAT, json=body(), headers={"idempotency-key": "k"}) for _ in range(10)]
        return [reply.status_code for reply in replies]

    statuses = talk(rig, many)
    assert statuses[:8] == [503] * 8
    assert statuses[8:] == [409, 409]
    assert len(rig.rows()) == 8


def test_live_requests_hold_no_http(tmp_path: Path) -> None:
    """LiveRequests is usable without the HTTP application: offline checks and other transports may call it."""
    rig = make_rig(tmp_path, scripts={STABLE: HELLO})
    answer = asyncio.run(LiveRequests(rig.ports).answer(live_request("hi")))
    assert (answer.text, answer.finish_reason) == ("Hello there.", "stop")
    with pytest.raises(ApiError, match="already ran"):
        asyncio.run(LiveRequests(rig.ports).answer(live_request("hi")))
