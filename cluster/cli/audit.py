"""`audit`: each record of a run in a table, with the verdict whether it is as the run wrote it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.cli.answer import Reply
from cluster.cli.runs import LATEST, find_run, recorded_workflow
from cluster.records import SOUND, Finding, RunFolder, audit_run, tagged_heads
from rl_actors.contracts import TamperedError
from rl_actors.durable import encode

_ABOUT_MLFLOW: Final = Finding(file="MLflow", rows=0, head="", verdict="gone", detail="")


def audit(run: str, home: Path, *, with_mlflow: bool = False) -> Reply:
    """Check a run; exit code 1 when something was changed or cannot be checked.

    Raises:
        BadInputError: no such run.
        InfrastructureError: MLflow was asked for and does not answer.
    """
    folder = find_run(home, "" if run == LATEST else run)
    findings = _audit_with_mlflow(folder, home) if with_mlflow else audit_run(folder)

    def show(console: Console) -> None:
        _show(console, folder.run_id, findings)

    is_sound = all(finding.is_sound for finding in findings)
    data = {"run_id": folder.run_id, "findings": encode(findings)}
    return Reply(data=data, show=show, exit_code=0 if is_sound else 1)


def _audit_with_mlflow(folder: RunFolder, home: Path) -> tuple[Finding, ...]:
    # Imported here: MLflow takes seconds, and lies outside the run folder for whoever wants that.
    from cluster.registry import Registry, store_of

    registry = Registry(recorded_workflow(folder), folder.run_id, store=store_of(home))
    try:
        tagged = tagged_heads(registry.parent_tags())
    except TamperedError as error:
        return (replace(_ABOUT_MLFLOW, verdict="changed", detail=str(error)), *audit_run(folder))
    if not tagged:
        detail = f"MLflow at {registry.store.public_uri} has no audit tags of {folder.run_id}: the run has not ended, "
        detail += "an older seatrial ended it, or MLFLOW_TRACKING_URI is another"
        return (replace(_ABOUT_MLFLOW, detail=detail), *audit_run(folder))
    return audit_run(folder, tagged)


def _show(console: Console, run_id: str, findings: Sequence[Finding]) -> None:
    """Print a table, and below it each defect."""
    console.print(_table(run_id, findings))
    unsound = [finding for finding in findings if not finding.is_sound]
    # Not in the table: a path must survive being copied from a narrow terminal.
    for finding in unsound:
        console.print(Text(f"  {finding.detail}"), soft_wrap=True)
    if any(finding.verdict == "not anchored" for finding in findings):
        remark = "not anchored: no ending of the run kept this, so that a cut-off end could not be seen"
        console.print(Text(f"  {remark}", style="dim"), soft_wrap=True)
    ending = Text(f"all {len(findings)} verify", style="bold green")
    if not findings:
        ending = Text("nothing to verify: no stage of this run has finished", style="bold yellow")
    if unsound:
        ending = Text(f"{len(unsound)} of {len(findings)} do not verify", style="bold red")
    console.print(ending)


def _table(run_id: str, findings: Sequence[Finding]) -> Table:
    table = Table(title=Text(f"Audit of {run_id}"), title_justify="left", title_style="bold")
    for column in ("file", "rows", "chain head", "verdict"):
        table.add_column(column, justify="right" if column == "rows" else "left", overflow="fold")
    for finding in findings:
        verdict = Text(finding.verdict, style="green" if finding.verdict in SOUND else "bold red")
        if finding.num_unchained:
            verdict.append(f" ({finding.num_unchained:,} rows)")
        table.add_row(Text(finding.file), f"{finding.rows:,}", finding.head[:12], verdict)
    return table
