"""The Ray Serve adapter on a fake Serve: what it deploys, waits for, refuses and cleans up."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import RayServeException

from rl_actors.contracts.errors import BadInputError, EngineError, InfrastructureError
from serving.contracts.release import SplitRecord
from serving.platform import serve as platform_module
from serving.platform.serve import PlatformConfig, ServePlatform, require_free_port
from serving.split.record import SplitStore
from serving.split.watch import SplitWatcher
from serving.store.served import ServedPolicies, application_of
from tests.serving.fakes import START, FakeClock
from tests.serving.gateway.live_fakes import CANDIDATE, STABLE, make_config, make_policy


@dataclass
class FakeDeployment:
    """Remembers its options and what it was bound to."""

    kind: type
    chosen: dict[str, Any] = field(default_factory=dict)
    bound: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict)

    def options(self, **options: Any) -> FakeDeployment:
        return FakeDeployment(self.kind, self.chosen | options)

    def bind(self, *args: Any, **kwargs: Any) -> FakeDeployment:
        return FakeDeployment(self.kind, self.chosen, args, kwargs)


@dataclass
class FakeResponse:
    value: Any = True
    error: Exception | None = None

    def result(self, timeout_s: float) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


@dataclass
class FakeServe:
    """Serve that starts an application `start_polls` status reads after it was asked to."""

    start_polls: int = 2
    end_status: str = "RUNNING"
    message: str = ""
    probe: FakeResponse = field(default_factory=FakeResponse)
    apps: dict[str, Any] = field(default_factory=dict)
    targets: list[Any] = field(default_factory=list)
    started: list[dict[str, Any]] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    num_shutdowns: int = 0
    broken: Exception | None = None
    is_up: bool = False
    resources: dict[str, float] = field(default_factory=lambda: {"CPU": 4.0, "node:__internal_head__": 1.0})
    RunTarget: Callable[..., Any] = SimpleNamespace
    Application = Any
    Deployment = FakeDeployment

    def deployment(self, kind: type) -> FakeDeployment:
        return FakeDeployment(kind)

    def start(self, **options: Any) -> None:
        self.started.append(options)
        self.is_up = True

    def run_many(self, targets: Sequence[Any], wait_for_applications_running: bool) -> None:
        assert not wait_for_applications_running
        for target in targets:
            self.targets.append(target)
            self.add(target.name, target.target.chosen["name"], status="DEPLOYING")

    def add(self, name: str, deployment: str, status: str = "RUNNING") -> None:
        deployments = {deployment: SimpleNamespace(message="the replica said why")}
        self.apps[name] = SimpleNamespace(status=status, message="", deployments=deployments, polls=0)

    def status(self) -> Any:
        if self.broken is not None:
            raise self.broken
        for app in self.apps.values():
            app.polls += 1
            if app.polls > self.start_polls and app.status == "DEPLOYING":
                app.status, app.message = self.end_status, self.message
        return SimpleNamespace(applications=dict(self.apps), proxies={"p": 1} if self.is_up else {})

    def delete(self, name: str) -> None:
        self.deleted.append(name)
        del self.apps[name]

    def shutdown(self) -> None:
        self.num_shutdowns += 1
        self.apps.clear()
        self.is_up = False

    def cluster_resources(self) -> dict[str, float]:
        """Ray's, not Serve's: one fake stands for both."""
        return self.resources

    def get_app_handle(self, name: str) -> Any:
        if name not in self.apps:
            raise RayServeException(f"Application '{name}' does not exist.")
        return SimpleNamespace(probe=SimpleNamespace(remote=lambda: self.probe))

    def target(self, name: str) -> Any:
        return next(target for target in self.targets if target.name == name)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeServe:
    serve = FakeServe()
    monkeypatch.setattr(platform_module, "serve", serve)
    monkeypatch.setattr(platform_module, "ray", serve)
    return serve


@contextmanager
def listening() -> Iterator[int]:
    """Somebody listens at this port: another program, or Serve's own proxy."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_platform(tmp_path: Path, **changes: Any) -> tuple[ServePlatform, FakeClock]:
    clock = FakeClock()
    config = PlatformConfig(**({"http_port": free_port(), "start_timeout_s": 5.0} | changes))
    return ServePlatform(make_config(tmp_path), config, clock=clock, sleep=clock.sleep), clock


