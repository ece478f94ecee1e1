"""`plan`: the run in numbers, what its changes do, or a knob explained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.cli_answer import Reply
from cluster.cli_runs import RunRequest, requested_spec
from cluster.plan_changes import Comparison, compare, explain
from cluster.plan_view import render_explanations, render_plan
from cluster.planning import plan_run
from cluster.spec import WorkflowSpec, load_spec
from cluster.workflows import spec_file


def show_plan(request: RunRequest, names: Sequence[str] = ()) -> Reply:
    """Plan a spec; with names, explain those knobs instead. Raises BadInputError."""
    spec = requested_spec(request)
    explained = [explain(spec, name) for name in dict.fromkeys(names)]
    plan, comparison = plan_run(spec), compared(request, spec)
    data = {
        "plan": plan.to_json(),
        "comparison": comparison.to_json(),
        "explained": [item.to_json() for item in explained],
    }
    return Reply(data=data, show=render_explanations(explained) if explained else render_plan(plan, comparison))


def compared(request: RunRequest, spec: WorkflowSpec) -> Comparison:
    """Compare with the spec without its settings; without settings, with the workflow's own spec if it brings one."""
    if request.settings:
        return compare(requested_spec(replace(request, settings=())), spec, f"{request.spec} as it is")
    name = spec.workflow.name
    own = load_spec(name) if spec_file(name).is_file() else spec
    return compare(own, spec, f"the packaged {name}")
