"""`seatrial ui`: the MLflow UI over the store in force, as a subprocess with bounded waits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cluster.preflight import is_port_free
from cluster.registry_store import Store, quieten, without_credentials
from rl_actors.errors import BadInputError, InfrastructureError

_POLL_S: Final = 0.25
_STOP_S: Final = 10.0
_LOG_TAIL: Final = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class UiServer:
    """A running UI. `process` is None where a tracking server already shows it."""

    url: str
    process: subprocess.Popen[bytes] | None
    log: Path | None

    @property
    def is_running(self) -> bool:
        """Whether our process lives; another machine's server is taken to."""
        return self.process is None or self.process.poll() is None

    def stop(self) -> None:
        """End the server with its workers, at most 10 s; a second call does nothing."""
        if self.process is None or self.process.poll() is not None:
            return
        _signal_group(self.process, signal.SIGTERM)
        try:
            self.process.wait(timeout=_STOP_S)
        except subprocess.TimeoutExpired:
            _signal_group(self.process, signal.SIGKILL)
            self.process.wait(timeout=_STOP_S)


def start_ui(
    store: Store,
    *,
    home: Path,
    port: int = 5000,
    host: str = "127.0.0.1",
    timeout_s: float = 90.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> UiServer:
    """Start the UI and wait until it answers.

    Raises:
        BadInputError: the port is in use or no port; nothing was started.
        InfrastructureError: it ended or did not answer within `timeout_s`; it was stopped. Its log is `home`/mlflow.
    """
    if store.is_server:
        return UiServer(url=store.public_uri, process=None, log=None)
    _check_port(port, host)
    log = home / "mlflow" / "ui.log"
    server = UiServer(url=f"http://{host}:{port}", process=_spawn(store, log, host, port), log=log)
    try:
        _wait(server, clock() + timeout_s, clock, sleep)
    except BaseException:
        server.stop()
        raise
    return server


def _check_port(port: int, host: str) -> None:
    if not 1 <= port <= 65_535:
        raise BadInputError("ui.port", port, "give a port in 1..65535")
    if not is_port_free(port, host):
        raise BadInputError("ui.port", port, f"in use on {host}; stop what listens there or choose another with --port")


def _spawn(store: Store, log: Path, host: str, port: int) -> subprocess.Popen[bytes]:
    """Start in a process group of its own, so that the server's workers end with it."""
    command = [sys.executable, "-m", "mlflow", "ui", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--default-artifact-root", str(store.artifacts)]
    # By environment: a command line is read by everybody on the machine, and the URI may hold a password.
    environ = {**os.environ, "MLFLOW_BACKEND_STORE_URI": store.uri}
    quieten(environ)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environ, process_group=0
        )


def _wait(server: UiServer, deadline: float, clock: Callable[[], float], sleep: Callable[[float], None]) -> None:
    while not answers(server.url):
        if not server.is_running:
            raise InfrastructureError(f"the MLflow UI ended while starting; {_said(server.log)}")
        if clock() > deadline:
            raise InfrastructureError(f"the MLflow UI at {server.url} did not answer in time; {_said(server.log)}")
        sleep(_POLL_S)


def answers(url: str) -> bool:
    """Whether an MLflow server answers at a URL within two seconds."""
    # Proxies of the environment are for the outside world; this is an address of this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=2.0) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _said(log: Path | None) -> str:
    if log is None or not log.exists():
        return "it wrote no log"
    text = log.read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL:].strip()
    return f"see {log}: {without_credentials(text)}"


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return
