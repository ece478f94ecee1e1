"""`seatrial up`, `status`, `down`, `ui`: Ray, MLflow and the gateway as a service on this machine.

Each part is written to `SEATRIAL_HOME/service.json` before the next one starts, so that `down` finds it after any
crash. Only processes recorded there are ever stopped, each by pid and birth.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from cluster.plan import local_cpus, place
from cluster.records import RunFolder, lock_run
from cluster.registry import Store, quieten, store_of
from cluster.service.gateway import servable_run, serve_stable
from cluster.service.processes import ProcessMark, http_ok, mark_of, start_process, stop_processes, wait_until
from cluster.spec import WorkflowSpec, parse_spec
from rl_actors.contracts import BadInputError, TamperedError
from rl_actors.durable import decode, encode, write_json
from rl_actors.ports import free_port, listen_error

PartName = Literal["ray", "mlflow", "gateway"]
PartState = Literal["up", "not answering", "gone", "stale"]

RAY_START_S: Final = 90.0
_UI_STOP_S: Final = 10.0
_LIVING: Final = ("up", "not answering")

STATE_REMEDIES: Final[dict[PartState, str]] = {
    "up": "",
    "not answering": "still starting, or stuck; see its log",
    "gone": "its process ended; see its log, then: seatrial up",
    "stale": "its pid now belongs to another process; seatrial down, then seatrial up",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServicePorts:
    """Where the parts listen, all on 127.0.0.1. `ray` is for workers and drivers, `dashboard` takes jobs."""

    ray: int = 6379
    dashboard: int = 8265
    mlflow: int = 5000
    gateway: int = 8000


@dataclass(frozen=True, slots=True, kw_only=True)
class ServicePart:
    """One part as it was started. The gateway's process is that of the Ray it lives in; an outside MLflow has none."""

    name: PartName
    process: ProcessMark | None
    url: str
    probe_url: str
    log: str
    started_at: float
    serves: str = ""

    @property
    def is_running(self) -> bool:
        """Whether our process lives; another machine's server is taken to."""
        return self.process is None or self.process.is_alive

    def stop(self) -> None:
        """End the process with everything below it, at most 10 s; a second call does nothing."""
        stop_processes([self.process] if self.process else [], timeout_s=_UI_STOP_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """The content of `service.json`."""

    parts: tuple[ServicePart, ...] = ()
    ray_address: str = ""

    def find(self, name: PartName) -> ServicePart | None:
        """Return a part, or None when it was not started."""
        return next((part for part in self.parts if part.name == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartStatus:
    """A part and its state now."""

    part: ServicePart
    state: PartState

    @property
    def remedy(self) -> str:
        """Advice for a part that is not up; empty when it is."""
        return STATE_REMEDIES[self.state]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpRequest:
    """A service to bring up. `run_id` empty serves the newest finished run, if there is one."""

    home: Path
    ports: ServicePorts = ServicePorts()
    run_id: str = ""
    with_mlflow: bool = True
    note: Callable[[str], object] = lambda _line: None


def up(request: UpRequest) -> Service:
    """Start every part that is not running yet and return the whole; a second call changes nothing.

    Raises:
        BadInputError: a port is in use or the run cannot be served; nothing was started.
        InfrastructureError: a part did not start in time; the parts that this call started are stopped again.
    """
    with lock_run(request.home / "service"):
        before = _without_dead(load_service(request.home))
        folder = servable_run(request.home, request.run_id)
        _require_ports(request, before, with_gateway=folder is not None)
        try:
            if before.find("ray") is None:
                _start_ray(request, folder)
            if request.with_mlflow and before.find("mlflow") is None:
                request.note("starting MLflow")
                _record(request.home, start_ui(store_of(request.home), home=request.home, port=request.ports.mlflow))
            if folder is None:
                request.note("no finished run to serve yet: seatrial run support_desk, then seatrial up")
            elif before.find("gateway") is None:
                _start_gateway(request, folder)
        except BaseException:
            _stop_all_but(request.home, before)
            raise
        return load_service(request.home)


def down(home: Path) -> list[PartName]:
    """Stop the parts that `up` started and nothing else; returns those that were running."""
    if not service_file(home).exists():
        return []
    with lock_run(home / "service"):
        service = load_service(home)
        running: list[PartName] = [s.part.name for s in status(service) if s.part.process and s.state in _LIVING]
        _stop(service.parts)
        service_file(home).unlink(missing_ok=True)
        return running


def status(service: Service, answers: Callable[[str], bool] | None = None) -> list[PartStatus]:
    """Look at every part now; each probe is bounded by two seconds."""
    return [PartStatus(part=part, state=_state(part, answers or http_ok)) for part in service.parts]


def _state(part: ServicePart, answers: Callable[[str], bool]) -> PartState:
    if part.process is not None and not part.is_running:
        return "stale" if mark_of(part.process.pid).is_alive else "gone"
    return "up" if answers(part.probe_url) else "not answering"


# --- the record -------------------------------------------------------------------------------------------------------


def service_file(home: Path) -> Path:
    """Return the path of the service's record."""
    return home / "service.json"


def load_service(home: Path) -> Service:
    """Return the recorded service, an empty one without a record. Raises TamperedError for an unreadable record."""
    path = service_file(home)
    if not path.exists():
        return Service()
    try:
        return decode(Service, json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise TamperedError(f"{path} is not a service record ({error}); end its processes and delete it") from error


def _record(home: Path, part: ServicePart, ray_address: str = "") -> None:
    """Add a part, in place of the one of the same name."""
    service = load_service(home)
    others = tuple(other for other in service.parts if other.name != part.name)
    address = ray_address or service.ray_address
    write_json(service_file(home), encode(Service(parts=(*others, part), ray_address=address)))


def _without_dead(service: Service) -> Service:
    return replace(service, parts=tuple(part for part in service.parts if part.is_running))


# --- starting ---------------------------------------------------------------------------------------------------------


def _require_ports(request: UpRequest, before: Service, *, with_gateway: bool) -> None:
    """Refuse a port in use, before anything starts. Raises BadInputError."""
    ports, with_mlflow = request.ports, request.with_mlflow and not store_of(request.home).is_server
    needed: tuple[tuple[PartName, str, int, bool], ...] = (
        ("ray", "--ray-port", ports.ray, True),
        ("ray", "--dashboard-port", ports.dashboard, True),
        ("mlflow", "--mlflow-port", ports.mlflow, with_mlflow),
        ("gateway", "--port", ports.gateway, with_gateway),
    )
    for name, option, port, is_needed in needed:
        if is_needed and before.find(name) is None and listen_error(port):
            raise BadInputError(option, port, f"in use; stop what listens there, or choose another with {option}")


def _start_ray(request: UpRequest, folder: RunFolder | None) -> None:
    request.note("starting Ray")
    log, ports, cores = request.home / "service" / "ray.log", request.ports, len(os.sched_getaffinity(0))
    num_cpus = local_cpus(place(_recorded_spec(folder)), cores) if folder else max(cores, 4)
    environ = {"RAY_DISABLE_IMPORT_WARNING": "1", "PATH": path_with_environment()}
    process = start_process(_ray_command(ports, num_cpus), log, environ)
    url = f"http://127.0.0.1:{ports.dashboard}"
    probe = f"{url}/api/gcs_healthz"  # the one that Ray serves without a token
    part = ServicePart(name="ray", process=process, url=url, probe_url=probe, log=str(log), started_at=time.time())
    _record(request.home, part, ray_address=f"127.0.0.1:{ports.ray}")
    wait_until("Ray", lambda: http_ok(probe), process, log, timeout_s=RAY_START_S)


def _recorded_spec(folder: RunFolder) -> WorkflowSpec:
    return parse_spec(folder.spec.read_text(encoding="utf-8"), str(folder.spec))


def path_with_environment() -> str:
    """Return PATH with this environment first."""
    # A job's `python` is looked up there, whether the environment was activated or not.
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _ray_command(ports: ServicePorts, num_cpus: int) -> Sequence[str]:
    ray = Path(sys.executable).parent / "ray"
    # `--block` keeps one process above all of Ray's: its end is their end.
    options = ["--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1", f"--port={ports.ray}"]
    options += ["--dashboard-host=127.0.0.1", f"--dashboard-port={ports.dashboard}", f"--num-cpus={num_cpus}"]
    # Free ones: the defaults would clash with another Ray of this machine, or with ours.
    options += [f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"]
    return [str(ray), "start", *options, "--min-worker-port=0", "--max-worker-port=0"]


def start_ui(
    store: Store, *, home: Path, port: int = 5000, host: str = "127.0.0.1", timeout_s: float = 90.0
) -> ServicePart:
    """Start MLflow's UI over a store and wait until it answers; a tracking server is its own UI and is only named.

    Raises:
        BadInputError: the port is in use or no port; nothing was started.
        InfrastructureError: it ended or did not answer within `timeout_s`; it was stopped. Its log is `home`/mlflow.
    """
    if store.is_server:
        return _mlflow_part(store.public_uri)
    if not 1 <= port <= 65_535:
        raise BadInputError("ui.port", port, "give a port in 1..65535")
    if listen_error(port, host):
        raise BadInputError("ui.port", port, f"in use on {host}; stop what listens there or choose another with --port")
    log = home / "mlflow" / "ui.log"
    process = _spawn_ui(store, log, host, port)
    part = _mlflow_part(f"http://{host}:{port}", process, str(log))
    try:
        wait_until("the MLflow UI", lambda: http_ok(part.probe_url), process, log, timeout_s=timeout_s)
    except BaseException:
        part.stop()
        raise
    return part


def _mlflow_part(url: str, process: ProcessMark | None = None, log: str = "") -> ServicePart:
    return ServicePart(
        name="mlflow", process=process, url=url, probe_url=f"{url}/health", log=log, started_at=time.time()
    )


def _spawn_ui(store: Store, log: Path, host: str, port: int) -> ProcessMark:
    command = [sys.executable, "-m", "mlflow", "ui", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--default-artifact-root", str(store.artifacts)]
    # By environment: a command line is read by everybody on the machine, and the URI may hold a password.
    environ = {**os.environ, "MLFLOW_BACKEND_STORE_URI": store.uri}
    quieten(environ)
    return start_process(command, log, environ)


def _start_gateway(request: UpRequest, folder: RunFolder) -> None:
    service = _without_dead(load_service(request.home))
    ray = service.find("ray")
    if ray is None:
        return
    request.note(f"serving the stable policy of {folder.run_id}")
    port, gpus = request.ports.gateway, _recorded_spec(folder).cluster.gpus_per_rollout_worker
    version = serve_stable(folder, ray_address=service.ray_address, port=port, gpus_per_policy=gpus)
    url = f"http://127.0.0.1:{port}"
    part = ServicePart(
        name="gateway",
        process=ray.process,
        url=f"{url}/v1",
        probe_url=f"{url}/healthz",
        log=ray.log,
        started_at=time.time(),
        serves=version,
    )
    _record(request.home, part)


# --- stopping ---------------------------------------------------------------------------------------------------------


def _stop(parts: Sequence[ServicePart]) -> None:
    stop_processes({part.process.pid: part.process for part in parts if part.process is not None}.values())


def _stop_all_but(home: Path, before: Service) -> None:
    """Undo a failed `up`: the parts that ran before it go on, and the record says so."""
    kept = {part.process.pid for part in before.parts if part.process is not None}
    _stop([p for p in load_service(home).parts if p.process is not None and p.process.pid not in kept])
    if before.parts:
        write_json(service_file(home), encode(before))
    else:
        service_file(home).unlink(missing_ok=True)
