"""The bench: real controller, real ledger, real split, on a Serve that is not there and users who follow a script."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.pipeline import release as bench_module
from cluster.pipeline.release import NUM_RELEASES, ReleaseBench, live_tasks, release_plan, require_room
from cluster.pipeline.snapshot import read_tasks
from cluster.plan.placement import NUM_THREADS
from cluster.records.run_folder import recorded_gateway
from cluster.records.summary import ReleaseOutcome
from cluster.simulation import traffic as traffic_thread
from cluster.simulation.ticket_book import TicketBook, TicketResult
from cluster.simulation.traffic import TrafficDriver, TrafficProgress
from cluster.workflows.support_desk import SupportDesk
from rl_actors.contracts.errors import BadInputError, EngineError, InfrastructureError
from rl_actors.contracts.reports import CostModel
from rl_actors.contracts.tasks import Task
from rl_actors.contracts.versions import DataSnapshot
from serving.contracts.release import Canary, Promoted, Promoting, ReleasePlan, ReleaseState, RolledBack, SplitRecord
from serving.contracts.requests import Success
from serving.platform.serve import PlatformConfig
from serving.split.record import SplitStore, route, slot_position
from serving.store.ledger import RequestLedger
from serving.store.served import GatewayConfig, ServedPolicy
from tests.cluster.pipeline.fakes import DeskRun, FakeVersions, make_run
from tests.serving.fakes import make_completion, make_record

FAST = ("release.canary_traffic_percent=50", "release.ramp=[50]", "release.min_canary_requests=50")


def query(run: DeskRun, database: str, sql: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(run.folder.root / "serving" / f"{database}.sqlite")) as connection:
        return connection.execute(sql).fetchall()


def policy(version: str) -> ServedPolicy:
    return ServedPolicy(
        version=version,
        path=f"/models/{version}",
        model_version="m",
        reward_model_version="rm",
        bundle_id=f"bundle-{version}",
    )


STABLE, CANDIDATE, BAD = policy("sft-1"), policy("ppo-1"), policy("degraded-1")


class FakeServe:
    """A platform without Ray Serve: gateways acknowledge at once, engines answer, and every act is remembered."""

    def __init__(self, gateway: GatewayConfig, config: PlatformConfig) -> None:
        self.gateway, self.config = gateway, config
        self.splits, self.candidate, self.acts = SplitStore(gateway.files.split), "", list[str]()
        self.url, self.refusal = "http://127.0.0.1:8000", None

    def start(self, stable: ServedPolicy, *others: ServedPolicy, critic_path: str) -> None:
        assert critic_path == "/models/rm"
        self.acts.append(f"start {' '.join(policy.version for policy in (stable, *others))}")
        if self.refusal is not None:
            raise self.refusal
        if self.splits.read() is None:
            first = SplitRecord(
                epoch=1, stable=stable.version, candidate="", share=0.0, salt="none", updated_at=time.time()
            )
            self.splits.compare_and_set(first)

    def shutdown(self) -> None:
        self.acts.append("shutdown")

    def set_split(self, record: SplitRecord) -> None:
        self.acts.append(f"split {record.share:g}")

    def acknowledged_epoch(self) -> int:
        record = self.splits.read()
        return record.epoch if record else 0

    def candidate_healthy(self) -> bool:
        assert self.candidate
        return True


class Users:
    """Tickets by a script, answered as a gateway would: routed by the split in force and written into the ledger."""

    def __init__(self, succeeds: Callable[[str, int], bool], num_tickets: int = 100_000) -> None:
        self.succeeds, self.num_tickets, self.tasks = succeeds, num_tickets, list[Sequence[Task]]()
        self.drivers: list[TrafficDriver] = []
        self.failure: BaseException | None = None
        self.bench: ReleaseBench | None = None
        self.was_stopped = False

    def __call__(
        self,
        driver: TrafficDriver,
        tasks: Sequence[Task],
        *,
        is_over: Callable[[], bool],
        on_progress: Callable[[TrafficProgress], None],
    ) -> TrafficProgress:
        self.tasks.append(tasks)
        self.drivers.append(driver)
        assert self.bench is not None
        ledger = RequestLedger(self.bench.ledger_path, owner="gateway")
        try:
            self._send(driver, ledger, is_over)
            on_progress(driver.progress)
        finally:
            ledger.close()
        return driver.progress

    def _send(self, driver: TrafficDriver, ledger: RequestLedger, is_over: Callable[[], bool]) -> None:
        prefix, before = driver._config.run_name, driver.progress.num_sent
        assert self.bench is not None
        assert isinstance(self.bench.platform, FakeServe)
        splits = self.bench.platform.splits
        for number in range(before, before + self.num_tickets):
            if is_over():
                self.was_stopped = True
                return
            driver._book.send(str(number))
            self._serve(ledger, splits, f"{prefix}.{number}", number)
            ended = TicketResult(
                task_id=str(number), run_id="", release_channel="", policy_version="", failure="", outcome=None,
                duration_ms=1.0,
            )  # fmt: skip
            driver._book.end(ended)
            driver.progress.add(ended)
        if self.failure is not None:
            raise self.failure

    def _serve(self, ledger: RequestLedger, splits: SplitStore, key: str, number: int) -> None:
        record = splits.read()
        assert record is not None
        position = slot_position(ledger.session_slot(record.salt, key), record.salt)
        found = route(record, position, time.time(), 60.0)
        label: Success = "yes" if self.succeeds(found.policy_version, number) else "no"
        row = make_record(
            run_id=key, request_id=key, session_key=key, policy_version=found.policy_version,
            release_channel=found.release_channel, split_epoch=found.split_epoch, started_at=time.time(),
        )  # fmt: skip
        assert ledger.start(row)
        completion = make_completion(success=label, duration_ms=100.0 + number % 7, cost=1.0)
        ledger.complete(key, completion, at=time.time())


@dataclass
class Rig:
    """A bench on fakes, and one call to release on it."""

    run: DeskRun
    snapshot: DataSnapshot
    users: Users
    aliases: FakeVersions = field(default_factory=FakeVersions)
    serve: FakeServe | None = None

    @property
    def plan(self) -> ReleasePlan:
        return replace(release_plan(self.run.spec, self.run.workflow.critical_checks, may_promote=True), tick_s=0.02)

    def bench(self) -> ReleaseBench:
        run = self.run
        self.users.bench = ReleaseBench(
            run.spec, run.folder, run.workflow, self.snapshot, self.aliases, "/models/rm", run.watch.progress
        )
        assert isinstance(self.users.bench.platform, FakeServe)
        self.serve = self.users.bench.platform
        return self.users.bench

    def release(self, plan: ReleasePlan | None = None) -> ReleaseOutcome:
        with self.bench() as bench:
            return bench.release(0, STABLE, CANDIDATE, plan or self.plan, self.directory)

    @property
    def directory(self) -> Path:
        return self.run.folder.root / "release"

    def ledger_rows(self, where: str = "1") -> int:
        return query(self.run, "ledger", f"SELECT COUNT(*) FROM runs WHERE {where}")[0][0]


def nine_of_ten(_version: str, number: int) -> bool:
    return number % 10 != 0


@pytest.fixture
def rig(home: Path, snapshot: DataSnapshot, monkeypatch: pytest.MonkeyPatch) -> Rig:
    users = Users(nine_of_ten)
    monkeypatch.setattr(bench_module, "ServePlatform", FakeServe)
    monkeypatch.setattr(traffic_thread, "run_traffic", users)
    return Rig(run=make_run(home, *FAST), snapshot=snapshot, users=users)


# --- room -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("until", "asks"), [("", True), ("release", True), ("ppo", False), ("eval", False)])
def test_a_run_asks_for_room_before_it_trains_when_it_will_release(
    home: Path, monkeypatch: pytest.MonkeyPatch, until: str, asks: bool
):
    def full(_serve: FakeServe) -> None:
        raise BadInputError("cluster.serve_port", 8000, "this Ray already serves another home")

    monkeypatch.setattr(bench_module, "ServePlatform", FakeServe)
    monkeypatch.setattr(FakeServe, "require_room", full, raising=False)
    with pytest.raises(BadInputError, match="another home") if asks else nullcontext():
        run = make_run(home)
        require_room(run.spec, run.folder, until)
    assert not (home / "runs" / "run-1" / "serving").exists()


# --- tickets ----------------------------------------------------------------------------------------------------------


def test_no_ticket_is_served_in_two_releases(snapshot: DataSnapshot):
    releases = [live_tasks(snapshot, index) for index in range(NUM_RELEASES)]
    ids = [{task.task_id for task in tasks} for tasks in releases]
    assert not ids[0] & ids[1]
    assert ids[0] | ids[1] == {task.task_id for task in read_tasks(snapshot, "live")}
    assert [len(tasks) for tasks in releases] == [6, 6]


def test_each_release_gets_its_own_tickets_and_request_ids(rig: Rig):
    with rig.bench() as bench:
        for index, candidate in enumerate((CANDIDATE, BAD)):
            rig.users.num_tickets = 3
            bench.release(index, STABLE, candidate, rig.plan, rig.run.folder.root / f"release-{index}")
    assert rig.users.tasks == [live_tasks(rig.snapshot, 0), live_tasks(rig.snapshot, 1)]
    assert [driver._config.run_name for driver in rig.users.drivers] == ["run-1-0", "run-1-1"]


# --- endings ----------------------------------------------------------------------------------------------------------


def test_an_equally_good_candidate_is_promoted(rig: Rig):
    result = rig.release()
    assert (result.outcome, result.reason) == ("promoted", "all gates passed at every step of the ramp")
    assert (result.release_id, result.stable, result.candidate) == ("run-1-0", "sft-1", "ppo-1")
    assert rig.aliases.named == {"stable": "ppo-1"}
    assert rig.serve is not None
    assert rig.serve.acts[0] == "start sft-1 ppo-1"
    assert rig.serve.acts[-1] == "shutdown"
    assert rig.serve.candidate == "ppo-1"
    assert rig.users.was_stopped
    assert result.time_to_recovery_s == 0.0


def test_a_bad_candidate_is_rolled_back_on_evidence(rig: Rig):
    rig.users.succeeds = lambda version, number: version == STABLE.version and nine_of_ten(version, number)
    result = rig.release()
    assert result.outcome == "rolled_back"
    assert "task_success_not_worse" in result.reason
    assert 0 < result.time_to_recovery_s < 60
    assert rig.aliases.named == {"stable": "sft-1"}
    assert rig.serve is not None
    record = rig.serve.splits.read()
    assert record is not None
    assert (record.stable, record.share) == ("sft-1", 0.0)


def test_a_drill_ends_in_a_roll_back_however_good_the_candidate(rig: Rig):
    result = rig.release(replace(rig.plan, may_promote=False))
    assert result.outcome == "rolled_back"
    assert "never promotes" in result.reason
    assert rig.aliases.named == {"stable": "sft-1"}


def test_tickets_that_run_out_end_the_release_without_a_promotion(rig: Rig):
    rig.users.num_tickets = 5
    result = rig.release()
    assert result.outcome == "rolled_back"
    assert result.reason == "seatrial: tickets ran out before the evidence sufficed"
    assert result.requests == 5
    assert not rig.users.was_stopped


def test_a_broken_driver_is_no_evidence(rig: Rig):
    rig.users.num_tickets, rig.users.failure = 5, RuntimeError("connection refused")
    with pytest.raises(InfrastructureError, match=r"traffic driver stopped.*connection refused"):
        rig.release()
    assert not (rig.directory / "result.json").exists()
    assert "stable" not in rig.aliases.named or rig.aliases.named["stable"] == "sft-1"
    assert rig.serve is not None
    assert rig.serve.acts[-1] == "shutdown"
    assert "traffic" not in {thread.name for thread in threading.enumerate()}


def test_a_broken_release_goes_on_where_it_stopped(rig: Rig):
    rig.users.num_tickets, rig.users.failure = 5, RuntimeError("connection refused")
    with pytest.raises(InfrastructureError):
        rig.release()
    rig.users.num_tickets, rig.users.failure = 0, None
    result = rig.release()
    assert (result.outcome, result.release_id) == ("rolled_back", "run-1-0")
    assert result.ledger_rows == result.requests == 5


def test_a_port_in_use_stops_before_any_traffic(rig: Rig):
    with rig.bench() as bench:
        assert rig.serve is not None
        rig.serve.refusal = BadInputError("cluster.serve_port", 8000, "already in use")  # type: ignore[assignment]
        with pytest.raises(BadInputError, match="already in use"):
            bench.release(0, STABLE, CANDIDATE, rig.plan, rig.directory)
    assert rig.users.tasks == []
    assert rig.serve.acts == ["start sft-1 ppo-1", "shutdown"]


def test_a_candidate_that_does_not_start_meets_no_user(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    def broken(_serve: FakeServe, *_policies: ServedPolicy, critic_path: str) -> None:
        raise EngineError("application failed to start")

    monkeypatch.setattr(FakeServe, "start", broken)
    with pytest.raises(EngineError, match="failed to start"):
        rig.release()
    assert rig.users.tasks == []


# --- the drive, step by step ------------------------------------------------------------------------------------------


class ScriptedController:
    """A controller whose ticks give these states, one after the other; a roll back is remembered and obeyed."""

    def __init__(self, plan: ReleasePlan, *states: ReleaseState) -> None:
        self.plan, self.states, self.roll_backs = plan, list(states), list[str]()

    def tick(self) -> ReleaseState:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def roll_back(self, *, actor: str, reason: str) -> ReleaseState:
        self.roll_backs.append(f"{actor}: {reason}")
        self.states = [RolledBack(reason=reason, time_to_recovery_s=0.1)]
        return self.states[0]


class ScriptedTraffic:
    """Users who have run out of tickets; with `breaks_when_asked`, the driver breaks just as one asks for them."""

    def __init__(self, *, breaks_when_asked: bool = False) -> None:
        self.failure, self._breaks = "", breaks_when_asked

    @property
    def is_finished(self) -> bool:
        if self._breaks:
            self.failure = "broke"
        return True

    def require_healthy(self) -> None:
        if self.failure:
            raise InfrastructureError(self.failure)


CANARY = Canary(step=0, epoch=3, step_started_at=0.0, release_started_at=0.0)
PROMOTING, PROMOTED = Promoting(decided_at=0.0, epoch=4), Promoted(at=1.0, epoch=4)


def test_a_driver_that_breaks_while_it_is_asked_did_not_run_out(rig: Rig):
    controller = ScriptedController(rig.plan, CANARY)
    with pytest.raises(InfrastructureError, match="broke"):
        rig.bench()._drive(controller, ScriptedTraffic(breaks_when_asked=True))  # type: ignore[arg-type]
    assert controller.roll_backs == []


def test_a_canary_without_tickets_is_rolled_back_once(rig: Rig):
    controller = ScriptedController(rig.plan, CANARY)
    state = rig.bench()._drive(controller, ScriptedTraffic())  # type: ignore[arg-type]
    assert isinstance(state, RolledBack)
    assert controller.roll_backs == ["seatrial: tickets ran out before the evidence sufficed"]


def test_a_promotion_that_only_waits_for_gateways_needs_no_more_tickets(rig: Rig):
    controller = ScriptedController(rig.plan, CANARY, PROMOTING, PROMOTING, PROMOTING, PROMOTED)
    assert rig.bench()._drive(controller, ScriptedTraffic()) == PROMOTED  # type: ignore[arg-type]
    assert controller.roll_backs == []


# --- the result -------------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_ledger(rig: Rig):
    result = rig.release()
    assert result.ledger_rows == rig.ledger_rows() == result.requests
    canary = rig.ledger_rows("release_channel = 'canary'")
    assert result.canary_requests == result.first_step_canary_requests == canary > 50
    ((epoch,),) = query(rig.run, "ledger", "SELECT MIN(split_epoch) FROM runs WHERE release_channel = 'canary'")
    assert result.first_step_requests == rig.ledger_rows(f"split_epoch = {epoch}")
    assert result.observed_share == pytest.approx(0.5, abs=0.15)
    assert result.failed_requests == 0
    assert 0 < result.drill_s < result.seconds


def test_the_first_step_is_told_apart_from_the_later_ones(home: Path, rig: Rig):
    steps = ("release.canary_traffic_percent=40", "release.ramp=[40, 60]", "release.min_canary_requests=50")
    rig.run = make_run(home, *steps)
    result = rig.release()
    assert result.outcome == "promoted"
    assert 0 < result.first_step_canary_requests < result.canary_requests
    assert result.observed_share == pytest.approx(0.4, abs=0.15)


def test_canary_runs_of_an_earlier_release_are_not_counted_again(rig: Rig):
    with rig.bench() as bench:
        first = bench.release(0, STABLE, CANDIDATE, rig.plan, rig.directory)
        rig.users.num_tickets = 20
        second = bench.release(1, CANDIDATE, BAD, rig.plan, rig.run.folder.root / "release_drill")
    assert first.outcome == "promoted"
    assert second.outcome == "rolled_back"
    assert second.canary_requests <= 20
    assert rig.ledger_rows("release_channel = 'canary'") == first.canary_requests + second.canary_requests


def test_the_result_is_written_beside_the_decisions(rig: Rig):
    result = rig.release()
    assert json.loads((rig.directory / "result.json").read_text()) == asdict(result)
    decisions = [json.loads(line) for line in (rig.directory / "decisions.jsonl").read_text().splitlines()]
    assert decisions[-1]["next_state"]["kind"] == "Promoted"


# --- what is built once -----------------------------------------------------------------------------------------------


def test_the_live_database_holds_the_worlds_of_both_releases(rig: Rig):
    rig.bench()
    orders = {row[0] for row in query(rig.run, "live", "SELECT order_id FROM orders")}
    wanted = {str(order["order_id"]) for task in read_tasks(rig.snapshot, "live") for order in task.world["orders"]}
    assert {str(order) for order in orders} == wanted


def test_a_resumed_run_keeps_its_live_database(rig: Rig):
    rig.bench()
    database = rig.run.folder.root / "serving" / "live.sqlite"
    before = database.stat().st_ino
    rig.bench()
    assert database.stat().st_ino == before


class KilledDesk(SupportDesk):
    """Dies in the middle of building the live database, once."""

    def __init__(self) -> None:
        super().__init__()
        self.was_killed = False

    def build_live_database(self, tasks: Sequence[Task], path: str) -> None:
        if self.was_killed:
            return super().build_live_database(tasks, path)
        self.was_killed = True
        super().build_live_database(tasks[:1], path)
        raise KeyboardInterrupt("kill -9")


def test_half_a_live_database_is_never_served(rig: Rig):
    rig.run.workflow = KilledDesk()
    with pytest.raises(KeyboardInterrupt):
        rig.bench()
    database = rig.run.folder.root / "serving" / "live.sqlite"
    assert not database.exists()
    rig.bench()
    ((found,),) = query(rig.run, "live", "SELECT COUNT(*) FROM orders")
    assert found == sum(len(task.world["orders"]) for task in read_tasks(rig.snapshot, "live"))
    assert not (database.parent / "live.tmp").exists()


def test_gateway_and_platform_follow_the_spec(home: Path, rig: Rig):
    settings = ("cluster.serve_port=8123", "cluster.gpus_per_rollout_worker=0.5", "ppo.temperature=0.7")
    rig.run = make_run(home, *settings, "release.concurrency=3")
    bench = rig.bench()
    gateway = recorded_gateway(rig.run.folder)
    assert rig.serve is not None
    assert gateway == rig.serve.gateway
    assert rig.serve.config == PlatformConfig(http_port=8123, engine_threads=NUM_THREADS // 2, gpus_per_policy=0.5)
    assert (gateway.limits, gateway.temperature, gateway.workflow) == (rig.run.limits, 0.7, rig.run.workflow_ref)
    assert gateway.cost_model == CostModel(), "what the offline suites are priced by"
    assert bench._driver("run-1-0", TicketBook(rig.directory / "tickets.jsonl"))._config.concurrency == 3
    assert bench.ledger_path == rig.run.folder.root / "serving" / "ledger.sqlite"


def test_a_bench_that_released_nothing_stops_nothing(rig: Rig):
    with rig.bench():
        pass
    assert rig.serve is not None
    assert rig.serve.acts == []


@pytest.mark.parametrize("failure", [None, RuntimeError("gone")])
def test_the_ledger_is_closed_however_a_release_ends(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, failure: Exception | None
):
    closed: list[str] = []

    class Watched(RequestLedger):
        def close(self) -> None:
            closed.append(self.owner)
            super().close()

    monkeypatch.setattr(bench_module, "RequestLedger", Watched)
    rig.users.num_tickets, rig.users.failure = 3, failure
    with suppress(InfrastructureError):
        rig.release()
    assert closed == ["controller"]
