"""Stop rules: gates that need not pass, but may roll back. By default `task_success_not_worse`."""

from __future__ import annotations

from serving.contracts import GateResults, LiveEvidence, ReleasePlan
from serving.gates import GATES
from serving.release.monitors.registry import comparison


@comparison
def watch_stop_rules(evidence: LiveEvidence, plan: ReleasePlan) -> GateResults:
    """Evaluate those stop rules of the plan that are not among its gates already."""
    return tuple(GATES[name].live(evidence, plan) for name in plan.rules if name not in plan.gates)
