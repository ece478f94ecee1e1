"""The ingress replica: one long-lived application in front of every policy version; it owns the sticky split.

Fills the ports of the HTTP application with Serve handles, tool hosts, the ledger and the split record.
"""

from __future__ import annotations

import asyncio
import importlib
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from rl_actors.agent import Generate, Toolset, renderer_of
from rl_actors.contracts import Completion, EngineError, SamplingParams, SeatrialError
from rl_actors.sandbox import ProcessSandbox
from serving.gateway import Critic, CriticQueue, LivePolicy, LivePorts, build_app, end_orphans
from serving.split import SplitStore, SplitWatcher
from serving.store import GatewayConfig, RequestLedger, ServedPolicies, TraceLog


class ServePolicies:
    """Finds a version: stamps and tokenizer on disk, its engine, when it first samples, behind its Serve application.

    In this order, a request has its row before anything asks Ray.
    """

    def __init__(self, config: GatewayConfig) -> None:
        """Find nothing yet."""
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
            renderer = renderer_of(stamps.path)
        return LivePolicy(stamps=stamps, renderer=renderer, generate=self._generate(stamps.application, version))

    def _generate(self, application: str, version: str) -> Generate:
        handle: DeploymentHandle | None = None

        async def generate(prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Completion:
            nonlocal handle
            with _serve_errors(f"policy {version}"):
                async with asyncio.timeout(self._timeout_s):
                    handle = handle or await asyncio.to_thread(serve.get_app_handle, application)
                    return await handle.generate.remote(tuple(prompt_token_ids), sampling)

        return generate


@contextmanager
def _serve_errors(what: str) -> Iterator[None]:
    """Turn whatever Ray says about a dead, full, slow or missing application into EngineError, broken files too."""
    try:
        yield
    except EngineError:
        raise
    except TimeoutError as error:
        raise EngineError(f"{what}: no answer in time") from error
    except (RayError, RayServeException) as error:
        raise EngineError(f"{what}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
    except (SeatrialError, OSError, ValueError) as error:
        raise EngineError(f"{what}: {error}") from error


def _serve_critic(application: str) -> Critic | None:
    """Return the critic behind a Serve application, looked up when first needed; None without one."""
    if not application:
        return None

    async def score(sequences: Sequence[Sequence[int]]) -> Sequence[float]:
        with _serve_errors("critic"):
            handle = await asyncio.to_thread(serve.get_app_handle, application)
            async with asyncio.timeout(30.0):
                return await handle.score.remote([list(sequence) for sequence in sequences])

    return score


def serve_ports(config: GatewayConfig) -> LivePorts:
    """Fill the ports of a gateway replica."""
    workflow = config.workflow.load()
    tools = importlib.import_module(workflow.tools_module).WORLD.tools
    gateway = f"gateway-{uuid.uuid4().hex[:12]}"
    ledger = RequestLedger(config.files.ledger, owner=gateway)
    end_orphans(ledger, config, time.time)
    return LivePorts(
        config=config,
        workflow=workflow,
        toolset=Toolset(tools),
        writes=frozenset(tool.name for tool in tools if tool.side_effect == "write"),
        sandbox_level=ProcessSandbox.level,
        worlds=ProcessSandbox(workflow.tools_module, num_hosts=config.num_tool_hosts),
        splits=SplitWatcher(
            SplitStore(config.files.split),
            config.files.acks,
            gateway=gateway,
            slot_of=ledger.session_slot,
            stale_after_s=config.stale_after_s,
            clock=time.time,
        ),
        find_policy=ServePolicies(config).find,
        find_stamps=ServedPolicies(config.files.served).find,
        ledger=ledger,
        critic=CriticQueue(
            _serve_critic(config.critic_application), ledger, size=config.critic_queue_size, clock=time.time
        ),
        traces=TraceLog(config.files.traces, config.trace_fraction),
        owner=gateway,
        clock=time.time,
        monotonic=time.monotonic,
    )


@serve.ingress()
class Gateway:
    """A Serve replica of the ingress."""

    def __init__(self, config: GatewayConfig) -> None:
        """Open ledger and split."""
        self._ports = serve_ports(config)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Give Serve the application to run."""
        return build_app(self._ports)
