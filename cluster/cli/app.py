"""`seatrial`: the command line. Each command turns words into a request, calls one function and answers."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, Final

import typer
from typer.core import TyperCommand

from cluster.cli.answer import DEBUG_VARIABLE, Reply, Scene, answer
from cluster.cli.runs import LATEST, RunRequest, find_run, requested_spec
from cluster.ray_cluster import offer_token
from cluster.records import seatrial_home

app = typer.Typer(
    name="seatrial",
    help="Train an agent policy, try it, and only then let it carry users. "
    "Exit codes: 0 ok, 1 a stage or gate said no, 2 bad input, 3 infrastructure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


# Commands import what they need when they are called: `validate` answers at once, without Ray, torch, vLLM or MLflow.

SpecArgument = Annotated[str, typer.Argument(metavar="SPEC", help="a spec file, its folder, or a workflow's name")]
OptionalSpec = Annotated[str, typer.Argument(metavar="SPEC", help="as for validate; left out with --resume RUN_ID")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN_ID", help="a run; the newest when left out")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a knob; repeatable")]
ExplainOption = Annotated[
    list[str] | None, typer.Option("--explain", metavar="KNOB", help="what a knob does, halved and doubled; repeatable")
]
JsonOption = Annotated[bool, typer.Option("--json", help="one JSON line on stdout and nothing else")]
ResumeOption = Annotated[
    str, typer.Option("--resume", metavar="[RUN_ID]", help="go on with a run; without an id, the newest unfinished")
]
RunIdOption = Annotated[str, typer.Option("--run-id", help="name the new run")]
AddressOption = Annotated[str, typer.Option("--address", help="Ray address for cluster.address, such as auto")]
KeepOption = Annotated[bool, typer.Option("--keep-serving", help="afterwards serve the stable policy: seatrial up")]
PORT_HELP: Final = "port on 127.0.0.1"


class ResumeCommand(TyperCommand):
    """A command whose `--resume` may stand without a value: it then means the newest unfinished run."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Give a bare `--resume` its value."""
        filled: list[str] = []
        for position, word in enumerate(args):
            filled.append(word)
            following = args[position + 1 : position + 2]
            if word == "--resume" and (not following or following[0].startswith("-")):
                filled.append(LATEST)
        return super().parse_args(ctx, filled)


def answers(work: Callable[..., Reply]) -> Callable[..., None]:
    """Make a command of a function that returns its reply: add `--json`, print the reply and set the exit code.

    A parameter named `scene` is no word of the command line: it is the command's own `Scene`.
    """
    words = inspect.signature(work, eval_str=True).parameters
    as_json = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=JsonOption)

    @functools.wraps(work)
    def command(as_json: bool, **given: Any) -> None:
        answer(lambda scene: work(**given, **({"scene": scene} if "scene" in words else {})), as_json)

    # Typer reads the words from the signature, and the help from the docstring that `wraps` copies.
    shown = [word for name, word in words.items() if name != "scene"]
    command.__signature__ = inspect.Signature([*shown, as_json])  # pyright: ignore[reportAttributeAccessIssue]
    return command


@app.callback()
def root(debug: Annotated[bool, typer.Option("--debug", help="tracebacks instead of sentences")] = False) -> None:
    """Train an agent policy, try it, and only then let it carry users."""
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"


# --- before a run -----------------------------------------------------------------------------------------------------
@app.command()
@answers
def validate(spec: SpecArgument, settings: SetOption = None) -> Reply:
    """Check a spec without starting anything."""
    found = requested_spec(RunRequest(spec=spec, settings=settings or ()))
    release = found.release
    ramp = " -> ".join(f"{share:g} %" for share in release.ramp)
    line = f"valid: workflow {found.workflow.name}, {len(release.gates)} gates, ramp {ramp}"
    return Reply(data={"spec": found.model_dump(mode="json")}, show=line)


@app.command()
@answers
def plan(spec: SpecArgument, settings: SetOption = None, explain: ExplainOption = None) -> Reply:
    """Estimate each stage's tokens, memory and minutes, and what changed knobs do."""
    from cluster.cli.plan import show_plan

    return show_plan(RunRequest(spec=spec, settings=settings or ()), explain or ())


@app.command()
@answers
def preflight(spec: SpecArgument, settings: SetOption = None) -> Reply:
    """Check that this machine can finish the run."""
    from cluster.cli.plan import check_here

    return check_here(requested_spec(RunRequest(spec=spec, settings=settings or ())))


# --- a run ------------------------------------------------------------------------------------------------------------
def _serve_run(port: int, run_id: str) -> Reply:
    # Imported here: most runs end without a service.
    from cluster.cli.service import bring_up
    from cluster.service import ServicePorts

    return bring_up(ServicePorts(gateway=port), run_id=run_id)


def _add_run_command(name: str, until: str, says: str) -> None:
    """Add a command that runs the pipeline up to a stage; all four read the same words."""

    @app.command(name, cls=ResumeCommand, help=says)
    @answers
    def command(
        scene: Scene,
        spec: OptionalSpec = "",
        settings: SetOption = None,
        resume: ResumeOption = "",
        run_id: RunIdOption = "",
        address: AddressOption = "",
        keep_serving: KeepOption = False,
    ) -> Reply:
        from cluster.cli.run import finish_run

        words = RunRequest(spec=spec, settings=settings or (), address=address, run_id=run_id, resume=resume)
        return finish_run(words, scene, name=name, until=until, serve=_serve_run if keep_serving else None)


