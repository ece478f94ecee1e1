"""The release controller: observe -> decide -> act -> record, one tick at a time, durable at every point.

Nothing lives in memory between ticks: each tick reads the last row of `decisions.jsonl`, makes the split agree with
that state, and goes on. A kill -9 at any point is therefore followed by an ordinary tick.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from rl_actors.contracts import EngineError, StageRefusedError
from rl_actors.durable import file_lock
from serving.contracts import (
    ArmEvent,
    Canary,
    Decision,
    Drill,
    Drilling,
    EventKind,
    GateResult,
    GateResults,
    LiveEvidence,
    Preparing,
    Promoted,
    Promoting,
    Release,
    ReleasePlan,
    ReleaseState,
    Restoring,
    RollBack,
    SplitRecord,
)
from serving.gates import check_gate_names
from serving.release.monitors import evaluate_live
from serving.release.state_machine import (
    ACKNOWLEDGED,
    HEALTHY,
    SAFE,
    TERMINAL,
    decide,
    desired_split,
    leave_out_absence,
    next_state,
    traffic_result,
)
from serving.split import SplitStore
from serving.store import DecisionLog, RequestLedger

_POLL_S: Final = 0.05
_LOCK: Final = "controller.lock"


class ReleasePlatform(Protocol):
    """What the serving platform does for a release. Every call is idempotent and may raise InfrastructureError."""

    def set_split(self, record: SplitRecord) -> None:
        """Hurry an already durable record to the gateways; may do nothing where they poll it."""

    def acknowledged_epoch(self) -> int:
        """Return the lowest split epoch by which any live gateway still routes."""
        ...

    def candidate_healthy(self) -> bool:
        """Whether the candidate's engine answers; an EngineError counts as no."""
        ...


class Aliases(Protocol):
    """Registry aliases `stable` and `candidate`. Every call is idempotent."""

    def alias_version(self, alias: str) -> str:
        """Return the name of the version an alias names; empty for none."""
        ...

    def move(self, alias: str, version: str) -> None:
        """Let an alias name a version."""

    def clear(self, alias: str) -> None:
        """Let an alias name nothing."""


class EvidenceSource(Protocol):
    """Where live evidence comes from."""

    def collect(self, release: Release, state: Canary, drills: tuple[Drill, ...], now: float) -> LiveEvidence:
        """Gather what the gates need at this ramp step."""
        ...


class LedgerEvidence:
    """Live evidence from the ledger and the split history: only this release's epochs, never offline requests."""

    def __init__(self, ledger: RequestLedger, splits: SplitStore) -> None:
        self._ledger, self._splits = ledger, splits

    def collect(self, release: Release, state: Canary, drills: tuple[Drill, ...], now: float) -> LiveEvidence:
        """Gather windows of this step, and events of all steps, of one release."""
        records = self._splits.history().values()
        shares = {r.epoch: r.share for r in records if r.salt == release.release_id and r.share > 0}
        return LiveEvidence(
            stable=self._ledger.window(release.stable, "general", epoch=state.epoch),
            candidate=self._ledger.window(release.candidate, "canary", epoch=state.epoch),
            share=shares[state.epoch],
            epoch_sessions=self._ledger.session_counts([state.epoch]),
            canary_sessions=self._ledger.session_counts(shares)[0],
            failed_checks=self._ledger.failed_checks(release.candidate, shares),
            safety_events=self._first_events(("violation", "override"), release, shares),
            failure_events=self._first_events(("failure", "override"), release, shares),
            drills=drills,
            now=now,
        )

    def _first_events(
        self, kinds: tuple[EventKind, ...], release: Release, shares: Mapping[int, float]
    ) -> tuple[ArmEvent, ...]:
        # Later events of a session fall into the same arm and prove nothing new.
        first: dict[str, ArmEvent] = {}
        for event in self._ledger.events(kinds, epochs=shares):
            if event.policy_version in {release.stable, release.candidate}:
                is_canary, share = event.policy_version == release.candidate, shares[event.split_epoch]
                first.setdefault(event.session_key, ArmEvent(is_canary=is_canary, share=share))
        return tuple(first.values())


