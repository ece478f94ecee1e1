"""Sample ratio: sessions must have been split as declared."""

from __future__ import annotations

from serving.contracts import GateResult, GateResults, LiveEvidence, ReleasePlan
from serving.gates import sample_ratio_check
from serving.release.monitors.registry import alarm


@alarm
def watch_sample_ratio(evidence: LiveEvidence, plan: ReleasePlan) -> GateResults:
    """Find this ramp step's sessions invalid where their split has a p-value below `sample_ratio_alpha`."""
    canary, total = evidence.epoch_sessions
    p_value = sample_ratio_check(canary, total, evidence.share)
    if p_value >= plan.sample_ratio_alpha:
        return ()
    # Whatever differs between the arms may now be the split, not the candidate.
    reason = f"{canary} of {total} sessions were canary at a share of {evidence.share:g} (p = {p_value:.2g})"
    return (
        GateResult(
            gate="sample_ratio",
            verdict="invalid",
            evidence={"p_value": p_value},
            reason=f"sample-ratio mismatch: {reason}",
        ),
    )
