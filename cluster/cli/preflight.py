"""`preflight`: every check of this machine in a table, with the remedy of each that fails."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from cluster.cli.answer import Reply
from cluster.plan import PreflightItem, check_machine, plan_run, probe_machine
from cluster.records import seatrial_home
from cluster.spec import WorkflowSpec
from rl_actors.durable import encode


def check(spec: WorkflowSpec) -> Reply:
    """Look at this machine; exit code 3 when it cannot finish the run."""
    home = seatrial_home()
    items = check_machine(spec, probe_machine(spec, home), home, plan_run(spec).peak_memory_bytes)
    return Reply(data={"checks": encode(items)}, show=_table(items), exit_code=0 if all(i.ok for i in items) else 3)


def _table(items: list[PreflightItem]) -> Table:
    table = Table(box=None)
    for column in ("", "check", "found", "remedy"):
        table.add_column(column, overflow="fold")
    for item in items:
        mark = Text("ok", style="green") if item.ok else Text("NO", style="bold red")
        table.add_row(mark, item.name, Text(item.found), Text(item.remedy))
    return table
