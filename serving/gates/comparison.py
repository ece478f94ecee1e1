"""Comparisons that more than one gate makes: bad sessions by arm, tasks in pairs, samples up to the same look."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from rl_actors.contracts import EvalReport, SuiteResult
from rl_actors.evaluation import mcnemar_p_value
from serving.contracts import ArmEvent, LiveEvidence, ReleasePlan, RequestSample
from serving.gates.registry import Finding
from serving.gates.statistics import EventEProcess, look_at, rate_below_e_value

MIN_OFFLINE_TASKS: Final = 20
ROUNDING: Final = 1e-9  # a value that is the limit but for its last bits is on the limit


def compare_events(events: tuple[ArmEvent, ...], evidence: LiveEvidence, plan: ReleasePlan) -> Finding:
    """Fail on proof of harm; pass on proof of non-inferiority, or of a bad-session rate below the tolerance."""
    process = EventEProcess(evidence.share, plan.event_margin)
    for event in events:
        process.observe(event.is_canary, event.share)
    # The ledger grows between its reads: the events, read later, may be ahead of the sessions.
    sessions = max(evidence.canary_sessions, process.num_canary_events)
    e_rate = rate_below_e_value(process.num_canary_events, sessions, plan.event_rate_tolerance)
    numbers = {
        "events": process.num_events,
        "canary_events": process.num_canary_events,
        "canary_sessions": sessions,
        "e_fail": process.e_fail,
        "e_pass": process.e_pass,
        "e_rate_below_tolerance": e_rate,
    }
    if process.e_fail >= 1 / plan.alpha_per_rule:
        return "fail", "the candidate has more bad sessions than its share explains", numbers
    if process.e_pass >= 1 / plan.alpha:
        return "pass", f"not worse than stable by more than {plan.event_margin:.0%}", numbers
    # Where events are rare in both arms, no comparison of them would ever be proof.
    if e_rate >= 1 / plan.alpha:
        return "pass", f"bad sessions are rarer than {plan.event_rate_tolerance:.1%}", numbers
    return "inconclusive", "too little evidence in either direction", numbers


def compare_tasks(
    report: EvalReport, bad_tasks: Callable[[SuiteResult], Iterable[str]], num_tasks: int, plan: ReleasePlan
) -> Finding:
    """Exact one-sided McNemar test on the tasks, paired by suite and id, where the two policies differ."""
    stable, candidate = (
        {(name, task) for name, suite in suites.items() for task in bad_tasks(suite)}
        for suites in (report.baseline, report.candidate)
    )
    newly_bad, fixed = len(candidate - stable), len(stable - candidate)
    p_value = mcnemar_p_value(newly_bad, fixed)
    numbers = {"newly_bad": newly_bad, "fixed": fixed, "num_tasks": num_tasks, "p_value": p_value}
    reason = f"{newly_bad} tasks newly bad, {fixed} fixed, of {num_tasks} (p = {p_value:.3f})"
    if num_tasks < MIN_OFFLINE_TASKS:
        return "inconclusive", f"insufficient: {num_tasks} of {MIN_OFFLINE_TASKS} tasks", numbers
    if p_value < plan.alpha:
        return "fail", reason, numbers
    return "pass" if newly_bad <= fixed else "inconclusive", reason, numbers


def ordinary_pairs(report: EvalReport) -> list[tuple[SuiteResult, SuiteResult]]:
    """Return (baseline, candidate) of each suite with at least MIN_OFFLINE_TASKS in both that looks like traffic."""
    # Hostile prompts are not traffic: what they take says nothing about what users will wait and pay for.
    names = sorted((set(report.baseline) & set(report.candidate)) - {"adversarial"})
    pairs = [(report.baseline[name], report.candidate[name]) for name in names]
    return [pair for pair in pairs if min(suite.num_tasks for suite in pair) >= MIN_OFFLINE_TASKS]


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchedArms:
    """Samples of both arms up to the last planned look, and that look's chances of a false fail and a false pass."""

    stable: tuple[RequestSample, ...]
    candidate: tuple[RequestSample, ...]
    alpha_fail: float
    alpha_pass: float

    @property
    def num_effective(self) -> float:
        """n m / (n + m) of n and m samples: the variance of a difference goes with 1/n + 1/m."""
        n, m = len(self.candidate), len(self.stable)
        return n * m / (n + m)


def match_arms(evidence: LiveEvidence, plan: ReleasePlan) -> MatchedArms | None:
    """Return both arms as of the last planned look; None while either has fewer than `min_samples` requests."""
    look = look_at(len(evidence.candidate.samples), plan.min_samples)
    if look is None:
        return None
    candidate = evidence.candidate.samples[: look.num_samples]
    stable = tuple(one for one in evidence.stable.samples if one.completed_at <= candidate[-1].completed_at)
    if len(stable) < plan.min_samples:
        return None
    # A pass that only leads to a larger share may be less certain than one that leads to promotion: what passed an
    # early step wrongly meets the gate again, on new requests, and the share bounds how many users do.
    alpha_pass = plan.alpha if evidence.share >= plan.ramp[-1].share else max(plan.alpha, plan.ramp_alpha)
    return MatchedArms(
        stable=stable,
        candidate=candidate,
        alpha_fail=plan.alpha_per_rule * look.alpha_fraction,
        alpha_pass=alpha_pass * look.alpha_fraction,
    )


def too_few(evidence: LiveEvidence, plan: ReleasePlan) -> Finding:
    """Say that an arm has fewer requests than the first look needs."""
    counts = {"candidate_runs": len(evidence.candidate.samples), "stable_runs": len(evidence.stable.samples)}
    return "inconclusive", f"insufficient: each arm needs {plan.min_samples} runs", counts
