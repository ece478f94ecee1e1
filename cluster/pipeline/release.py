"""Stages 7 and 8: a canary beside the stable policy, until evidence promotes it or fails it back; then a bad one.

Both are tried on one Serve, one live database and one ledger. Nothing carries traffic that MLflow cannot name, with the
data and reward model it stands on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

from cluster.pipeline.run import Learned, Run
from cluster.pipeline.sampling import agent_limits
from cluster.pipeline.snapshot import read_tasks
from cluster.plan import threads_each
from cluster.records import Bundle, Component, ReleaseEnding, ReleaseOutcome, RunFolder, fresh, record_gateway
from cluster.registry import Lineage, RegisteredVersions
from cluster.simulation import (
    DEGRADE_SCALE,
    TicketBook,
    TrafficConfig,
    TrafficDriver,
    TrafficProgress,
    TrafficThread,
    degrade_policy,
)
from cluster.spec import MAX_ROLLBACK_S, NUM_RELEASES, WorkflowSpec
from cluster.workflows import locate_workflow
from rl_actors.contracts import DataSnapshot, PolicyVersion, Task
from rl_actors.durable import write_json
from rl_actors.environment import Workflow
from serving.contracts import Canary, RampStep, Release, ReleasePlan, ReleaseState
from serving.platform import CRITIC, PlatformConfig, ServePlatform
from serving.release import TERMINAL, Aliases, ReleaseController, open_release
from serving.split import SplitStore
from serving.store import GatewayConfig, RequestLedger, ServedPolicy

# `full_samples` in `min_canary_requests`. With the default 50, latency is decided after 100 candidate requests at 5 and
# 25 %, and after 200 at 50 %, where stable's sample is no larger.
FULL_WEIGHT: Final = 1.4
_ENDINGS: Final[Mapping[str, ReleaseEnding]] = {
    "Promoted": "promoted",
    "RolledBack": "rolled_back",
    "FailedBack": "failed_back",
    "Halted": "halted",
}


def release_plan(spec: WorkflowSpec, critical_checks: Sequence[str], *, may_promote: bool) -> ReleasePlan:
    """Return the rules of a release from the spec; a drill has the same rules and can never promote."""
    release = spec.release
    max_duration_s = release.max_minutes * 60.0
    ramp = tuple(
        RampStep(share=share / 100.0, min_requests=release.min_canary_requests, max_duration_s=max_duration_s)
        for share in release.ramp
    )
    return ReleasePlan(
        ramp=ramp,
        max_duration_s=max_duration_s,
        gates=tuple(release.gates),
        critical_checks=tuple(critical_checks),
        alpha=release.alpha,
        full_samples=round(FULL_WEIGHT * release.min_canary_requests),
        min_samples=max(2, min(50, release.min_canary_requests)),  # one sample has no spread
        max_rollback_s=MAX_ROLLBACK_S,
        may_promote=may_promote,
        tick_s=1.0,
        seed=spec.seed,
    )


def release_all(
    run: Run,
    seed: int,
    plan: ReleasePlan,
    learned: Learned,
    bundle: Bundle,
    versions: RegisteredVersions,
    bench: ReleaseBench,
) -> tuple[ReleaseOutcome, ReleaseOutcome]:
    """Release the candidate against the baseline, then a deliberately bad one against whoever is stable after that."""
    baseline, candidate, drill = learned.baseline, learned.candidate, replace(plan, may_promote=False)
    degraded = run.stage(
        "degrade",
        {"policy": candidate.sha256, "scale": DEGRADE_SCALE, "seed": seed},
        lambda: degrade_policy(candidate, run.folder.models / "degraded", seed),
        PolicyVersion,
        detail="a really bad checkpoint for the fail-back drill",
        describe=lambda p: p.name,
    )
    # Before any traffic: an alias cannot name a version that MLflow does not have.
    served = register_policies(versions, learned, bundle, (baseline, candidate, degraded))
    first = run.stage(
        "canary",
        {"plan": plan, "stable": baseline.sha256, "candidate": candidate.sha256, "bundle": bundle.id},
        lambda: bench.release(0, served[baseline.name], served[candidate.name], plan, run.folder.decisions.parent),
        ReleaseOutcome,
        detail=f"{100 * plan.ramp[0].share:g} % of live tickets on Ray Serve",
        describe=describe_release,
    )
    # A candidate that lost must not be what the drill falls back to.
    stable = candidate if first.outcome == "promoted" else baseline
    second = run.stage(
        "failback_drill",
        {"plan": drill, "stable": stable.sha256, "candidate": degraded.sha256},
        lambda: bench.release(1, served[stable.name], served[degraded.name], drill, run.folder.root / "release_drill"),
        ReleaseOutcome,
        detail="the bad checkpoint meets live traffic",
        describe=describe_release,
    )
    return first, second


def register_policies(
    versions: RegisteredVersions, learned: Learned, bundle: Bundle, policies: Sequence[PolicyVersion]
) -> dict[str, ServedPolicy]:
    """Register the reward model and every policy that may carry traffic, linked to each other; return them as served.

    Each policy has a bundle of its own, and the reward model stands on that of the first.
    """
    data, reward_model = learned.snapshot.sha256, learned.reward_model
    bundle_ids = {policy.name: replace_policy(bundle, policy).id for policy in policies}
    first = bundle_ids[policies[0].name]
    number = versions.register(reward_model, Lineage(bundle_id=first, snapshot_sha256=data, stage="reward_model"))
    for policy in policies:
        stage = "degrade" if policy.kind == "degraded" else policy.kind
        bundle_id = bundle_ids[policy.name]
        versions.register(policy, Lineage(bundle_id=bundle_id, snapshot_sha256=data, reward_model=number, stage=stage))
    return {policy.name: served(policy, reward_model.name, bundle_ids[policy.name]) for policy in policies}


def served(policy: PolicyVersion, reward_model_version: str, bundle_id: str) -> ServedPolicy:
    """Return a policy as Serve deploys it, with the stamps every response will carry."""
    return ServedPolicy(
        version=policy.name,
        path=policy.path,
        model_version=policy.sha256[:16],
        reward_model_version=reward_model_version,
        bundle_id=bundle_id,
    )


def replace_policy(bundle: Bundle, policy: PolicyVersion) -> Bundle:
    """Return the bundle with another policy in it: every version that may answer users has a bundle of its own."""
    return replace(bundle, policy=Component(version=policy.name, sha256=policy.sha256))


def describe_release(result: ReleaseOutcome) -> str:
    """Return one line for the person who watches."""
    counts = f"{result.canary_requests} canary of {result.requests} requests, {result.failed_requests} failed"
    has_recovered = result.outcome in {"rolled_back", "failed_back"}  # after a halt nobody has acknowledged anything
    recovery = f", recovered in {result.time_to_recovery_s:.2f} s" if has_recovered else ""
    return f"{result.outcome.replace('_', ' ')}{recovery} ({counts})"


def live_tasks(snapshot: DataSnapshot, index: int) -> list[Task]:
    """Return the live tickets of release number `index`; each is good for one serving."""
    # A database row that one release changed would be wrong for the next: no ticket is in two.
    tasks = read_tasks(snapshot, "live")
    size = len(tasks) // NUM_RELEASES
    return tasks[index * size : (index + 1) * size]


class ReleaseBench:
    """The serving side of a run: platform, live database and ledger, shared by its releases."""

    def __init__(
        self,
        spec: WorkflowSpec,
        folder: RunFolder,
        workflow: Workflow,
        snapshot: DataSnapshot,
        aliases: Aliases,
        critic_path: str,
        report: Callable[[str, int, int, Mapping[str, float]], None],
    ) -> None:
        """Build the live database when it is not there yet; start nothing.

        `critic_path` is a reward model's, `report` hears how far the tickets are.
        """
        gateway = gateway_config(spec, folder)
        self._spec, self._folder, self._workflow, self._snapshot = spec, folder, workflow, snapshot
        self._gateway, self._aliases, self._critic_path, self._report = gateway, aliases, critic_path, report
        self._is_started = False
        self.ledger_path = gateway.files.ledger
        self._build_world(Path(gateway.live_world["database"]))
        self.platform = ServePlatform(gateway, platform_config(spec))
        record_gateway(folder, gateway)

    def _build_world(self, database: Path) -> None:
        if database.exists():
            return
        # Built apart and moved into place: what a killed attempt left must not pass for the whole.
        scratch = fresh(database.with_suffix(".tmp"))
        self._workflow.build_live_database(read_tasks(self._snapshot, "live"), str(scratch / database.name))
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
    ) -> ReleaseOutcome:
        """Serve stable, put the candidate beside it, send traffic, and tick the controller to the end."""
        started = time.monotonic()
        # Said first: a start that fails half-way leaves something to stop.
        self._is_started = True
        self.platform.start(stable, candidate, critic_path=self._critic_path)
        self.platform.candidate = candidate.version
        name = f"{self._folder.run_id}-{index}"
        release = Release(release_id=name, stable=stable.version, candidate=candidate.version)
        over = threading.Event()
        tasks, book = live_tasks(self._snapshot, index), TicketBook(directory / "tickets.jsonl")
        with closing(RequestLedger(self.ledger_path, owner="controller")) as ledger:
            traffic = TrafficThread(self._driver(name, book), tasks, over, self._report, index)
            controller = open_release(
                release,
                plan,
                directory=directory,
                split_directory=self._gateway.files.split,
                ledger=ledger,
                platform=self.platform,
                aliases=self._aliases,
            )
            traffic.start()
            try:
                state = self._drive(controller, traffic)
            finally:
                over.set()
                # Tickets in flight end first: the ledger and the users must count the same.
                traffic.join(timeout=120.0)
            seconds = time.monotonic() - started
            outcome = self._outcome(release, controller, state, ledger, traffic.progress, seconds)
        write_json(directory / "result.json", asdict(outcome))
        return outcome

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

    def _outcome(
        self,
        release: Release,
        controller: ReleaseController,
        state: ReleaseState,
        ledger: RequestLedger,
        progress: TrafficProgress,
        seconds: float,
    ) -> ReleaseOutcome:
        # The salt is the release's id: a run's releases share one history, and only this one's splits count.
        history = SplitStore(self._gateway.files.split).history().values()
        epochs = [record.epoch for record in history if record.salt == release.release_id and record.share > 0]
        first_canary, first_step = ledger.session_counts(epochs[:1])
        canary, _ = ledger.session_counts(epochs)
        drills = controller.log.drills()
        return ReleaseOutcome(
            release_id=release.release_id,
            stable=release.stable,
            candidate=release.candidate,
            outcome=_ENDINGS[type(state).__name__],
            reason=getattr(state, "reason", "all gates passed at every step of the ramp"),
            requests=progress.num_requests,
            failed_requests=progress.num_failed,
            ledger_rows=ledger.count_requests(release.release_id),
            first_step_requests=first_step,
            first_step_canary_requests=first_canary,
            canary_requests=canary,
            time_to_recovery_s=getattr(state, "time_to_recovery_s", 0.0),
            drill_s=drills[-1].seconds if drills else 0.0,
            seconds=seconds,
        )

    def _driver(self, name: str, book: TicketBook) -> TrafficDriver:
        config = TrafficConfig(
            url=self.platform.url,
            live_world=self._gateway.live_world,
            run_name=name,
            concurrency=self._spec.release.concurrency,
            # Later than the gateway's own bound: a slow candidate must fail there, by name, not here as a silence.
            timeout_s=max(90.0, 2.0 * self._spec.agent.timeout_s),
        )
        return TrafficDriver(self._workflow, config, book)


def gateway_config(spec: WorkflowSpec, folder: RunFolder) -> GatewayConfig:
    """Return what the gateways of a run's releases are told; nothing is created."""
    return GatewayConfig(
        root=str(folder.serving),
        workflow=locate_workflow(spec.workflow.name),
        live_world={"database": str(folder.serving / "live.sqlite")},
        limits=agent_limits(spec),
        temperature=spec.ppo.temperature,
        critic_application=CRITIC,
    )


def platform_config(spec: WorkflowSpec) -> PlatformConfig:
    """Return how Serve runs for a run's releases."""
    gpus = spec.cluster.gpus_per_rollout_worker
    # Two engines at a time share the cores: stable and candidate.
    return PlatformConfig(http_port=spec.cluster.serve_port, engine_threads=threads_each(2), gpus_per_policy=gpus)


def require_room(spec: WorkflowSpec, folder: RunFolder, until: str) -> None:
    """Refuse a run whose releases would find no room on this Ray, before anything is trained.

    One that ends before them (`until` a stage of the pipeline) needs none.

    Raises:
        BadInputError: The port is taken, or this Ray serves another home; nothing was touched.
    """
    if until in ("", "release"):
        ServePlatform(gateway_config(spec, folder), platform_config(spec)).require_room()
