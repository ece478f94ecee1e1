"""The release gates by name: each has a live form (from the ledger) and most an offline form (from an EvalReport).

Four gates come from the article and are the default; `task_success_not_worse` is armed as a stop rule, because a drop
in success must roll back long before the cost gate can prove anything. What the gates share:

* No data is `inconclusive`, never `pass`.
* A session-ratio mismatch makes every live gate `invalid`; only a critical violation still fails.
* Fails use alpha / (number of rules), because any one of them rolls back; passes use alpha, because all are needed.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from rl_actors.contracts import BadInputError, EvalReport, SuiteResult
from rl_actors.evaluation import mcnemar_p_value
from serving.contracts import Drill, Evidence, GateResult, ReleasePlan, RequestSample, TrafficWindow, Verdict
from serving.gates.statistics import (
    EventEProcess,
    MatchedSamples,
    cost_per_success_ratio,
    match_samples,
    mean_log_ratio,
    p95_ratio,
    rate_below_e_value,
    sample_ratio_check,
)

_MIN_OFFLINE_TASKS: Final = 20


_ADVERSARIAL: Final = "adversarial"


_ROUNDING: Final = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmEvent:
    """The first bad event of one session: whose it was, and the canary's share when its run was routed."""

    is_canary: bool
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveEvidence:
    """Everything a live gate may look at.

    Windows and `epoch_sessions` = (canary, all) cover the current ramp step; events, `canary_sessions` and
    `failed_checks` (candidate runs by failed check) the whole release.
    """

    stable: TrafficWindow
    candidate: TrafficWindow
    share: float
    epoch_sessions: tuple[int, int]
    canary_sessions: int
    failed_checks: Mapping[str, int]
    safety_events: tuple[ArmEvent, ...]
    failure_events: tuple[ArmEvent, ...]
    drills: tuple[Drill, ...]
    now: float


LiveGate = Callable[[LiveEvidence, ReleasePlan], GateResult]


OfflineGate = Callable[[EvalReport, ReleasePlan], GateResult]


# --- live -------------------------------------------------------------------------------------------------------------
def evaluate_live(evidence: LiveEvidence, plan: ReleasePlan) -> tuple[GateResult, ...]:
    """Evaluate every gate and stop rule of the plan on live traffic, critical violations and the split itself first."""
    critical = sorted(set(evidence.failed_checks) & set(plan.critical_checks))
    if critical:
        counts: Evidence = {name: evidence.failed_checks[name] for name in critical}
        return (_result("no_safety_regression", "fail", _critical_reason(critical), counts),)
    results = [GATES[name].live(evidence, plan) for name in _rules(plan)]
    canary, total = evidence.epoch_sessions
    p_value = sample_ratio_check(canary, total, evidence.share)
    if p_value >= plan.sample_ratio_alpha:
        return tuple(results)
    reason = f"{canary} of {total} sessions were canary at a share of {evidence.share:g} (p = {p_value:.2g})"
    return tuple(
        replace(result, verdict="invalid", reason=f"sample-ratio mismatch: {reason}", evidence={"p_value": p_value})
        for result in results
    )


def _critical_reason(critical: list[str]) -> str:
    return f"critical policy check failed: {', '.join(critical)}"


def traffic_result(num_runs: int, min_requests: int) -> GateResult:
    """Say whether a ramp step has carried the candidate runs it asks for."""
    verdict: Verdict = "pass" if num_runs >= min_requests else "inconclusive"
    return _result("enough_traffic", verdict, f"{num_runs} of {min_requests} candidate runs", {"num_runs": num_runs})


def _live_safety(evidence: LiveEvidence, plan: ReleasePlan) -> GateResult:
    """Failed policy checks and human overrides, one per session, as an event e-process (design section 4)."""
    return _event_result("no_safety_regression", evidence.safety_events, evidence, plan)


def _live_success(evidence: LiveEvidence, plan: ReleasePlan) -> GateResult:
    """Failed runs (verifier or label says no, engine error, timeout, abort) and overrides, one per session."""
    return _event_result("task_success_not_worse", evidence.failure_events, evidence, plan)


