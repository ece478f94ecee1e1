"""Connecting to Ray: a local one that is ours alone, a cluster when one is named; and where each actor goes."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import worker as ray_worker
from ray.exceptions import AuthenticationError

from cluster.plan.placement import Placement, place
from cluster.ray_cluster import connection as ray_runtime
from cluster.ray_cluster.connection import (
    TOKEN_REMEDY,
    WORKER_ENVIRONMENT,
    connected,
    offer_token,
    placed,
    quieten_libraries,
    worker_environment,
)
from cluster.spec.spec import load_spec, override
from rl_actors.contracts.errors import BadInputError, InfrastructureError

LISTENS = ray_runtime.listens
GPU = ("cluster.gpus_per_learner=1", "cluster.gpus_per_rollout_worker=2", "ppo.num_rollout_workers=2")


def placement_of(*settings: str) -> Placement:
    return place(override(load_spec("support_desk"), list(settings)))


# --- environment ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "accelerator"), [((), "cpu"), (GPU, "cuda"), (GPU[:1], "cuda")])
def test_workers_are_told_which_accelerator_they_have(settings: tuple[str, ...], accelerator: str):
    environment = worker_environment(placement_of(*settings))
    assert environment["DS_ACCELERATOR"] == accelerator
    assert {**environment, "DS_ACCELERATOR": "cpu"} == WORKER_ENVIRONMENT


def test_workers_never_reach_for_the_hub():
    assert worker_environment(placement_of())["HF_HUB_OFFLINE"] == "1"


def test_asking_twice_does_not_change_the_defaults():
    worker_environment(placement_of(*GPU))
    assert worker_environment(placement_of())["DS_ACCELERATOR"] == "cpu"


# --- connecting, on a Ray that only remembers -------------------------------------------------------------------------


@dataclass
class FakeRay:
    """What `connected` asks of Ray."""

    resources: dict[str, float]
    is_up: bool = False
    inits: list[dict[str, Any]] = field(default_factory=list)
    num_shutdowns: int = 0
    error: Exception | None = None

    def is_initialized(self) -> bool:
        return self.is_up

    def init(self, **options: Any) -> None:
        assert not self.is_up
        self.inits.append(options)
        if self.error is not None:
            raise self.error
        self.is_up = True

    def cluster_resources(self) -> dict[str, float]:
        assert self.is_up
        return self.resources

    def shutdown(self) -> None:
        self.num_shutdowns += 1
        self.is_up = False


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay({"CPU": 8.0})
    for name in ("is_initialized", "init", "cluster_resources", "shutdown"):
        monkeypatch.setattr(ray, name, getattr(fake, name))
    monkeypatch.setattr(ray_runtime, "listens", lambda _host, _port, _timeout_s: True)
    return fake


def test_without_an_address_a_local_ray_is_started_and_no_other_is_joined(fake_ray: FakeRay):
    with connected("", placement_of()):
        assert fake_ray.is_up
    (options,) = fake_ray.inits
    assert options["address"] == "local"
    assert options["include_dashboard"] is False
    assert options["runtime_env"] == {"env_vars": worker_environment(placement_of())}
    assert (fake_ray.is_up, fake_ray.num_shutdowns) == (False, 1)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ConnectionError("Could not find any running Ray instance.\nA page more"),
            "Could not find any running Ray instance.",
        ),
        (RuntimeError(""), "RuntimeError"),
    ],
)
@pytest.mark.parametrize(("given", "environ", "field"), [("auto", "", "cluster.address"), ("", "auto", "RAY_ADDRESS")])
def test_a_cluster_that_is_not_there_is_named_with_its_remedy(
    fake_ray: FakeRay,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    said: str,
    given: str,
    environ: str,
    field: str,
):
    monkeypatch.setenv("RAY_ADDRESS", environ)
    fake_ray.error = error
    with pytest.raises(InfrastructureError) as caught, connected(given, placement_of()):
        pytest.fail("nothing may start")
    assert str(caught.value).startswith(
        f"{field} = 'auto': no Ray cluster answers there ({said}); start one (ray start"
    )
    assert "\n" not in str(caught.value)
    assert (caught.value.exit_code, fake_ray.num_shutdowns) == (3, 0)


def test_an_address_that_is_none_is_bad_input(fake_ray: FakeRay):
    fake_ray.error = ValueError("Invalid address format: nonsense")
    with pytest.raises(BadInputError, match="Invalid address format") as caught, connected("nonsense", placement_of()):
        pytest.fail("nothing may start")
    assert (caught.value.field, caught.value.value, caught.value.exit_code) == ("cluster.address", "nonsense", 2)


def test_a_cluster_that_wants_a_token_says_where_it_comes_from(fake_ray: FakeRay):
    fake_ray.error = AuthenticationError("no token")
    with (
        pytest.raises(InfrastructureError, match=f"asks for a token; {re.escape(TOKEN_REMEDY)}"),
        connected("auto", placement_of()),
    ):
        pytest.fail("nothing may start")


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}"])
def test_a_port_where_nobody_listens_is_refused_before_ray_tries_for_minutes(
    fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch, address: str
):
    monkeypatch.setattr(ray_runtime, "listens", LISTENS)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        there = address.format(port=listener.getsockname()[1])
        started = time.monotonic()
        with pytest.raises(InfrastructureError, match="nobody listens"), connected(there, placement_of()):
            pytest.fail("nothing may start")
        assert time.monotonic() - started < 5
        assert fake_ray.inits == []
        listener.listen()
        with connected(there, placement_of()):
            assert fake_ray.inits[0]["address"] == there


def test_no_host_and_no_port_listen_not():
    assert not LISTENS("no-such-host.invalid", 6379, 5.0)
    assert not LISTENS("127.0.0.1", 700_000, 5.0)


def test_joining_a_cluster_that_is_gone_is_told_alike(fake_ray: FakeRay):
    fake_ray.error = ConnectionError("gone")
    with pytest.raises(InfrastructureError, match="no Ray cluster answers there"):
        ray_runtime.join("auto")


def test_a_small_machine_gets_enough_logical_cpus(fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray_runtime.os, "cpu_count", lambda: 2)
    with connected("", placement_of()):
        pass
    assert fake_ray.inits[0]["num_cpus"] == 3


@pytest.mark.parametrize(
    ("address", "environ", "joined"),
    [
        ("ray://head:10001", None, "ray://head:10001"),
        ("", "10.0.0.1:6379", "10.0.0.1:6379"),
        ("ray://head:10001", "10.0.0.1:6379", "ray://head:10001"),
    ],
)
def test_a_named_cluster_is_joined_and_not_resized(
    fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch, address: str, environ: str | None, joined: str
):
    if environ:
        monkeypatch.setenv("RAY_ADDRESS", environ)
    with connected(address, placement_of()):
        pass
    (options,) = fake_ray.inits
    assert options["address"] == joined
    assert "num_cpus" not in options
    assert "object_store_memory" not in options
    assert options["runtime_env"]["env_vars"]["HF_HUB_OFFLINE"] == "1"


def test_a_ray_that_is_up_already_is_used_and_left_running(fake_ray: FakeRay):
    fake_ray.is_up = True
    with connected("", placement_of()):
        pass
    assert (fake_ray.inits, fake_ray.num_shutdowns, fake_ray.is_up) == ([], 0, True)


def test_a_spec_that_can_never_be_placed_is_refused_and_ray_ends(fake_ray: FakeRay):
    ran = []
    with pytest.raises(BadInputError, match="the cluster has 0"), connected("", placement_of(*GPU)):
        ran.append(True)
    assert (ran, fake_ray.is_up) == ([], False)


def test_a_run_that_fails_still_ends_its_ray(fake_ray: FakeRay):
    with pytest.raises(InfrastructureError, match="disk"), connected("", placement_of()):
        raise InfrastructureError("disk full")
    assert not fake_ray.is_up


# --- placing ----------------------------------------------------------------------------------------------------------


@dataclass
class Groups:
    """Placement groups that are only names."""

    reserved: list[tuple[str, float]] = field(default_factory=list)
    removed: list[object] = field(default_factory=list)
    refusal: Exception | None = None

    def reserve(self, _placement: Placement, stage: str, *, timeout_s: float) -> str:
        if self.refusal is not None:
            raise self.refusal
        self.reserved.append((stage, timeout_s))
        return f"group of {stage}"


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Groups:
    fake = Groups()
    monkeypatch.setattr(ray_runtime, "reserve", fake.reserve)
    # By the module's name: `ray.util.placement_group` is a function too.
    module = importlib.import_module("ray.util.placement_group")
    monkeypatch.setattr(module, "remove_placement_group", fake.removed.append)
    return fake


def test_every_actor_goes_to_its_own_bundle_with_what_it_reserved(groups: Groups):
    placement = placement_of(*GPU)
    with placed(placement, "ppo") as options:
        found = [options(bundle.role, bundle.rank) for bundle in placement.bundles("ppo")]
    strategies = [given["scheduling_strategy"] for given in found]
    assert [strategy.placement_group_bundle_index for strategy in strategies] == list(range(4))
    assert {strategy.placement_group for strategy in strategies} == {"group of ppo"}
    assert [(given["num_cpus"], given["num_gpus"]) for given in found] == [
        (1.0, 1.0), (1.0, 2.0), (1.0, 2.0), (1.0, 0.0),
    ]  # fmt: skip


def test_bundles_are_given_back_when_the_stage_ends_and_when_it_fails(groups: Groups):
    with placed(placement_of(), "sft"):
        assert groups.removed == []
    assert groups.removed == ["group of sft"]
    with pytest.raises(InfrastructureError), placed(placement_of(), "ppo"):
        raise InfrastructureError("worker died")
    assert groups.removed == ["group of sft", "group of ppo"]


def test_nothing_is_given_back_that_was_never_reserved(groups: Groups):
    groups.refusal = InfrastructureError("waited 60 s")
    with pytest.raises(InfrastructureError, match="waited"), placed(placement_of(), "ppo"):
        pass
    assert groups.removed == []


def test_a_wait_for_places_is_bounded(groups: Groups):
    with placed(placement_of(), "ppo"):
        pass
    assert groups.reserved == [("ppo", ray_runtime.RESERVE_TIMEOUT_S)]


@pytest.mark.parametrize(("role", "rank"), [("scorer", 1), ("learner", 1), ("cook", 0)])
def test_an_actor_the_stage_has_no_place_for_is_refused(groups: Groups, role: str, rank: int):
    with placed(placement_of(), "ppo") as options, pytest.raises(KeyError, match=role):
        options(role, rank)


# --- a real Ray -------------------------------------------------------------------------------------------------------


@pytest.fixture
def neighbour(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Somebody else's cluster on this machine: the one that a plain `ray.init()` would find and join."""
    # Below /tmp and short: Ray's sockets lie there. Of its own, so that nobody beside this test finds the cluster.
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as directory:
        monkeypatch.setenv("RAY_TMPDIR", directory)
        options = ("--port=0", "--num-cpus=1", "--include-dashboard=false", "--object-store-memory=100000000")
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", *options]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, **quiet) as process:  # type: ignore[call-overload]
            yield wait_for_text(Path(directory) / "ray" / "ray_current_cluster")
            process.terminate()
            process.wait(60)


