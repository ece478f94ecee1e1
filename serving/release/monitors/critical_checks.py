"""Critical checks: one failed policy check that the plan calls critical ends a canary at once."""

from __future__ import annotations

from serving.contracts import GateResult, GateResults, LiveEvidence, ReleasePlan
from serving.release.monitors.registry import alarm


@alarm
def watch_critical_checks(evidence: LiveEvidence, plan: ReleasePlan) -> GateResults:
    """Fail on the first critical violation, with the number of requests by check."""
    critical = sorted(set(evidence.failed_checks) & set(plan.critical_checks))
    if not critical:
        return ()
    counts = {name: evidence.failed_checks[name] for name in critical}
    reason = f"critical policy check failed: {', '.join(critical)}"
    # Under the name of the safety gate, which is what a critical violation breaks.
    return (GateResult(gate="no_safety_regression", verdict="fail", evidence=counts, reason=reason),)
