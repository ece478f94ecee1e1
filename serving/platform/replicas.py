"""Classes that Serve replicas run: the gateway before every policy version, a policy with its engine, the critic."""

from __future__ import annotations

import asyncio
import importlib
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from rl_actors.agent import Generate, HarmonyRenderer, Toolset
from rl_actors.contracts import Completion, EngineError, SamplingParams, SeatrialError
from rl_actors.durable import disk_errors
from rl_actors.sandbox import SANDBOX_LEVEL, ToolHostPool
from serving.gateway import Critic, CriticQueue, LivePolicy, LivePorts, LiveRequests, build_app
from serving.split import SplitStore, SplitWatcher, is_live, read_acks
from serving.store import GatewayConfig, RequestLedger, ServedPolicies, ServedPolicy, TraceLog, application_of

_CRITIC_TIMEOUT_S: Final = 30.0
_PROBE_TIMEOUT_S: Final = 20.0
_PROBE: Final = SamplingParams(max_tokens=1, temperature=0.0, seed=0)
_WARM_UP: Final = SamplingParams(max_tokens=16, temperature=1.0, seed=0)


# --- the gateway ------------------------------------------------------------------------------------------------------
@serve.ingress()
class Gateway:
    """A replica of the ingress: one long-lived application that owns the sticky split."""

    def __init__(self, config: GatewayConfig) -> None:
        self._ports = serve_ports(config)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self._ports, LiveRequests(self._ports).answer)


def serve_ports(config: GatewayConfig) -> LivePorts:
    """Fill the ports of a gateway replica with Serve handles, tool hosts, the ledger and the split record."""
    workflow = config.workflow.load()
    tools = importlib.import_module(workflow.tools_module).WORLD.tools
    gateway = f"gateway-{uuid.uuid4().hex[:12]}"
    files, policies = config.files, ServePolicies(config)
    ledger = RequestLedger(files.ledger, owner=gateway)
    end_dead = partial(end_orphans, ledger, config, time.time)
    end_dead()
    return LivePorts(
        config=config,
        workflow=workflow,
        toolset=Toolset(tools),
        writes=frozenset(tool.name for tool in tools if tool.side_effect == "write"),
        sandbox_level=SANDBOX_LEVEL,
        worlds=ToolHostPool(workflow.tools_module, num_hosts=config.num_tool_hosts),
        splits=SplitWatcher(
            SplitStore(files.split),
            files.acks,
            gateway=gateway,
            slot_of=ledger.session_slot,
            stale_after_s=config.stale_after_s,
            clock=time.time,
        ),
        find_policy=policies.find,
        find_stamps=ServedPolicies(files.served).find,
        ledger=ledger,
        end_orphans=end_dead,
        critic=CriticQueue(
            _serve_critic(config.critic_application), ledger, size=config.critic_queue_size, clock=time.time
        ),
        traces=TraceLog(files.traces, config.trace_fraction),
        clock=time.time,
        monotonic=time.monotonic,
    )


def end_orphans(ledger: RequestLedger, config: GatewayConfig, clock: Callable[[], float]) -> int:
    """Abort the requests that dead gateways left open, and forget those gateways; returns how many requests."""
    num_ended = 0
    for ack in read_acks(config.files.acks):
        # Never our own: a gateway whose disk keeps it from acknowledging still answers its users.
        if ack.gateway != ledger.owner and not is_live(ack, clock(), config.stale_after_s):
            num_ended += ledger.abort_orphans(ack.gateway, at=clock())
            path = config.files.acks / f"{ack.gateway}.json"
            with disk_errors(path):
                path.unlink(missing_ok=True)
    return num_ended


