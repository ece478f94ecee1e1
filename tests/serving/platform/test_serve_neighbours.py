"""One Ray, several homes: what a platform refuses to use, what it ends and what it leaves, and where its parts run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayError

from rl_actors.contracts.errors import BadInputError, EngineError
from serving.platform.serve import PlatformConfig, ServePlatform, ServeSite, require_serve_there
from serving.split.record import SplitStore
from serving.store.served import ReleaseFiles, ServedPolicies, application_of
from tests.serving.fakes import FakeClock
from tests.serving.gateway.live_fakes import CANDIDATE, STABLE, make_config, make_policy
from tests.serving.platform.test_serve import FakeServe, fake, free_port, listening, make_platform, put

__all__ = ["fake"]  # a fixture: used by name
HEAD = "node:__internal_head__"
OURS = ("critic", "gateway", "policy-ppo-b", "policy-sft-a")


@pytest.fixture
def port() -> int:
    return free_port()


def platform_at(tmp_path: Path, port: int, home: str = "one", **changes: Any) -> ServePlatform:
    """A platform of one of several homes."""
    clock = FakeClock()
    config = PlatformConfig(**({"http_port": port, "start_timeout_s": 5.0} | changes))
    return ServePlatform(make_config(tmp_path / home), config, clock=clock, sleep=clock.sleep)


def site(tmp_path: Path, port: int, home: str = "one", owner: Any = "run") -> ServeSite:
    return ServeSite(root=str(tmp_path / home), port=port, owner=owner)


def untouched(fake: FakeServe) -> bool:
    return not (fake.started or fake.targets or fake.deleted or fake.num_shutdowns)


class TestMark:
    def test_says_what_by_whom_and_where(self, tmp_path: Path):
        name = site(tmp_path, 8000).deployment("Gateway")
        assert name.startswith("Gateway-run-8000-")
        assert "#" not in name, "Serve parts its own names by it"

    def test_is_the_same_after_a_restart_and_by_another_spelling(self, tmp_path: Path):
        plain, odd = site(tmp_path, 8000), ServeSite(root=f"{tmp_path}/x/../one", port=8000, owner="run")
        assert plain.mark == odd.mark

    @pytest.mark.parametrize(
        ("port", "home", "owner", "is_strange", "is_started_here"),
        [
            (8000, "one", "run", False, True),
            (8000, "one", "service", False, False),
            (8001, "one", "run", True, False),
            (8000, "two", "run", True, False),
            (18000, "one", "run", True, False),
        ],
    )
    def test_tells_homes_ports_and_owners_apart(
        self, tmp_path: Path, port: int, home: str, owner: Any, is_strange: bool, is_started_here: bool
    ):
        names = [site(tmp_path, port, home, owner).deployment("Gateway")]
        ours = site(tmp_path, 8000)
        assert (ours.is_strange(names), ours.is_started_here(names)) == (is_strange, is_started_here)

    @pytest.mark.parametrize("name", ["Gateway", "Model", "Gateway-run-8000", "x-8000-1f0c9a5be2d4"])
    def test_what_bears_no_mark_is_a_stranger_s(self, tmp_path: Path, name: str):
        assert site(tmp_path, 8000).is_strange([name])
        assert not site(tmp_path, 8000).is_started_here([name])

    def test_what_has_no_deployments_yet_is_neither(self, tmp_path: Path):
        assert not site(tmp_path, 8000).is_strange([])
        assert not site(tmp_path, 8000).is_started_here([])


class TestStrangers:
    def test_a_gateway_of_another_home_is_refused_before_anything_is_touched(self, fake: FakeServe, tmp_path: Path):
        with listening() as port:
            fake.is_up = True
            fake.add("gateway", site(tmp_path, port, "two").deployment("Gateway"))
            platform = platform_at(tmp_path, port)
            with pytest.raises(BadInputError, match=r"cluster\.serve_port = \d+: .*gateway of another home") as caught:
                platform.start(make_policy())
        assert (caught.value.field, caught.value.value) == ("cluster.serve_port", port)
        assert "seatrial down" in caught.value.remedy
        assert untouched(fake)
        files = make_config(tmp_path / "one").files
        assert not files.served.exists()
        assert SplitStore(files.split).read() is None

    def test_our_own_gateway_of_an_earlier_process_is_used(self, fake: FakeServe, tmp_path: Path):
        """Negative control: the same start, with our mark on what runs."""
        with listening() as port:
            fake.is_up = True
            fake.add("gateway", site(tmp_path, port).deployment("Gateway"))
            platform_at(tmp_path, port).start(make_policy())
        assert [target.name for target in fake.targets] == ["policy-sft-a"]

    def test_a_service_of_the_same_home_is_used_too(self, fake: FakeServe, tmp_path: Path):
        with listening() as port:
            fake.is_up = True
            fake.add("gateway", site(tmp_path, port, owner="service").deployment("Gateway"))
            platform_at(tmp_path, port).start(make_policy())
        assert "gateway" not in [target.name for target in fake.targets]

    @pytest.mark.parametrize("status", ["RUNNING", "DEPLOYING", "UNHEALTHY", "DEPLOY_FAILED", "DELETING"])
    @pytest.mark.parametrize("name", ["gateway", "critic", "policy-sft-a", "policy-ppo-b"])
    def test_any_name_we_need_in_any_state(self, fake: FakeServe, tmp_path: Path, port: int, name: str, status: str):
        """Another home's policy of the same name has other weights; a broken one is still not ours to replace."""
        fake.add(name, site(tmp_path, port, "two").deployment("X"), status=status)
        with pytest.raises(BadInputError, match=f"serves the application {name} of another home"):
            platform_at(tmp_path, port).start(make_policy(), make_policy(CANDIDATE), critic_path="/models/rm")
        assert untouched(fake)

    @pytest.mark.parametrize("is_asked", [True, False])
    def test_a_critic_counts_only_where_the_gateway_would_ask_it(
        self, fake: FakeServe, tmp_path: Path, port: int, is_asked: bool
    ):
        fake.add("critic", site(tmp_path, port, "two").deployment("CriticServer"))
        config = replace(make_config(tmp_path / "one"), critic_application="critic" if is_asked else "")
        platform = ServePlatform(config, PlatformConfig(http_port=port))
        if is_asked:
            with pytest.raises(BadInputError, match="application critic of another home"):
                platform.require_room()
        else:
            platform.require_room()

    def test_other_names_are_no_concern_of_ours(self, fake: FakeServe, tmp_path: Path, port: int):
        fake.add("translator", "Model")
        platform_at(tmp_path, port).start(make_policy())
        assert "translator" in fake.apps

    def test_the_same_home_behind_another_port_is_refused(self, fake: FakeServe, tmp_path: Path, port: int):
        fake.add("gateway", site(tmp_path, port + 1).deployment("Gateway"))
        with pytest.raises(BadInputError, match=f"Gateway-run-{port + 1}-"):
            platform_at(tmp_path, port).start(make_policy())
        assert untouched(fake)

    def test_serve_behind_another_port_is_refused(self, fake: FakeServe, tmp_path: Path, port: int):
        """Serve keeps the port it was started with: nobody would ever answer at ours."""
        fake.is_up = True
        with pytest.raises(BadInputError, match=r"cluster\.serve_port = '127\.0\.0\.1:\d+': .*another port.*shutdown"):
            platform_at(tmp_path, port).start(make_policy())
        assert untouched(fake)

    def test_a_listener_at_our_port_passes_and_silence_does_not(self, port: int):
        with listening() as taken:
            require_serve_there("127.0.0.1", taken)
        with pytest.raises(BadInputError, match="another port"):
            require_serve_there("127.0.0.1", port)

    def test_deploying_and_removing_refuse_too(self, fake: FakeServe, tmp_path: Path, port: int):
        fake.add("policy-ppo-b", site(tmp_path, port, "two").deployment("PolicyServer"))
        platform = platform_at(tmp_path, port)
        with pytest.raises(BadInputError, match="of another home"):
            platform.deploy_policy(make_policy(CANDIDATE))
        served = ServedPolicies(ReleaseFiles(root=tmp_path / "one").served)
        with pytest.raises(EngineError, match="never deployed"):
            served.find(CANDIDATE)
        served.add(make_policy(CANDIDATE))
        with pytest.raises(BadInputError, match="of another home"):
            platform.remove_policy(CANDIDATE)
        assert untouched(fake)

    def test_room_can_be_asked_for_early(self, fake: FakeServe, tmp_path: Path, port: int):
        """A run of hours must not find out at its end."""
        platform = platform_at(tmp_path, port)
        platform.require_room()
        platform.require_room(make_policy())
        fake.add("gateway", site(tmp_path, port, "two").deployment("Gateway"))
        with pytest.raises(BadInputError, match="of another home"):
            platform.require_room()
        assert untouched(fake)

    def test_of_two_that_start_at_once_the_second_stops(self, fake: FakeServe, tmp_path: Path, port: int):
        """Both found room; the gateway that then runs is the other's."""
        run_many = fake.run_many

        def overtaken(targets: Any, wait_for_applications_running: bool) -> None:
            run_many(targets, wait_for_applications_running)
            if "gateway" not in fake.apps:
                fake.add("gateway", site(tmp_path, port, "two").deployment("Gateway"))

        fake.run_many = overtaken  # type: ignore[method-assign]
        platform = platform_at(tmp_path, port)
        with pytest.raises(BadInputError, match="gateway of another home"):
            platform.start(make_policy())
        platform.shutdown()
        assert sorted(fake.apps) == ["gateway"]
        assert (fake.deleted, fake.num_shutdowns) == (["policy-sft-a"], 0)


