"""The UI as a subprocess: refusals without one, and one real start that also serves as a tracking server."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import httpx
import psutil
import pytest

from cluster.cli import service as cli_service
from cluster.registry.connection import Store, store_of
from cluster.registry.entries import Lineage, StageLog
from cluster.registry.registry import Registry
from cluster.service import service as ui
from cluster.service.processes import http_ok
from rl_actors.contracts.errors import BadInputError, InfrastructureError
from rl_actors.contracts.versions import PolicyVersion
from rl_actors.ports import free_port


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_in_use_is_refused_before_anything_starts(tmp_path: Path, busy_port: int):
    with pytest.raises(BadInputError, match=r"ui\.port = \d+: in use.*--port"):
        ui.start_ui(store_of(tmp_path, {}), home=tmp_path, port=busy_port)
    assert not (tmp_path / "mlflow").exists()


@pytest.mark.parametrize("port", [0, -1, 65_536])
def test_a_number_that_is_no_port_is_refused(tmp_path: Path, port: int):
    with pytest.raises(BadInputError, match=r"1\.\.65535"):
        ui.start_ui(store_of(tmp_path, {}), home=tmp_path, port=port)


def test_a_tracking_server_is_its_own_ui(tmp_path: Path):
    server = ui.start_ui(Store(uri="http://mlflow.example:5000", artifacts=None), home=tmp_path, port=1)
    assert (server.url, server.is_running) == ("http://mlflow.example:5000", True)
    server.stop()


def test_a_tracking_servers_password_is_not_shown(tmp_path: Path):
    server = ui.start_ui(Store(uri="http://ann:s3cret@mlflow:5000", artifacts=None), home=tmp_path)
    assert server.url == "http://mlflow:5000"


def test_the_store_is_told_by_environment_not_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Everybody on the machine reads command lines."""
    program = 'import os, sys; print(sys.argv[1:], "by environment:", os.environ["MLFLOW_BACKEND_STORE_URI"])'
    substitute(monkeypatch, tmp_path, program)
    store = Store(uri="postgresql://ann:s3cret@db/mlflow", artifacts=tmp_path)
    log = tmp_path / "ui.log"
    psutil.Process(ui._spawn_ui(store, log, "127.0.0.1", 5000).pid).wait(30)
    arguments, _, told = log.read_text().partition(" by environment: ")
    assert told.strip() == store.uri
    assert "s3cret" not in arguments
    assert "'--port', '5000'" in arguments
    with pytest.raises(InfrastructureError, match="by environment: postgresql://db/mlflow") as caught:
        ui.start_ui(store, home=tmp_path, port=free_port(), timeout_s=30)
    assert "s3cret" not in str(caught.value), "what the log says of it is not shown either"


def test_mlflow_takes_the_store_from_the_environment():
    """The variable is the one that the installed MLflow reads."""
    from mlflow.cli import server

    (option,) = [each for each in server.params if each.name == "backend_store_uri"]
    assert option.envvar == "MLFLOW_BACKEND_STORE_URI"


def test_the_environments_proxy_is_not_asked(monkeypatch: pytest.MonkeyPatch):
    """Negative control first: httpx by itself goes there, and finds nobody."""
    with HTTPServer(("127.0.0.1", 0), Healthy) as listener:
        Thread(target=listener.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{listener.server_port}"
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        monkeypatch.delenv("no_proxy", raising=False)
        with pytest.raises(httpx.ConnectError, match="refused"):
            httpx.get(f"{url}/health", timeout=2)
        assert http_ok(f"{url}/health")
        listener.shutdown()
    assert not http_ok(f"{url}/health")


class Healthy(BaseHTTPRequestHandler):
    """Says yes."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Dying:
    """A server that runs until a SIGTERM arrives, which it sends itself."""

    process, url, is_stopped = object(), "http://here", False

    @property
    def is_running(self) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    def stop(self) -> None:
        self.is_stopped = True


def test_a_sigterm_ends_the_server_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server, before = Dying(), {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setenv("SEATRIAL_HOME", str(tmp_path))
    monkeypatch.setattr(cli_service, "start_ui", lambda *_arguments, **_options: server)
    try:
        assert cli_service.keep_ui(5000).data == {"url": "http://here"}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert server.is_stopped


def substitute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str) -> None:
    """Let another Python program stand in for MLflow's."""
    script = tmp_path / "stand_in.sh"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{program}' \"$@\"\n")
    script.chmod(0o755)
    monkeypatch.setattr(ui.sys, "executable", str(script))


def test_a_ui_that_ends_at_once_shows_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    substitute(monkeypatch, tmp_path, 'print("no such store")')
    with pytest.raises(InfrastructureError, match=r"ended while starting: no such store.*ui\.log"):
        ui.start_ui(store_of(tmp_path, {}), home=tmp_path, port=free_port(), timeout_s=30)


def test_a_ui_that_never_answers_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    substitute(monkeypatch, tmp_path, "import time; time.sleep(600)")
    started = []
    spawn = ui._spawn_ui
    monkeypatch.setattr(ui, "_spawn_ui", lambda *args: started.append(spawn(*args)) or started[0])
    with pytest.raises(InfrastructureError, match=r"did not answer within 0\.5 s"):
        ui.start_ui(store_of(tmp_path, {}), home=tmp_path, port=free_port(), timeout_s=0.5)
    assert not started[0].is_alive


def test_a_ui_that_ignores_the_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = 'import signal, time; signal.signal(15, signal.SIG_IGN); print("deaf", flush=True); time.sleep(600)'
    substitute(monkeypatch, tmp_path, program)
    monkeypatch.setattr(ui, "_UI_STOP_S", 0.3)
    log = tmp_path / "ui.log"
    process = ui._spawn_ui(store_of(tmp_path, {}), log, "127.0.0.1", free_port())
    while "deaf" not in log.read_text() and process.is_alive:
        pass
    server = ui._mlflow_part("http://127.0.0.1:1", process, str(log))
    server.stop()
    server.stop()
    assert not server.is_running


@pytest.mark.slow
def test_the_ui_starts_serves_and_stops(tmp_path: Path):
    """Also the other address of the same code: a registry that talks to a server, which cannot see our directories."""
    server = ui.start_ui(store_of(tmp_path, {}), home=tmp_path, port=free_port(), timeout_s=120)
    try:
        assert "MLflow" in httpx.get(server.url, timeout=10, trust_env=False).text
        check_registry_over_http(server.url, tmp_path)
    finally:
        server.stop()
    assert not server.is_running
    with pytest.raises(httpx.ConnectError, match="refused"):
        httpx.get(server.url, timeout=2, trust_env=False)


def check_registry_over_http(url: str, tmp_path: Path) -> None:
    weights = tmp_path / "ppo-1"
    weights.mkdir()
    (weights / "config.json").write_text("{}")
    registry = Registry("desk", "run-1", store=Store(uri=url, artifacts=None))
    registry.start_run(spec={"seed": 0}, started_at=1.0)
    registry.log_stage(StageLog(stage="ppo", started_at=1.0, finished_at=2.0, metrics={"success": 0.9}))
    policy = PolicyVersion(name="ppo-1", kind="ppo", path=str(weights), sha256="a" * 64, parent_sha256="")
    version = registry.versions.register(policy, Lineage(bundle_id="b" * 64, snapshot_sha256="c" * 64))
    registry.versions.move("stable", "ppo-1")
    assert registry.versions.alias_version("stable") == "ppo-1"
    source = registry.connect().get_model_version("desk-policy", version).source
    assert source.startswith("models:/m-"), "uploaded once, for the server cannot see our disk"