class ServePolicies:
    """Finds a version: stamps and tokenizer on disk, its engine behind its Serve application."""

    def __init__(self, config: GatewayConfig) -> None:
        self._served, self._timeout_s = ServedPolicies(config.files.served), config.engine_timeout_s
        self._found: dict[str, LivePolicy] = {}

    async def find(self, version: str) -> LivePolicy:
        """Return a version, loading its tokenizer at first use. Raises EngineError when disk does not hold it whole."""
        if version not in self._found:
            self._found[version] = await asyncio.to_thread(self._load, version)
        return self._found[version]

    def _load(self, version: str) -> LivePolicy:
        with _serve_errors(f"policy {version}"):
            stamps = self._served.find(version)
            renderer = HarmonyRenderer.from_directory(stamps.path)
        return LivePolicy(stamps=stamps, renderer=renderer, generate=self._sampler(version))

    def _sampler(self, version: str) -> Generate:
        handle: DeploymentHandle | None = None

        async def generate(prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Completion:
            nonlocal handle
            # The engine is first looked up here: by now the request has its row, so a missing engine is a failure seen.
            with _serve_errors(f"policy {version}"):
                async with asyncio.timeout(self._timeout_s):
                    handle = handle or await asyncio.to_thread(serve.get_app_handle, application_of(version))
                    return await handle.generate.remote(tuple(prompt_token_ids), sampling)

        return generate


def _serve_critic(application: str) -> Critic | None:
    """Return the critic behind a Serve application, looked up at each batch; None without one."""
    if not application:
        return None

    async def score(sequences: Sequence[Sequence[int]]) -> Sequence[float]:
        with _serve_errors("critic"):
            handle = await asyncio.to_thread(serve.get_app_handle, application)
            async with asyncio.timeout(_CRITIC_TIMEOUT_S):
                return await handle.score.remote([list(sequence) for sequence in sequences])

    return score


@contextmanager
def _serve_errors(asked: str) -> Iterator[None]:
    """Turn Ray's errors about a dead, full, slow or missing application into EngineError, broken files too."""
    try:
        yield
    except EngineError:
        raise
    except TimeoutError as error:
        raise EngineError(f"{asked}: no answer in time") from error
    except (RayError, RayServeException) as error:
        # Ray appends whole remote tracebacks; a user's error body gets the first line.
        raise EngineError(f"{asked}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
    except (SeatrialError, OSError, ValueError) as error:
        raise EngineError(f"{asked}: {error}") from error


# --- a policy and the critic ------------------------------------------------------------------------------------------
def vllm_engine(path: str, max_model_len: int, max_num_seqs: int) -> Generate:
    """Start the engine class that training rollouts use, on a model directory."""
    # Imported here, as the reward model below: a gateway replica loads neither vLLM nor torch.
    from rl_actors.actors import VllmEngine

    return VllmEngine(path, max_model_len=max_model_len, max_num_seqs=max_num_seqs).generate


class PolicyServer:
    """One policy version behind one engine. Raises EngineError from every call once its engine is dead.

    Serve replaces a replica whose health check fails.
    """

    def __init__(
        self,
        policy: ServedPolicy,
        *,
        max_model_len: int,
        max_num_seqs: int,
        build_engine: Callable[[str, int, int], Generate] = vllm_engine,
    ) -> None:
        self._policy = policy
        self._sample = build_engine(policy.path, max_model_len, max_num_seqs)
        self._is_warm = False

    async def generate(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        """Sample one completion of exact token ids."""
        return await self._sample(prompt_token_ids, sampling)

    async def probe(self) -> bool:
        """Sample one token. Raises EngineError when the engine is dead or silent."""
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                await self._sample((0, 1), _PROBE)
        except TimeoutError:
            raise EngineError(f"policy {self._policy.version}: no token within {_PROBE_TIMEOUT_S:g} s") from None
        return True

    async def check_health(self) -> None:
        """Warm up once, then probe. Raises EngineError as `probe` does."""
        # Serve's first check comes before any traffic: the warm-up is a real request, and no user waits for it.
        if not self._is_warm:
            await self._sample(tuple(range(8)) * 4, _WARM_UP)
            self._is_warm = True
        await self.probe()


class CriticServer:
    """A reward model on one replica that scores finished requests in batches."""

    def __init__(self, path: str) -> None:
        from rl_actors.models import RewardModel

        self._model = RewardModel.load(path)

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Return one calibrated score per sequence, in 0..1, as training's scorers do."""
        scores, _ = await asyncio.to_thread(self._model.critic_scores, sequences)
        return scores
