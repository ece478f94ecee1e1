"""`run`, `train`, `eval`, `release`, `report`: one call of the pipeline, watched, and its ending shown."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from cluster.cli.answer import Reply, Scene
from cluster.cli.console import render_summary, watch_for
from cluster.cli.runs import RunRequest, open_run, record_spec, require_machine
from cluster.pipeline import Silent, Watch
from cluster.plan import measure_workload
from cluster.records import RunFolder, RunSummary, seatrial_home
from cluster.workflows import find_workflow


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineCommand:
    """Which command runs the pipeline, and how far. `until` empty means to the end."""

    name: str
    until: str = ""
    keep_serving: bool = False
    quiet: bool = False


def finish_run(request: RunRequest, command: PipelineCommand, scene: Scene) -> Reply:
    """Run the pipeline as far as the command says.

    Everything that can be refused is refused before the run is recorded, a cluster that does not answer included.
    """
    home = seatrial_home()
    spec, folder = open_run(request, home)
    require_machine(spec, home, command.until, is_resumed=bool(request.resume))
    words = ["seatrial", command.name, request.spec, *(f"--set {setting}" for setting in request.settings)]
    with _watching(quiet=command.quiet) as watch:

        def begin() -> None:
            record_spec(spec, folder)
            scene.resume = " ".join(word for word in (*words, "--resume", folder.run_id) if word)
            scene.crash_folder = folder.root
            watch.note(f"run {folder.run_id} in {folder.root}")
            for warning in measure_workload(spec, find_workflow(spec.workflow.name)).warnings:
                watch.note(f"doubtful workload: {warning}")

        # Imported here: this is what loads Ray, torch and vLLM.
        from cluster.pipeline import run_pipeline

        summary = run_pipeline(spec, folder, watch, until=command.until, begin=begin)
    served = _serve(folder, spec.cluster.serve_port) if command.keep_serving and summary.exit_code == 0 else None
    return _ending(summary, served)


def _watching(*, quiet: bool) -> AbstractContextManager[Watch]:
    return nullcontext(Silent()) if quiet else watch_for(Console())


def _serve(folder: RunFolder, port: int) -> Reply:
    # Imported here: most runs end without a service.
    from cluster.cli.service import bring_up
    from cluster.service import ServicePorts

    return bring_up(ServicePorts(gateway=port), run_id=folder.run_id)


def _ending(summary: RunSummary, served: Reply | None) -> Reply:
    def show(console: Console) -> None:
        render_summary(console, summary)
        if served is not None and not callable(served.show):
            console.print(served.show)

    data = {"summary": summary.to_json(), **(served.data if served else {})}
    return Reply(data=data, show=show, exit_code=summary.exit_code)


def rewrite_report(folder: RunFolder) -> Reply:
    """Write the briefs of a run again from its rows."""
    # Imported here: reports load Matplotlib and Jinja2.
    from cluster.reports import write_briefs

    write_briefs(folder.root, ledger=folder.root / "serving" / "ledger.sqlite")
    briefs = sorted(str(path) for path in folder.report.glob("brief.*"))
    return Reply(data={"run_id": folder.run_id, "briefs": briefs}, show=Text("\n".join(briefs), overflow="fold"))
