"""Ray Serve, and nothing else calls it: start the gateway, deploy and remove policy versions, tell how they are.

One application per policy version (no route; its name carries the version), one long-lived ingress that owns the split.
A roll back is one record write: no deploy is needed for it. Every wait here is bounded. One Ray may have other users:
what another home serves is neither used nor ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, cast

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from rl_actors.contracts import BadInputError, EngineError
from serving.contracts import SplitRecord
from serving.platform.critic_server import CriticServer
from serving.platform.ingress import Gateway
from serving.platform.policy_server import PolicyServer
from serving.platform.serve_site import PORT_FIELD, Owner, ServeSite, require_free_port, require_serve_there
from serving.split import SplitStore, acknowledged_epoch
from serving.store import GatewayConfig, ServedPolicies, ServedPolicy, application_of

GATEWAY: Final = "gateway"


CRITIC: Final = "critic"


_QUIET: Final = LoggingConfig(enable_access_log=False, log_level="WARNING")


_READY: Final = "RUNNING"


_BROKEN: Final = frozenset({"DEPLOY_FAILED", "UNHEALTHY"})


_HEAD: Final = "node:__internal_head__"
"""The resource that Ray gives to the head node, and to no other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformConfig:
    """How Serve runs. Logical CPUs are small on purpose: two of them must carry gateway, engines and training.

    `owner` says who starts the applications: a run ends its own with itself, and leaves a service's alone.
    """

    http_host: str = "127.0.0.1"
    http_port: int = 8000
    num_gateways: int = 1
    gateway_cpus: float = 0.1
    policy_cpus: float = 0.1
    gpus_per_policy: float = 0.0
    engine_threads: int = 1
    max_num_seqs: int = 32
    request_timeout_s: float = 120.0
    start_timeout_s: float = 300.0
    graceful_shutdown_s: float = 5.0
    probe_timeout_s: float = 20.0
    engine_environment: Mapping[str, str] = field(default_factory=dict)
    owner: Owner = "run"


