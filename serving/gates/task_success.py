"""Task success not worse: by default a stop rule, for a drop must roll back long before the cost gate proves any."""

from __future__ import annotations

from rl_actors.contracts import EvalReport
from serving.contracts import LiveEvidence, ReleasePlan
from serving.gates.comparison import compare_events, compare_tasks
from serving.gates.registry import Finding, gate


def compare_failures(report: EvalReport, plan: ReleasePlan) -> Finding:
    """Compare failed tasks in pairs."""
    num_tasks = sum(len(suite.success_by_task) for suite in report.candidate.values())
    return compare_tasks(
        report, lambda suite: [task for task, won in suite.success_by_task.items() if not won], num_tasks, plan
    )


@gate("task_success_not_worse", offline=compare_failures)
def compare_failed_sessions(evidence: LiveEvidence, plan: ReleasePlan) -> Finding:
    """Compare sessions with a failed request (verifier, label, engine error, timeout, abort) or an override."""
    return compare_events(evidence.failure_events, evidence, plan)
