"""Cost per successful completion not worse by more than `cost_margin`."""

from __future__ import annotations

import math

import numpy as np

from rl_actors.contracts import EvalReport
from serving.contracts import LiveEvidence, ReleasePlan, RequestSample
from serving.gates.comparison import ROUNDING, MatchedArms, match_arms, ordinary_pairs, too_few
from serving.gates.registry import Finding, gate
from serving.gates.statistics import cost_per_success_ratio


def compare_suite_cost(report: EvalReport, plan: ReleasePlan) -> Finding:
    """Compare the costs of each suite, point by point, for both policies had the same tasks; the worst ratio counts."""
    pairs = ordinary_pairs(report)
    if not pairs or any(not 0 < stable.cost_per_success < math.inf for stable, _ in pairs):
        return "inconclusive", "insufficient: the baseline has no success to compare with", {}
    ratio = max(candidate.cost_per_success / stable.cost_per_success for stable, candidate in pairs)
    verdict = "pass" if ratio <= 1 + plan.cost_margin + ROUNDING else "fail"
    return verdict, f"worst cost per success x {ratio:.3f} of the baseline's", {"ratio": ratio}


@gate("cost_per_success_not_worse", offline=compare_suite_cost)
def compare_live_cost(evidence: LiveEvidence, plan: ReleasePlan) -> Finding:
    """Compare matched traffic by a bootstrap over sessions."""
    arms = match_arms(evidence, plan)
    if arms is None or min(_num_labelled(arms.candidate), _num_labelled(arms.stable)) < plan.min_samples:
        return too_few(evidence, plan)
    limit = 1 + plan.cost_margin + ROUNDING
    found = cost_per_success_ratio(
        arms.stable,
        arms.candidate,
        alpha=arms.alpha_fail,
        alpha_high=arms.alpha_pass,
        rng=np.random.default_rng(plan.seed),  # fresh for each look: the same look gives the same verdict
    )
    numbers = {"ratio": found.ratio, "low": found.low, "high": found.high, "candidate_runs": len(arms.candidate)}
    reason = f"cost per success x {found.ratio:.3f} of stable's, limit x {1 + plan.cost_margin:.3f}"
    if found.low > limit and (math.isfinite(found.low) or _is_no_success_proof(arms)):
        return "fail", reason, numbers
    if found.high <= limit:
        return "pass", reason, numbers
    return "inconclusive", f"{reason}, not yet certain", numbers


def _num_labelled(samples: tuple[RequestSample, ...]) -> int:
    return sum(sample.success != "unknown" for sample in samples)


def _is_no_success_proof(arms: MatchedArms) -> bool:
    """Whether no success at all would be unlikely for a candidate as good as stable: (1 - p)^n <= alpha."""
    rate = sum(sample.success == "yes" for sample in arms.stable) / _num_labelled(arms.stable)
    return (1 - rate) ** _num_labelled(arms.candidate) <= arms.alpha_fail