def put(tmp_path: Path, epoch: int, share: float, stable: str = STABLE, candidate: str = CANDIDATE) -> SplitRecord:
    record = SplitRecord(epoch=epoch, stable=stable, candidate=candidate, share=share, salt="s", updated_at=START)
    SplitStore(make_config(tmp_path).files.split).compare_and_set(record)
    return record


class TestStart:
    def test_serves_stable_behind_the_gateway(self, fake: FakeServe, tmp_path: Path) -> None:
        platform, _ = make_platform(tmp_path)
        platform.start(make_policy())
        assert set(fake.apps) == {"policy-sft-a", "gateway"}
        assert fake.target("policy-sft-a").route_prefix is None
        assert fake.target("gateway").route_prefix == "/"

    def test_first_split_gives_all_to_stable(self, fake: FakeServe, tmp_path: Path) -> None:
        platform, _ = make_platform(tmp_path)
        platform.start(make_policy())
        record = SplitStore(make_config(tmp_path).files.split).read()
        assert record is not None
        assert (record.epoch, record.stable, record.share) == (1, STABLE, 0.0)

    def test_a_split_in_force_is_the_truth(self, fake: FakeServe, tmp_path: Path) -> None:
        before = put(tmp_path, 1, 0.25)
        platform, _ = make_platform(tmp_path)
        platform.start(make_policy())
        assert SplitStore(make_config(tmp_path).files.split).read() == before

    def test_others_start_at_the_same_time(self, fake: FakeServe, tmp_path: Path) -> None:
        platform, clock = make_platform(tmp_path)
        platform.start(make_policy(), make_policy(CANDIDATE))
        assert set(fake.apps) == {"policy-sft-a", "policy-ppo-b", "gateway"}
        assert clock.now - START < 1.0

    def test_again_starts_nothing_twice(self, fake: FakeServe, tmp_path: Path) -> None:
        platform, _ = make_platform(tmp_path)
        platform.start(make_policy())
        platform.start(make_policy())
        assert len(fake.targets) == 2

    def test_defaults_of_serve_that_must_change(self, fake: FakeServe, tmp_path: Path) -> None:
        platform, _ = make_platform(tmp_path)
        platform.start(make_policy())
        assert fake.started[0]["http_options"].request_timeout_s == 120.0
        assert fake.started[0]["http_options"].host == "127.0.0.1"
        for name in ("policy-sft-a", "gateway"):
            chosen = fake.target(name).target.chosen
            assert chosen["max_ongoing_requests"] > 5
            assert chosen["max_queued_requests"] > 0
            assert chosen["graceful_shutdown_timeout_s"] < 20
            assert chosen["ray_actor_options"]["num_cpus"] <= 0.5

    def test_gateway_refuses_before_serve_does(self, fake: FakeServe, tmp_path: Path) -> None:
        """Otherwise a full gateway answers in Serve's words, without our error body."""
        platform, _ = make_platform(tmp_path)
        platform.start(make_policy())
        chosen = fake.target("gateway").target.chosen
        assert chosen["max_ongoing_requests"] > make_config(tmp_path).max_concurrency

    def test_engine_environment(self, fake: FakeServe, tmp_path: Path) -> None:
        platform, _ = make_platform(tmp_path, engine_threads=3, engine_environment={"VLLM_X": "1"}, gpus_per_policy=0.5)
        platform.start(make_policy())
        options = fake.target("policy-sft-a").target.chosen["ray_actor_options"]
        assert options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "3"
        assert options["runtime_env"]["env_vars"]["VLLM_X"] == "1"
        assert options["num_gpus"] == 0.5

    def test_policy_gets_its_version_and_context(self, fake: FakeServe, tmp_path: Path) -> None:
        platform, _ = make_platform(tmp_path)
        platform.start(make_policy())
        application = fake.target("policy-sft-a").target
        assert application.bound == (make_policy(),)
        assert application.named["max_model_len"] == 700

    def test_port_in_use(self, fake: FakeServe, tmp_path: Path) -> None:
        with listening() as port:
            platform, _ = make_platform(tmp_path, http_port=port)
            with pytest.raises(BadInputError, match=r"cluster\.serve_port.*in use"):
                platform.start(make_policy())
        assert fake.started == []

    def test_our_own_serve_on_the_port_is_no_conflict(self, fake: FakeServe, tmp_path: Path) -> None:
        fake.is_up = True
        with listening() as port:
            platform, _ = make_platform(tmp_path, http_port=port)
            platform.start(make_policy())

    def test_url(self, fake: FakeServe, tmp_path: Path) -> None:
        platform, _ = make_platform(tmp_path, http_port=8123)
        assert platform.url == "http://127.0.0.1:8123"


