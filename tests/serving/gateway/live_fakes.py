"""Fakes of a live gateway: a real tokenizer and loop, a scripted engine, a world in memory, a clock moved by hand."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from rl_actors.agent.executor import Toolset
from rl_actors.agent.renderers.harmony import HarmonyRenderer, train_tokenizer
from rl_actors.contracts.errors import EngineError, InfrastructureError, TamperedError, ToolHostError
from rl_actors.contracts.rollouts import Completion, SamplingParams, ToolResult
from rl_actors.contracts.tasks import AgentLimits
from rl_actors.environment.workflow import WorkflowRef
from serving.contracts.release import SplitRecord
from serving.contracts.requests import RequestRecord
from serving.gateway.answer import LiveRequests
from serving.gateway.critic_queue import Critic, CriticQueue
from serving.gateway.http import build_app
from serving.gateway.openai_api import ChatRequest
from serving.gateway.ports import LivePolicy, LivePorts, LiveRequest
from serving.platform.replicas import end_orphans
from serving.split.record import SplitStore, slot_position
from serving.split.watch import SplitWatcher
from serving.store.ledger import RequestLedger
from serving.store.served import ApiLimits, GatewayConfig, ServedPolicy
from serving.store.trace_log import TraceLog
from tests.serving.fakes import START, FakeClock
from tests.serving.gateway.shop import TOOLS, ShopWorkflow

STABLE, CANDIDATE = "sft-a", "ppo-b"
PROMPT = "From C1000: please pay order 48213"
Step = tuple[str, Any] | Exception
"""("plan", budget), ("call", (tool, arguments)), ("final", text), ("junk", ""), ("wait", event), or what is raised."""
PAY: tuple[Step, ...] = (("plan", 3), ("call", ("pay", {"order": "48213"})), ("final", "It is paid."))
LOOK: tuple[Step, ...] = (("plan", 3), ("call", ("look", {"order": "48213"})), ("final", "It is here."))
HELLO: tuple[Step, ...] = (("final", "Hello there."),)


@functools.cache
def renderer() -> HarmonyRenderer:
    """A real renderer with a tiny tokenizer."""
    texts = [PROMPT, "system user assistant final json commentary to=functions.pay look plan error ok"]
    return HarmonyRenderer(train_tokenizer(texts, vocab_size=330))


@dataclass
class ScriptedEngine:
    """Says the script's step of the turn it is asked for; the turn is read off the prompt, so many runs may overlap."""

    script: Sequence[Step]
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    sampling: list[SamplingParams] = field(default_factory=list)

    async def __call__(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        self.prompts.append(tuple(prompt_token_ids))
        self.sampling.append(sampling)
        call_token = renderer().stop_token_ids[0]
        step = self.script[list(prompt_token_ids).count(call_token)]
        if isinstance(step, Exception):
            raise step
        kind, value = step
        if kind == "wait":
            await value.wait()
            kind, value = "final", "Waited."
        await asyncio.sleep(0)
        ids = tuple(_tokens(kind, value))
        return Completion(
            token_ids=ids, logprobs=(0.0,) * len(ids), weights_version=0, finished=kind != "junk", cached_tokens=2
        )


def _tokens(kind: str, value: Any) -> list[int]:
    render = renderer()
    if kind == "plan":
        return render.call("plan", {"steps": ["act"], "tool_budget": value})
    if kind == "call":
        return render.call(*value)
    return render.final(value) if kind == "final" else [9, 10, 11]


@dataclass
class MemoryWorlds:
    """Live worlds whose calls are remembered. `fail` maps a tool to what it raises, `errors` to an error it answers."""

    opened: list[Mapping[str, Any]] = field(default_factory=list)
    calls: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    num_closed: int = 0
    fail: dict[str, Exception] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    open_error: Exception | None = None

    async def open(self, world: Mapping[str, Any]) -> Any:
        if self.open_error is not None:
            raise self.open_error
        self.opened.append(world)
        return self._world()

    @asynccontextmanager
    async def _world(self) -> AsyncIterator[MemoryWorlds]:
        try:
            yield self
        finally:
            self.num_closed += 1

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> ToolResult:
        self.calls.append((tool, arguments))
        if tool in self.fail:
            raise self.fail[tool]
        return ToolResult(content='{"ok":1}', error=self.errors.get(tool, ""), duration_ms=1.0)


@dataclass
class Damage:
    """What is broken on disk: `policies` maps a version to why it cannot be loaded, `stamps` names unreadable ones."""

    policies: dict[str, InfrastructureError] = field(default_factory=dict)
    stamps: set[str] = field(default_factory=set)

    def find_stamps(self, version: str) -> ServedPolicy:
        if version in self.stamps:
            raise TamperedError(f"{version}.json does not hold a policy's stamps")
        return make_policy(version)


@dataclass
class Rig:
    """One gateway on fakes. A version without an engine is one that Serve does not know."""

    root: Path
    ports: LivePorts
    ledger: RequestLedger
    store: SplitStore
    clock: FakeClock
    worlds: MemoryWorlds
    workflow: ShopWorkflow
    engines: dict[str, ScriptedEngine]
    damage: Damage

    def put_split(self, share: float, *, stable: str = STABLE, candidate: str = CANDIDATE, poll: bool = True) -> None:
        """Put the next split in force and let the gateway see it."""
        current = self.store.read()
        record = SplitRecord(
            epoch=current.epoch + 1 if current else 1,
            stable=stable,
            candidate=candidate if share else "",
            share=share,
            salt="r1",
            updated_at=self.clock(),
        )
        self.store.compare_and_set(record)
        if poll:
            self.ports.splits.poll()

    def rows(self) -> list[RequestRecord]:
        return list(self.ledger.rows())

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        """An HTTP client of the application, its lifespan run."""
        app = build_app(self.ports, LiveRequests(self.ports).answer)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://gateway") as client,
        ):
            yield client


