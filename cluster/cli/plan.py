"""`plan` and `preflight`: the run in numbers, what its changes do, a knob explained; and whether this machine can.

Tables fit 80 columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Final

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cluster.cli.answer import Reply
from cluster.cli.console import spoken
from cluster.cli.runs import RunRequest, requested_spec
from cluster.plan import (
    PARTS,
    BatchPlan,
    Change,
    Comparison,
    Explanation,
    PreflightItem,
    RunPlan,
    Shift,
    Workload,
    check_machine,
    compare,
    explain,
    measure_workload,
    plan_run,
    probe_machine,
)
from cluster.records import seatrial_home
from cluster.spec import WorkflowSpec, charter_answers, load_spec
from cluster.workflows import find_workflow, spec_file
from rl_actors.durable import encode

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_MAX_VALUE: Final = 44  # letters of a knob's value; a longer one is cut
_PART_NAMES: Final = {"attention": "attention activations", "experts": "expert activations", "kv_cache": "KV cache"}
_TRIFLE: Final = 1e-3  # a change below this share is not worth a line
_MINUTES, _BYTES = "minutes", "memory_bytes"


def show_plan(request: RunRequest, names: Sequence[str] = ()) -> Reply:
    """Plan a spec; with names, explain those knobs instead. Raises BadInputError."""
    spec = requested_spec(request)
    explained = [explain(spec, name) for name in dict.fromkeys(names)]
    plan, comparison = plan_run(spec), compare_request(request, spec)
    answers, workload = charter_answers(spec), measure_workload(spec, find_workflow(spec.workflow.name))
    data = {
        "charter": dict(answers),
        "workload": workload.to_json(),
        "plan": plan.to_json(),
        "comparison": asdict(comparison),
        "explained": [item.to_json() for item in explained],
    }
    shown = Group(render_charter(answers, workload), render_plan(plan, comparison))
    return Reply(data=data, show=render_explanations(explained) if explained else shown)


def compare_request(request: RunRequest, spec: WorkflowSpec) -> Comparison:
    """Compare with the spec without its settings; without settings, with the workflow's own spec if it brings one."""
    if request.settings:
        return compare(requested_spec(replace(request, settings=())), spec, f"{request.spec} as it is")
    name = spec.workflow.name
    # A workflow of a user's folder may come without a spec of its own.
    own = load_spec(name) if spec_file(name).is_file() else spec
    return compare(own, spec, f"the packaged {name}")


def render_plan(plan: RunPlan, comparison: Comparison | None = None) -> Group:
    """Return the plan as tables, and what the changes do where there are any."""
    parts: list[RenderableType] = [_batch_table(plan), _stage_table(plan), _memory_table(plan), _release_line(plan)]
    if comparison and comparison.changes:
        parts += [Text(), render_changes(comparison)]
    return Group(*parts)


def render_charter(answers: Mapping[str, str], workload: Workload) -> Table:
    """Return the charter's three answers, the workload behind them in numbers, and each doubt about it."""
    table = Table(title="Charter", show_header=False, show_lines=True)
    for name, answer in answers.items():
        table.add_row(spoken(name), Text(answer))
    steps = f"{workload.mean_tool_calls:.2f} tool calls a ticket (measured), {workload.tickets_per_day:,} tickets a day"
    days = f"at least {workload.tickets_to_verdict:,} tickets to a verdict, {workload.days_to_verdict:.2g} days"
    table.add_row("in numbers", Text(f"{steps} (declared), {days}"))
    for warning in workload.warnings:
        table.add_row("doubtful", Text(warning, style="yellow"))
    return table


