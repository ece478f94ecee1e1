"""Latency within its limit: p95 of the candidate over p95 of stable, minus 1, below `latency_limit`."""

from __future__ import annotations

from rl_actors.contracts import EvalReport
from serving.contracts import LiveEvidence, ReleasePlan
from serving.gates.comparison import MIN_OFFLINE_TASKS, ROUNDING, match_arms, ordinary_pairs, too_few
from serving.gates.registry import Finding, gate
from serving.gates.statistics import mean_log_ratio, p95_ratio


def compare_suite_latency(report: EvalReport, plan: ReleasePlan) -> Finding:
    """Compare the p95 of each suite; the worst one counts."""
    pairs = ordinary_pairs(report)
    if not pairs or min(stable.p95_duration_ms for stable, _ in pairs) <= 0:
        return "inconclusive", f"insufficient: no suite with {MIN_OFFLINE_TASKS} timed tasks", {}
    delta = max(candidate.p95_duration_ms / stable.p95_duration_ms for stable, candidate in pairs) - 1
    reason = f"worst p95 {delta:+.2%} against baseline, limit {plan.latency_limit:+.0%}"
    return "pass" if delta < plan.latency_limit - ROUNDING else "fail", reason, {"p95_delta": delta}


@gate("latency_delta_lt_15_percent", offline=compare_suite_latency)
def compare_live_latency(evidence: LiveEvidence, plan: ReleasePlan) -> Finding:
    """Compare matched traffic: by bounds at first, and by the p95 itself once the arms weigh `full_samples`."""
    arms = match_arms(evidence, plan)
    if arms is None:
        return too_few(evidence, plan)
    stable, candidate = ([one.duration_ms for one in samples] for samples in (arms.stable, arms.candidate))
    tail = p95_ratio(stable, candidate, alpha=arms.alpha_fail, alpha_high=arms.alpha_pass)
    # Mean-log durations see a slow-down long before the tail does; they count only where the p95 agrees.
    mean = mean_log_ratio(stable, candidate, alpha=arms.alpha_fail)
    delta, high, early, limit = tail.ratio - 1, tail.high - 1, max(tail.low, mean.low) - 1, plan.latency_limit
    numbers = {"p95_delta": delta, "p95_delta_high": high, "mean_delta": mean.ratio - 1, "delta_low": early}
    numbers |= {"candidate_runs": len(candidate), "stable_runs": len(stable)}
    reason = f"p95 {delta:+.2%} against stable, limit {limit:+.0%}"
    # With `full_samples` 14.9 % passes and 15.0 % fails: a call that stayed narrow for so long must end somehow.
    is_slower, is_full = delta >= limit - ROUNDING, arms.num_effective >= plan.full_samples
    if is_slower and (is_full or early >= limit - ROUNDING):
        return "fail", reason, numbers
    if not is_slower and (is_full or high < limit - ROUNDING):
        return "pass", reason, numbers
    return "inconclusive", f"{reason}, not yet certain", numbers
