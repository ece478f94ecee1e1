"""`up`, `serve`, `status`, `ui`: the service in tables and hints."""

from __future__ import annotations

import signal
import time

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from cluster.cli.answer import Reply
from cluster.cli.console import duration
from cluster.cli.runs import find_run
from cluster.records import seatrial_home
from cluster.registry import store_of
from cluster.service import (
    PartStatus,
    Service,
    ServicePorts,
    UpRequest,
    load_service,
    servable_run,
    service_file,
    start_ui,
    status,
    up,
)
from rl_actors.contracts import BadInputError
from rl_actors.durable import encode

STATE_STYLES = {"up": "green", "not answering": "yellow", "gone": "red", "stale": "red"}


def bring_up(ports: ServicePorts, *, run_id: str = "", with_mlflow: bool = True, must_serve: bool = False) -> Reply:
    """Start the service and show where its parts are.

    Raises:
        BadInputError: a port is in use, or `must_serve` and there is nothing to serve.
    """
    home = seatrial_home()
    if must_serve and servable_run(home, run_id) is None:
        find_run(home, run_id)  # a home without runs, or a wrong id, has a message of its own
        raise BadInputError("RUN_ID", run_id, "no run has finished its release yet; finish one: seatrial run --resume")
    errors = Console(stderr=True)
    request = UpRequest(
        home=home,
        ports=ports,
        run_id=run_id,
        with_mlflow=with_mlflow,
        note=lambda line: errors.print(Text(f"... {line}", style="dim")),
    )
    service = up(request)
    return Reply(data={"service": encode(service)}, show=Group(_table(status(service)), *_hints(service)))


def show_status() -> Reply:
    """Probe every part. Exit code 1 unless all are up."""
    home = seatrial_home()
    service = load_service(home)
    found = status(service)
    rows = [{**encode(each.part), "state": each.state, "remedy": each.remedy} for each in found]
    all_up = bool(found) and all(each.state == "up" for each in found)
    hint = Text(f"nothing was started from {home}; start it: seatrial up")
    show = Group(_table(found), *_hints(service)) if found else hint
    data = {"parts": rows, "record": str(service_file(home))}
    return Reply(data=data, show=show, exit_code=0 if all_up else 1)


def keep_ui(port: int) -> Reply:
    """Show MLflow's UI until Ctrl-C; one that `up` already runs, or a remote server, is only named."""
    home = seatrial_home()
    for each in status(load_service(home)):
        if each.part.name == "mlflow" and each.state == "up":
            return Reply(data={"url": each.part.url}, show=Text(f"MLflow is up at {each.part.url}"))
    server = start_ui(store_of(home), home=home, port=port)
    if server.process is not None:
        Console(stderr=True).print(Text(f"MLflow at {server.url} ; Ctrl-C ends it", style="green"))
    # SIGTERM is a service manager's; a shell's background job is started with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        while server.process is not None and server.is_running:
            time.sleep(0.5)
    except KeyboardInterrupt:
        pass  # the way to end it
    finally:
        server.stop()
    return Reply(data={"url": server.url}, show=Text(server.url))


def _table(found: list[PartStatus]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("part", "state", "address", "pid", "up for", "serves"):
        table.add_column(column, overflow="fold")
    for each in found:
        part = each.part
        pid = str(part.process.pid) if part.process else "outside"
        # A clock that was set back must not show a negative age.
        age = duration(max(0.0, time.time() - part.started_at)) if each.state == "up" else "-"
        table.add_row(part.name, Text(each.state, style=STATE_STYLES[each.state]), part.url, pid, age, part.serves)
    return table


def _hints(service: Service) -> list[Text]:
    """Return the next steps: for each part that is not up, and with those that are."""
    broken = [f"  {each.part.name}: {each.remedy} ({each.part.log})" for each in status(service) if each.remedy]
    gateway, ray = service.find("gateway"), service.find("ray")
    lines = [f"  ask it        OpenAI(base_url={gateway.url!r}, api_key='-')"] if gateway else []
    if ray and gateway:
        lines += ["  a new run     seatrial down first, or submit to another Ray: one Ray serves one home"]
    elif ray:
        lines += [f"  submit to it  seatrial submit SPEC --address {ray.url}"]
    return [Text(line, style="yellow", overflow="fold") for line in broken] + [Text(line) for line in lines]