def _event_result(gate: str, events: tuple[ArmEvent, ...], evidence: LiveEvidence, plan: ReleasePlan) -> GateResult:
    """Fail on proof of harm; pass on proof of non-inferiority, or of a bad-session rate below the tolerance."""
    process = EventEProcess(evidence.share, plan.event_margin)
    for event in events:
        process.observe(event.is_canary, event.share)
    sessions = max(evidence.canary_sessions, process.num_canary_events)
    e_rate = rate_below_e_value(process.num_canary_events, sessions, plan.event_rate_tolerance)
    numbers: Evidence = {
        "events": process.num_events,
        "canary_events": process.num_canary_events,
        "canary_sessions": sessions,
        "e_fail": process.e_fail,
        "e_pass": process.e_pass,
        "e_rate_below_tolerance": e_rate,
    }
    if process.e_fail >= 1 / plan.alpha_per_rule:
        return _result(gate, "fail", "the candidate has more bad sessions than its share explains", numbers)
    if process.e_pass >= 1 / plan.alpha:
        return _result(gate, "pass", f"not worse than stable by more than {plan.event_margin:.0%}", numbers)
    if e_rate >= 1 / plan.alpha:
        return _result(gate, "pass", f"bad sessions are rarer than {plan.event_rate_tolerance:.1%}", numbers)
    return _result(gate, "inconclusive", "too little evidence in either direction", numbers)


def _matched(evidence: LiveEvidence, plan: ReleasePlan) -> MatchedSamples | None:
    return match_samples(evidence.stable.samples, evidence.candidate.samples, plan.min_samples)


def _alphas(evidence: LiveEvidence, plan: ReleasePlan, matched: MatchedSamples) -> tuple[float, float]:
    """Return this look's chance of a false failure, and of a false pass.

    A pass that only leads to a larger share may be less certain than one that leads to promotion: what passed an early
    step wrongly meets the gate again, on new runs, and the share bounds how many users do.
    """
    to_pass = plan.alpha if evidence.share >= plan.ramp[-1].share else max(plan.alpha, plan.ramp_alpha)
    return plan.alpha_per_rule * matched.alpha_fraction, to_pass * matched.alpha_fraction


def _too_few(gate: str, evidence: LiveEvidence, plan: ReleasePlan) -> GateResult:
    counts = {"candidate_runs": len(evidence.candidate.samples), "stable_runs": len(evidence.stable.samples)}
    return _result(gate, "inconclusive", f"insufficient: each arm needs {plan.min_samples} runs", counts)


def _live_latency(evidence: LiveEvidence, plan: ReleasePlan) -> GateResult:
    """p95 of the candidate over p95 of stable, minus 1, below the limit, on matched traffic.

    The bounds decide while they clear the limit; once the arms weigh `full_samples` the point estimate does, so 14.9 %
    passes and 15.0 % fails. Mean-log durations see a slow-down earlier, and count where the p95 points the same way.
    """
    gate, matched = "latency_delta_lt_15_percent", _matched(evidence, plan)
    if matched is None:
        return _too_few(gate, evidence, plan)
    arms = tuple([sample.duration_ms for sample in samples] for samples in (matched.stable, matched.candidate))
    strict, loose = _alphas(evidence, plan, matched)
    tail, mean = p95_ratio(*arms, alpha=strict, alpha_high=loose), mean_log_ratio(*arms, alpha=strict)
    delta, high, early, limit = tail.ratio - 1, tail.high - 1, max(tail.low, mean.low) - 1, plan.latency_limit
    numbers = {"p95_delta": delta, "p95_delta_high": high, "mean_delta": mean.ratio - 1, "delta_low": early}
    numbers |= {"candidate_runs": len(matched.candidate), "stable_runs": len(matched.stable)}
    reason = f"p95 {delta:+.2%} against stable, limit {limit:+.0%}"
    is_slower, is_full = delta >= limit - _ROUNDING, matched.num_effective >= plan.full_samples
    if is_slower and (is_full or early >= limit - _ROUNDING):
        return _result(gate, "fail", reason, numbers)
    if not is_slower and (is_full or high < limit - _ROUNDING):
        return _result(gate, "pass", reason, numbers)
    return _result(gate, "inconclusive", f"{reason}, not yet certain", numbers)


