"""The service: what was started is found again, stopped exactly, and never mistaken for a stranger's process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from cluster.cli.service import show_status
from cluster.records.journal import lock_run
from cluster.records.run_folder import RunFolder, list_runs, record_gateway, recorded_gateway
from cluster.registry.connection import store_of
from cluster.registry.entries import Lineage
from cluster.registry.registry import Registry
from cluster.registry.versions import RegisteredVersions
from cluster.service import gateway as service_gateway
from cluster.service import processes as service_processes
from cluster.service import service as service_module
from cluster.service.gateway import servable_run
from cluster.service.processes import (
    ProcessMark,
    http_ok,
    log_tail,
    mark_of,
    start_process,
    stop_processes,
    wait_until,
)
from cluster.service.service import (
    PartState,
    Service,
    ServicePart,
    ServicePorts,
    UpRequest,
    down,
    load_service,
    service_file,
    status,
    up,
)
from cluster.spec.spec import load_spec
from rl_actors.contracts.errors import BadInputError, InfrastructureError, TamperedError
from rl_actors.contracts.tasks import AgentLimits
from rl_actors.contracts.versions import PolicyVersion
from rl_actors.durable.codec import encode
from rl_actors.durable.files import write_json
from rl_actors.environment.workflow import WorkflowRef
from rl_actors.ports import free_port
from serving.store.served import GatewayConfig

SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)",
]
PARENT = [sys.executable, "-c", f"import subprocess, time; subprocess.Popen({SLEEPER!r}); time.sleep(60)"]
SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""


@pytest.fixture
def started(tmp_path: Path) -> Iterator:
    """Start commands that end with the test."""
    marks: list[ProcessMark] = []

    def start(command: list[str]) -> ProcessMark:
        marks.append(start_process(command, tmp_path / "log"))
        return marks[-1]

    yield start
    stop_processes(marks, timeout_s=0.1)


def descendants(mark: ProcessMark) -> list[ProcessMark]:
    return [mark_of(child.pid) for child in psutil.Process(mark.pid).children(recursive=True)]


def wait_for(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


# --- processes --------------------------------------------------------------------------------------------------------


def test_a_process_is_known_by_its_birth(started):
    mark = started(SLEEPER)
    assert mark.is_alive
    assert mark_of(mark.pid) == mark
    assert not replace(mark, birth="other boot/1").is_alive, "the same pid of another birth is a stranger"


def test_a_process_that_is_gone_is_not_alive():
    process = subprocess.Popen([sys.executable, "-c", ""])
    mark = mark_of(process.pid)
    process.wait()
    assert not mark.is_alive
    assert not ProcessMark(pid=process.pid, birth="").is_alive
    assert not mark_of(-1).is_alive


def test_a_zombie_is_not_alive(started):
    mark = started(SLEEPER)
    os.kill(mark.pid, signal.SIGKILL)
    wait_for(lambda: not mark.is_alive)


def test_stopping_ends_children_too(started):
    parent = started(PARENT)
    wait_for(lambda: descendants(parent))
    children = descendants(parent)
    assert stop_processes([parent], timeout_s=1.0) == [parent.pid]
    assert not any(mark.is_alive for mark in (parent, *children))


def test_a_process_that_ignores_sigterm_is_killed(started, tmp_path: Path):
    mark = started(STUBBORN)
    wait_for(lambda: "up" in (tmp_path / "log").read_text())
    stop_processes([mark], timeout_s=0.2)
    wait_for(lambda: not mark.is_alive)


def test_a_stranger_under_our_pid_is_never_touched(started):
    stranger = started(SLEEPER)
    assert stop_processes([replace(stranger, birth="earlier boot/7")]) == []
    assert stranger.is_alive


def test_a_process_outlives_its_starter(tmp_path: Path):
    code = "import sys; from pathlib import Path; from cluster.service.processes import start_process as s;"
    code += f"print(s({SLEEPER!r}, Path(sys.argv[1])).pid)"
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    mark = mark_of(int(done.stdout))
    assert mark.is_alive
    stop_processes([mark])
    assert not mark.is_alive


def test_waiting_ends_when_the_process_does(tmp_path: Path):
    log = tmp_path / "log"
    mark = start_process([sys.executable, "-c", "raise ValueError('no such port')"], log)
    with pytest.raises(InfrastructureError, match="Ray ended while starting: ValueError: no such port"):
        wait_until("Ray", lambda: False, mark, log, timeout_s=20)


def test_waiting_is_bounded(started, tmp_path: Path):
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    with pytest.raises(InfrastructureError, match="did not answer within 5 s: nothing"):
        wait_until(
            "Ray", lambda: False, started(SLEEPER), tmp_path / "l", timeout_s=5, clock=lambda: now[0], sleep=sleep
        )
    assert now[0] < 6


def test_last_words_prefer_an_error(tmp_path: Path):
    log = tmp_path / "log"
    log.write_text("start\nray.exceptions.RaySystemError: disk full\nsee the manual\n\n")
    assert log_tail(log).startswith("ray.exceptions.RaySystemError: disk full (see ")
    log.write_text("start\nbye\n")
    assert log_tail(log).startswith("bye")


def test_last_words_hold_no_credentials(tmp_path: Path):
    log = tmp_path / "log"
    log.write_text("OSError: no answer from postgresql://ann:s3cret@db/mlflow\n")
    assert log_tail(log).startswith("OSError: no answer from postgresql://db/mlflow (see ")


def test_a_birth_outlives_a_change_of_the_clock(started, monkeypatch: pytest.MonkeyPatch):
    """Negative control first: the time of birth by the clock moves with it."""
    mark, by_clock = started(SLEEPER), psutil.Process
    before = by_clock(mark.pid).create_time()
    an_hour_on = psutil.boot_time() + 3600
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: an_hour_on)
    assert by_clock(mark.pid).create_time() == before + 3600
    assert mark.is_alive


def test_a_child_that_nobody_reaps_is_not_waited_for(started, monkeypatch: pytest.MonkeyPatch):
    idle = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', '']); time.sleep(60)"
    parent = started([sys.executable, "-c", f"import signal; signal.signal(15, signal.SIG_IGN); {idle}"])
    wait_for(lambda: [child.status() for child in psutil.Process(parent.pid).children()] == [psutil.STATUS_ZOMBIE])
    (zombie,) = psutil.Process(parent.pid).children()
    begun = time.monotonic()
    assert service_processes._left_after(30.0, [zombie]) == []
    assert time.monotonic() - begun < 5


# --- probes -----------------------------------------------------------------------------------------------------------


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/healthz" else 503)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def http_port() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def test_a_probe_tells_success_from_failure(http_port: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert http_ok(f"http://127.0.0.1:{http_port}/healthz")
    assert not http_ok(f"http://127.0.0.1:{http_port}/other")
    assert not http_ok(f"http://127.0.0.1:{free_port()}/")
    assert not http_ok("not a url")


def test_a_silent_port_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(service_processes, "PROBE_TIMEOUT_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begun = time.monotonic()
        assert not http_ok(f"http://127.0.0.1:{silent.getsockname()[1]}/")
        assert time.monotonic() - begun < 5


def part(process: ProcessMark | None, name: str = "ray") -> ServicePart:
    return ServicePart(
        name=name,  # type: ignore[arg-type]
        process=process,
        url="http://u",
        probe_url="http://u/health",
        log="",
        started_at=0.0,
    )


def states(service: Service, *, answers: bool) -> list[PartState]:
    return [each.state for each in status(service, lambda _url: answers)]


def test_every_state_of_a_part_is_told_apart(started):
    alive = started(SLEEPER)
    dead = ProcessMark(pid=alive.pid, birth="earlier boot/7")
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    gone = ProcessMark(pid=process.pid, birth="boot/9")
    service = Service(parts=(part(alive), part(dead), part(gone), part(None, "mlflow")))
    assert states(service, answers=True) == ["up", "stale", "gone", "up"]
    assert states(service, answers=False) == ["not answering", "stale", "gone", "not answering"]
    assert all(bool(each.remedy) == (each.state != "up") for each in status(service, lambda _url: True))


# --- up and down ------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A home whose Ray and MLflow are small HTTP servers in real processes; the gateway is a recorded call."""
    ports = ServicePorts(ray=free_port(), dashboard=free_port(), mlflow=free_port(), gateway=free_port())
    served: list = []
    broken: set[str] = set()

    def ray_command(chosen: ServicePorts, num_cpus: int) -> list[str]:
        served.append(("cpus", num_cpus))
        return [sys.executable, "-c", "1/0" if "ray" in broken else SERVER, str(chosen.dashboard)]

    def start_ui(_store, *, home: Path, port: int) -> ServicePart:
        if "mlflow" in broken:
            raise InfrastructureError("the MLflow UI ended while starting")
        mark = start_process([sys.executable, "-c", SERVER, str(port)], home / "ui.log")
        wait_for(lambda: http_ok(f"http://127.0.0.1:{port}/health"))
        return service_module._mlflow_part(f"http://127.0.0.1:{port}", mark, str(home / "ui.log"))

    def serve_stable(folder: RunFolder, **where: object) -> str:
        if "gateway" in broken:
            raise InfrastructureError("application gateway not running after 180 s")
        served.append({"run": folder.run_id, **where})
        return "ppo-1"

    monkeypatch.setenv("SEATRIAL_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(service_module, "_ray_command", ray_command)
    monkeypatch.setattr(service_module, "start_ui", start_ui)
    monkeypatch.setattr(service_module, "serve_stable", serve_stable)
    yield SimpleNamespace(home=tmp_path, ports=ports, served=served, broken=broken)
    down(tmp_path)


def request(machine: SimpleNamespace, **changes: object) -> UpRequest:
    return UpRequest(**{"home": machine.home, "ports": machine.ports} | changes)  # type: ignore[arg-type]


def gateway_config(home: Path) -> GatewayConfig:
    return GatewayConfig(
        root=str(home / "serving"),
        workflow=WorkflowRef(module="cluster.workflows.support_desk"),
        live_world={"database": str(home / "live.sqlite")},
        limits=AgentLimits(
            max_turns=10, max_tool_calls=6, max_tokens_per_turn=96, max_context_tokens=1024, timeout_s=30.0
        ),
    )


def finished_run(home: Path, run_id: str = "support_desk-1") -> RunFolder:
    folder = RunFolder.of(home, run_id)
    write_json(folder.spec, load_spec("support_desk").model_dump(mode="json"))
    record_gateway(folder, gateway_config(home))
    write_json(folder.summary, {})
    return folder


def pids(service: Service) -> dict[str, int]:
    return {each.name: each.process.pid for each in service.parts if each.process}


def test_up_without_a_run_starts_ray_and_mlflow_and_says_what_is_missing(machine: SimpleNamespace):
    notes: list[str] = []
    service = up(request(machine, note=notes.append))
    assert [each.name for each in service.parts] == ["ray", "mlflow"]
    assert service.ray_address == f"127.0.0.1:{machine.ports.ray}"
    assert [each.state for each in status(service)] == ["up", "up"]
    assert any("no finished run to serve" in note for note in notes)
    assert load_service(machine.home) == service


def test_up_serves_the_newest_finished_run(machine: SimpleNamespace):
    finished_run(machine.home)
    service = up(request(machine))
    gateway = service.find("gateway")
    assert gateway is not None
    assert (gateway.serves, gateway.url) == ("ppo-1", f"http://127.0.0.1:{machine.ports.gateway}/v1")
    where = {"ray_address": service.ray_address, "port": machine.ports.gateway, "gpus_per_policy": 0.0}
    assert machine.served[-1] == {"run": "support_desk-1", **where}
    assert machine.served[0] == ("cpus", max(3, len(os.sched_getaffinity(0)))), (
        "actors share the cores of a small machine"
    )


def test_up_twice_changes_nothing(machine: SimpleNamespace):
    finished_run(machine.home)
    first = up(request(machine))
    assert up(request(machine)) == first


def test_up_restarts_only_what_died(machine: SimpleNamespace):
    first = up(request(machine))
    os.kill(pids(first)["mlflow"], signal.SIGKILL)
    wait_for(lambda: [each.state for each in status(first)] == ["up", "gone"])
    second = up(request(machine))
    assert pids(second)["ray"] == pids(first)["ray"]
    assert pids(second)["mlflow"] != pids(first)["mlflow"]


def test_a_gateway_goes_with_the_ray_it_lived_in(machine: SimpleNamespace):
    finished_run(machine.home)
    first = up(request(machine))
    os.kill(pids(first)["ray"], signal.SIGKILL)
    wait_for(lambda: status(first)[0].state == "gone")
    assert {each.part.name for each in status(first) if each.state == "gone"} == {"ray", "gateway"}
    second = up(request(machine))
    assert second.find("gateway") is not None
    assert len([call for call in machine.served if not isinstance(call, tuple)]) == 2


@pytest.mark.parametrize(
    ("part_name", "option"),
    [("ray", "--ray-port"), ("dashboard", "--dashboard-port"), ("mlflow", "--mlflow-port"), ("gateway", "--port")],
)
def test_a_port_in_use_is_refused_before_anything_starts(machine: SimpleNamespace, part_name: str, option: str):
    finished_run(machine.home)
    with socket.socket() as other:
        other.bind(("127.0.0.1", getattr(machine.ports, part_name)))
        other.listen()
        with pytest.raises(BadInputError) as caught:
            up(request(machine))
    assert caught.value.field == option
    assert not machine.served
    assert not service_file(machine.home).exists()


@pytest.mark.parametrize("broken", ["ray", "mlflow", "gateway"])
def test_a_failed_up_leaves_nothing_running(machine: SimpleNamespace, broken: str, monkeypatch: pytest.MonkeyPatch):
    finished_run(machine.home)
    machine.broken.add(broken)
    started: list[ProcessMark] = []

    def spy(*arguments) -> ProcessMark:
        started.append(start_process(*arguments))
        return started[-1]

    monkeypatch.setattr(service_module, "start_process", spy)
    with pytest.raises(InfrastructureError):
        up(request(machine))
    assert started
    assert not any(mark.is_alive for mark in started)
    assert not service_file(machine.home).exists()


def test_a_failed_up_keeps_what_ran_before(machine: SimpleNamespace):
    first = up(request(machine))
    finished_run(machine.home)
    machine.broken.add("gateway")
    with pytest.raises(InfrastructureError):
        up(request(machine))
    assert load_service(machine.home) == first
    assert [each.state for each in status(first)] == ["up", "up"]


def test_a_remote_mlflow_is_only_named(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example")
    monkeypatch.setattr(service_module, "start_ui", lambda store, **_: service_module._mlflow_part(store.uri))
    service = up(request(machine))
    mlflow = service.find("mlflow")
    assert mlflow is not None
    assert (mlflow.url, mlflow.process) == ("http://mlflow.example", None)
    assert down(machine.home) == ["ray"]


def test_down_stops_exactly_what_up_started_and_is_idempotent(machine: SimpleNamespace, started):
    stranger = started(SLEEPER)
    service = up(request(machine))
    marks = [each.process for each in service.parts if each.process]
    assert down(machine.home) == ["ray", "mlflow"]
    assert not any(mark.is_alive for mark in marks)
    assert stranger.is_alive
    assert down(machine.home) == []
    assert not service_file(machine.home).exists()


def test_down_leaves_a_reused_pid_alone(machine: SimpleNamespace, started):
    stranger = started(SLEEPER)
    stale = replace(stranger, birth="earlier boot/7")
    write_json(service_file(machine.home), encode(Service(parts=(part(stale),))))
    assert down(machine.home) == []
    assert stranger.is_alive
    assert not service_file(machine.home).exists()


def test_two_ups_at_once_are_refused(machine: SimpleNamespace):
    with lock_run(machine.home / "service"), pytest.raises(InfrastructureError, match="in use by process"):
        up(request(machine))


def test_a_broken_record_is_named(tmp_path: Path):
    service_file(tmp_path).write_text('{"parts": 3}')
    with pytest.raises(TamperedError, match="service\\.json"):
        load_service(tmp_path)


def test_status_answers_for_people_and_machines(machine: SimpleNamespace):
    assert show_status().exit_code == 1
    service = up(request(machine))
    reply = show_status()
    assert reply.exit_code == 0
    assert [row["state"] for row in reply.data["parts"]] == ["up", "up"]
    json.dumps(reply.data)
    os.kill(pids(service)["ray"], signal.SIGKILL)
    wait_for(lambda: show_status().exit_code == 1)


# --- which run is served ----------------------------------------------------------------------------------------------


def test_a_runs_gateway_survives_its_file(tmp_path: Path):
    folder = finished_run(tmp_path)
    assert recorded_gateway(folder) == gateway_config(tmp_path)


def test_prices_per_token_of_an_older_record_do_not_stop_its_gateway(tmp_path: Path):
    folder = finished_run(tmp_path)
    path = folder.decisions.parent / "gateway.json"
    record = json.loads(path.read_text())
    del record["cost_model"]
    write_json(path, record | {"cost_per_token_in": 5e-08, "cost_per_token_out": 2e-07})
    found = recorded_gateway(folder)
    assert found == gateway_config(tmp_path)
    assert found.cost_model.cost(tokens_in=1, tokens_out=1, tool_calls=0) == pytest.approx(5e-08 + 2e-07)
    write_json(path, record | {"cost_model": {"usd_per_tool_call": "free"}})
    with pytest.raises(TamperedError, match="usd_per_tool_call"):
        recorded_gateway(folder)


def test_the_newest_finished_run_is_served(tmp_path: Path):
    assert servable_run(tmp_path) is None
    older, newer = finished_run(tmp_path, "a-1"), finished_run(tmp_path, "a-2")
    unfinished = finished_run(tmp_path, "a-3")
    unfinished.summary.unlink()
    for age, folder in enumerate((unfinished, newer, older)):
        os.utime(folder.spec, (1e9 - age, 1e9 - age))
    assert servable_run(tmp_path) == newer
    assert servable_run(tmp_path, "a-1") == older


def ended_run(home: Path, run_id: str, stable: str, workflow: str = "support_desk") -> RunFolder:
    """A finished run, younger than those before it."""
    folder = finished_run(home, run_id)
    write_json(folder.summary, {"workflow": workflow, "stable_policy": stable})
    os.utime(folder.spec, (1e9 + len(list_runs(home)), 1e9 + len(list_runs(home))))
    return folder


def register(home: Path, *names: str, stable: str = "") -> None:
    """Write policies into the real registry of a home, and which of them is stable."""
    registry = Registry("support_desk", "run-1", store=store_of(home))
    for name in names:
        (home / name).mkdir()
        policy = PolicyVersion(
            name=name, kind="ppo", path=str(home / name), sha256=name.encode().hex().ljust(64, "0"), parent_sha256=""
        )
        registry.versions.register(policy, Lineage(bundle_id="b", snapshot_sha256="s", stage="ppo"))
    if stable:
        registry.versions.move("stable", stable)


def test_the_run_whose_policy_is_stable_is_served_not_one_that_was_rolled_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    promoted, rolled_back = ended_run(tmp_path, "a-1", "ppo-1"), ended_run(tmp_path, "a-2", "sft-2")
    other = ended_run(tmp_path, "b-1", "ppo-1", workflow="night_desk")
    assert servable_run(tmp_path) == other, "another workflow's registry is asked for its newest run"
    other.summary.unlink()
    assert servable_run(tmp_path) == rolled_back, "negative control: without a registry it is the newest"
    assert not (tmp_path / "mlflow").exists(), "looking creates no registry"
    register(tmp_path, "ppo-1", "sft-2")
    assert servable_run(tmp_path) == rolled_back, "nothing is stable"
    register(tmp_path, stable="ppo-1")
    assert servable_run(tmp_path) == promoted
    assert servable_run(tmp_path, "a-2") == rolled_back, "a run that is named is served"
    promoted.summary.write_text("{")
    assert servable_run(tmp_path) == rolled_back, "the stable policy is of no run that is here"


def test_runs_that_agree_ask_no_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(service_gateway, "stable_by_registry", lambda *_: pytest.fail("loads MLflow for nothing"))
    ended_run(tmp_path, "a-1", "ppo-1")
    newest = ended_run(tmp_path, "a-2", "ppo-1")
    assert servable_run(tmp_path) == newest


@pytest.mark.parametrize("uri", ["http://127.0.0.1:1", "postgresql://127.0.0.1:1/mlflow"])
def test_a_registry_that_does_not_answer_leaves_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(RegisteredVersions, "alias_version", broken_registry)
    ended_run(tmp_path, "a-1", "ppo-1")
    newest = ended_run(tmp_path, "a-2", "sft-2")
    started = time.monotonic()
    assert servable_run(tmp_path) == newest
    assert time.monotonic() - started < 30


def broken_registry(*_: object) -> str:
    raise InfrastructureError("MLflow, connect: refused")


def test_a_run_that_never_served_is_refused(tmp_path: Path):
    with pytest.raises(BadInputError, match="served no policy yet"):
        servable_run(tmp_path, "a-9")


def test_a_broken_gateway_record_is_named(tmp_path: Path):
    folder = finished_run(tmp_path)
    (folder.decisions.parent / "gateway.json").write_text("{}")
    with pytest.raises(TamperedError, match=r"gateway\.json"):
        recorded_gateway(folder)


def test_rays_command_is_local_and_takes_no_default_port():
    command = " ".join(service_module._ray_command(ServicePorts(ray=7001, dashboard=7002), 5))
    for word in ("--block", "--port=7001", "--dashboard-host=127.0.0.1", "--dashboard-port=7002", "--num-cpus=5"):
        assert word in command


@pytest.mark.ray
@pytest.mark.slow
def test_a_real_ray_comes_up_and_goes_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SEATRIAL_HOME", str(tmp_path))
    ports = ServicePorts(ray=free_port(), dashboard=free_port())
    service = up(UpRequest(home=tmp_path, ports=ports, with_mlflow=False))
    try:
        ray = service.find("ray")
        assert ray is not None
        assert ray.process is not None
        family = [ray.process, *descendants(ray.process)]
        assert len(family) > 4
        assert [each.state for each in status(service)] == ["up"]
    finally:
        assert down(tmp_path) == ["ray"]
    assert not any(mark.is_alive for mark in family)


def test_what_up_starts_finds_this_environments_python_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/usr/bin")
    assert service_module.path_with_environment() == f"{Path(sys.executable).parent}:/usr/bin"
