"""Stages 7 and 8: a canary beside the stable policy, until evidence promotes it or fails it back."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from cluster.bundle import Bundle, Component
from cluster.paths import write_json
from cluster.registry import Registry
from cluster.stages.context import NUM_THREADS, Run
from cluster.stages.data import NUM_RELEASES, read_tasks
from cluster.stages.registration import register_policies
from cluster.stages.training import copy_tokenizer
from cluster.traffic import TrafficConfig, TrafficDriver, TrafficProgress, run_traffic
from rl_actors.contracts import DataSnapshot, PolicyVersion, RewardModelVersion, Task
from rl_actors.errors import InfrastructureError
from rl_actors.evaluation import CostModel
from serving.contracts import RampStep, Release, ReleasePlan, ReleaseState
from serving.controller import Aliases, LedgerEvidence, ReleaseController
from serving.ledger import RunLedger
from serving.platform import PlatformConfig, ServePlatform
from serving.release_state_machine import TERMINAL
from serving.served import GatewayConfig, ServedPolicy
from serving.split import SplitStore

Outcome = Literal["promoted", "rolled_back", "failed_back", "halted"]
DEGRADE_SCALE = 0.6
"""Noise of the deliberately bad candidate, in standard deviations of each weight tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseResult:
    """How one release ended, from the ledger and the controller's own record."""

    release_id: str
    stable: str
    candidate: str
    outcome: Outcome
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


def release_plan(run: Run, *, may_promote: bool) -> ReleasePlan:
    """Return the rules of a release from the spec; a drill has the same rules and can never promote."""
    release = run.spec.release
    max_duration_s = release.max_minutes * 60.0
    ramp = tuple(
        RampStep(
            share=min(share, 99.0) / 100.0, min_requests=release.min_canary_requests, max_duration_s=max_duration_s
        )
        for share in release.ramp
    )
    return ReleasePlan(
        ramp=ramp,
        max_duration_s=max_duration_s,
        gates=tuple(release.gates),
        alpha=release.alpha,
        full_samples=2 * release.min_canary_requests,
        min_samples=min(50, release.min_canary_requests),
        may_promote=may_promote,
        tick_s=1.0,
        seed=run.spec.seed,
    )