def _batch_table(plan: RunPlan) -> Table:
    table = Table(title="One PPO step", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name in BatchPlan.__dataclass_fields__:
        label = "optimizer steps, all" if name == "optimizer_steps" else spoken(name)
        table.add_row(label, f"{getattr(plan.batch, name):,}")
    return table


def _stage_table(plan: RunPlan) -> Table:
    table = Table(title=f"{plan.params:,} parameters ({plan.active_params:,} active), {plan.device}; estimates")
    for column in ("stage", "tokens", "steps", "memory", "CPU", "GPU", "minutes"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in plan.stages:
        table.add_row(
            spoken(stage.stage),
            f"{stage.tokens:,}",
            f"{stage.optimizer_steps:,}" if stage.optimizer_steps else "-",
            amount(_BYTES, stage.total_memory_bytes),
            f"{stage.cpus:g}",
            f"{stage.gpus:g}",
            f"{stage.minutes:.1f}",
        )
    table.add_section()
    peak = f"peak {amount(_BYTES, plan.peak_memory_bytes)}"
    table.add_row("all", "", "", peak, "", "", f"{plan.total_minutes:.1f}")
    return table


def _memory_table(plan: RunPlan) -> Table:
    # A stage of one process alone has one part, which the table of stages shows.
    stages = [stage for stage in plan.stages if len(stage.memory_bytes) > 1]
    caption = "reward model: sampling its pairs or training on them, whichever takes more"
    table = Table(title="Memory of each part, all processes together", caption=caption)
    table.add_column("part")
    for stage in stages:
        table.add_column(spoken(stage.stage).replace(" ", "\n"), justify="right", vertical="bottom")
    for part in PARTS:
        sizes = [stage.memory_bytes.get(part, 0) for stage in stages]
        if any(sizes):
            label = _PART_NAMES.get(part, spoken(part))
            table.add_row(label, *(amount(_BYTES, size) if size else "-" for size in sizes))
    table.add_section()
    table.add_row("all", *(amount(_BYTES, stage.total_memory_bytes) for stage in stages))
    return table


def _release_line(plan: RunPlan) -> Text:
    line = f"The ramp needs at least {plan.tickets_needed:,} live tickets; data.num_live gives {plan.tickets_given:,}"
    if plan.tickets_given < plan.tickets_needed:
        return Text(f"{line}: no candidate can be promoted. Raise it, or lower min_canary_requests.", style="red")
    return Text(f"{line}.")


def render_changes(comparison: Comparison) -> Table:
    """Return a table with a cell per changed knob: its sentence and what it moves alone; then all of them together."""
    table = Table(
        title=f"What your changes do, each alone, against {comparison.against}", show_header=False, show_lines=True
    )
    for change in comparison.changes:
        table.add_row(_change_cell(change))
    if len(comparison.changes) > 1:
        table.add_row(Group(Text("all together", style="bold"), _effects(comparison.together)))
    return table


def _change_cell(change: Change) -> Group:
    values = f"  {value_text(change.before)} -> {value_text(change.after)}"
    head = Text(change.knob, style="bold").append(values, "cyan")
    return Group(head, Text(change.meaning, style="italic"), _outcome(change, "refused on its own"))


def _outcome(change: Change, refused: str) -> RenderableType:
    if change.refusal:
        return Padding(Text(f"{refused}: {change.refusal}", style="yellow"), (0, 0, 0, 2))
    return _effects(change.shifts)


def _effects(shifts: Sequence[Shift]) -> RenderableType:
    """Return a grid of quantities, before, after and by how much; what moves by a trifle is left out."""
    shown = [shift for shift in shifts if not math.isclose(shift.before, shift.after, rel_tol=_TRIFLE)]
    if not shown:
        nothing = "changes nothing in the plan's arithmetic"
        line = f"moves nothing in the plan by {_TRIFLE:.1%} or more" if shifts else nothing
        return Padding(Text(line, style="dim"), (0, 0, 0, 2))
    grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    for justify in ("left", "right", "left", "right", "right"):
        grid.add_column(justify=justify, no_wrap=True)
    for shift in shown:
        before, after = (amount(shift.quantity, value) for value in (shift.before, shift.after))
        grid.add_row(label_of(shift.quantity), before, "->", after, f" {factor_text(shift.before, shift.after)}")
    return Padding(grid, (0, 0, 0, 2))


def render_explanations(explanations: Iterable[Explanation]) -> Group:
    """Return one table per knob: sentence, default, limits, value, and what half and double of it would do."""
    return Group(*(_explain_knob(item) for item in explanations))


def _explain_knob(item: Explanation) -> Table:
    table = Table(title=item.knob.path, title_style="bold", show_header=False, show_lines=True, box=box.SQUARE)
    facts = Table.grid(padding=(0, 2))
    facts.add_row("value", Text(value_text(item.value, cut=False), style="cyan"))
    facts.add_row("default", "none, it must be given" if item.knob.is_required else value_text(item.knob.default))
    facts.add_row("limits", item.knob.limits)
    table.add_row(Group(Text(item.knob.meaning, style="italic"), facts))
    for word, trial in item.trials.items():
        head = Text(f"{word}: {value_text(trial.before)} -> {value_text(trial.after)}", style="bold")
        table.add_row(Group(head, _outcome(trial, "refused")))
    return table


def value_text(value: Any, *, cut: bool = True) -> str:
    """Return a knob's value as a spec would write it, cut where it is long."""
    if isinstance(value, list | tuple):
        text = f"[{', '.join(value_text(item) for item in value)}]"
    elif isinstance(value, dict):
        text = f"{{{', '.join(f'{key}: {value_text(item)}' for key, item in value.items())}}}"
    elif isinstance(value, float):
        text = f"{value:g}"
    else:
        text = str(value) if value != "" else '""'
    return text if not cut or len(text) <= _MAX_VALUE else f"{text[: _MAX_VALUE - 3]}..."


def label_of(quantity: str) -> str:
    """Return a quantity's name for people. Example: `ppo.memory_bytes` -> `ppo memory`."""
    names = {"cpus": "CPUs", "gpus": "GPUs", "params": "parameters", "active_params": "active parameters"}
    stage, dot, last = quantity.rpartition(".")
    last = names.get(last) or spoken(last.removesuffix("_bytes"))
    return f"{spoken(stage)} {last}" if dot else last


def amount(quantity: str, value: float) -> str:
    """Return a value in its unit: bytes with three digits, minutes with a decimal, counts in full."""
    if quantity.endswith("_bytes"):
        return _bytes_text(value)
    if quantity.endswith(_MINUTES):
        return f"{value:,.0f} min" if value >= 999.5 else f"{value:.1f} min"
    return f"{value:,.0f}" if value == round(value) else f"{value:,.3g}"


def _bytes_text(value: float) -> str:
    power = 0
    # Three digits at most: 1000 MiB is written as 0.98 GiB.
    while value >= 999.5 and power < len(_UNITS) - 1:
        value, power = value / 1024, power + 1
    digits = 0 if value >= 99.95 or power == 0 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {_UNITS[power]}"


def factor_text(before: float, after: float) -> str:
    """Return how far a value moved. Example: `x 4`, `/ 2`, or `+12 %` where it is less than by half."""
    if before <= 0 or after <= 0:
        return ""
    ratio = after / before
    if ratio >= 1.5 or ratio <= 1 / 1.5:
        sign, times = ("x", ratio) if ratio > 1 else ("/", 1 / ratio)
        return f"{sign} {times:,.0f}" if times >= 99.5 else f"{sign} {times:.3g}"
    percent = 100 * (ratio - 1)
    return f"{percent:+.0f} %" if abs(percent) >= 9.95 else f"{percent:+.1f} %"


def check_here(spec: WorkflowSpec) -> Reply:
    """Look at this machine; exit code 3 when it cannot finish the run."""
    home = seatrial_home()
    items = check_machine(spec, probe_machine(spec, home), home, plan_run(spec).peak_memory_bytes)
    return Reply(
        data={"checks": encode(items)}, show=_check_table(items), exit_code=0 if all(i.ok for i in items) else 3
    )


def _check_table(items: list[PreflightItem]) -> Table:
    table = Table(box=None)
    for column in ("", "check", "found", "remedy"):
        table.add_column(column, overflow="fold")
    for item in items:
        mark = Text("ok", style="green") if item.ok else Text("NO", style="bold red")
        table.add_row(mark, item.name, Text(item.found), Text(item.remedy))
    return table
