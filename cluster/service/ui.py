"""`seatrial ui`: the MLflow UI over the store in force, as a process of its own with bounded waits."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cluster.registry import Store, quieten
from cluster.service.processes import ProcessMark, http_ok, start_process, stop_processes, wait_until
from rl_actors.contracts import BadInputError
from rl_actors.ports import listen_error

_STOP_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class UiServer:
    """A running UI. `process` is None where a tracking server already shows it."""

    url: str
    process: ProcessMark | None
    log: Path | None

    @property
    def is_running(self) -> bool:
        """Whether our process lives; another machine's server is taken to."""
        return self.process is None or self.process.is_alive

    def stop(self) -> None:
        """End the server with its workers, at most 10 s; a second call does nothing."""
        stop_processes([self.process] if self.process else [], timeout_s=_STOP_S)


def start_ui(
    store: Store,
    *,
    home: Path,
    port: int = 5000,
    host: str = "127.0.0.1",
    timeout_s: float = 90.0,
) -> UiServer:
    """Start the UI and wait until it answers.

    Raises:
        BadInputError: the port is in use or no port; nothing was started.
        InfrastructureError: it ended or did not answer within `timeout_s`; it was stopped. Its log is `home`/mlflow.
    """
    if store.is_server:
        return UiServer(url=store.public_uri, process=None, log=None)
    _check_port(port, host)
    log, url = home / "mlflow" / "ui.log", f"http://{host}:{port}"
    process = _spawn(store, log, host, port)
    server = UiServer(url=url, process=process, log=log)
    try:
        wait_until("the MLflow UI", lambda: http_ok(f"{url}/health"), process, log, timeout_s=timeout_s)
    except BaseException:
        server.stop()
        raise
    return server


def _check_port(port: int, host: str) -> None:
    if not 1 <= port <= 65_535:
        raise BadInputError("ui.port", port, "give a port in 1..65535")
    if listen_error(port, host):
        raise BadInputError("ui.port", port, f"in use on {host}; stop what listens there or choose another with --port")


def _spawn(store: Store, log: Path, host: str, port: int) -> ProcessMark:
    command = [sys.executable, "-m", "mlflow", "ui", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--default-artifact-root", str(store.artifacts)]
    # By environment: a command line is read by everybody on the machine, and the URI may hold a password.
    environ = {**os.environ, "MLFLOW_BACKEND_STORE_URI": store.uri}
    quieten(environ)
    return start_process(command, log, environ)
