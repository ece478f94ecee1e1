"""Rollback within its limit: only a deployment can be timed, so this gate has no offline form."""

from __future__ import annotations

from serving.contracts import LiveEvidence, ReleasePlan
from serving.gates.registry import Finding, gate


@gate("rollback_under_5_minutes")
def time_drills(evidence: LiveEvidence, plan: ReleasePlan) -> Finding:
    """Judge this release's slowest drill, and the age of its last."""
    if not evidence.drills:
        return "inconclusive", "no rollback drill was run for this release", {}
    slowest = max(drill.seconds for drill in evidence.drills)
    age = evidence.now - max(drill.at for drill in evidence.drills)
    numbers = {"slowest_s": slowest, "age_s": age, "drills": len(evidence.drills)}
    if age > plan.drill_max_age_s:
        return "fail", f"the last drill is {age:.0f} s old, at most {plan.drill_max_age_s:.0f}", numbers
    verdict = "pass" if slowest < plan.max_rollback_s else "fail"
    return verdict, f"slowest drill {slowest:.2f} s, limit {plan.max_rollback_s:.0f} s", numbers