def degrade_policy(run: Run, policy: PolicyVersion) -> PolicyVersion:
    """Write a really bad checkpoint: every weight of the policy with noise added. What a broken training run leaves."""
    from transformers import AutoModelForCausalLM

    directory = run.fresh("models/degraded")
    model = AutoModelForCausalLM.from_pretrained(policy.path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(run.spec.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * parameter.std() * DEGRADE_SCALE)
    model.save_pretrained(directory)
    copy_tokenizer(policy.path, directory)
    return run.policy("degraded_v1", "degraded", directory, policy.sha256)


def served(policy: PolicyVersion, reward_model_version: str, bundle_id: str) -> ServedPolicy:
    """Return a policy as Serve deploys it, with the stamps every response will carry."""
    return ServedPolicy(
        version=policy.name,
        path=policy.path,
        model_version=policy.sha256[:16],
        reward_model_version=reward_model_version,
        bundle_id=bundle_id,
    )


def live_tasks(snapshot: DataSnapshot, index: int) -> list[Task]:
    """Return the live tickets of release number `index`; each is good for one serving."""
    tasks = read_tasks(snapshot, "live")
    size = len(tasks) // NUM_RELEASES
    return tasks[index * size : (index + 1) * size]


class ReleaseBench:
    """The serving side of a run: platform, live database and ledger, shared by its releases."""

    def __init__(self, run: Run, snapshot: DataSnapshot, aliases: Aliases) -> None:
        """Build the live database when it is not there yet; start nothing."""
        self._run, self._snapshot, self._aliases = run, snapshot, aliases
        self._is_started = False
        self._root = run.folder.root / "serving"
        self._root.mkdir(parents=True, exist_ok=True)
        database = self._root / "live.sqlite"
        if not database.exists():
            run.workflow.build_live_database(read_tasks(snapshot, "live"), str(database))
        self._world = {"database": str(database)}
        self.platform = ServePlatform(self._gateway(), self._config())
        self.ledger_path = self._gateway().files.ledger

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
        self.platform.start(stable)
        self.platform.deploy_policy(candidate)
        self.platform.candidate = candidate.version
        release = Release(
            release_id=f"{self._run.folder.run_id}-{index}", stable=stable.version, candidate=candidate.version
        )
        ledger = RunLedger(self.ledger_path, owner="controller")
        controller = self._controller(release, plan, ledger, directory)
        over = threading.Event()
        traffic = _Traffic(self._driver(index), live_tasks(self._snapshot, index), over, self._run, index)
        traffic.start()
        try:
            state = self._drive(controller, traffic)
        finally:
            over.set()
            traffic.join(timeout=120.0)
        result = self._result(release, controller, state, ledger, traffic.progress, time.monotonic() - started)
        write_json(directory / "result.json", asdict(result))
        return result

    def _drive(self, controller: ReleaseController, traffic: _Traffic) -> ReleaseState:
        """Run the controller; tickets that run out before a decision end the release for lack of evidence."""
        state = controller.tick()
        while not isinstance(state, _TERMINAL):
            time.sleep(controller.plan.tick_s)
            traffic.require_healthy()
            if traffic.is_finished:
                state = controller.tick()
                if not isinstance(state, _TERMINAL):
                    controller.roll_back(actor="seatrial", reason="tickets ran out before the evidence sufficed")
            state = controller.tick()
        return state

    def _controller(self, release: Release, plan: ReleasePlan, ledger: RunLedger, directory: Path) -> ReleaseController:
        splits = SplitStore(self._gateway().files.split)
        return ReleaseController(
            release,
            plan,
            directory=directory,
            splits=splits,
            platform=self.platform,
            evidence=LedgerEvidence(ledger, splits),
            aliases=self._aliases,
            clock=time.time,
            sleep=time.sleep,
        )

    def _result(
        self,
        release: Release,
        controller: ReleaseController,
        state: ReleaseState,
        ledger: RunLedger,
        progress: TrafficProgress,
        seconds: float,
    ) -> ReleaseResult:
        history = SplitStore(self._gateway().files.split).history().values()
        epochs = [record.epoch for record in history if record.salt == release.release_id and record.share > 0]
        first, second = ledger.session_counts(epochs[:1]), ledger.session_counts(epochs)
        rows = sum(ledger.counts().values())
        drills = controller.log.drills()
        return ReleaseResult(
            release_id=release.release_id,
            stable=release.stable,
            candidate=release.candidate,
            outcome=_OUTCOMES[type(state).__name__],
            reason=getattr(state, "reason", "all gates passed at every step of the ramp"),
            requests=progress.num_sent,
            failed_requests=progress.num_failed,
            ledger_rows=rows,
            first_step_requests=first[1],
            first_step_canary_requests=first[0],
            canary_requests=second[0],
            time_to_recovery_s=getattr(state, "time_to_recovery_s", 0.0),
            drill_s=drills[-1].seconds if drills else 0.0,
            seconds=seconds,
        )

    def _driver(self, index: int) -> TrafficDriver:
        config = TrafficConfig(
            url=self.platform.url,
            live_world=self._world,
            run_name=f"{self._run.folder.run_id}-{index}",
            concurrency=self._run.spec.release.concurrency,
        )
        return TrafficDriver(self._run.workflow, config)

    def _gateway(self) -> GatewayConfig:
        cost = CostModel()
        return GatewayConfig(
            root=str(self._root),
            workflow=self._run.workflow_ref,
            live_world=self._world,
            limits=self._run.limits,
            temperature=self._run.spec.ppo.temperature,
            cost_per_token_in=cost.usd_per_million_tokens_in / 1e6,
            cost_per_token_out=cost.usd_per_million_tokens_out / 1e6,
        )

    def _config(self) -> PlatformConfig:
        return PlatformConfig(http_port=self._run.spec.cluster.serve_port, engine_threads=NUM_THREADS // 2)


class _Traffic(threading.Thread):
    """Users: tickets over HTTP until the release is over."""

    def __init__(
        self, driver: TrafficDriver, tasks: Sequence[Task], over: threading.Event, run: Run, index: int
    ) -> None:
        super().__init__(name="traffic", daemon=True)
        self._driver, self._tasks, self._over, self._run, self._index = driver, tasks, over, run, index
        self._failure: BaseException | None = None
        self.is_finished = False

    @property
    def progress(self) -> TrafficProgress:
        """Counts so far."""
        return self._driver.progress

    def run(self) -> None:
        """Send tickets; what goes wrong is kept for the controller's thread."""
        try:
            run_traffic(self._driver, self._tasks, is_over=self._over.is_set, on_progress=self._show)
        except BaseException as error:  # noqa: BLE001 - raised again by require_healthy
            self._failure = error
        finally:
            self.is_finished = True

    def require_healthy(self) -> None:
        """Raise when the driver itself broke: silence of our own making is no evidence."""
        if self._failure is not None:
            raise InfrastructureError(f"the traffic driver stopped: {self._failure!r}")

    def _show(self, progress: TrafficProgress) -> None:
        metrics = {
            "requests_per_s": progress.requests_per_s,
            "canary": float(progress.answered["canary"]),
            "stable_success": progress.success_rate("general"),
            "canary_success": progress.success_rate("canary"),
            "failed": float(progress.num_failed),
        }
        self._run.watch.progress(_STAGES[self._index], progress.num_sent, len(self._tasks), metrics)


_STAGES = ("canary", "failback_drill")
_TERMINAL = TERMINAL
_OUTCOMES: dict[str, Outcome] = {
    "Promoted": "promoted",
    "RolledBack": "rolled_back",
    "FailedBack": "failed_back",
    "Halted": "halted",
}


def release_all(
    run: Run,
    snapshot: DataSnapshot,
    registry: Registry,
    bundle: Bundle,
    baseline: PolicyVersion,
    candidate: PolicyVersion,
    reward_model: RewardModelVersion,
) -> tuple[ReleaseResult, ReleaseResult]:
    """Release the candidate against the baseline, then a deliberately bad one against whoever is stable after that."""
    plan, drill = release_plan(run, may_promote=True), release_plan(run, may_promote=False)
    degraded = run.stage(
        "degrade",
        {"policy": candidate.sha256, "scale": DEGRADE_SCALE, "seed": run.spec.seed},
        lambda: degrade_policy(run, candidate),
        PolicyVersion,
        detail="a really bad checkpoint for the fail-back drill",
        describe=lambda p: p.name,
        artifacts=lambda p: [p.path],
    )
    bundles = {p.name: replace_policy(bundle, p) for p in (baseline, candidate, degraded)}
    register_policies(registry, snapshot, reward_model, [(p, bundles[p.name]) for p in (baseline, candidate, degraded)])
    versions = {p.name: served(p, reward_model.name, bundles[p.name].id) for p in (baseline, candidate, degraded)}
    with ReleaseBench(run, snapshot, registry.versions) as bench:
        first = run.stage(
            "canary",
            {"plan": plan, "stable": baseline.sha256, "candidate": candidate.sha256, "bundle": bundle.id},
            lambda: bench.release(
                0, versions[baseline.name], versions[candidate.name], plan, run.folder.decisions.parent
            ),
            ReleaseResult,
            detail=f"{run.spec.release.canary_traffic_percent:g} % of live tickets on Ray Serve",
            describe=describe_release,
        )
        stable = candidate if first.outcome == "promoted" else baseline
        second = run.stage(
            "failback_drill",
            {"plan": drill, "stable": stable.sha256, "candidate": degraded.sha256},
            lambda: bench.release(
                1, versions[stable.name], versions[degraded.name], drill, run.folder.root / "release_drill"
            ),
            ReleaseResult,
            detail="the bad checkpoint meets live traffic",
            describe=describe_release,
        )
    return first, second


def replace_policy(bundle: Bundle, policy: PolicyVersion) -> Bundle:
    """Return the bundle with another policy in it: every version that may answer users has a bundle of its own."""
    return replace(bundle, policy=Component(version=policy.name, sha256=policy.sha256))


def describe_release(result: ReleaseResult) -> str:
    """Return one line for the person who watches."""
    counts = f"{result.canary_requests} canary of {result.requests} requests, {result.failed_requests} failed"
    recovery = f", recovered in {result.time_to_recovery_s:.2f} s" if result.outcome != "promoted" else ""
    return f"{result.outcome.replace('_', ' ')}{recovery} ({counts})"
