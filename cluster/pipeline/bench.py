"""The serving side of a run: one Serve, one live database and one ledger, on which its releases are tried."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.pipeline.data import NUM_RELEASES, read_tasks
from cluster.pipeline.run import Run
from cluster.plan import threads_each
from cluster.records import ReleaseOutcome, record_gateway
from cluster.simulation import TicketBook, TrafficConfig, TrafficDriver, TrafficProgress, TrafficThread
from rl_actors.contracts import DataSnapshot, Task
from rl_actors.durable import write_json
from serving.contracts import Canary, Release, ReleasePlan, ReleaseState
from serving.platform import CRITIC, PlatformConfig, ServePlatform
from serving.release import TERMINAL, Aliases, ReleaseController, open_release
from serving.split import SplitStore
from serving.store import GatewayConfig, RequestLedger, ServedPolicy

_OUTCOMES: dict[str, ReleaseOutcome] = {
    "Promoted": "promoted",
    "RolledBack": "rolled_back",
    "FailedBack": "failed_back",
    "Halted": "halted",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseResult:
    """How one release ended, from the ledger and the controller's own record.

    `requests` counts the tickets that users wrote down as sent (`tickets.jsonl`), before a kill or after; `ledger_rows`
    the requests of this release in the ledger, which the gateways wrote. The two must be equal.
    """

    release_id: str
    stable: str
    candidate: str
    outcome: ReleaseOutcome
    reason: str
    requests: int
    failed_requests: int
    ledger_rows: int
    first_step_requests: int
    first_step_canary_requests: int
    canary_requests: int
    time_to_recovery_s: float
    drill_s: float
    seconds: float

    @property
    def observed_share(self) -> float:
        """Canary runs over all runs while at the first ramp step."""
        return self.first_step_canary_requests / max(self.first_step_requests, 1)


def live_tasks(snapshot: DataSnapshot, index: int) -> list[Task]:
    """Return the live tickets of release number `index`; each is good for one serving."""
    tasks = read_tasks(snapshot, "live")
    size = len(tasks) // NUM_RELEASES
    return tasks[index * size : (index + 1) * size]


class ReleaseBench:
    """The serving side of a run: platform, live database and ledger, shared by its releases."""

    def __init__(self, run: Run, snapshot: DataSnapshot, aliases: Aliases, critic_path: str) -> None:
        """Build the live database when it is not there yet; start nothing. `critic_path` is a reward model's."""
        self._run, self._snapshot, self._aliases, self._critic_path = run, snapshot, aliases, critic_path
        self._is_started = False
        self._root = run.folder.root / "serving"
        self._root.mkdir(parents=True, exist_ok=True)
        self._config = gateway_config(run)
        database = Path(self._config.live_world["database"])
        if not database.exists():
            self._build_world(database)
        self.platform = ServePlatform(self._config, platform_config(run))
        self.ledger_path = self._config.files.ledger
        record_gateway(run.folder, self._config)

    def _build_world(self, database: Path) -> None:
        """Build it apart and move it into place: what a killed attempt left must not pass for the whole."""
        scratch = self._run.fresh("serving/live.tmp")
        self._run.workflow.build_live_database(read_tasks(self._snapshot, "live"), str(scratch / database.name))
        (scratch / database.name).rename(database)
        scratch.rmdir()

    def __enter__(self) -> ReleaseBench:
        """Return the bench; Serve starts with the first release that really runs."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop Serve when it was started."""
        if self._is_started:
            self.platform.shutdown()

    def release(
        self, index: int, stable: ServedPolicy, candidate: ServedPolicy, plan: ReleasePlan, directory: Path
    ) -> ReleaseResult:
        """Serve stable, put the candidate beside it, send traffic, and tick the controller to the end."""
        started = time.monotonic()
        self._is_started = True
        self.platform.start(stable, candidate, critic_path=self._critic_path)
        self.platform.candidate = candidate.version
        release = Release(
            release_id=f"{self._run.folder.run_id}-{index}", stable=stable.version, candidate=candidate.version
        )
        over = threading.Event()
        tasks, book = live_tasks(self._snapshot, index), TicketBook(directory / "tickets.jsonl")
        with closing(RequestLedger(self.ledger_path, owner="controller")) as ledger:
            traffic = TrafficThread(self._driver(index, book), tasks, over, self._run.watch.progress, index)
            controller = open_release(
                release,
                plan,
                directory=directory,
                split_directory=self._config.files.split,
                ledger=ledger,
                platform=self.platform,
                aliases=self._aliases,
            )
            traffic.start()
            try:
                state = self._drive(controller, traffic)
            finally:
                over.set()
                traffic.join(timeout=120.0)
            result = self._result(release, controller, state, ledger, traffic.progress, time.monotonic() - started)
        write_json(directory / "result.json", asdict(result))
        return result

    def _drive(self, controller: ReleaseController, traffic: TrafficThread) -> ReleaseState:
        """Run the controller; tickets that run out before a decision end the release for lack of evidence."""
        state = controller.tick()
        while not isinstance(state, TERMINAL):
            time.sleep(controller.plan.tick_s)
            # Asked in this order: a driver that breaks in between must not look like one that ran out of tickets.
            has_run_out = traffic.is_finished
            traffic.require_healthy()
            if has_run_out:
                state = controller.tick()
                if isinstance(state, Canary):
                    controller.roll_back(actor="seatrial", reason="tickets ran out before the evidence sufficed")
            state = controller.tick()
        return state

    def _result(
        self,
        release: Release,
        controller: ReleaseController,
        state: ReleaseState,
        ledger: RequestLedger,
        progress: TrafficProgress,
        seconds: float,
    ) -> ReleaseResult:
        history = SplitStore(self._config.files.split).history().values()
        epochs = [record.epoch for record in history if record.salt == release.release_id and record.share > 0]
        first, second = ledger.session_counts(epochs[:1]), ledger.session_counts(epochs)
        drills = controller.log.drills()
        return ReleaseResult(
            release_id=release.release_id,
            stable=release.stable,
            candidate=release.candidate,
            outcome=_OUTCOMES[type(state).__name__],
            reason=getattr(state, "reason", "all gates passed at every step of the ramp"),
            requests=progress.num_requests,
            failed_requests=progress.num_failed,
            ledger_rows=ledger.count_requests(release.release_id),
            first_step_requests=first[1],
            first_step_canary_requests=first[0],
            canary_requests=second[0],
            time_to_recovery_s=getattr(state, "time_to_recovery_s", 0.0),
            drill_s=drills[-1].seconds if drills else 0.0,
            seconds=seconds,
        )

    def _driver(self, index: int, book: TicketBook) -> TrafficDriver:
        config = TrafficConfig(
            url=self.platform.url,
            live_world=self._config.live_world,
            run_name=f"{self._run.folder.run_id}-{index}",
            concurrency=self._run.spec.release.concurrency,
            # Later than the gateway's own bound: a slow candidate must fail there, by name, not here as a silence.
            timeout_s=max(90.0, 2.0 * self._run.spec.agent.timeout_s),
        )
        return TrafficDriver(self._run.workflow, config, book)


def gateway_config(run: Run) -> GatewayConfig:
    """Return what the gateways of a run's releases are told; nothing is created."""
    root = run.folder.root / "serving"
    return GatewayConfig(
        root=str(root),
        workflow=run.workflow_ref,
        live_world={"database": str(root / "live.sqlite")},
        limits=run.limits,
        temperature=run.spec.ppo.temperature,
        critic_application=CRITIC,
    )


def platform_config(run: Run) -> PlatformConfig:
    """Return how Serve runs for a run's releases."""
    cluster = run.spec.cluster
    return PlatformConfig(
        http_port=cluster.serve_port, engine_threads=threads_each(2), gpus_per_policy=cluster.gpus_per_rollout_worker
    )


def require_room(run: Run, until: str) -> None:
    """Refuse a run whose releases would find no room on this Ray, before anything is trained.

    One that ends before them (`until` a stage of the pipeline) needs none.

    Raises:
        BadInputError: The port is taken, or this Ray serves another home; nothing was touched.
    """
    if until in ("", "release"):
        ServePlatform(gateway_config(run), platform_config(run)).require_room()
