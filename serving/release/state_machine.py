"""The release as a pure state machine: `decide` reads verdicts, `next_state` follows a decision. No I/O, no clock.

Preparing -> Drilling -> Canary(0) -> Canary(1) ... -> Promoting -> Promoted
any of them -> Restoring -> RolledBack | FailedBack | Halted
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final, assert_never

from serving.contracts import (
    Advance,
    Canary,
    Decision,
    Drilling,
    Ending,
    FailedBack,
    GateResult,
    GateResults,
    Halt,
    Halted,
    Hold,
    Preparing,
    Promote,
    Promoted,
    Promoting,
    Release,
    ReleasePlan,
    ReleaseState,
    Restoring,
    RollBack,
    RolledBack,
    SplitRecord,
)

ACKNOWLEDGED: Final = "split_acknowledged"
HEALTHY: Final = "candidate_healthy"
ENOUGH_TRAFFIC: Final = "enough_traffic"

SAFE: Final = (Restoring, RolledBack, FailedBack, Halted)  # all traffic is back at stable, or on its way there
TERMINAL: Final = (Promoted, RolledBack, FailedBack, Halted)


def traffic_result(num_requests: int, min_requests: int) -> GateResult:
    """Say whether a ramp step has carried the candidate requests it asks for."""
    return GateResult(
        gate=ENOUGH_TRAFFIC,
        verdict="pass" if num_requests >= min_requests else "inconclusive",
        evidence={"num_runs": num_requests},
        reason=f"{num_requests} of {min_requests} candidate runs",
    )


def decide(state: ReleaseState, results: GateResults, plan: ReleasePlan, now: float) -> Decision:
    """Choose what to do next. `results` holds gate verdicts, and those named by the constants of this module."""
    stop = _decide_stop(results)
    match state:
        case Preparing():
            return stop or Advance(reason="time the rollback path before any user traffic", evidence=results)
        case Drilling(started_at=since) | Promoting(decided_at=since):
            return stop or _decide_waiting("split", results, RollBack, now - since, plan.max_rollback_s)
        case Canary():
            return stop or _decide_canary(state, results, plan, now)
        case Restoring():
            # No verdict can turn a roll back around: only acknowledgement counts.
            return _decide_waiting("safe split", results, Halt, now - state.detected_at, plan.max_rollback_s)
        case Promoted() | RolledBack() | FailedBack() | Halted():
            return Hold(reason="the release is over", evidence=results)
        case _:
            assert_never(state)


def _decide_stop(results: GateResults) -> RollBack | Halt | None:
    # In this order: a candidate that is proven bad goes, also where another comparison is broken.
    for verdict, kind in (("fail", RollBack), ("invalid", Halt)):
        found = [result for result in results if result.verdict == verdict]
        if found:
            return kind(reason="; ".join(f"{r.gate}: {r.reason}" for r in found), evidence=results)
    return None


def _decide_waiting(
    split: str, results: GateResults, late: type[RollBack | Halt], waited_s: float, limit_s: float
) -> Decision:
    if _has_passed(ACKNOWLEDGED, results):
        return Advance(reason=f"every gateway acknowledged the {split}", evidence=results)
    if waited_s > limit_s:
        return late(reason=f"{split} not acknowledged within {limit_s:g} s", evidence=results)
    return Hold(reason=f"waiting for the gateways to acknowledge the {split}", evidence=results)


def _decide_canary(state: Canary, results: GateResults, plan: ReleasePlan, now: float) -> Decision:
    step = plan.ramp[state.step]
    waiting = ", ".join(name for name in (*plan.gates, ENOUGH_TRAFFIC) if not _has_passed(name, results))
    if not waiting:
        return _decide_passed(state, results, plan)
    for bound, since, limit_s in (
        (f"step {state.step + 1}: ", state.step_started_at, step.max_duration_s),
        ("", state.release_started_at, plan.max_duration_s),
    ):
        if now - since > limit_s:
            return RollBack(reason=f"no evidence within {bound}{limit_s:g} s; missing {waiting}", evidence=results)
    return Hold(reason=f"waiting for {waiting}", evidence=results)


def _decide_passed(state: Canary, results: GateResults, plan: ReleasePlan) -> Decision:
    if state.step + 1 < len(plan.ramp):
        return Advance(reason=f"all gates passed; on to {plan.ramp[state.step + 1].share:.0%}", evidence=results)
    if not plan.may_promote:
        return RollBack(reason="end of the rollback drill, which never promotes", evidence=results)
    return Promote(reason="all gates passed at the last step", evidence=results)


def _has_passed(gate: str, results: GateResults) -> bool:
    # A result that is missing is no data, hence no pass.
    return any(result.gate == gate and result.verdict == "pass" for result in results)


def next_state(state: ReleaseState, decision: Decision, now: float) -> ReleaseState:
    """Follow a decision. Raises ValueError for one that the state does not allow."""
    match decision:
        case Hold():
            return state
        case RollBack() | Halt():
            return _restore(state, decision, now)
        case Promote():
            if isinstance(state, Canary):
                return Promoting(decided_at=now, epoch=state.epoch + 1)
        case Advance():
            return _advance(state, now)
        case _:
            assert_never(decision)
    raise ValueError(f"{type(decision).__name__} is not allowed in {state}")


def _restore(state: ReleaseState, decision: RollBack | Halt, now: float) -> ReleaseState:
    if isinstance(state, Restoring) and isinstance(decision, Halt):
        return Halted(reason=f"{state.reason}; {decision.reason}")
    if isinstance(state, SAFE):
        raise ValueError(f"{type(decision).__name__} is not allowed in {state}")
    ending: Ending = "halted" if isinstance(decision, Halt) else "rolled_back"
    if isinstance(state, Promoted):
        ending = "failed_back"
    return Restoring(ending=ending, reason=decision.reason, detected_at=now, epoch=state.epoch + 1)


def _advance(state: ReleaseState, now: float) -> ReleaseState:
    match state:
        case Preparing(epoch=epoch):
            return Drilling(started_at=now, epoch=epoch + 1)
        case Drilling(epoch=epoch):
            return Canary(step=0, epoch=epoch + 1, step_started_at=now, release_started_at=now)
        case Canary(step=step, epoch=epoch):
            return replace(state, step=step + 1, epoch=epoch + 1, step_started_at=now)
        case Promoting(epoch=epoch):
            return Promoted(at=now, epoch=epoch)
        case Restoring():
            return _end(state, now)
        case Promoted() | RolledBack() | FailedBack() | Halted():
            raise ValueError(f"Advance is not allowed in {state}")
        case _:
            assert_never(state)


def _end(state: Restoring, now: float) -> ReleaseState:
    recovery_s = now - state.detected_at
    match state.ending:
        case "rolled_back":
            return RolledBack(reason=state.reason, time_to_recovery_s=recovery_s)
        case "failed_back":
            return FailedBack(reason=state.reason, time_to_recovery_s=recovery_s)
        case "halted":
            return Halted(reason=state.reason)
        case _:
            assert_never(state.ending)


def leave_out_absence(state: Canary, absent_s: float) -> tuple[Canary, Hold]:
    """Return a canary whose clock leaves out `absent_s` seconds without a controller, and the decision to record."""
    after = replace(
        state,
        step_started_at=state.step_started_at + absent_s,
        release_started_at=state.release_started_at + absent_s,
    )
    reason = f"resumed after {absent_s:.0f} s without a controller: the candidate had no traffic, they do not count"
    return after, Hold(reason=reason, evidence=())


def desired_split(state: ReleaseState, release: Release, plan: ReleasePlan, now: float) -> SplitRecord | None:
    """Return the split a state asks for; None where it asks for nothing."""
    stable, candidate, share = release.stable, "", 0.0
    match state:
        case Drilling(epoch=epoch):
            candidate = release.candidate
        case Canary(step=step, epoch=epoch):
            candidate, share = release.candidate, plan.ramp[step].share
        case Promoting(epoch=epoch) | Promoted(epoch=epoch):
            stable = release.candidate
        case Restoring(epoch=epoch):
            pass
        case Preparing() | RolledBack() | FailedBack() | Halted():
            return None
        case _:
            assert_never(state)
    salt = release.release_id
    return SplitRecord(epoch=epoch, stable=stable, candidate=candidate, share=share, salt=salt, updated_at=now)