@dataclass(kw_only=True)
class ReleaseController:
    """Drives one release to its end. Ticks on one directory exclude each other across processes.

    `directory` is the release's own; `clock` gives Unix seconds. Nothing is touched before the first tick.

    Raises:
        BadInputError: The plan names an unknown gate.
    """

    release: Release = field(kw_only=False)
    plan: ReleasePlan = field(kw_only=False)
    directory: Path
    splits: SplitStore
    platform: ReleasePlatform
    evidence: EvidenceSource
    aliases: Aliases
    clock: Callable[[], float]
    sleep: Callable[[float], None]

    def __post_init__(self) -> None:
        check_gate_names(self.plan)
        self.log, self._has_ticked = DecisionLog(self.directory), False

    def run(self) -> ReleaseState:
        """Tick until the release is over; waits `tick_s` only while the canary carries traffic."""
        state = self.tick()
        while not isinstance(state, TERMINAL):
            if isinstance(state, Canary):
                self.sleep(self.plan.tick_s)
            state = self.tick()
        return state

    def tick(self) -> ReleaseState:
        """Take one step: load, observe, decide, act, record. Returns the state it leaves behind."""
        with file_lock(self.directory / _LOCK):
            state = self._leave_out_absence(self._load_state())
            if isinstance(state, TERMINAL):
                return state
            # Refreshed, or it would go stale; said again, for a kill may have swallowed the first time.
            if not isinstance(state, Preparing) and (record := self.splits.refresh(self.clock())):
                self.platform.set_split(record)
            results = self._observe(state)
            now = self.clock()
            return self._act(state, decide(state, results, self.plan, now), now)

    def roll_back(self, *, actor: str, reason: str) -> ReleaseState:
        """Give all traffic back to stable at once, on a human's word; a promoted release fails back."""
        with file_lock(self.directory / _LOCK):
            state = self._load_state()
            if isinstance(state, SAFE):
                return state
            decision = RollBack(reason=f"{actor}: {reason}", evidence=())
            return self._act(state, decision, self.clock())

    # --- observe ------------------------------------------------------------------------------------------------------

    def _observe(self, state: ReleaseState) -> GateResults:
        if isinstance(state, Restoring):
            return (self._await_acknowledgement(state.epoch),)
        health = self._check_health()
        if health.verdict == "fail" or not isinstance(state, Drilling | Canary | Promoting):
            return (health,)
        if not isinstance(state, Canary):
            return health, self._await_acknowledgement(state.epoch)
        evidence = self.evidence.collect(self.release, state, self.log.drills(), self.clock())
        traffic = traffic_result(evidence.candidate.num_runs, self.plan.ramp[state.step].min_requests)
        return health, traffic, *evaluate_live(evidence, self.plan)

    def _check_health(self) -> GateResult:
        verdict, reason = "fail", "the candidate's engine does not answer"
        try:
            if self.platform.candidate_healthy():
                verdict, reason = "pass", "the candidate's engine answers"
        except EngineError as error:  # any other failure is not the candidate's, and must not roll it back
            reason = str(error)
        return GateResult(gate=HEALTHY, verdict=verdict, evidence={}, reason=reason)

    def _await_acknowledgement(self, epoch: int) -> GateResult:
        """Poll the gateways for at most `ack_poll_s`; the next tick goes on polling."""
        deadline = self.clock() + self.plan.ack_poll_s
        while (found := self.platform.acknowledged_epoch()) < epoch and self.clock() < deadline:
            self.sleep(_POLL_S)
        verdict, reason = ("pass", "acknowledged") if found >= epoch else ("inconclusive", "not acknowledged")
        return GateResult(
            gate=ACKNOWLEDGED,
            verdict=verdict,
            evidence={"epoch": epoch, "acknowledged_epoch": found},
            reason=f"split epoch {epoch} {reason} by all gateways",
        )

    # --- act and record -----------------------------------------------------------------------------------------------

    def _act(self, state: ReleaseState, decision: Decision, now: float) -> ReleaseState:
        after = next_state(state, decision, now)
        is_changed, is_restoring = after != state, isinstance(after, Restoring)
        if is_changed and is_restoring:
            # Towards safety the split comes first: one write, which needs nothing else to work.
            self._put_split(after)
        elif is_changed:
            # Idempotent and before the record, so that a kill in between repeats it.
            self._move_aliases(after)
        self.log.append(self.release, state, decision, after, now)
        if is_changed and not is_restoring:
            # Towards promotion no user follows a decision that is not on record.
            self._put_split(after)
        return after

    def _put_split(self, state: ReleaseState) -> None:
        record = desired_split(state, self.release, self.plan, self.clock())
        if record is not None:
            self.splits.compare_and_set(record)
            self.platform.set_split(record)

    def _move_aliases(self, after: ReleaseState) -> None:
        """Let the registry follow the traffic."""
        if isinstance(after, Drilling):
            self.aliases.move("candidate", self.release.candidate)
        elif isinstance(after, Promoted):
            self.aliases.move("stable", self.release.candidate)
            self.aliases.clear("candidate")
        elif isinstance(after, TERMINAL):
            # Another run's release may have promoted a better policy: this one takes back only what it gave.
            if self.aliases.alias_version("stable") in {"", self.release.candidate}:
                self.aliases.move("stable", self.release.stable)
            self.aliases.clear("candidate")

    # --- resume -------------------------------------------------------------------------------------------------------

    def _load_state(self) -> ReleaseState:
        """Return the recorded state, after repairing what a kill interrupted."""
        current = self.splits.read()
        epoch = current.epoch if current else 0
        state = self.log.state(self.release)
        if state is None:
            return Preparing(epoch=epoch)
        wanted = desired_split(state, self.release, self.plan, self.clock())
        if wanted is None or (epoch == wanted.epoch and isinstance(state, Promoted)):
            return state
        if current is not None and epoch > wanted.epoch:
            return self._adopt_split(state, current, wanted)
        self.splits.compare_and_set(wanted)
        return state

    def _adopt_split(self, state: ReleaseState, current: SplitRecord, wanted: SplitRecord) -> ReleaseState:
        """Take over a safe split that is one epoch ahead: a roll back killed before its record, or a human's stop."""
        is_safe = current.share == 0 and current.stable == self.release.stable
        if not is_safe or current.epoch != wanted.epoch + 1 or isinstance(state, Restoring):
            if isinstance(state, Promoted):  # it is over, and a later release has split the traffic since
                return state
            raise StageRefusedError(f"{self.splits.path}: epoch {current.epoch} is another release's; end that first")
        decision = RollBack(reason="adopted a safe split found in force", evidence=())
        after = next_state(state, decision, current.updated_at)
        self.log.append(self.release, state, decision, after, self.clock())
        return after

    def _leave_out_absence(self, state: ReleaseState) -> ReleaseState:
        """Take the time without any controller out of a canary's clock, on record."""
        is_first, self._has_ticked = not self._has_ticked, True
        # Only a new controller may, so that a slow one cannot stretch a release for ever.
        if not is_first or not isinstance(state, Canary):
            return state
        now = self.clock()
        absent_s = now - self.log.last_at()
        # Past this age the split was stale, so that nobody was served by the candidate.
        if absent_s <= self.plan.stale_after_s:
            return state
        after, decision = leave_out_absence(state, absent_s)
        self.log.append(self.release, state, decision, after, now)
        return after


def open_release(
    release: Release,
    plan: ReleasePlan,
    *,
    directory: Path,
    split_directory: Path,
    ledger: RequestLedger,
    platform: ReleasePlatform,
    aliases: Aliases,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> ReleaseController:
    """Return the controller of a release over the ledger and split that its gateways use; nothing is touched yet.

    `directory` is the release's own, for its decisions. Raises BadInputError for a plan with an unknown gate.
    """
    splits = SplitStore(split_directory)
    return ReleaseController(
        release,
        plan,
        directory=directory,
        splits=splits,
        platform=platform,
        evidence=LedgerEvidence(ledger, splits),
        aliases=aliases,
        clock=clock,
        sleep=sleep,
    )
