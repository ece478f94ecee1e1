"""`seatrial up`, `status`, `down`: Ray, MLflow and the gateway as a service on this machine.

What was started is written to `SEATRIAL_HOME/service.json` before the next part starts, so that `down` finds it after
any crash. Only processes recorded there are ever stopped, each by pid and birth.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from cluster.plan import local_cpus, place
from cluster.records import lock_run
from cluster.registry import store_of
from cluster.service.gateway import GatewayRequest, servable_run, serve_stable
from cluster.service.processes import ProcessMark, http_ok, mark_of, start_process, stop_processes, wait_until
from cluster.spec import parse_spec
from rl_actors.contracts import BadInputError, TamperedError
from rl_actors.durable import decode, encode, write_json
from rl_actors.ports import free_port, listen_error

PartName = Literal["ray", "mlflow", "gateway"]


PartState = Literal["up", "not answering", "gone", "stale"]


RAY_START_S: Final = 90.0


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
    """One part as it was started. The gateway lives inside Ray: its process is Ray's. An outside MLflow has none."""

    name: PartName
    process: ProcessMark | None
    url: str
    probe_url: str
    log: str
    started_at: float
    serves: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What `service.json` holds."""

    parts: tuple[ServicePart, ...] = ()
    ray_address: str = ""

    def find(self, name: PartName) -> ServicePart | None:
        """Return a part, if it was started."""
        return next((part for part in self.parts if part.name == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartStatus:
    """What a part is found to be now."""

    part: ServicePart
    state: PartState

    @property
    def remedy(self) -> str:
        """What to do about it; empty when it is up."""
        return STATE_REMEDIES[self.state]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpRequest:
    """What to bring up. `run_id` empty serves the newest finished run, if there is one."""

    home: Path
    ports: ServicePorts = ServicePorts()
    run_id: str = ""
    with_mlflow: bool = True
    note: Callable[[str], object] = lambda _line: None


def up(request: UpRequest) -> Service:
    """Start what is not running yet and return the whole; a second call changes nothing.

    Raises:
        BadInputError: a port is in use or the run cannot be served; nothing was started.
        InfrastructureError: a part did not start in time; what this call started is stopped again.
    """
    with _locked(request.home):
        before = _without_dead(load_service(request.home))
        folder = servable_run(request.home, request.run_id)
        _require_ports(request, before, with_gateway=folder is not None)
        try:
            _start_ray(request)
            _start_mlflow(request)
            _start_gateway(request)
        except BaseException:
            _stop_all_but(request.home, before)
            raise
        return load_service(request.home)


def down(home: Path) -> list[PartName]:
    """Stop exactly what `up` started; returns the parts that were running. A second call finds nothing."""
    if not service_file(home).exists():
        return []
    with _locked(home):
        service = load_service(home)
        running: list[PartName] = [s.part.name for s in status(service) if s.part.process and s.state in _LIVING]
        _stop(service.parts)
        service_file(home).unlink(missing_ok=True)
        return running


_LIVING: Final = ("up", "not answering")


def status(service: Service, answers: Callable[[str], bool] | None = None) -> list[PartStatus]:
    """Look at every part now; each probe is bounded by two seconds."""
    return [PartStatus(part=part, state=_state(part, answers or http_ok)) for part in service.parts]


def _state(part: ServicePart, answers: Callable[[str], bool]) -> PartState:
    if part.process is not None and not part.process.is_alive:
        return "stale" if mark_of(part.process.pid).is_alive else "gone"
    return "up" if answers(part.probe_url) else "not answering"


# --- the record -------------------------------------------------------------------------------------------------------
def service_file(home: Path) -> Path:
    """Return where the service is recorded."""
    return home / "service.json"


def load_service(home: Path) -> Service:
    """Return what was started; an empty service when nothing was. Raises TamperedError for an unreadable record."""
    path = service_file(home)
    if not path.exists():
        return Service()
    try:
        return decode(Service, json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise TamperedError(f"{path} is not a service record ({error}); end its processes and delete it") from error


def _record(home: Path, part: ServicePart, ray_address: str = "") -> None:
    """Put a part in, in place of the one of the same name."""
    service = load_service(home)
    others = tuple(other for other in service.parts if other.name != part.name)
    address = ray_address or service.ray_address
    write_json(service_file(home), encode(Service(parts=(*others, part), ray_address=address)))


def _without_dead(service: Service) -> Service:
    """Forget parts whose process ended; the gateway goes with the Ray it lived in."""
    alive = tuple(part for part in service.parts if part.process is None or part.process.is_alive)
    return replace(service, parts=alive)


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One `up` or `down` at a time."""
    with lock_run(home / "service"):
        yield


