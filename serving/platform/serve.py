"""The control side of Ray Serve: start the gateway, deploy and remove policy versions, ask how they are.

One application per policy version (no route; its name carries the version), one long-lived ingress that owns the split.
Every wait is bounded. One Ray may have other users: what another home serves is neither used nor ended.
"""

from __future__ import annotations

import errno
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, cast

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from rl_actors.contracts import BadInputError, EngineError
from rl_actors.ports import listen_error
from serving.contracts import SplitRecord
from serving.platform.replicas import CriticServer, Gateway, PolicyServer
from serving.split import SplitStore, acknowledged_epoch
from serving.store import GatewayConfig, ServedPolicies, ServedPolicy, application_of

Owner = Literal["run", "service"]

GATEWAY: Final = "gateway"
CRITIC: Final = "critic"
PORT_FIELD: Final = "cluster.serve_port"

_QUIET: Final = LoggingConfig(enable_access_log=False, log_level="WARNING")
_READY: Final = "RUNNING"
_BROKEN: Final = frozenset({"DEPLOY_FAILED", "UNHEALTHY"})
# The resource that Ray gives to the head node, and to no other.
_HEAD: Final = "node:__internal_head__"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformConfig:
    """How Serve runs. A run (`owner`) ends its own applications with itself, and leaves a service's alone."""

    http_host: str = "127.0.0.1"
    http_port: int = 8000
    num_gateways: int = 1
    # Logical CPUs are small on purpose: two of them must carry gateway, engines and training.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSite:
    """One serving home behind one port, and who starts applications for it: a run, which ends, or a service.

    Example: ServeSite(root="/home/runs/r1/serving", port=8000, owner="run").deployment("Gateway")
    gives "Gateway-run-8000-1f0c9a5be2d4".
    """

    root: str
    port: int
    owner: Owner

    # The mark lives in names that Serve itself keeps, so it lasts as long as what it marks, through any kill of ours.
    @property
    def mark(self) -> str:
        """The end of the names of its deployments, whoever started them."""
        return f"-{self.port}-{hashlib.sha256(str(Path(self.root).resolve()).encode()).hexdigest()[:12]}"

    def deployment(self, kind: str) -> str:
        """Return the name of a deployment."""
        return f"{kind}-{self.owner}{self.mark}"

    def is_started_here(self, deployments: Iterable[str]) -> bool:
        """Whether this owner started an application with these deployments, now or before a restart."""
        return any(name.endswith(f"-{self.owner}{self.mark}") for name in deployments)

    def is_strange(self, deployments: Iterable[str]) -> bool:
        """Whether an application belongs to another home or port; one that has no deployments yet cannot be told."""
        names = tuple(deployments)
        return bool(names) and not any(name.endswith(self.mark) for name in names)


def require_free_port(host: str, port: int) -> None:
    """Raise BadInputError when nobody could listen there."""
    error = listen_error(port, host)
    if error is not None:
        remedy = "already in use; end what listens there, or set cluster.serve_port"
        if error.errno != errno.EADDRINUSE:
            remedy = f"cannot listen there ({error.strerror}); choose another host or port"
        raise BadInputError(PORT_FIELD, f"{host}:{port}", remedy) from error