def make_rig(
    tmp_path: Path,
    *,
    share: float | None = 0.0,
    scripts: Mapping[str, Sequence[Step]] | None = None,
    critic: Critic | None = None,
    config: Mapping[str, Any] | None = None,
) -> Rig:
    """Build a gateway; without a share there is no split in force."""
    clock, worlds, workflow = FakeClock(), MemoryWorlds(), ShopWorkflow()
    chosen = replace(make_config(tmp_path), **(config or {}))
    ledger = RequestLedger(chosen.files.ledger, owner="gateway-1")
    engines = {version: ScriptedEngine(script) for version, script in (scripts or {STABLE: PAY}).items()}
    store = SplitStore(chosen.files.split)

    damage = Damage()

    async def find_policy(version: str) -> LivePolicy:
        if version in damage.policies:
            raise damage.policies[version]

        async def generate(prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Completion:
            if version not in engines:
                raise EngineError(f"Application 'policy-{version}' does not exist")
            return await engines[version](prompt_token_ids, sampling)

        return LivePolicy(stamps=make_policy(version), renderer=renderer(), generate=generate)

    ports = LivePorts(
        config=chosen,
        workflow=workflow,  # type: ignore[arg-type]
        toolset=Toolset(TOOLS),
        writes=frozenset({"pay"}),
        sandbox_level="process",
        worlds=worlds,
        splits=SplitWatcher(
            store,
            chosen.files.acks,
            gateway="gateway-1",
            slot_of=ledger.session_slot,
            stale_after_s=chosen.stale_after_s,
            clock=clock,
        ),
        find_policy=find_policy,
        find_stamps=damage.find_stamps,
        ledger=ledger,
        critic=CriticQueue(critic, ledger, size=4, clock=clock),
        traces=TraceLog(chosen.files.traces, chosen.trace_fraction),
        end_orphans=functools.partial(end_orphans, ledger, chosen, clock),
        clock=clock,
        monotonic=clock,
    )
    rig = Rig(
        root=tmp_path, ports=ports, ledger=ledger, store=store, clock=clock, worlds=worlds, workflow=workflow,
        engines=engines, damage=damage,
    )  # fmt: skip
    if share is not None:
        rig.put_split(share)
    return rig


def make_config(root: Path) -> GatewayConfig:
    return GatewayConfig(
        root=str(root),
        workflow=WorkflowRef(module="tests.serving.gateway.shop"),
        live_world={"database": "live.sqlite"},
        limits=AgentLimits(
            max_turns=6, max_tool_calls=3, max_tokens_per_turn=40, max_context_tokens=700, timeout_s=20.0
        ),
        api=ApiLimits(max_body_bytes=20_000, max_messages=5, max_text_chars=3_000),
        poll_s=0.01,
        check_timeout_s=0.3,
        allowed_hosts=("gateway",),
    )


def make_policy(version: str = STABLE, **changes: str) -> ServedPolicy:
    values = {
        "version": version,
        "path": f"/models/{version}",
        "model_version": "gpt-oss-1m",
        "reward_model_version": "rm-1",
        "bundle_id": f"bundle-{version}",
    }
    return ServedPolicy(**(values | changes))


def body(text: str = PROMPT, **changes: Any) -> dict[str, Any]:
    return {"model": "shop", "messages": [{"role": "user", "content": text}]} | changes


def live_request(text: str = PROMPT, **changes: Any) -> LiveRequest:
    """A request as the HTTP application hands it on."""
    chat = ChatRequest.model_validate(body(text, seed=1))
    return LiveRequest(**({"request_id": "r1", "session_key": "s1", "chat": chat} | changes))


def engine_error() -> EngineError:
    return EngineError("the engine is dead")


def host_error() -> ToolHostError:
    return ToolHostError("the tool host died")


def session_in(rig: Rig, *, canary: bool, share: float = 0.5) -> str:
    """A session key on the wanted side of the split; whoever was asked for on the way keeps a slot."""
    keys = (f"user-{index}" for index in range(10_000))
    return next(key for key in keys if (slot_position(rig.ledger.session_slot("r1", key), "r1") < share) == canary)


NOW = START