def wait_for_text(path: Path, seconds: float = 120.0) -> str:
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.read_text().strip()):
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.1)
    return path.read_text().strip()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_local_ray_is_our_own_starts_and_stops_beside_another(neighbour: str):
    assert neighbour
    placement = placement_of()
    with connected("", placement):
        assert ray.is_initialized()
        assert ray.get_runtime_context().gcs_address != neighbour
        assert len(ray.nodes()) == 1
        with connected("", placement):
            assert ray.is_initialized()
        assert ray.is_initialized()
        seen = ray.get(ray.remote(num_cpus=0)(lambda: dict(os.environ)).remote(), timeout=120)
        assert {name: seen[name] for name in WORKER_ENVIRONMENT} == worker_environment(placement)
        with placed(placement, "offline_eval") as options:
            actor: Any = ray.remote(_Where).options(**options("rollout_worker", 0)).remote()
            assert ray.get(actor.group.remote(), timeout=120)
        removed = {row["state"] for row in ray.util.placement_group_table().values()}
        assert removed == {"REMOVED"}
    assert not ray.is_initialized()


class _Where:
    """An actor that says whether it runs inside a placement group."""

    def group(self) -> str:
        group = ray.util.get_current_placement_group()
        return group.id.hex() if group else ""


# --- what Ray prints --------------------------------------------------------------------------------------------------

