"""`run`, `train`, `eval`, `release`, `report`: one call of the pipeline, watched, and its ending shown."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from rich.console import Console
from rich.text import Text

from cluster.cli.answer import Reply, Scene
from cluster.cli.console import render_summary, watch_for
from cluster.cli.runs import RunRequest, open_run, record_spec, require_machine
from cluster.plan import measure_workload
from cluster.records import RunFolder, RunSummary, seatrial_home
from cluster.workflows import find_workflow

Serve = Callable[[int, str], Reply]


def finish_run(request: RunRequest, scene: Scene, *, name: str, until: str, serve: Serve | None) -> Reply:
    """Run the pipeline up to stage `until`, empty for all of it, then `serve` what it promoted.

    `name` is the command's; `serve` takes the gateway's port and the run's id.
    """
    home = seatrial_home()
    spec, folder = open_run(request, home)
    require_machine(spec, home, until, is_resumed=bool(request.resume))
    # Imported here: this loads Ray, torch and vLLM, which a run that is refused must not wait for.
    from cluster.pipeline import Silent, run_pipeline

    words = ["seatrial", name, request.spec, *(f"--set {setting}" for setting in request.settings)]
    with nullcontext(Silent()) if scene.as_json else watch_for(Console()) as watch:

        def begin() -> None:
            # Called once the cluster has answered: a run that was refused leaves no folder.
            record_spec(spec, folder)
            scene.resume = " ".join(word for word in (*words, "--resume", folder.run_id) if word)
            scene.crash_folder = folder.root
            watch.note(f"run {folder.run_id} in {folder.root}")
            for warning in measure_workload(spec, find_workflow(spec.workflow.name)).warnings:
                watch.note(f"doubtful workload: {warning}")

        summary = run_pipeline(spec, folder, watch, until=until, begin=begin)
    served = serve(spec.cluster.serve_port, folder.run_id) if serve and summary.exit_code == 0 else None
    return _ending(summary, served)


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