_add_run_command("run", "", "Run every stage, from data to a released policy.")
_add_run_command("train", "ppo", "Run the stages up to PPO.")
_add_run_command("eval", "eval", "Run the stages up to the offline gates.")
_add_run_command("release", "release", "Run the stages up to the end of the canary.")


@app.command()
@answers
def submit(
    scene: Scene,
    spec: SpecArgument,
    address: Annotated[str, typer.Option("--address", help="the cluster's job server")] = "http://127.0.0.1:8265",
    settings: SetOption = None,
    timeout: Annotated[float, typer.Option("--timeout", help="hours to follow the job at most")] = 24.0,
) -> Reply:
    """Run the pipeline as a Ray job and follow its log."""
    from cluster.cli.submit import submit_and_follow

    found = requested_spec(RunRequest(spec=spec, settings=settings or ()))
    write = functools.partial(typer.echo, nl=False, err=scene.as_json)
    return submit_and_follow(found, address, scene, write=write, timeout_s=timeout * 3600)


@app.command()
@answers
def report(run_id: RunArgument = "") -> Reply:
    """Write the Reliability Brief of a run again."""
    from cluster.cli.run import rewrite_report

    return rewrite_report(find_run(seatrial_home(), run_id))


@app.command()
@answers
def audit(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run's id, or latest")] = LATEST,
    mlflow: Annotated[bool, typer.Option("--mlflow", help="hold it to the heads that MLflow keeps, too")] = False,
) -> Reply:
    """Verify that a run's records are still what it wrote."""
    from cluster.cli.audit import audit as check

    return check(run, seatrial_home(), with_mlflow=mlflow)


@app.command()
def override(
    request_id: Annotated[str, typer.Argument(metavar="REQUEST_ID", help="as in the header x-seatrial-run-id")],
    actor: Annotated[str, typer.Option("--actor", help="who overrides")],
    reason: Annotated[str, typer.Option("--reason", help="why, for the record")],
    url: Annotated[str, typer.Option("--url", help="the gateway; by default the one of seatrial up")] = "",
    as_json: JsonOption = False,
) -> None:
    """Record that a human overrode the reply to a request."""

    def work(_: Scene) -> Reply:
        from cluster.cli.override import Override, record_override

        where = record_override(Override(request_id=request_id, actor=actor, reason=reason, url=url), seatrial_home())
        line = f"recorded: {actor} overrode {request_id} ({where})"
        return Reply(data={"run_id": request_id, "human_override": True, "recorded_by": where}, show=line)

    answer(work, as_json)


# --- the service ------------------------------------------------------------------------------------------------------
@app.command()
@answers
def up(
    run_id: Annotated[str, typer.Option("--run-id", help="serve this run's stable policy")] = "",
    port: Annotated[int, typer.Option("--port", help=f"the gateway's {PORT_HELP}")] = 8000,
    ray_port: Annotated[int, typer.Option("--ray-port", help=f"Ray's {PORT_HELP}")] = 6379,
    dashboard_port: Annotated[int, typer.Option("--dashboard-port", help=f"the job server's {PORT_HELP}")] = 8265,
    mlflow_port: Annotated[int, typer.Option("--mlflow-port", help=f"MLflow's {PORT_HELP}")] = 5000,
) -> Reply:
    """Start Ray, MLflow and the gateway in the background."""
    from cluster.cli.service import bring_up
    from cluster.service import ServicePorts

    ports = ServicePorts(ray=ray_port, dashboard=dashboard_port, mlflow=mlflow_port, gateway=port)
    return bring_up(ports, run_id=run_id)


@app.command()
@answers
def serve(
    run_id: RunArgument = "",
    port: Annotated[int, typer.Option("--port", help=f"the gateway's {PORT_HELP}")] = 8000,
) -> Reply:
    """Serve a run's stable policy, without MLflow; stop with down."""
    from cluster.cli.service import bring_up
    from cluster.service import ServicePorts

    return bring_up(ServicePorts(gateway=port), run_id=run_id, with_mlflow=False, must_serve=True)


@app.command()
@answers
def status() -> Reply:
    """Show what `up` started; exit code 1 unless all is up."""
    from cluster.cli.service import show_status

    return show_status()


@app.command()
@answers
def down() -> Reply:
    """Stop exactly what `up` started."""
    from cluster.service import down as stop

    stopped = stop(seatrial_home())
    line = f"stopped: {', '.join(stopped)}" if stopped else "nothing was running"
    return Reply(data={"stopped": stopped}, show=line)


@app.command()
@answers
def ui(
    port: Annotated[int, typer.Option("--port", help=f"the UI's {PORT_HELP}")] = 5000,
) -> Reply:
    """Open the MLflow UI and keep it until Ctrl-C."""
    from cluster.cli.service import keep_ui

    return keep_ui(port)


def main() -> None:
    """Run the command line."""
    offer_token()
    # `--debug` belongs to the program, but people add it at the end of the line that failed.
    words = sys.argv[1:]
    rest = [word for word in words if word != "--debug"]
    app(args=["--debug", *rest] if len(rest) < len(words) else rest, prog_name="seatrial")
