"""How a run can end, and what its row, its reply and its tools then look like; and two gateways over one home."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from rl_actors.contracts.errors import InfrastructureError
from rl_actors.contracts.tasks import AgentLimits
from serving.gateway.answer import LiveRequests
from serving.gateway.http import build_app
from serving.gateway.ports import LivePolicy
from serving.platform import replicas as gateway_module
from serving.platform.replicas import serve_ports
from serving.split.record import SplitStore
from serving.split.watch import SplitWatcher, acknowledged_epoch, read_acks
from serving.store.ledger import RequestLedger
from tests.serving.gateway.live_fakes import (
    HELLO,
    PAY,
    STABLE,
    Rig,
    ScriptedEngine,
    body,
    make_config,
    make_policy,
    make_rig,
    renderer,
)

CHAT = "/v1/chat/completions"
TIGHT = AgentLimits(max_turns=2, max_tool_calls=1, max_tokens_per_turn=40, max_context_tokens=700, timeout_s=0.05)


def talk(rig: Rig, conversation: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with rig.client() as client:
            return await asyncio.wait_for(conversation(client), 20.0)

    return asyncio.run(run())


def post(rig: Rig, **headers: str) -> httpx.Response:
    return talk(rig, lambda client: client.post(CHAT, json=body(), headers=headers))


class TestEndings:
    def test_slow_run_ends_in_time(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, scripts={STABLE: (("wait", asyncio.Event()),)}, config={"limits": TIGHT})
        response = post(rig)
        assert response.status_code == 200
        assert response.json()["choices"][0]["finish_reason"] == "length"
        (row,) = rig.rows()
        assert (row.status, row.success, row.policy_checks) == ("timeout", "no", {})

    def test_a_timeout_is_a_failure_event(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, scripts={STABLE: (("wait", asyncio.Event()),)}, config={"limits": TIGHT})
        post(rig)
        assert [event.kind for event in rig.ledger.events(["failure"], epochs=[1])] == ["failure"]

    def test_too_many_turns(self, tmp_path: Path) -> None:
        limits = replace(TIGHT, timeout_s=10.0)
        rig = make_rig(tmp_path, scripts={STABLE: PAY}, config={"limits": limits})
        assert post(rig).json()["choices"][0]["finish_reason"] == "length"
        assert rig.rows()[0].status == "truncated"

    def test_unreleased_run_still_tells_that_tools_ran(self, tmp_path: Path) -> None:
        limits = replace(TIGHT, timeout_s=10.0)
        rig = make_rig(tmp_path, scripts={STABLE: PAY}, config={"limits": limits})
        assert post(rig).headers["x-should-retry"] == "false"
        assert rig.rows()[0].tool_calls_count == 1

    def test_call_without_a_plan_is_denied_and_counted(self, tmp_path: Path) -> None:
        script = (("call", ("pay", {"order": "1"})), ("final", "Done."))
        rig = make_rig(tmp_path, scripts={STABLE: script})
        post(rig)
        assert rig.worlds.calls == []
        assert (rig.rows()[0].tool_calls_count, rig.rows()[0].tool_error_count) == (1, 1)

    @pytest.mark.parametrize(
        "call", [("steal", {"order": "1"}), ("pay", {"order": 7}), ("pay", {}), ("pay", {"order": "1", "to": "me"})]
    )
    def test_what_is_not_allowed_never_reaches_the_world(self, tmp_path: Path, call: Any) -> None:
        rig = make_rig(tmp_path, scripts={STABLE: (("plan", 3), ("call", call), ("final", "Done."))})
        post(rig)
        assert [name for name, _ in rig.worlds.calls if name == "steal"] == []
        errors = rig.rows()[0].tool_error_count
        assert errors == (0 if call[1].get("to") else 1)

    def test_row_is_written_before_the_first_token(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, scripts={STABLE: HELLO})
        seen: list[str] = []
        say = rig.engines[STABLE].__call__

        async def generate(prompt: Any, sampling: Any) -> Any:
            seen.extend(row.status for row in rig.rows())
            return await say(prompt, sampling)

        async def find(version: str) -> LivePolicy:
            return LivePolicy(stamps=make_policy(version), renderer=renderer(), generate=generate)

        object.__setattr__(rig.ports, "find_policy", find)
        post(rig)
        assert seen == ["running"]

    def test_row_is_complete_before_the_reply(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A ledger that cannot be completed holds the reply back: what is not recorded did not happen."""
        rig = make_rig(tmp_path)

        def fail(*args: Any, **kwargs: Any) -> None:
            raise InfrastructureError("disk full")

        monkeypatch.setattr(rig.ledger, "complete", fail)
        response = post(rig)
        assert response.status_code == 503
        assert response.headers["x-should-retry"] == "false"
        assert "It is paid" not in response.text

    def test_duration_is_the_runs_own(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, scripts={STABLE: HELLO})
        times = iter((10.0, 10.25))
        object.__setattr__(rig.ports, "monotonic", lambda: next(times))
        post(rig)
        assert rig.rows()[0].duration_ms == pytest.approx(250.0)

    def test_seeded_requests_repeat(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, scripts={STABLE: PAY})

        async def twice(client: httpx.AsyncClient) -> None:
            for _ in range(2):
                await client.post(CHAT, json=body(seed=5))

        talk(rig, twice)
        seeds = [sampling.seed for sampling in rig.engines[STABLE].sampling]
        assert seeds[:3] == seeds[3:]
        assert len(set(seeds[:3])) == 3

    def test_without_a_seed_sampling_is_free(self, tmp_path: Path) -> None:
        rig = make_rig(tmp_path, scripts={STABLE: HELLO})
        post(rig)
        assert rig.engines[STABLE].sampling[0].seed is None

    def test_prompt_grows_by_exact_tokens(self, tmp_path: Path) -> None:
        """Token in, token out, as in training: each prompt begins with the one before it."""
        rig = make_rig(tmp_path)
        post(rig)
        prompts = rig.engines[STABLE].prompts
        assert len(prompts) == 3
        for earlier, later in itertools.pairwise(prompts):
            assert later[: len(earlier)] == earlier


