"""`plan`: the run in numbers, what its changes do, or a knob explained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Group

from cluster.charter import charter_answers
from cluster.cli_answer import Reply
from cluster.cli_runs import RunRequest, requested_spec
from cluster.plan_changes import Comparison, compare, explain
from cluster.plan_view import render_charter, render_explanations, render_plan
from cluster.planning import plan_run
from cluster.spec import WorkflowSpec, load_spec
from cluster.workflows import find_workflow, spec_file
from cluster.workload import measure_workload


def show_plan(request: RunRequest, names: Sequence[str] = ()) -> Reply:
    """Plan a spec; with names, explain those knobs instead. Raises BadInputError."""
    spec = requested_spec(request)
    explained = [explain(spec, name) for name in dict.fromkeys(names)]
    plan, comparison = plan_run(spec), compared(request, spec)
    answers, workload = charter_answers(spec), measure_workload(spec, find_workflow(spec.workflow.name))
    data = {
        "charter": dict(answers),
        "workload": workload.to_json(),
        "plan": plan.to_json(),
        "comparison": comparison.to_json(),
        "explained": [item.to_json() for item in explained],
    }
    shown = Group(render_charter(answers, workload), render_plan(plan, comparison))
    return Reply(data=data, show=render_explanations(explained) if explained else shown)


def compared(request: RunRequest, spec: WorkflowSpec) -> Comparison:
    """Compare with the spec without its settings; without settings, with the workflow's own spec if it brings one."""
    if request.settings:
        return compare(requested_spec(replace(request, settings=())), spec, f"{request.spec} as it is")
    name = spec.workflow.name
    own = load_spec(name) if spec_file(name).is_file() else spec
    return compare(own, spec, f"the packaged {name}")