class TestShutdown:
    def started(self, tmp_path: Path, port: int, **changes: Any) -> ServePlatform:
        platform = platform_at(tmp_path, port, **changes)
        platform.start(make_policy(), make_policy(CANDIDATE), critic_path="/models/rm")
        return platform

    def test_serve_that_we_started_for_ourselves_ends_whole(self, fake: FakeServe, tmp_path: Path, port: int):
        self.started(tmp_path, port).shutdown()
        assert (fake.num_shutdowns, fake.deleted, fake.apps) == (1, [], {})

    def test_without_a_start_nothing_is_ended(self, fake: FakeServe, tmp_path: Path, port: int):
        fake.is_up = True
        fake.add("gateway", site(tmp_path, port, "two").deployment("Gateway"))
        platform_at(tmp_path, port).shutdown()
        assert untouched(fake)
        assert list(fake.apps) == ["gateway"]

    def test_serve_that_ran_before_us_goes_on(self, fake: FakeServe, tmp_path: Path):
        fake.is_up = True
        fake.add("translator", "Model")
        with listening() as port:
            self.started(tmp_path, port).shutdown()
        assert (fake.num_shutdowns, sorted(fake.deleted)) == (0, sorted(OURS))
        assert list(fake.apps) == ["translator"]

    def test_serve_that_someone_else_came_to_use_goes_on(self, fake: FakeServe, tmp_path: Path, port: int):
        platform = self.started(tmp_path, port)
        fake.add("translator", "Model")
        platform.shutdown()
        assert (fake.num_shutdowns, sorted(fake.deleted)) == (0, sorted(OURS))
        assert list(fake.apps) == ["translator"]

    def test_a_second_time_ends_nothing_more(self, fake: FakeServe, tmp_path: Path, port: int):
        platform = self.started(tmp_path, port)
        platform.shutdown()
        fake.is_up = True
        fake.add("translator", "Model")
        platform.shutdown()
        assert (fake.num_shutdowns, fake.deleted) == (1, [])

    def test_what_a_killed_process_of_ours_started_is_ended(self, fake: FakeServe, tmp_path: Path):
        """The engines of a run outlive a kill -9 on a shared Ray: its resumed process must not leak them."""
        with listening() as port:
            fake.is_up = True
            self.started(tmp_path, port)
            resumed = self.started(tmp_path, port)
            resumed.shutdown()
        assert (fake.num_shutdowns, sorted(fake.deleted)) == (0, sorted(OURS))

    def test_a_service_s_gateway_and_what_it_serves_outlive_a_run(self, fake: FakeServe, tmp_path: Path):
        """A release on a home that `seatrial up` serves: only what the run added, and nobody is served by, ends."""
        with listening() as port:
            fake.is_up = True
            platform_at(tmp_path, port, owner="service").start(make_policy())
            run = self.started(tmp_path, port)
            run.shutdown()
        assert sorted(fake.deleted) == ["critic", "policy-ppo-b"]
        assert sorted(fake.apps) == ["gateway", "policy-sft-a"]
        assert fake.num_shutdowns == 0

    def test_a_policy_that_a_run_promoted_under_a_service_stays(self, fake: FakeServe, tmp_path: Path):
        with listening() as port:
            fake.is_up = True
            platform_at(tmp_path, port, owner="service").start(make_policy())
            run = self.started(tmp_path, port)
            put(tmp_path / "one", 2, 0.0, stable=CANDIDATE, candidate="")
            run.shutdown()
        assert fake.deleted == ["critic"]
        assert application_of(CANDIDATE) in fake.apps

    def test_without_a_gateway_that_stays_nothing_in_force_is_spared(self, fake: FakeServe, tmp_path: Path):
        """Negative control: the split alone keeps no engine alive."""
        fake.is_up = True
        with listening() as port:
            platform = self.started(tmp_path, port)
            record = SplitStore(make_config(tmp_path / "one").files.split).read()
            assert record is not None
            assert record.stable == STABLE
            platform.shutdown()
        assert "policy-sft-a" in fake.deleted

    def test_ray_s_errors_become_ours(self, fake: FakeServe, tmp_path: Path, port: int):
        platform = self.started(tmp_path, port)
        fake.broken = RayError("gone")
        with pytest.raises(EngineError, match="Ray Serve: gone"):
            platform.shutdown()