def test_host_nobody_can_listen_on() -> None:
    with pytest.raises(BadInputError, match="cannot listen there"):
        require_free_port("203.0.113.7", 8000)


class TestDeploy:
    def test_waits_until_it_answers(self, fake: FakeServe, tmp_path: Path) -> None:
        fake.start_polls = 10
        platform, clock = make_platform(tmp_path)
        platform.deploy_policy(make_policy(CANDIDATE))
        assert fake.apps["policy-ppo-b"].status == "RUNNING"
        assert clock.now > START

    def test_again_changes_nothing(self, fake: FakeServe, tmp_path: Path) -> None:
        platform, _ = make_platform(tmp_path)
        for _ in range(2):
            platform.deploy_policy(make_policy(CANDIDATE))
        assert len(fake.targets) == 1

    def test_a_name_is_never_reused(self, fake: FakeServe, tmp_path: Path) -> None:
        platform, _ = make_platform(tmp_path)
        platform.deploy_policy(make_policy(CANDIDATE))
        with pytest.raises(BadInputError, match="give a new name"):
            platform.deploy_policy(make_policy(CANDIDATE, path="/models/other"))
        assert len(fake.targets) == 1

    @pytest.mark.parametrize("status", ["DEPLOY_FAILED", "UNHEALTHY"])
    def test_failure_says_why_and_leaves_nothing(self, fake: FakeServe, tmp_path: Path, status: str) -> None:
        fake.end_status, fake.message = status, "no tokenizer in /models"
        platform, _ = make_platform(tmp_path)
        with pytest.raises(EngineError, match="no tokenizer in /models the replica said why"):
            platform.deploy_policy(make_policy(CANDIDATE))
        assert fake.deleted == ["policy-ppo-b"]

    def test_wait_is_bounded(self, fake: FakeServe, tmp_path: Path) -> None:
        fake.start_polls = 10**9
        platform, clock = make_platform(tmp_path, start_timeout_s=5.0)
        with pytest.raises(EngineError, match="not running after 5 s"):
            platform.deploy_policy(make_policy(CANDIDATE))
        assert clock.now - START < 7.0
        assert fake.apps == {}

    def test_failed_application_is_deployed_afresh(self, fake: FakeServe, tmp_path: Path) -> None:
        platform, _ = make_platform(tmp_path)
        platform.deploy_policy(make_policy(CANDIDATE))
        fake.apps["policy-ppo-b"].status = "DEPLOY_FAILED"
        platform.deploy_policy(make_policy(CANDIDATE))
        assert len(fake.targets) == 2

    @pytest.mark.parametrize("error", [RayError("gone"), RayServeException("no controller"), TimeoutError("slow")])
    def test_ray_errors_become_ours(self, fake: FakeServe, tmp_path: Path, error: Exception) -> None:
        fake.broken = error
        platform, _ = make_platform(tmp_path)
        with pytest.raises(EngineError, match="Ray Serve"):
            platform.deploy_policy(make_policy(CANDIDATE))


class TestRemove:
    def test_candidate_without_traffic(self, fake: FakeServe, tmp_path: Path) -> None:
        platform, _ = make_platform(tmp_path)
        platform.deploy_policy(make_policy(CANDIDATE))
        put(tmp_path, 1, 0.0)
        platform.remove_policy(CANDIDATE)
        platform.remove_policy(CANDIDATE)
        assert fake.deleted == ["policy-ppo-b"]

    @pytest.mark.parametrize("version", [STABLE, CANDIDATE])
    def test_what_carries_traffic_stays(self, fake: FakeServe, tmp_path: Path, version: str) -> None:
        platform, _ = make_platform(tmp_path)
        platform.deploy_policy(make_policy(version))
        put(tmp_path, 1, 0.05)
        with pytest.raises(BadInputError, match="carries traffic"):
            platform.remove_policy(version)
        assert fake.deleted == []

    def test_version_nobody_knows(self, fake: FakeServe, tmp_path: Path) -> None:
        platform, _ = make_platform(tmp_path)
        with pytest.raises(EngineError, match="never deployed"):
            platform.remove_policy("other")


