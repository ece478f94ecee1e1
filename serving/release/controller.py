"""The release controller: observe -> decide -> act -> record, one tick at a time, durable at every point.

Nothing lives in memory between ticks: each tick reads the last row of `decisions.jsonl`, makes the split agree with
that state, and goes on. A kill -9 at any point is therefore followed by an ordinary tick.

Order of acts. Towards promotion the decision is recorded first and the split follows. Towards safety the split comes
first (one write, which needs nothing else to work), then the record, then the gateways' acknowledgement, then the
aliases. A tick that finds a safe split one epoch ahead of the record adopts it as the roll back it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Protocol

from rl_actors.contracts import EngineError, StageRefusedError
from rl_actors.durable import file_lock
from serving import contracts
from serving.contracts import (
    Canary,
    Decision,
    Drill,
    Drilling,
    EventKind,
    GateResult,
    Preparing,
    Promoted,
    Promoting,
    Release,
    ReleasePlan,
    ReleaseState,
    RequestEvent,
    Restoring,
    RollBack,
    SplitRecord,
)
from serving.gates import ArmEvent, LiveEvidence, check_gate_names, evaluate_live, traffic_result
from serving.release.state_machine import ACKNOWLEDGED, HEALTHY, TERMINAL, decide, desired_split, next_state, woken
from serving.split import SplitStore
from serving.store import DecisionLog, RequestLedger

_POLL_S: Final = 0.05


_SAFETY_KINDS: Final[tuple[EventKind, ...]] = ("violation", "override")


_FAILURE_KINDS: Final[tuple[EventKind, ...]] = ("failure", "override")


class ReleasePlatform(Protocol):
    """What the serving platform does for a release. Every call is idempotent and may raise InfrastructureError."""

    def set_split(self, record: SplitRecord) -> None:
        """Hurry an already durable record to the gateways; may do nothing where they poll it."""
        ...

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
        ...

    def clear(self, alias: str) -> None:
        """Let an alias name nothing."""
        ...


class EvidenceSource(Protocol):
    """Where live evidence comes from."""

    def collect(self, release: Release, state: Canary, drills: tuple[Drill, ...], now: float) -> LiveEvidence:
        """Gather what the gates need at this ramp step."""
        ...


class LedgerEvidence:
    """Live evidence from the ledger and the split history: only runs of this release's epochs, never offline ones."""

    def __init__(self, ledger: RequestLedger, splits: SplitStore) -> None:
        """Read from `ledger`; `splits` tells the share of every epoch."""
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
            safety_events=_first_per_session(self._ledger.events(_SAFETY_KINDS, epochs=shares), release, shares),
            failure_events=_first_per_session(self._ledger.events(_FAILURE_KINDS, epochs=shares), release, shares),
            drills=drills,
            now=now,
        )


def _first_per_session(
    events: tuple[RequestEvent, ...], release: Release, shares: Mapping[int, float]
) -> tuple[ArmEvent, ...]:
    """Keep the first bad event of each session: later ones fall into the same arm and prove nothing new."""
    first: dict[str, RequestEvent] = {}
    for event in events:
        if event.policy_version in {release.stable, release.candidate}:
            first.setdefault(event.session_key, event)
    return tuple(
        ArmEvent(is_canary=event.policy_version == release.candidate, share=shares[event.split_epoch])
        for event in first.values()
    )