class TestHeadNode:
    """A ledger in WAL mode works on one host: its gateways and the critic stay with it."""

    def resources(self, fake: FakeServe, name: str) -> dict[str, float]:
        return fake.target(name).target.chosen["ray_actor_options"].get("resources", {})

    def test_gateway_and_critic_stay_on_the_head(self, fake: FakeServe, tmp_path: Path):
        platform, _ = make_platform(tmp_path, num_gateways=3)
        platform.start(make_policy(), critic_path="/models/rm")
        assert self.resources(fake, "gateway") == {HEAD: 0.001}
        assert self.resources(fake, "critic") == {HEAD: 0.001}

    def test_engines_go_where_the_gpus_are(self, fake: FakeServe, tmp_path: Path):
        platform, _ = make_platform(tmp_path)
        platform.start(make_policy())
        assert self.resources(fake, "policy-sft-a") == {}

    def test_a_ray_without_that_resource_still_serves(self, fake: FakeServe, tmp_path: Path):
        """Otherwise the gateway would wait for ever for a node that cannot come."""
        fake.resources = {"CPU": 4.0}
        platform, _ = make_platform(tmp_path)
        platform.start(make_policy(), critic_path="/models/rm")
        assert self.resources(fake, "gateway") == self.resources(fake, "critic") == {}

    def test_a_gateway_takes_little_of_it(self, fake: FakeServe, tmp_path: Path):
        platform, _ = make_platform(tmp_path)
        platform.start(make_policy())
        assert self.resources(fake, "gateway")[HEAD] * 100 < fake.resources[HEAD]

    def test_ray_that_does_not_answer_is_an_engine_error(self, fake: FakeServe, tmp_path: Path):
        def fail() -> dict[str, float]:
            raise RayError("gcs is gone")

        fake.cluster_resources = fail  # type: ignore[method-assign]
        platform, _ = make_platform(tmp_path)
        with pytest.raises(EngineError, match="gcs is gone"):
            platform.start(make_policy())

    def test_it_does_not_spread_to_the_engines_environment(self, fake: FakeServe, tmp_path: Path):
        platform, _ = make_platform(tmp_path)
        platform.start(make_policy())
        chosen = fake.target("gateway").target.chosen["ray_actor_options"]
        assert chosen["num_cpus"] == 0.1
        assert chosen["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "1"