class TestReleasePlatform:
    def test_acknowledged_epoch_is_the_gateways(self, fake: FakeServe, tmp_path: Path) -> None:
        platform, clock = make_platform(tmp_path)
        config = make_config(tmp_path)
        put(tmp_path, 1, 0.0)
        watcher = SplitWatcher(
            SplitStore(config.files.split),
            config.files.acks,
            gateway="g",
            slot_of=lambda salt, key: 0,
            stale_after_s=30.0,
            clock=clock,
        )
        watcher.poll()
        assert platform.acknowledged_epoch() == 1
        platform.set_split(put(tmp_path, 2, 0.5))
        assert platform.acknowledged_epoch() == 1
        watcher.poll()
        assert platform.acknowledged_epoch() == 2

    def test_no_gateway_is_no_acknowledgement(self, fake: FakeServe, tmp_path: Path) -> None:
        platform, _ = make_platform(tmp_path)
        with pytest.raises(InfrastructureError, match="no gateway"):
            platform.acknowledged_epoch()

    def test_healthy_candidate(self, fake: FakeServe, tmp_path: Path) -> None:
        platform, _ = make_platform(tmp_path)
        platform.deploy_policy(make_policy(CANDIDATE))
        platform.candidate = CANDIDATE
        assert platform.candidate_healthy()

    @pytest.mark.parametrize("error", [TimeoutError("slow"), RayActorError(), EngineError("the engine is dead")])
    def test_ill_candidate(self, fake: FakeServe, tmp_path: Path, error: Exception) -> None:
        fake.probe = FakeResponse(error=error)
        platform, _ = make_platform(tmp_path)
        platform.deploy_policy(make_policy(CANDIDATE))
        platform.candidate = CANDIDATE
        with pytest.raises(EngineError):
            platform.candidate_healthy()

    def test_candidate_that_is_not_served(self, fake: FakeServe, tmp_path: Path) -> None:
        platform, _ = make_platform(tmp_path)
        ServedPolicies(make_config(tmp_path).files.served).add(make_policy(CANDIDATE))
        platform.candidate = CANDIDATE
        with pytest.raises(EngineError, match="does not exist"):
            platform.candidate_healthy()

    def test_candidate_must_be_named(self, fake: FakeServe, tmp_path: Path) -> None:
        platform, _ = make_platform(tmp_path)
        with pytest.raises(BadInputError, match=r"platform\.candidate"):
            platform.candidate_healthy()

    def test_critic_is_an_application(self, fake: FakeServe, tmp_path: Path) -> None:
        platform, _ = make_platform(tmp_path)
        platform.start(make_policy(), critic_path="/models/rm")
        assert fake.target("critic").target.bound == ("/models/rm",)

    def test_without_a_reward_model_there_is_no_critic(self, fake: FakeServe, tmp_path: Path) -> None:
        platform, _ = make_platform(tmp_path)
        platform.start(make_policy())
        assert "critic" not in fake.apps

    def test_everything_is_asked_for_before_anything_is_waited_for(self, fake: FakeServe, tmp_path: Path) -> None:
        """Engines and critic load at the same time: one after the other would cost their start-ups in turn."""
        platform, _ = make_platform(tmp_path)
        asked_when_first_polled: list[list[str]] = []
        status = fake.status

        def polled() -> Any:
            if fake.apps and any(app.polls > len(fake.apps) for app in fake.apps.values()):
                asked_when_first_polled.append(list(fake.apps))
            return status()

        fake.status = polled  # type: ignore[method-assign]
        fake.start_polls = 10
        platform.start(make_policy(), make_policy(CANDIDATE), critic_path="/models/rm")
        expected = [application_of(STABLE), application_of(CANDIDATE), "critic", "gateway"]
        assert asked_when_first_polled[0] == expected

    def test_a_critic_that_does_not_start_is_an_error_with_its_reason(self, fake: FakeServe, tmp_path: Path) -> None:
        platform, _ = make_platform(tmp_path)
        fake.end_status, fake.message = "DEPLOY_FAILED", "no such file"
        with pytest.raises(EngineError, match="no such file"):
            platform.start(make_policy(), critic_path="/models/none")
