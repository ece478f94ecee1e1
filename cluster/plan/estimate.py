"""`seatrial plan`: what a run will cost before it starts. Pure arithmetic on the spec; only estimates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from cluster.plan.memory import PROCESS_BYTES, Device, MemoryModel, Parts
from cluster.plan.model_shape import ModelShape, shape_of
from cluster.plan.placement import Placement, Stage, place
from cluster.spec import WorkflowSpec, is_pinned
from rl_actors.contracts import BATCH_PAIRS, CALIBRATION_FRACTION

# Rates to estimate minutes with. CPU: measured on 2 AMX cores with the 1.1M-parameter model (notes.md); they scale with
# active parameters. GPU: not measured, one H100 at about 40 % of its bfloat16 peak; calibrate before you believe them.
RATES: dict[Device, dict[str, float]] = {
    "cpu": {"train_params_tokens_per_s": 1.2e10, "generate_params_tokens_per_s": 8.0e9, "max_tokens_per_s": 8e3},
    "gpu": {"train_params_tokens_per_s": 6.0e13, "generate_params_tokens_per_s": 1.8e13, "max_tokens_per_s": 3e4},
}


# Shares and fixed costs that turn limits into typical values.
TYPICAL: dict[str, float] = {
    "turns_per_rollout": 4.0,
    "filled_turn_fraction": 0.4,
    "filled_length_fraction": 0.4,
    "serve_requests_per_s": 12.0,
    "engine_start_s": 13.0,
    "serve_start_s": 30.0,
    "ray_start_s": 8.0,
}


FORWARD: Final = 1 / 3  # of a training pass, whose backward costs two forwards


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """Batch algebra of one PPO step and of the whole PPO stage."""

    rollouts_per_step: int
    rollouts_per_minibatch: int
    rollouts_per_learner: int
    optimizer_steps_per_step: int
    optimizer_steps: int
    sampled_tokens_per_step: int
    trained_tokens_per_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One stage: tokens it touches, optimizer steps, memory by part over all its processes, resources and minutes."""

    stage: str
    tokens: int
    optimizer_steps: int
    memory_bytes: Mapping[str, int]
    cpus: float
    gpus: float
    minutes: float

    @property
    def total_memory_bytes(self) -> int:
        """Memory of the stage over all its processes."""
        return sum(self.memory_bytes.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """Everything `seatrial plan` prints. `tickets_needed` is what the ramp cannot do with less of."""

    params: int
    active_params: int
    device: Device
    batch: BatchPlan
    stages: tuple[StagePlan, ...]
    tickets_needed: int
    tickets_given: int

    @property
    def total_minutes(self) -> float:
        """Expected minutes of the whole run, installation excluded."""
        return sum(stage.minutes for stage in self.stages)

    @property
    def peak_memory_bytes(self) -> int:
        """Memory of the largest stage."""
        return max(stage.total_memory_bytes for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON."""
        stages = [
            asdict(s) | {"memory_bytes": dict(s.memory_bytes), "minutes": round(s.minutes, 2)} for s in self.stages
        ]
        totals = {"total_minutes": round(self.total_minutes, 2), "peak_memory_bytes": self.peak_memory_bytes}
        return asdict(self) | {"stages": stages} | totals


def plan_batch(spec: WorkflowSpec) -> BatchPlan:
    """Return the batch algebra of PPO."""
    ppo = spec.ppo
    rollouts = ppo.rollouts_per_step
    per_step = ppo.epochs * ppo.minibatches
    return BatchPlan(
        rollouts_per_step=rollouts,
        rollouts_per_minibatch=math.ceil(rollouts / ppo.minibatches),
        rollouts_per_learner=math.ceil(rollouts / ppo.minibatches / ppo.num_learners),
        optimizer_steps_per_step=per_step,
        optimizer_steps=per_step * ppo.num_steps,
        sampled_tokens_per_step=rollouts * _sampled_tokens(spec),
        trained_tokens_per_step=rollouts * _rollout_tokens(spec) * ppo.epochs,
    )


def _sampled_tokens(spec: WorkflowSpec) -> int:
    turn = spec.agent.max_tokens_per_turn * TYPICAL["filled_turn_fraction"]
    return round(min(TYPICAL["turns_per_rollout"], spec.agent.max_turns) * turn)


def _rollout_tokens(spec: WorkflowSpec) -> int:
    return round(spec.model.max_length * TYPICAL["filled_length_fraction"])


def tickets_needed(spec: WorkflowSpec) -> int:
    """Return how many live tickets bring every ramp step its candidate runs: at least this many, at its share."""
    release = spec.release
    return sum(math.ceil(release.min_canary_requests * 100 / share) for share in release.ramp)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Costs:
    """Spec, shape and rates together: what every stage's estimate is made of."""

    spec: WorkflowSpec
    shape: ModelShape
    placement: Placement

    @property
    def memory(self) -> MemoryModel:
        return MemoryModel(spec=self.spec, shape=self.shape)

    def train_seconds(self, tokens: float) -> float:
        rate = RATES[self.memory.device]["train_params_tokens_per_s"] / self.shape.active_params
        return tokens / rate / self.spec.ppo.num_learners

    def generate_seconds(self, tokens: float) -> float:
        device = self.memory.device
        rates = RATES[device]
        rate = min(rates["generate_params_tokens_per_s"] / self.shape.active_params, rates["max_tokens_per_s"])
        workers = self.spec.ppo.num_rollout_workers if device == "gpu" else 1  # CPU workers share the cores
        return tokens / rate / workers

    def stage(
        self,
        stage: Stage | Literal["snapshot"],
        tokens: float,
        memory: Parts,
        seconds: float,
        optimizer_steps: int = 0,
    ) -> StagePlan:
        demand = {"CPU": 1.0, "GPU": 0.0} if stage == "snapshot" else self.placement.demand(stage)
        return StagePlan(
            stage=stage,
            tokens=round(tokens),
            optimizer_steps=optimizer_steps,
            memory_bytes=memory,
            cpus=demand["CPU"],
            gpus=demand["GPU"],
            minutes=seconds / 60,
        )


def plan_run(spec: WorkflowSpec, shape: ModelShape | None = None) -> RunPlan:
    """Return batch algebra, memory, placement and expected minutes of a run. Pure once `shape` is given."""
    costs = _Costs(spec=spec, shape=shape or shape_of(spec.model), placement=place(spec))
    stages = (_plan_snapshot(costs), _plan_sft(costs), _plan_reward(costs), _plan_ppo(costs))
    return RunPlan(
        params=costs.shape.params,
        active_params=costs.shape.active_params,
        device=costs.memory.device,
        batch=plan_batch(spec),
        stages=(*stages, _plan_evaluation(costs), _plan_canary(costs)),
        tickets_needed=tickets_needed(spec),
        tickets_given=spec.data.num_live,
    )


def _plan_snapshot(costs: _Costs) -> StagePlan:
    tasks = sum(costs.spec.num_tasks.values())
    memory = {"processes": PROCESS_BYTES}
    return costs.stage("snapshot", tasks * _rollout_tokens(costs.spec), memory, TYPICAL["ray_start_s"] + tasks * 2e-3)


def _plan_sft(costs: _Costs) -> StagePlan:
    """Each learner takes batches of its own, so that more of them take fewer steps on larger batches."""
    spec = costs.spec
    if is_pinned(spec.workflow.baseline):
        return costs.stage("sft", 0, {}, 0.0)
    tokens = spec.data.num_train * _rollout_tokens(spec) * spec.sft.epochs
    steps = math.ceil(tokens / (spec.sft.batch_tokens * spec.ppo.num_learners))
    seconds = TYPICAL["engine_start_s"] + costs.train_seconds(tokens)
    return costs.stage("sft", tokens, costs.memory.sft(), seconds, steps)


def _plan_reward(costs: _Costs) -> StagePlan:
    """Pairs are made of rollouts that the baseline samples first, about one for each; some pairs only calibrate.

    A pinned reward model is not trained, but a baseline that is trained here is sampled all the same.
    """
    reward, workflow = costs.spec.reward, costs.spec.workflow
    if is_pinned(workflow.reward_model):
        return _plan_sampling(costs, 0 if is_pinned(workflow.baseline) else reward.num_pairs)
    pairs = reward.num_pairs * (1 - CALIBRATION_FRACTION)
    sampled = reward.num_pairs * _sampled_tokens(costs.spec)
    trained = 2 * pairs * _rollout_tokens(costs.spec) * reward.epochs
    steps = reward.epochs * max(1, round(pairs) // BATCH_PAIRS)
    seconds = 2 * TYPICAL["engine_start_s"] + costs.generate_seconds(sampled) + costs.train_seconds(trained)
    return costs.stage("reward_model", sampled + trained, costs.memory.reward_model(), seconds, steps)


def _plan_sampling(costs: _Costs, rollouts: int) -> StagePlan:
    """What is left of the reward model's stage when it is pinned: the baseline's rollouts, or nothing."""
    if not rollouts:
        return costs.stage("reward_model", 0, {}, 0.0)
    tokens = rollouts * _sampled_tokens(costs.spec)
    seconds = TYPICAL["engine_start_s"] + costs.generate_seconds(tokens)
    return costs.stage("reward_model", tokens, costs.memory.evaluation(policies=1), seconds)


def _plan_ppo(costs: _Costs) -> StagePlan:
    """Per rollout token a forward each of old policy, reference and reward model, and a training pass an epoch."""
    spec, batch = costs.spec, plan_batch(costs.spec)
    sampled = batch.sampled_tokens_per_step * spec.ppo.num_steps
    trained = batch.trained_tokens_per_step * spec.ppo.num_steps
    looked = trained / spec.ppo.epochs * 3 * FORWARD
    memory = costs.memory.ppo(batch.rollouts_per_minibatch * _rollout_tokens(spec))
    seconds = 2 * TYPICAL["engine_start_s"] + costs.generate_seconds(sampled) + costs.train_seconds(trained + looked)
    return costs.stage("ppo", sampled + trained, memory, seconds, batch.optimizer_steps)


def _plan_evaluation(costs: _Costs) -> StagePlan:
    """Baseline and candidate on the same three suites."""
    data = costs.spec.data
    rollouts = 2 * (data.num_held_out + data.num_frozen + data.num_adversarial)
    tokens = rollouts * _sampled_tokens(costs.spec)
    seconds = 2 * TYPICAL["engine_start_s"] + costs.generate_seconds(tokens)
    return costs.stage("offline_eval", tokens, costs.memory.evaluation(), seconds)


def _plan_canary(costs: _Costs) -> StagePlan:
    spec = costs.spec
    tokens = spec.data.num_live * _sampled_tokens(spec)
    traffic = max(spec.data.num_live / TYPICAL["serve_requests_per_s"], costs.generate_seconds(tokens))
    seconds = TYPICAL["serve_start_s"] + min(traffic, spec.release.max_minutes * 60)
    return costs.stage("canary", tokens, costs.memory.canary(), seconds)