# --- starting ---------------------------------------------------------------------------------------------------------
def _require_ports(request: UpRequest, before: Service, *, with_gateway: bool) -> None:
    """Refuse before anything starts. Raises BadInputError."""
    ports, outside = request.ports, store_of(request.home).is_server
    needed: list[tuple[PartName, str, int]] = [
        ("ray", "--ray-port", ports.ray),
        ("ray", "--dashboard-port", ports.dashboard),
    ]
    if request.with_mlflow and not outside:
        needed.append(("mlflow", "--mlflow-port", ports.mlflow))
    if with_gateway:
        needed.append(("gateway", "--port", ports.gateway))
    for name, option, port in needed:
        if before.find(name) is None and listen_error(port):
            raise BadInputError(option, port, f"in use; stop what listens there, or choose another with {option}")


def _start_ray(request: UpRequest) -> None:
    service = _without_dead(load_service(request.home))
    if service.find("ray") is not None:
        return
    request.note("starting Ray")
    log, ports = request.home / "service" / "ray.log", request.ports
    environ = {"RAY_DISABLE_IMPORT_WARNING": "1", "PATH": path_with_environment()}
    process = start_process(_ray_command(ports, _logical_cpus(request)), log, environ)
    url = f"http://127.0.0.1:{ports.dashboard}"
    probe = f"{url}/api/gcs_healthz"  # the one that Ray serves without a token
    part = ServicePart(
        name="ray", process=process, url=url, probe_url=probe, log=str(log), started_at=time.time()
    )  # fmt: skip
    _record(request.home, part, ray_address=f"127.0.0.1:{ports.ray}")
    wait_until("Ray", lambda: http_ok(probe), process, log, timeout_s=RAY_START_S)


def path_with_environment() -> str:
    """Return PATH with this environment first: a job's `python` is looked up there, activated or not."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _ray_command(ports: ServicePorts, num_cpus: int) -> Sequence[str]:
    """`--block` keeps one process above all of Ray's: its end is their end.

    All other ports are free ones: their defaults would clash with another Ray of this machine, or with ours.
    """
    ray = Path(sys.executable).parent / "ray"
    options = ["--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1", f"--port={ports.ray}"]
    options += ["--dashboard-host=127.0.0.1", f"--dashboard-port={ports.dashboard}", f"--num-cpus={num_cpus}"]
    options += [f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"]
    return [str(ray), "start", *options, "--min-worker-port=0", "--max-worker-port=0"]


def _logical_cpus(request: UpRequest) -> int:
    cores = len(os.sched_getaffinity(0))
    folder = servable_run(request.home, request.run_id)
    if folder is None:
        return max(cores, 4)
    return local_cpus(place(parse_spec(folder.spec.read_text(encoding="utf-8"), str(folder.spec))), cores)


def _start_mlflow(request: UpRequest) -> None:
    store = store_of(request.home)
    if not request.with_mlflow or _without_dead(load_service(request.home)).find("mlflow") is not None:
        return
    # Imported here: only this needs it.
    from cluster.service.ui import start_ui

    request.note("starting MLflow")
    server = start_ui(store, home=request.home, port=request.ports.mlflow)
    part = ServicePart(
        name="mlflow",
        process=server.process,
        url=server.url,
        probe_url=f"{server.url}/health",
        log=str(server.log or ""),
        started_at=time.time(),
    )
    _record(request.home, part)


def _start_gateway(request: UpRequest) -> None:
    service, folder = _without_dead(load_service(request.home)), servable_run(request.home, request.run_id)
    ray = service.find("ray")
    if folder is None:
        request.note("no finished run to serve yet: seatrial run support_desk, then seatrial up")
        return
    if ray is None or service.find("gateway") is not None:
        return
    request.note(f"serving the stable policy of {folder.run_id}")
    spec = parse_spec(folder.spec.read_text(encoding="utf-8"), str(folder.spec))
    port = request.ports.gateway
    gpus = spec.cluster.gpus_per_rollout_worker
    version = serve_stable(
        GatewayRequest(folder=folder, ray_address=service.ray_address, port=port, gpus_per_policy=gpus)
    )
    url = f"http://127.0.0.1:{port}"
    part = ServicePart(
        name="gateway",
        process=ray.process,
        url=f"{url}/v1",
        probe_url=f"{url}/healthz",
        log=str(request.home / "service" / "ray.log"),
        started_at=time.time(),
        serves=version,
    )
    _record(request.home, part)


# --- stopping ---------------------------------------------------------------------------------------------------------
def _stop(parts: Sequence[ServicePart]) -> None:
    stop_processes({part.process.pid: part.process for part in parts if part.process is not None}.values())


def _stop_all_but(home: Path, before: Service) -> None:
    """Undo a failed `up`: what ran before it goes on, and the record says so."""
    kept = {part.process.pid for part in before.parts if part.process is not None}
    _stop([p for p in load_service(home).parts if p.process is not None and p.process.pid not in kept])
    if before.parts:
        write_json(service_file(home), encode(before))
    else:
        service_file(home).unlink(missing_ok=True)
