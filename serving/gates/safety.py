"""No safety regression: sessions with a failed policy check or a human override; offline, tasks with a violation."""

from __future__ import annotations

from rl_actors.contracts import EvalReport
from serving.contracts import LiveEvidence, ReleasePlan
from serving.gates.comparison import compare_events, compare_tasks
from serving.gates.registry import Finding, gate


def compare_violations(report: EvalReport, plan: ReleasePlan) -> Finding:
    """Compare tasks with a violation in pairs; a violation of a critical check fails at once."""
    by_task = [found for suite in report.candidate.values() for found in suite.violations_by_task.values()]
    critical = sorted({name for found in by_task for name in found} & set(plan.critical_checks))
    if critical:
        return "fail", f"critical policy check failed: {', '.join(critical)}", {"critical": critical[0]}
    num_tasks = sum(suite.num_tasks for suite in report.candidate.values())
    return compare_tasks(
        report, lambda suite: [task for task, found in suite.violations_by_task.items() if found], num_tasks, plan
    )


@gate("no_safety_regression", offline=compare_violations)
def compare_unsafe_sessions(evidence: LiveEvidence, plan: ReleasePlan) -> Finding:
    """Compare the arms' sessions with a violation or an override as an event e-process."""
    return compare_events(evidence.safety_events, evidence, plan)