class ReleaseController:
    """Drives one release to its end. Ticks on one directory exclude each other across processes."""

    def __init__(
        self,
        release: Release,
        plan: ReleasePlan,
        *,
        directory: Path,
        splits: SplitStore,
        platform: ReleasePlatform,
        evidence: EvidenceSource,
        aliases: Aliases,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        """Check the rules, touch nothing. `directory` is the run's `release/`; `clock` gives Unix seconds."""
        check_gate_names(plan)
        self.release, self.plan, self.log = release, plan, DecisionLog(directory)
        self._splits, self._platform, self._evidence, self._aliases = splits, platform, evidence, aliases
        self._clock, self._sleep, self._lock_path = clock, sleep, directory / "controller.lock"
        self._has_ticked = False

    def run(self) -> ReleaseState:
        """Tick until the release is over; waits `tick_s` only while the canary carries traffic."""
        state = self.tick()
        while not isinstance(state, TERMINAL):
            if isinstance(state, Canary):
                self._sleep(self.plan.tick_s)
            state = self.tick()
        return state

    def tick(self) -> ReleaseState:
        """Take one step: settle, observe, decide, act, record. Returns the state it leaves behind."""
        with file_lock(self._lock_path):
            state = self._woken(self._settled())
            if isinstance(state, TERMINAL):
                return state
            self._beat(state)
            results = self._observe(state)
            now = self._clock()
            return self._act(state, decide(state, results, self.plan, now), now)

    def roll_back(self, *, actor: str, reason: str) -> ReleaseState:
        """Give all traffic back to stable at once, on a human's word; a promoted release fails back."""
        with file_lock(self._lock_path):
            state = self._settled()
            if isinstance(state, Restoring | contracts.RolledBack | contracts.FailedBack | contracts.Halted):
                return state
            decision = RollBack(reason=f"{actor}: {reason}", evidence=())
            return self._act(state, decision, self._clock())

    # --- observe ------------------------------------------------------------------------------------------------------

    def _observe(self, state: ReleaseState) -> tuple[GateResult, ...]:
        if isinstance(state, Restoring):
            return (self._acknowledged(state.epoch),)
        health = self._health()
        if health.verdict == "fail" or isinstance(state, Preparing):
            return (health,)
        if isinstance(state, Drilling | Promoting):
            return health, self._acknowledged(state.epoch)
        if not isinstance(state, Canary):
            return (health,)
        evidence = self._evidence.collect(self.release, state, self.log.drills(), self._clock())
        traffic = traffic_result(evidence.candidate.num_runs, self.plan.ramp[state.step].min_requests)
        return health, traffic, *evaluate_live(evidence, self.plan)

    def _health(self) -> GateResult:
        try:
            is_healthy, reason = self._platform.candidate_healthy(), "the candidate's engine does not answer"
        except EngineError as error:
            is_healthy, reason = False, str(error)
        if is_healthy:
            return GateResult(gate=HEALTHY, verdict="pass", evidence={}, reason="the candidate's engine answers")
        return GateResult(gate=HEALTHY, verdict="fail", evidence={}, reason=reason)

    def _acknowledged(self, epoch: int) -> GateResult:
        """Poll the gateways for at most `ack_poll_s`; the next tick goes on polling."""
        deadline = self._clock() + self.plan.ack_poll_s
        while (found := self._platform.acknowledged_epoch()) < epoch and self._clock() < deadline:
            self._sleep(_POLL_S)
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
            self._put_split(after)
        elif is_changed:
            self._move_aliases(after)
        self.log.append(self.release, state, decision, after, now)
        if is_changed and not is_restoring:
            self._put_split(after)
        return after

    def _put_split(self, state: ReleaseState) -> None:
        """Make the split agree with the state; a split that already does is left alone."""
        record = desired_split(state, self.release, self.plan, self._clock())
        if record is not None:
            self._splits.compare_and_set(record)
            self._platform.set_split(record)

    def _move_aliases(self, after: ReleaseState) -> None:
        """Let the registry follow the traffic; idempotent, and before the record, so that a kill repeats it."""
        match after:
            case Drilling():
                self._aliases.move("candidate", self.release.candidate)
            case Promoted():
                self._aliases.move("stable", self.release.candidate)
                self._aliases.clear("candidate")
            case contracts.RolledBack() | contracts.FailedBack() | contracts.Halted():
                # Another run's release may have promoted a better policy: this one takes back only what it gave.
                if self._aliases.alias_version("stable") in {"", self.release.candidate}:
                    self._aliases.move("stable", self.release.stable)
                self._aliases.clear("candidate")
            case _:
                pass

    # --- resume -------------------------------------------------------------------------------------------------------

    def _settled(self) -> ReleaseState:
        """Load the recorded state and repair what a kill interrupted."""
        current = self._splits.read()
        epoch = current.epoch if current else 0
        state = self.log.state(self.release)
        if state is None:
            return Preparing(epoch=epoch)
        wanted = desired_split(state, self.release, self.plan, self._clock())
        if wanted is None or (epoch == wanted.epoch and isinstance(state, Promoted)):
            return state
        if current is not None and epoch > wanted.epoch:
            return self._adopted(state, current, wanted)
        self._splits.compare_and_set(wanted)
        return state

    def _woken(self, state: ReleaseState) -> ReleaseState:
        """Take the time without any controller out of a canary's clock, on record: its split was stale, so nobody was
        served by the candidate. Only a new controller may, so that a slow one cannot stretch a release for ever.
        """
        is_first, self._has_ticked = not self._has_ticked, True
        if not is_first or not isinstance(state, Canary):
            return state
        now = self._clock()
        if (asleep_s := now - self.log.last_at()) <= self.plan.stale_after_s:
            return state
        after, decision = woken(state, asleep_s)
        self.log.append(self.release, state, decision, after, now)
        return after

    def _beat(self, state: ReleaseState) -> None:
        """Keep the split in force fresh, and say it again: a kill may have swallowed the first time."""
        if not isinstance(state, Preparing) and (record := self._splits.refresh(self._clock())):
            self._platform.set_split(record)

    def _adopted(self, state: ReleaseState, current: SplitRecord, wanted: SplitRecord) -> ReleaseState:
        """Take over a safe split that is one epoch ahead: a roll back killed before its record, or a human's stop."""
        is_safe = current.share == 0 and current.stable == self.release.stable
        if not is_safe or current.epoch != wanted.epoch + 1 or isinstance(state, Restoring):
            if isinstance(state, Promoted):
                return state
            raise StageRefusedError(f"{self._splits.path}: epoch {current.epoch} is another release's; end that first")
        decision = RollBack(reason="adopted a safe split found in force", evidence=())
        after = next_state(state, decision, current.updated_at)
        self.log.append(self.release, state, decision, after, self._clock())
        return after