def _live_cost(evidence: LiveEvidence, plan: ReleasePlan) -> GateResult:
    """Cost per successful completion not worse by more than the margin: bootstrap over sessions, seeded by the plan."""
    gate, matched = "cost_per_success_not_worse", _matched(evidence, plan)
    labelled = _labelled(matched.candidate) if matched else 0
    if matched is None or min(labelled, _labelled(matched.stable)) < plan.min_samples:
        return _too_few(gate, evidence, plan)
    limit = 1 + plan.cost_margin + _ROUNDING
    strict, loose = _alphas(evidence, plan, matched)
    rng = np.random.default_rng(plan.seed)  # fresh for each look: the same look gives the same verdict
    estimate = cost_per_success_ratio(matched.stable, matched.candidate, alpha=strict, alpha_high=loose, rng=rng)
    low, high = estimate.low, estimate.high
    numbers = {"ratio": estimate.ratio, "low": low, "high": high, "candidate_runs": len(matched.candidate)}
    reason = f"cost per success x {estimate.ratio:.3f} of stable's, limit x {1 + plan.cost_margin:.3f}"
    if low > limit and (math.isfinite(low) or _no_success_is_proof(matched, strict)):
        return _result(gate, "fail", reason, numbers)
    if high <= limit:
        return _result(gate, "pass", reason, numbers)
    return _result(gate, "inconclusive", f"{reason}, not yet certain", numbers)


def _labelled(samples: tuple[RequestSample, ...]) -> int:
    return sum(sample.success != "unknown" for sample in samples)


def _no_success_is_proof(matched: MatchedSamples, alpha: float) -> bool:
    """Whether no success at all would be unlikely for a candidate as good as stable: (1 - p)^n <= alpha."""
    rate = sum(sample.success == "yes" for sample in matched.stable) / _labelled(matched.stable)
    return (1 - rate) ** _labelled(matched.candidate) <= alpha


def _live_rollback(evidence: LiveEvidence, plan: ReleasePlan) -> GateResult:
    """Slowest drill of this release under the bound, and none too old."""
    gate = "rollback_under_5_minutes"
    if not evidence.drills:
        return _result(gate, "inconclusive", "no rollback drill was run for this release", {})
    slowest = max(drill.seconds for drill in evidence.drills)
    age = evidence.now - max(drill.at for drill in evidence.drills)
    numbers = {"slowest_s": slowest, "age_s": age, "drills": len(evidence.drills)}
    if age > plan.drill_max_age_s:
        return _result(gate, "fail", f"the last drill is {age:.0f} s old, at most {plan.drill_max_age_s:.0f}", numbers)
    verdict: Verdict = "pass" if slowest < plan.max_rollback_s else "fail"
    return _result(gate, verdict, f"slowest drill {slowest:.2f} s, limit {plan.max_rollback_s:.0f} s", numbers)


# --- offline ----------------------------------------------------------------------------------------------------------
def evaluate_offline(report: EvalReport, plan: ReleasePlan) -> tuple[GateResult, ...]:
    """Evaluate those gates and stop rules of the plan that a report can answer, before any traffic."""
    return tuple(gate.offline(report, plan) for gate in map(GATES.__getitem__, _rules(plan)) if gate.offline)


def may_enter_canary(results: tuple[GateResult, ...], plan: ReleasePlan) -> bool:
    """Whether the offline results allow live traffic: every gate passed and no stop rule failed."""
    gates = [result for result in results if result.gate in plan.gates]
    return bool(gates) and all(r.verdict == "pass" for r in gates) and all(r.verdict != "fail" for r in results)


def _offline_safety(report: EvalReport, plan: ReleasePlan) -> GateResult:
    """Tasks with a violation, paired; a violation of a critical check fails at once."""
    gate = "no_safety_regression"
    stable, candidate = (_violating(suites) for suites in (report.baseline, report.candidate))
    by_task = [found for suite in report.candidate.values() for found in suite.violations_by_task.values()]
    critical = sorted({name for found in by_task for name in found} & set(plan.critical_checks))
    if critical:
        return _result(gate, "fail", _critical_reason(critical), {"critical": critical[0]})
    num_tasks = sum(suite.num_tasks for suite in report.candidate.values())
    return _paired_result(gate, len(candidate - stable), len(stable - candidate), num_tasks, plan.alpha)


def _offline_success(report: EvalReport, plan: ReleasePlan) -> GateResult:
    """Failed tasks, paired by task id and seed."""
    stable, candidate = (_failing(suites) for suites in (report.baseline, report.candidate))
    num_tasks = sum(len(suite.success_by_task) for suite in report.candidate.values())
    newly, fixed = len(candidate - stable), len(stable - candidate)
    return _paired_result("task_success_not_worse", newly, fixed, num_tasks, plan.alpha)