class TestTwoGateways:
    def pair(self, tmp_path: Path) -> tuple[Rig, Rig]:
        """Two gateways that share ledger, split and live world, and nothing else."""
        one = make_rig(tmp_path)
        two = make_rig(tmp_path, share=None)
        config = two.ports.config
        changes = {
            "ledger": RequestLedger(config.files.ledger, owner="gateway-2"),
            "worlds": one.worlds,
            "splits": SplitWatcher(
                SplitStore(config.files.split), config.files.acks, gateway="gateway-2",
                slot_of=one.ledger.session_slot, stale_after_s=30.0,
                clock=one.clock,
            ),
        }  # fmt: skip
        two.ports = replace(two.ports, **changes)
        return one, two

    def test_a_key_runs_on_one_of_them_only(self, tmp_path: Path) -> None:
        one, two = self.pair(tmp_path)
        assert post(one, **{"idempotency-key": "k"}).status_code == 200
        response = post(two, **{"idempotency-key": "k"})
        assert (response.status_code, response.json()["error"]["code"]) == (409, "already_ran")
        assert len(one.worlds.calls) == 1

    def test_at_the_same_time_too(self, tmp_path: Path) -> None:
        one, two = self.pair(tmp_path)

        async def race() -> list[int]:
            async with one.client() as first, two.client() as second:
                asking = [c.post(CHAT, json=body(), headers={"idempotency-key": "k"}) for c in (first, second)]
                return sorted(reply.status_code for reply in await asyncio.gather(*asking))

        assert asyncio.run(race()) == [200, 409]
        assert len(one.worlds.calls) == 1

    def test_the_slower_one_holds_the_acknowledgement(self, tmp_path: Path) -> None:
        one, two = self.pair(tmp_path)
        acks = one.ports.config.files.acks
        two.ports.splits.poll()
        one.put_split(0.1)
        assert acknowledged_epoch(acks, one.clock(), 30.0) == 1
        two.ports.splits.poll()
        assert acknowledged_epoch(acks, one.clock(), 30.0) == 2

    def test_leaving_touches_only_ones_own(self, tmp_path: Path) -> None:
        one, two = self.pair(tmp_path)
        two.ports.splits.poll()

        async def visit() -> None:
            async with two.client() as client:
                await client.get("/healthz")

        asyncio.run(visit())
        assert [ack.gateway for ack in read_acks(one.ports.config.files.acks)] == ["gateway-1"]


class TestReplicaPorts:
    """What a Serve replica builds for itself, with real tool hosts and everything but Serve."""

    def test_real_tool_host_behind_the_http_application(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        live = tmp_path / "live.txt"
        config = replace(make_config(tmp_path), live_world={"database": str(live)}, num_tool_hosts=1)
        make_rig(tmp_path)

        class Policies:
            def __init__(self, given: object) -> None:
                assert given == config

            async def find(self, version: str) -> LivePolicy:
                return LivePolicy(stamps=make_policy(version), renderer=renderer(), generate=ScriptedEngine(PAY))

        monkeypatch.setattr(gateway_module, "ServePolicies", Policies)
        SplitStore(config.files.split).refresh(10**12)

        async def ask() -> httpx.Response:
            ports = serve_ports(config)
            app = build_app(ports, LiveRequests(ports).answer)
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            async with (
                app.router.lifespan_context(app),
                httpx.AsyncClient(transport=transport, base_url="http://gateway") as client,
            ):
                reply = await client.post(CHAT, json=body(), headers={"idempotency-key": "k"})
            await ports.worlds.close()  # type: ignore[attr-defined]
            return reply

        response = asyncio.run(asyncio.wait_for(ask(), 60.0))
        assert response.json()["choices"][0]["message"]["content"] == "It is paid."
        assert live.read_text() == "k paid 48213\n"

    def test_only_writes_are_remembered_between_attempts(self, tmp_path: Path) -> None:
        assert serve_ports(make_config(tmp_path)).writes == frozenset({"pay"})

    def test_each_replica_has_a_name_of_its_own(self, tmp_path: Path) -> None:
        names = {serve_ports(make_config(tmp_path)).ledger.owner for _ in range(3)}
        assert len(names) == 3