def require_serve_there(host: str, port: int) -> None:
    """Raise BadInputError when Serve runs, but nobody listens at the port that is ours: it has another one."""
    if listen_error(port, host) is None:
        remedy = "Serve runs on this Ray behind another port; give that port, or first end it: serve shutdown -y"
        raise BadInputError(PORT_FIELD, f"{host}:{port}", remedy)


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
        self._gateway, self._config, self._clock, self._sleep = gateway, config, clock, sleep
        self._served, self._splits = ServedPolicies(gateway.files.served), SplitStore(gateway.files.split)
        self._site = ServeSite(root=gateway.root, port=config.http_port, owner=config.owner)
        self._critic_name = gateway.critic_application or CRITIC
        self._has_started_serve = False
        self.url = f"http://{config.http_host}:{config.http_port}"
        self.candidate = ""

    # --- start and stop -----------------------------------------------------------------------------------------------

    def start(self, stable: ServedPolicy, *others: ServedPolicy, critic_path: str = "") -> None:
        """Serve these versions behind the gateway; what already runs stays.

        `critic_path` names a reward model to score finished requests with; empty for none.

        Raises:
            BadInputError: the port is in use, or Serve serves another home or port; nothing was touched.
            InfrastructureError: something did not start in time; the message says why.
        """
        config, policies = self._config, (stable, *others)
        self.require_room(*policies, with_critic=bool(critic_path))
        self._has_started_serve |= not self._is_up()
        serve.start(
            proxy_location="HeadOnly",
            http_options=HTTPOptions(
                host=config.http_host, port=config.http_port, request_timeout_s=config.request_timeout_s
            ),
            logging_config=_QUIET,
        )
        # All start before any is waited for: an engine needs most of its start for imports and its model.
        names = [self._start_policy(policy) for policy in policies]
        if self._splits.read() is None:
            # A split that is there already is the truth and stays.
            first = SplitRecord(
                epoch=1, stable=stable.version, candidate="", share=0.0, salt="none", updated_at=self._clock()
            )
            self._splits.compare_and_set(first)
        if critic_path:
            names.append(self._start_application(self._critic_name, self._critic_app(critic_path)))
        names.append(self._start_application(GATEWAY, self._gateway_app(), route_prefix="/"))
        for name in names:
            self._await(name)
        # Of two homes that start at once, both found room: the one that came second must not go on with the other's.
        self._require_no_stranger(*names)

    def require_room(self, *policies: ServedPolicy, with_critic: bool = False) -> None:
        """Raise BadInputError unless gateway, policies and critic can be served here; touches nothing."""
        host, port, is_up = self._config.http_host, self._config.http_port, self._is_up()
        if not is_up:
            require_free_port(host, port)
        critics = [self._critic_name] if with_critic or self._gateway.critic_application else []
        # An application of another home would get our requests, or lose its own.
        self._require_no_stranger(GATEWAY, *critics, *(application_of(policy.version) for policy in policies))
        if is_up and not self._has_started_serve:
            require_serve_there(host, port)

    def shutdown(self) -> None:
        """Stop what was started for this home by this owner, and Serve too when we started it for nobody else."""
        with _serve_errors():
            found = serve.status().applications
            ours = [name for name, app in found.items() if self._site.is_started_here(app.deployments)]
            if self._has_started_serve and len(ours) == len(found):
                serve.shutdown()
                self._has_started_serve = False
                return
            gateway = found.get(GATEWAY)
            # Where a service's gateway of this home stays, so do the policies that it may send traffic to.
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
        self._require_no_stranger(application_of(policy.version))
        name = self._start_policy(policy)
        try:
            self._await(name)
        except EngineError:
            self.remove_policy(policy.version)
            raise

    def remove_policy(self, version: str) -> None:
        """Stop serving a version; one that is not served is no error. Refuses a version that may carry traffic."""
        application = application_of(self._served.find(version).version)
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
        return frozenset(map(application_of, [record.stable, *([record.candidate] if record.share > 0 else [])]))

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
        application = application_of(self._served.find(self.candidate).version)
        with _serve_errors():
            response = serve.get_app_handle(application).probe.remote()
            return bool(response.result(timeout_s=self._config.probe_timeout_s))

    # --- applications -------------------------------------------------------------------------------------------------

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

    def _start_policy(self, policy: ServedPolicy) -> str:
        self._served.add(policy)
        return self._start_application(application_of(policy.version), self._policy_app(policy))

    def _start_application(self, name: str, application: serve.Application, *, route_prefix: str | None = None) -> str:
        """Ask Serve for an application without waiting, and return its name; one that runs or starts is left alone."""
        with _serve_errors():
            found = serve.status().applications.get(name)
            if found is None or found.status in _BROKEN:
                target = serve.RunTarget(target=application, name=name, route_prefix=route_prefix)
                serve.run_many([target], wait_for_applications_running=False)
        return name

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
        actor = self._actor_options(config.policy_cpus, num_gpus=config.gpus_per_policy)
        limits = {"max_ongoing_requests": 2 * config.max_num_seqs, "max_queued_requests": 4 * config.max_num_seqs}
        health = {"health_check_period_s": 5.0, "health_check_timeout_s": 30.0}
        return self._deployment(PolicyServer, actor, num_replicas=1, **limits, **health).bind(
            policy, max_model_len=self._gateway.limits.max_context_tokens, max_num_seqs=config.max_num_seqs
        )

    def _critic_app(self, path: str) -> serve.Application:
        actor = self._actor_options(self._config.policy_cpus, resources=_head_node())
        return self._deployment(CriticServer, actor, num_replicas=1).bind(path)

    def _gateway_app(self) -> serve.Application:
        # Above its own limit, so that a full gateway refuses in our words before Serve does in its own.
        most = self._gateway.max_concurrency
        limits = {"max_ongoing_requests": 4 * most, "max_queued_requests": 8 * most}
        actor = self._actor_options(self._config.gateway_cpus, resources=_head_node())
        return self._deployment(Gateway, actor, num_replicas=self._config.num_gateways, **limits).bind(self._gateway)

    def _deployment(self, kind: type, actor: dict[str, Any], **options: Any) -> serve.Deployment:
        # Ray types its decorator for functions only.
        return cast(serve.Deployment, serve.deployment(kind)).options(
            name=self._site.deployment(kind.__name__),
            graceful_shutdown_timeout_s=self._config.graceful_shutdown_s,
            graceful_shutdown_wait_loop_s=0.2,
            logging_config=_QUIET,
            ray_actor_options=actor,
            **options,
        )

    def _actor_options(self, cpus: float, **options: Any) -> dict[str, Any]:
        # An engine reads these when it is imported: they must be there before it starts.
        threads = str(self._config.engine_threads)
        environment = {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
            # vLLM's own choice binds every engine of a machine to the same cores.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        env_vars = environment | dict(self._config.engine_environment)
        return {"num_cpus": cpus, "runtime_env": {"env_vars": env_vars}, **options}


def _head_node() -> dict[str, float]:
    """Return the resources that keep a deployment on the head node; none where Ray has no such resource."""
    # A ledger in WAL mode is shared through the memory of one host.
    with _serve_errors():
        return {_HEAD: 0.001} if _HEAD in ray.cluster_resources() else {}


def _reason(found: Any) -> str:
    """Return Serve's words about an application and its deployments."""
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
