"""Whole releases: the real gateway, ledger, split, evidence and controller; only engines and time are made up."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from rl_actors.contracts.errors import EngineError
from serving.contracts.release import Promoted, RampStep, Release, ReleasePlan, ReleaseState, RolledBack
from serving.release.controller import ReleaseController, open_release
from serving.release.state_machine import TERMINAL
from serving.split.record import slot_position
from serving.split.watch import acknowledged_epoch
from tests.serving.fakes import FakeAliases, make_plan
from tests.serving.gateway.live_fakes import CANDIDATE, HELLO, STABLE, Rig, ScriptedEngine, Step, body, make_rig

RELEASE = Release(release_id="r1", stable=STABLE, candidate=CANDIDATE)
RUDE: tuple[Step, ...] = (("final", "Rude words."),)
DEAD: tuple[Step, ...] = (EngineError("the engine is dead"),)


@dataclass
class Site:
    """A gateway, its controller, and users who send tickets between two ticks."""

    rig: Rig
    plan: ReleasePlan
    aliases: FakeAliases = field(default_factory=FakeAliases)
    statuses: Counter[int] = field(default_factory=Counter)
    states: list[ReleaseState] = field(default_factory=list)
    numbers: Any = field(default_factory=itertools.count)

    # --- ReleasePlatform: the gateway's own acknowledgement file is the truth ---

    def set_split(self, record: object) -> None:
        return

    def acknowledged_epoch(self) -> int:
        return acknowledged_epoch(self.rig.ports.config.files.acks, self.rig.clock(), 30.0)

    def candidate_healthy(self) -> bool:
        step = self.rig.engines[CANDIDATE].script[0]
        if isinstance(step, Exception):
            raise step
        return True

    def controller(self) -> ReleaseController:
        """A new one, as after a restart."""
        return open_release(
            RELEASE,
            self.plan,
            directory=self.rig.root / "release",
            split_directory=self.rig.ports.config.files.split,
            ledger=self.rig.ledger,
            platform=self,
            aliases=self.aliases,
            clock=self.rig.clock,
            sleep=self._sleep,
        )

    def _sleep(self, seconds: float) -> None:
        """Time passes, and the gateway goes on polling."""
        self.rig.clock.sleep(seconds)
        self.rig.ports.splits.poll()

    async def release(
        self, *, per_tick: int = 60, max_ticks: int = 60, after: Callable[[int], None] = lambda tick: None
    ) -> ReleaseState:
        """Tick with traffic in between until the release is over."""
        async with self.rig.client() as client:
            state: ReleaseState = self.controller().tick()
            for tick in range(max_ticks):
                self.states.append(state)
                if isinstance(state, TERMINAL):
                    return state
                await asyncio.gather(*(self._ticket(client) for _ in range(per_tick)))
                after(tick)
                self._sleep(self.plan.tick_s)
                state = self.controller().tick()
        return state

    async def _ticket(self, client: httpx.AsyncClient) -> None:
        """One user: ask, and say how it went; polite words are right, all others are overridden."""
        reply = await client.post("/v1/chat/completions", json=body(user=f"user-{next(self.numbers)}"))
        self.statuses[reply.status_code] += 1
        if reply.status_code != 200:
            return
        run_id = reply.headers["x-seatrial-run-id"]
        text = reply.json()["choices"][0]["message"]["content"]
        is_right = text == "Hello there."
        said = {"actor": "user", "reason": "checked"}
        await client.post(f"/v1/requests/{run_id}/outcome", json={**said, "success": is_right})
        if not is_right:
            await client.post(f"/v1/requests/{run_id}/override", json=said)


def make_site(tmp_path: Path, candidate: Sequence[Step], **changes: object) -> Site:
    scripts: Mapping[str, Sequence[Step]] = {STABLE: HELLO, CANDIDATE: candidate}
    rig = make_rig(tmp_path, share=0.0, scripts=scripts, config={"max_concurrency": 100, "poll_s": 30.0})
    ticks = itertools.count()
    object.__setattr__(rig.ports, "monotonic", lambda: next(ticks) * 0.05)
    values: dict[str, object] = {
        "ramp": (RampStep(share=0.3, min_requests=40, max_duration_s=600.0),),
        "critical_checks": (),
        "min_samples": 20,
        "full_samples": 60,
        "tick_s": 5.0,
    }
    return Site(rig, make_plan(**(values | changes)))


def run(site: Site, **options: Any) -> ReleaseState:
    return asyncio.run(asyncio.wait_for(site.release(**options), 120.0))


def test_equally_good_candidate_is_promoted_or_still_measured(tmp_path: Path) -> None:
    """Never rolled back; and once promoted, the split and the aliases agree that it is stable."""
    site = make_site(tmp_path, HELLO)
    state = run(site, max_ticks=12)
    assert not isinstance(state, RolledBack)
    assert set(site.statuses) == {200}
    if isinstance(state, Promoted):
        record = site.rig.store.read()
        assert record is not None
        assert record.stable == CANDIDATE
        assert site.aliases.named["stable"] == CANDIDATE


@pytest.mark.parametrize(
    "check", [lambda reply, run: {"polite": "Rude" not in reply}, lambda reply, run: {"polite": True}]
)
def test_rude_candidate_is_rolled_back(tmp_path: Path, check: Any) -> None:
    """Caught by its violations where a check sees them, else by what users say."""
    site = make_site(tmp_path, RUDE)
    site.rig.workflow.checks = check
    state = run(site)
    assert isinstance(state, RolledBack)
    record = site.rig.store.read()
    assert record is not None
    assert (record.stable, record.share) == (STABLE, 0.0)
    assert site.aliases.named["stable"] == STABLE
    assert set(site.statuses) == {200}


def test_blocked_words_never_reach_a_user(tmp_path: Path) -> None:
    site = make_site(tmp_path, RUDE)
    site.rig.workflow.checks = lambda reply, run: {"polite": "Rude" not in reply}
    run(site)
    canary = [row for row in site.rig.rows() if row.policy_version == CANDIDATE]
    assert canary
    assert all(row.policy_checks == {"polite": False} and row.success == "no" for row in canary)


def test_candidate_that_dies_is_rolled_back_and_no_user_notices(tmp_path: Path) -> None:
    site = make_site(tmp_path, HELLO)

    def die(tick: int) -> None:
        if tick == 3:
            site.rig.engines[CANDIDATE] = ScriptedEngine(DEAD)

    state = run(site, after=die)
    assert isinstance(state, RolledBack)
    assert "engine" in state.reason
    assert set(site.statuses) == {200}


def test_engine_that_fails_only_under_traffic_fails_no_request(tmp_path: Path) -> None:
    """The health probe says yes; requests say no: every one of them ends on stable, with a row for each attempt."""
    site = make_site(tmp_path, DEAD)
    site.candidate_healthy = lambda: True  # type: ignore[method-assign]
    state = run(site)
    assert isinstance(state, RolledBack)
    assert set(site.statuses) == {200}
    rows = site.rig.rows()
    failed = [row for row in rows if row.status == "engine_error"]
    assert failed
    assert all(row.policy_version == CANDIDATE for row in failed)
    retried = [row for row in rows if "~" in row.request_id]
    assert len(retried) == len(failed)
    assert all(row.split_epoch == 0 and row.status == "ok" for row in retried)


def test_candidate_whose_engine_is_missing_is_rolled_back_by_a_gate(tmp_path: Path) -> None:
    """Its sessions are answered by stable; without a row of their own, no gate would ever see that it cannot answer."""
    site = make_site(tmp_path, HELLO)
    del site.rig.engines[CANDIDATE]
    site.candidate_healthy = lambda: True  # type: ignore[method-assign]
    state = run(site)
    assert isinstance(state, RolledBack)
    assert set(site.statuses) == {200}
    canary = [row for row in site.rig.rows() if row.release_channel == "canary"]
    assert canary
    assert {(row.policy_version, row.status) for row in canary} == {(CANDIDATE, "engine_error")}


def test_recovery_is_timed_from_the_split_to_the_acknowledgement(tmp_path: Path) -> None:
    site = make_site(tmp_path, RUDE)
    state = run(site)
    assert isinstance(state, RolledBack)
    assert 0.0 <= state.time_to_recovery_s < 10.0


def test_sessions_go_where_their_slot_says(tmp_path: Path) -> None:
    site = make_site(tmp_path, HELLO)
    run(site, max_ticks=6)
    compared = [row for row in site.rig.rows() if row.split_epoch >= 3]
    assert compared
    for row in compared:
        expected = slot_position(site.rig.ledger.session_slot("r1", row.session_key), "r1") < 0.3
        assert (row.release_channel == "canary") == expected


def test_no_row_is_lost_doubled_or_left_open(tmp_path: Path) -> None:
    site = make_site(tmp_path, RUDE)
    run(site)
    rows = site.rig.rows()
    assert len(rows) == sum(site.statuses.values())
    assert len({row.request_id for row in rows}) == len(rows)
    assert all(row.status != "running" for row in rows)


def test_after_a_roll_back_the_candidate_gets_nothing(tmp_path: Path) -> None:
    site = make_site(tmp_path, RUDE)
    run(site)
    before = len([row for row in site.rig.rows() if row.policy_version == CANDIDATE])

    async def more() -> None:
        async with site.rig.client() as client:
            await asyncio.gather(*(site._ticket(client) for _ in range(40)))

    asyncio.run(more())
    assert len([row for row in site.rig.rows() if row.policy_version == CANDIDATE]) == before


def test_human_stop_wins_at_once(tmp_path: Path) -> None:
    site = make_site(tmp_path, HELLO)

    def stop(tick: int) -> None:
        if tick == 3:
            site.controller().roll_back(actor="ann", reason="do not like it")

    state = run(site, after=stop)
    assert isinstance(state, RolledBack)
    assert "ann" in state.reason
