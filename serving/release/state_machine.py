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


TERMINAL: Final = (Promoted, RolledBack, FailedBack, Halted)


Results = tuple[GateResult, ...]


def decide(state: ReleaseState, results: Results, plan: ReleasePlan, now: float) -> Decision:
    """Choose what to do next. `results` holds gate verdicts, and those named by the constants of this module."""
    match state:
        case Promoted() | RolledBack() | FailedBack() | Halted():
            return Hold(reason="the release is over", evidence=results)
        case Restoring():
            return _decide_restoring(state, results, plan, now)
        case Preparing() | Drilling() | Canary() | Promoting():
            return _stopped(results) or _decide_moving(state, results, plan, now)
        case _:
            assert_never(state)


def _stopped(results: Results) -> RollBack | Halt | None:
    """One fail is enough to roll back; an invalid comparison stops for a human."""
    for verdict, kind in (("fail", RollBack), ("invalid", Halt)):
        found = [result for result in results if result.verdict == verdict]
        if found:
            return kind(reason="; ".join(f"{r.gate}: {r.reason}" for r in found), evidence=results)
    return None


def _decide_moving(
    state: Preparing | Drilling | Canary | Promoting, results: Results, plan: ReleasePlan, now: float
) -> Decision:
    match state:
        case Preparing():
            return Advance(reason="time the rollback path before any user traffic", evidence=results)
        case Drilling(started_at=since) | Promoting(decided_at=since):
            if _passed(ACKNOWLEDGED, results):
                return Advance(reason="every gateway acknowledged the split", evidence=results)
            if now - since > plan.max_rollback_s:
                return RollBack(reason=f"split not acknowledged within {plan.max_rollback_s:g} s", evidence=results)
            return Hold(reason="waiting for the gateways to acknowledge the split", evidence=results)
        case Canary():
            return _decide_canary(state, results, plan, now)
        case _:
            assert_never(state)


def _decide_canary(state: Canary, results: Results, plan: ReleasePlan, now: float) -> Decision:
    step = plan.ramp[state.step]
    waiting = [name for name in (*plan.gates, ENOUGH_TRAFFIC) if not _passed(name, results)]
    if not waiting:
        return _decide_passed(state, results, plan)
    if now - state.step_started_at > step.max_duration_s:
        return _without_evidence(f"step {state.step + 1}: {step.max_duration_s:g} s", waiting, results)
    if now - state.release_started_at > plan.max_duration_s:
        return _without_evidence(f"{plan.max_duration_s:g} s", waiting, results)
    return Hold(reason=f"waiting for {', '.join(waiting)}", evidence=results)


def _without_evidence(bound: str, waiting: list[str], results: Results) -> RollBack:
    return RollBack(reason=f"no evidence within {bound}; missing {', '.join(waiting)}", evidence=results)


def _decide_passed(state: Canary, results: Results, plan: ReleasePlan) -> Decision:
    if state.step + 1 < len(plan.ramp):
        return Advance(reason=f"all gates passed; on to {plan.ramp[state.step + 1].share:.0%}", evidence=results)
    if not plan.may_promote:
        return RollBack(reason="end of the rollback drill, which never promotes", evidence=results)
    return Promote(reason="all gates passed at the last step", evidence=results)


def _decide_restoring(state: Restoring, results: Results, plan: ReleasePlan, now: float) -> Decision:
    """A roll back under way looks at nothing but acknowledgement: no verdict can turn it around."""
    if _passed(ACKNOWLEDGED, results):
        return Advance(reason="every gateway acknowledged the safe split", evidence=results)
    if now - state.detected_at > plan.max_rollback_s:
        return Halt(reason=f"safe split not acknowledged within {plan.max_rollback_s:g} s", evidence=results)
    return Hold(reason="waiting for the gateways to acknowledge the safe split", evidence=results)


def _passed(gate: str, results: Results) -> bool:
    """Whether a result for this gate exists and passed: a missing one is no data, hence no pass."""
    return any(result.gate == gate and result.verdict == "pass" for result in results)


def next_state(state: ReleaseState, decision: Decision, now: float) -> ReleaseState:
    """Follow a decision. Raises ValueError for one that the state does not allow."""
    match decision:
        case Hold():
            return state
        case RollBack() | Halt():
            return _restored(state, decision, now)
        case Promote():
            if isinstance(state, Canary):
                return Promoting(decided_at=now, epoch=state.epoch + 1)
        case Advance():
            return _advanced(state, now)
        case _:
            assert_never(decision)
    raise ValueError(f"{type(decision).__name__} is not allowed in {state}")


def _restored(state: ReleaseState, decision: RollBack | Halt, now: float) -> ReleaseState:
    if isinstance(state, Restoring) and isinstance(decision, Halt):
        return Halted(reason=f"{state.reason}; {decision.reason}")
    if isinstance(state, Restoring | RolledBack | FailedBack | Halted):
        raise ValueError(f"{type(decision).__name__} is not allowed in {state}")
    ending: Ending = "halted" if isinstance(decision, Halt) else "rolled_back"
    if isinstance(state, Promoted):
        ending = "failed_back"
    return Restoring(ending=ending, reason=decision.reason, detected_at=now, epoch=state.epoch + 1)


def _advanced(state: ReleaseState, now: float) -> ReleaseState:
    match state:
        case Preparing(epoch=epoch):
            return Drilling(started_at=now, epoch=epoch + 1)
        case Drilling(epoch=epoch):
            return Canary(step=0, epoch=epoch + 1, step_started_at=now, release_started_at=now)
        case Canary(step=step, epoch=epoch, release_started_at=since):
            return Canary(step=step + 1, epoch=epoch + 1, step_started_at=now, release_started_at=since)
        case Promoting(epoch=epoch):
            return Promoted(at=now, epoch=epoch)
        case Restoring():
            return _ended(state, now)
        case Promoted() | RolledBack() | FailedBack() | Halted():
            raise ValueError(f"Advance is not allowed in {state}")
        case _:
            assert_never(state)


def _ended(state: Restoring, now: float) -> ReleaseState:
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


def woken(state: Canary, asleep_s: float) -> tuple[Canary, Hold]:
    """Return a canary whose clock leaves out `asleep_s` seconds without a controller, and the decision that says so."""
    after = replace(
        state,
        step_started_at=state.step_started_at + asleep_s,
        release_started_at=state.release_started_at + asleep_s,
    )
    reason = f"resumed after {asleep_s:.0f} s without a controller: the candidate had no traffic, they do not count"
    return after, Hold(reason=reason, evidence=())


def desired_split(state: ReleaseState, release: Release, plan: ReleasePlan, now: float) -> SplitRecord | None:
    """Return the split a state asks for; None where it asks for nothing."""
    match state:
        case Drilling(epoch=epoch):
            stable, candidate, share = release.stable, release.candidate, 0.0
        case Canary(step=step, epoch=epoch):
            stable, candidate, share = release.stable, release.candidate, plan.ramp[step].share
        case Promoting(epoch=epoch) | Promoted(epoch=epoch):
            stable, candidate, share = release.candidate, "", 0.0
        case Restoring(epoch=epoch):
            stable, candidate, share = release.stable, "", 0.0
        case Preparing() | RolledBack() | FailedBack() | Halted():
            return None
        case _:
            assert_never(state)
    salt = release.release_id
    return SplitRecord(epoch=epoch, stable=stable, candidate=candidate, share=share, salt=salt, updated_at=now)