GOODBYE = (
    "Task ServeController.graceful_shutdown failed. There are infinite retries remaining, so the task will be retried. "
    "Error: The actor is dead because it was killed by `ray.kill`."
)


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What reaches Ray's own printing, once seatrial has put itself before it."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(ray_worker, "print_to_stdstream", lambda data, ignore_prefix: found.append(data))
    quieten_libraries()
    return found


@pytest.mark.parametrize(
    "line",
    [
        "Task Learner.update failed. There are 3 retries remaining. Error: it was killed by `ray.kill`.",
        "Task ServeController.deploy failed. There are 3 retries remaining. Error: the node is out of memory",
    ],
)
def test_rays_messages_go_to_stderr(printed: list[dict[str, Any]], line: str):
    ray_worker.print_to_stdstream({"lines": [line], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    assert printed == [{"lines": [line], "pid": "raylet", "is_err": True}]


def test_the_end_of_serve_is_no_message(printed: list[dict[str, Any]]):
    ray_worker.print_to_stdstream({"lines": [GOODBYE], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    both = {"lines": [GOODBYE, "out of disk"], "pid": "raylet", "is_err": False}
    ray_worker.print_to_stdstream(both, ignore_prefix=False)
    assert [data["lines"] for data in printed] == [["out of disk"]]


def test_rays_printing_is_put_aside_once(printed: list[dict[str, Any]]):
    first = ray_worker.print_to_stdstream
    quieten_libraries()
    assert ray_worker.print_to_stdstream is first


def test_ray_still_asks_for_its_printing_by_that_name():
    """Where this fails after an update of Ray, its messages are back on stdout."""
    assert "print_to_stdstream(" in inspect.getsource(ray_worker.listen_error_messages)


# --- the token --------------------------------------------------------------------------------------------------------


def offered(home: Path, **environ: str) -> str:
    offer_token(environ, home)
    return environ.get("RAY_AUTH_MODE", "")


@pytest.fixture
def token(tmp_path: Path) -> Path:
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("secret")
    return file


def test_without_a_token_nothing_is_chosen(tmp_path: Path):
    assert offered(tmp_path) == ""
    assert offered(tmp_path, RAY_AUTH_TOKEN_PATH=str(tmp_path / "none")) == ""


def test_a_token_in_rays_own_place_is_offered(tmp_path: Path, token: Path):
    assert offered(tmp_path) == "token"


def test_a_token_in_a_variable_or_a_named_file_is_offered(tmp_path: Path, token: Path):
    assert offered(tmp_path / "elsewhere", RAY_AUTH_TOKEN="secret") == "token"
    assert offered(tmp_path / "elsewhere", RAY_AUTH_TOKEN_PATH=str(token)) == "token"


def test_a_chosen_mode_is_left_alone(tmp_path: Path, token: Path):
    assert offered(tmp_path, RAY_AUTH_MODE="disabled") == "disabled"