class ServePlatform:
    """The serving side of one home. Connects to the Ray that is initialised, or to a running Serve on it.

    `candidate` names the version whose health the controller asks about; set it again after a restart.
    """

    def __init__(
        self,
        gateway: GatewayConfig,
        config: PlatformConfig,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Touch nothing yet."""
        self._gateway, self._config, self._clock, self._sleep = gateway, config, clock, sleep
        self._served, self._splits = ServedPolicies(gateway.files.served), SplitStore(gateway.files.split)
        self._site = ServeSite(root=gateway.root, port=config.http_port, owner=config.owner)
        self._has_started_serve = False
        self.candidate = ""

    @property
    def url(self) -> str:
        """Where the gateway listens."""
        return f"http://{self._config.http_host}:{self._config.http_port}"

    # --- start and stop -----------------------------------------------------------------------------------------------

    def start(self, stable: ServedPolicy, *others: ServedPolicy, critic_path: str = "") -> None:
        """Serve the stable version, and others beside it, behind the gateway; what already runs stays.

        `critic_path` names a reward model to score finished runs with; empty for none.

        All start at the same time: an engine needs most of its start for imports and its model.

        Raises:
            BadInputError: the port is in use, or Serve serves another home or port; nothing was touched.
            InfrastructureError: something did not start in time; the message says why.
        """
        config = self._config
        self.require_room(stable, *others, with_critic=bool(critic_path))
        self._has_started_serve |= not self._is_up()
        serve.start(
            proxy_location="HeadOnly",
            http_options=HTTPOptions(
                host=config.http_host, port=config.http_port, request_timeout_s=config.request_timeout_s
            ),
            logging_config=_QUIET,
        )
        for policy in (stable, *others):
            self._served.add(policy)
            self._begin(policy.application, self._policy_app(policy))
        self._open_split(stable.version)
        critics = [self._begin_critic(critic_path)] if critic_path else []
        self._begin(GATEWAY, self._gateway_app(), route_prefix="/")
        names = (*(policy.application for policy in (stable, *others)), *critics, GATEWAY)
        for name in names:
            self._await(name)
        # Of two homes that start at once, both found room: the one that came second must not go on with the other's.
        self._require_no_stranger(*names)

    def require_room(self, *policies: ServedPolicy, with_critic: bool = False) -> None:
        """Raise BadInputError unless gateway, policies and critic can be served here; touches nothing.

        What another home serves on this Ray would get our requests, or lose its own.
        """
        host, port = self._config.http_host, self._config.http_port
        if not self._is_up():
            require_free_port(host, port)
        critics = [self._critic_name] if with_critic or self._gateway.critic_application else []
        self._require_no_stranger(GATEWAY, *critics, *(policy.application for policy in policies))
        if self._is_up() and not self._has_started_serve:
            require_serve_there(host, port)

    def shutdown(self) -> None:
        """Stop what was started for this home by this owner, and Serve too when we started it for nobody else.

        Ray goes on. Where a service's gateway of this home stays, so do the policies that it may send traffic to.
        """
        with _serve_errors():
            found = serve.status().applications
            ours = [name for name, app in found.items() if self._site.is_started_here(app.deployments)]
            if self._has_started_serve and len(ours) == len(found):
                serve.shutdown()
                self._has_started_serve = False
                return
            gateway = found.get(GATEWAY)
            stays = gateway is not None and GATEWAY not in ours and not self._site.is_strange(gateway.deployments)
            for name in sorted(set(ours) - (self._in_force() if stays else frozenset())):
                serve.delete(name)

    # --- policies -----------------------------------------------------------------------------------------------------

    def deploy_policy(self, policy: ServedPolicy) -> None:
        """Serve a version beside the others; returns when it answers. The same again changes nothing.

        Raises:
            BadInputError: the name was used for another version, or another home serves it.
            EngineError: it did not become healthy in time; it is removed again.
        """
        self._require_no_stranger(policy.application)
        self._served.add(policy)
        self._begin(policy.application, self._policy_app(policy))
        try:
            self._await(policy.application)
        except EngineError:
            self.remove_policy(policy.version)
            raise

    def remove_policy(self, version: str) -> None:
        """Stop serving a version; one that is not served is no error. Refuses a version that may carry traffic."""
        application = self._served.find(version).application
        if application in self._in_force():
            raise BadInputError("version", version, "it carries traffic; move the split away from it first")
        self._require_no_stranger(application)
        with _serve_errors():
            if application in serve.status().applications:
                serve.delete(application)

    def _in_force(self) -> frozenset[str]:
        """Return the applications of the versions that the split may send traffic to."""
        record = self._splits.read()
        if record is None:
            return frozenset()
        versions = [record.stable, *([record.candidate] if record.share > 0 else [])]
        return frozenset(map(application_of, versions))

    @property
    def _critic_name(self) -> str:
        return self._gateway.critic_application or CRITIC

    def _begin_critic(self, path: str) -> str:
        """Ask for a reward model under the gateway's `critic_application` name; returns that name."""
        options = self._on_head(self._options(CriticServer, self._config.policy_cpus))
        self._begin(self._critic_name, _deployment(CriticServer).options(**options, num_replicas=1).bind(path))
        return self._critic_name

    # --- ReleasePlatform ----------------------------------------------------------------------------------------------

    def set_split(self, record: SplitRecord) -> None:
        """Do nothing: gateways poll the record that the store already made durable."""

    def acknowledged_epoch(self) -> int:
        """Return the lowest split epoch by which any live gateway still routes."""
        return acknowledged_epoch(self._gateway.files.acks, self._clock(), self._gateway.stale_after_s)

    def candidate_healthy(self) -> bool:
        """Whether the candidate's engine samples a token now. Raises EngineError with the reason when it cannot."""
        if not self.candidate:
            raise BadInputError("platform.candidate", "", "name the candidate before the release starts")
        application = self._served.find(self.candidate).application
        with _serve_errors():
            response = serve.get_app_handle(application).probe.remote()
            return bool(response.result(timeout_s=self._config.probe_timeout_s))

    # --- how ----------------------------------------------------------------------------------------------------------

    def _is_up(self) -> bool:
        with _serve_errors():
            return bool(serve.status().proxies)

    def _require_no_stranger(self, *names: str) -> None:
        """Raise BadInputError when one of these applications is there, of another home or port."""
        with _serve_errors():
            found = serve.status().applications
        for name in names:
            deployments = sorted(found[name].deployments) if name in found else []
            if self._site.is_strange(deployments):
                remedy = f"this Ray already serves the application {name} of another home or port ({deployments[0]})"
                remedy += "; end that where it was started (seatrial down), or use another Ray"
                raise BadInputError(PORT_FIELD, self._config.http_port, remedy)

    def _open_split(self, stable: str) -> None:
        """Put the first split in force; a split that is there already is the truth and stays."""
        if self._splits.read() is None:
            first = SplitRecord(epoch=1, stable=stable, candidate="", share=0.0, salt="none", updated_at=self._clock())
            self._splits.compare_and_set(first)

    def _begin(self, name: str, application: serve.Application, *, route_prefix: str | None = None) -> None:
        """Ask Serve for an application without waiting; one that runs or starts already is left alone."""
        with _serve_errors():
            found = serve.status().applications.get(name)
            if found is not None and found.status not in _BROKEN:
                return
            target = serve.RunTarget(target=application, name=name, route_prefix=route_prefix)
            serve.run_many([target], wait_for_applications_running=False)

    def _await(self, name: str) -> None:
        """Wait until an application runs. Raises EngineError with Serve's reason, or after `start_timeout_s`."""
        deadline = self._clock() + self._config.start_timeout_s
        while True:
            with _serve_errors():
                found = serve.status().applications.get(name)
            if found is not None and found.status == _READY:
                return
            if found is not None and found.status in _BROKEN:
                raise EngineError(f"application {name} failed to start: {_reason(found)}")
            if self._clock() > deadline:
                waited = f"{self._config.start_timeout_s:g} s"
                raise EngineError(f"application {name} not running after {waited}: {_reason(found)}; see `ray status`")
            self._sleep(0.1)

    def _policy_app(self, policy: ServedPolicy) -> serve.Application:
        config = self._config
        options = self._options(PolicyServer, config.policy_cpus)
        options["ray_actor_options"]["num_gpus"] = config.gpus_per_policy
        deployment = _deployment(PolicyServer).options(
            **options,
            num_replicas=1,
            max_ongoing_requests=2 * config.max_num_seqs,
            max_queued_requests=4 * config.max_num_seqs,
            health_check_period_s=5.0,
            health_check_timeout_s=30.0,
        )
        return deployment.bind(
            policy, max_model_len=self._gateway.limits.max_context_tokens, max_num_seqs=config.max_num_seqs
        )

    def _gateway_app(self) -> serve.Application:
        limit = self._gateway.max_concurrency
        deployment = _deployment(Gateway).options(
            **self._on_head(self._options(Gateway, self._config.gateway_cpus)),
            num_replicas=self._config.num_gateways,
            max_ongoing_requests=4 * limit,
            max_queued_requests=8 * limit,
        )
        return deployment.bind(self._gateway)

    def _on_head(self, options: dict[str, Any]) -> dict[str, Any]:
        """Keep a deployment on the head node: a ledger in WAL mode is shared through the memory of one host."""
        with _serve_errors():
            if _HEAD in ray.cluster_resources():
                options["ray_actor_options"]["resources"] = {_HEAD: 0.001}
        return options

    def _options(self, kind: type, cpus: float) -> dict[str, Any]:
        """Return what all our deployments share; an engine's threads are capped before it starts."""
        threads = str(self._config.engine_threads)
        environment = {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
            # vLLM's own choice binds every engine of a machine to the same cores.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        return {
            "name": self._site.deployment(kind.__name__),
            "graceful_shutdown_timeout_s": self._config.graceful_shutdown_s,
            "graceful_shutdown_wait_loop_s": 0.2,
            "logging_config": _QUIET,
            "ray_actor_options": {
                "num_cpus": cpus,
                "runtime_env": {"env_vars": environment | dict(self._config.engine_environment)},
            },
        }


def _deployment(kind: type) -> serve.Deployment:
    """Make a Serve deployment of a plain class (Ray types its decorator for functions only)."""
    return cast(serve.Deployment, serve.deployment(kind))


def _reason(found: Any) -> str:
    """Say what Serve says about an application and its deployments."""
    if found is None:
        return "Serve does not know it"
    messages = [deployment.message for deployment in found.deployments.values()]
    return " ".join(message for message in (found.message, *messages) if message) or str(found.status)


@contextmanager
def _serve_errors() -> Iterator[None]:
    """Turn what Ray raises into EngineError, which the controller takes as bad health."""
    try:
        yield
    except TimeoutError as error:
        raise EngineError(f"Ray Serve did not answer in time: {error}") from error
    except (RayError, RayServeException) as error:
        raise EngineError(f"Ray Serve: {error}") from error