def _paired_result(gate: str, newly_bad: int, fixed: int, num_tasks: int, alpha: float) -> GateResult:
    """Exact one-sided McNemar test on the tasks where the two policies differ."""
    p_value = mcnemar_p_value(newly_bad, fixed)
    numbers = {"newly_bad": newly_bad, "fixed": fixed, "num_tasks": num_tasks, "p_value": p_value}
    reason = f"{newly_bad} tasks newly bad, {fixed} fixed, of {num_tasks} (p = {p_value:.3f})"
    if num_tasks < _MIN_OFFLINE_TASKS:
        return _result(gate, "inconclusive", f"insufficient: {num_tasks} of {_MIN_OFFLINE_TASKS} tasks", numbers)
    if p_value < alpha:
        return _result(gate, "fail", reason, numbers)
    return _result(gate, "pass" if newly_bad <= fixed else "inconclusive", reason, numbers)


def _offline_latency(report: EvalReport, plan: ReleasePlan) -> GateResult:
    """Worst p95 ratio over the suites, minus 1, below the limit."""
    gate, pairs = "latency_delta_lt_15_percent", _ordinary_pairs(report)
    if not pairs or min(stable.p95_duration_ms for stable, _ in pairs) <= 0:
        return _result(gate, "inconclusive", f"insufficient: no suite with {_MIN_OFFLINE_TASKS} timed tasks", {})
    delta = max(candidate.p95_duration_ms / stable.p95_duration_ms for stable, candidate in pairs) - 1
    verdict: Verdict = "pass" if delta < plan.latency_limit - _ROUNDING else "fail"
    reason = f"worst p95 {delta:+.2%} against baseline, limit {plan.latency_limit:+.0%}"
    return _result(gate, verdict, reason, {"p95_delta": delta})


def _offline_cost(report: EvalReport, plan: ReleasePlan) -> GateResult:
    """Worst ratio of costs per success over the suites: a point comparison, for the suites are the same tasks."""
    gate, pairs = "cost_per_success_not_worse", _ordinary_pairs(report)
    if not pairs or any(not 0 < stable.cost_per_success < math.inf for stable, _ in pairs):
        return _result(gate, "inconclusive", "insufficient: the baseline has no success to compare with", {})
    ratio = max(candidate.cost_per_success / stable.cost_per_success for stable, candidate in pairs)
    verdict: Verdict = "pass" if ratio <= 1 + plan.cost_margin + _ROUNDING else "fail"
    return _result(gate, verdict, f"worst cost per success x {ratio:.3f} of the baseline's", {"ratio": ratio})


def _ordinary_pairs(report: EvalReport) -> list[tuple[SuiteResult, SuiteResult]]:
    """(baseline, candidate) of each big enough suite that looks like traffic."""
    names = sorted((set(report.baseline) & set(report.candidate)) - {_ADVERSARIAL})
    pairs = [(report.baseline[name], report.candidate[name]) for name in names]
    return [pair for pair in pairs if min(suite.num_tasks for suite in pair) >= _MIN_OFFLINE_TASKS]


def _violating(suites: Mapping[str, SuiteResult]) -> set[tuple[str, str]]:
    return {(name, task) for name, suite in suites.items() for task, found in suite.violations_by_task.items() if found}


def _failing(suites: Mapping[str, SuiteResult]) -> set[tuple[str, str]]:
    return {(name, task) for name, suite in suites.items() for task, won in suite.success_by_task.items() if not won}


# --- registry ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """One gate in both forms; `offline` is None where only a deployment can answer."""

    live: LiveGate
    offline: OfflineGate | None


GATES: Final[Mapping[str, Gate]] = {
    "no_safety_regression": Gate(live=_live_safety, offline=_offline_safety),
    "latency_delta_lt_15_percent": Gate(live=_live_latency, offline=_offline_latency),
    "cost_per_success_not_worse": Gate(live=_live_cost, offline=_offline_cost),
    "rollback_under_5_minutes": Gate(live=_live_rollback, offline=None),
    "task_success_not_worse": Gate(live=_live_success, offline=_offline_success),
}


def nearest_gate(name: str) -> str:
    """Return the gate whose name is most like `name`, for the remedy of a misspelling."""
    return difflib.get_close_matches(name, GATES, n=1, cutoff=0.0)[0]


def check_gate_names(plan: ReleasePlan) -> None:
    """Refuse a plan with an unknown gate or stop rule, naming the nearest one."""
    for name in _rules(plan):
        if name not in GATES:
            raise BadInputError("gate", name, f"unknown gate; did you mean {nearest_gate(name)!r}?")


def _rules(plan: ReleasePlan) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*plan.gates, *plan.stop_rules)))


def _result(gate: str, verdict: Verdict, reason: str, evidence: Evidence) -> GateResult:
    return GateResult(gate=gate, verdict=verdict, evidence=evidence, reason=reason)
