"""`seatrial plan`: what a run will cost before it starts. Pure arithmetic on the spec; only estimates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Group
from rich.table import Table

from cluster.model_shape import ModelShape, shape_of
from cluster.placement import Placement, Stage, place
from cluster.spec import WorkflowSpec

GIB = 1024**3

# Rates to estimate minutes with. CPU: measured on 2 AMX cores with the 1.1M-parameter model (notes.md); they scale with
# active parameters. GPU: not measured, one H100 at about 40 % of its bfloat16 peak; calibrate before you believe them.
RATES: dict[str, dict[str, float]] = {
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
    "process_bytes": 0.9 * GIB,
    "engine_bytes": 1.4 * GIB,
    "cpu_kv_cache_bytes": 1.0 * GIB,
}


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
    """One stage: tokens it touches, memory by use over all its processes, what it reserves and how long it may take."""

    stage: str
    tokens: int
    memory_bytes: dict[str, int]
    cpus: float
    gpus: float
    minutes: float

    @property
    def total_memory_bytes(self) -> int:
        """Memory of the stage over all its processes."""
        return sum(self.memory_bytes.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything `seatrial plan` prints."""

    params: int
    active_params: int
    device: str
    batch: BatchPlan
    stages: tuple[StagePlan, ...]

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
            {
                "stage": s.stage,
                "tokens": s.tokens,
                "memory_bytes": dict(s.memory_bytes),
                "cpus": s.cpus,
                "gpus": s.gpus,
                "minutes": round(s.minutes, 2),
            }
            for s in self.stages
        ]
        batch = {name: getattr(self.batch, name) for name in BatchPlan.__dataclass_fields__}
        return {
            "params": self.params,
            "active_params": self.active_params,
            "device": self.device,
            "batch": batch,
            "stages": stages,
            "total_minutes": round(self.total_minutes, 2),
            "peak_memory_bytes": self.peak_memory_bytes,
        }


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Costs:
    """Spec, shape and rates together: what every stage's estimate is made of."""

    spec: WorkflowSpec
    shape: ModelShape
    placement: Placement

    @property
    def device(self) -> str:
        return "gpu" if self.spec.cluster.uses_gpu else "cpu"

    @property
    def bytes_per_value(self) -> int:
        return 2 if self.spec.cluster.dtype == "bfloat16" else 4

    @property
    def weights(self) -> int:
        return self.shape.params * self.bytes_per_value

    def training_memory(self, tokens_per_batch: int) -> dict[str, int]:
        """Adam keeps two float32 moments, and a float32 copy of bfloat16 weights; ranks split them (ZeRO-2)."""
        ranks = self.spec.ppo.num_learners
        master = 4 * self.shape.params if self.bytes_per_value == 2 else 0
        tokens = tokens_per_batch // ranks
        activations = tokens * (self.shape.num_layers * self.shape.hidden_size * 18 + 3 * self.shape.vocab_size)
        return {
            "processes": round(ranks * TYPICAL["process_bytes"]),
            "params": ranks * self.weights,
            "grads": self.weights,
            "optimizer": 8 * self.shape.params + master,
            "activations": ranks * activations * self.bytes_per_value,
        }

    def engine_memory(self, engines: int, sequences: int) -> dict[str, int]:
        """KV cache: what the sequences need, and on CPU at least what vLLM sets aside."""
        per_token = self.shape.kv_bytes_per_token(self.bytes_per_value)
        needed = math.ceil(sequences / engines) * self.spec.model.max_length * per_token
        kept = max(needed, round(TYPICAL["cpu_kv_cache_bytes"])) if self.device == "cpu" else needed
        return {
            "engine_processes": round(engines * TYPICAL["engine_bytes"]),
            "engine_params": engines * self.weights,
            "kv_cache": engines * kept,
        }

    def train_seconds(self, tokens: float) -> float:
        rate = RATES[self.device]["train_params_tokens_per_s"] / self.shape.active_params
        return tokens / rate / self.spec.ppo.num_learners

    def generate_seconds(self, tokens: float) -> float:
        rates = RATES[self.device]
        rate = min(rates["generate_params_tokens_per_s"] / self.shape.active_params, rates["max_tokens_per_s"])
        workers = self.spec.ppo.num_rollout_workers if self.device == "gpu" else 1  # CPU workers share the cores
        return tokens / rate / workers

    def stage(
        self, stage: Stage | Literal["snapshot"], tokens: float, memory: dict[str, int], seconds: float
    ) -> StagePlan:
        demand = {"CPU": 1.0, "GPU": 0.0} if stage == "snapshot" else self.placement.demand(stage)
        return StagePlan(
            stage=stage,
            tokens=round(tokens),
            memory_bytes=memory,
            cpus=demand["CPU"],
            gpus=demand["GPU"],
            minutes=seconds / 60,
        )


def plan_run(spec: WorkflowSpec, shape: ModelShape | None = None) -> Plan:
    """Return batch algebra, memory, placement and expected minutes of a run. Pure once `shape` is given."""
    costs = _Costs(spec=spec, shape=shape or shape_of(spec.model), placement=place(spec))
    stages = (_plan_snapshot(costs), _plan_sft(costs), _plan_reward(costs), _plan_ppo(costs))
    return Plan(
        params=costs.shape.params,
        active_params=costs.shape.active_params,
        device=costs.device,
        batch=plan_batch(spec),
        stages=(*stages, _plan_evaluation(costs), _plan_canary(costs)),
    )


def _plan_snapshot(costs: _Costs) -> StagePlan:
    tasks = sum(costs.spec.num_tasks.values())
    memory = {"processes": round(TYPICAL["process_bytes"])}
    return costs.stage("snapshot", tasks * _rollout_tokens(costs.spec), memory, TYPICAL["ray_start_s"] + tasks * 2e-3)


def _plan_sft(costs: _Costs) -> StagePlan:
    spec = costs.spec
    tokens = spec.data.num_train * _rollout_tokens(spec) * spec.sft.epochs
    seconds = TYPICAL["engine_start_s"] + costs.train_seconds(tokens)
    return costs.stage("sft", tokens, costs.training_memory(spec.sft.batch_tokens), seconds)


def _plan_reward(costs: _Costs) -> StagePlan:
    """Pairs are made of rollouts that the baseline samples first."""
    spec = costs.spec
    sampled = spec.reward.num_pairs * spec.reward.rollouts_per_task * _sampled_tokens(spec) / 2
    trained = 2 * spec.reward.num_pairs * _rollout_tokens(spec) * spec.reward.epochs
    seconds = 2 * TYPICAL["engine_start_s"] + costs.generate_seconds(sampled) + costs.train_seconds(trained)
    return costs.stage("reward_model", sampled + trained, costs.training_memory(spec.sft.batch_tokens), seconds)


def _plan_ppo(costs: _Costs) -> StagePlan:
    """Per rollout token: old and reference forwards (2/3 of a training pass), a pass each for policy and critic."""
    spec, batch = costs.spec, plan_batch(costs.spec)
    sampled = batch.sampled_tokens_per_step * spec.ppo.num_steps
    trained = batch.trained_tokens_per_step * spec.ppo.num_steps
    memory = costs.training_memory(batch.rollouts_per_minibatch * _rollout_tokens(spec))
    ranks = spec.ppo.num_learners
    memory |= {"reference": ranks * costs.weights, "critic": ranks * costs.weights + 12 * costs.shape.params}
    memory |= {"scorer": round(TYPICAL["process_bytes"]) + costs.weights}
    memory |= costs.engine_memory(spec.ppo.num_rollout_workers, spec.ppo.rollouts_per_step)
    seconds = 2 * TYPICAL["engine_start_s"] + costs.generate_seconds(sampled) + costs.train_seconds(trained * 8 / 3)
    return costs.stage("ppo", sampled + trained, memory, seconds)


def _plan_evaluation(costs: _Costs) -> StagePlan:
    """Baseline and candidate on the same three suites."""
    data = costs.spec.data
    rollouts = 2 * (data.num_held_out + data.num_frozen + data.num_adversarial)
    tokens = rollouts * _sampled_tokens(costs.spec)
    seconds = 2 * TYPICAL["engine_start_s"] + costs.generate_seconds(tokens)
    memory = costs.engine_memory(costs.spec.ppo.num_rollout_workers, costs.spec.ppo.rollouts_per_step)
    return costs.stage("offline_eval", tokens, memory, seconds)


def _plan_canary(costs: _Costs) -> StagePlan:
    spec = costs.spec
    tokens = spec.data.num_live * _sampled_tokens(spec)
    traffic = max(spec.data.num_live / TYPICAL["serve_requests_per_s"], costs.generate_seconds(tokens))
    seconds = TYPICAL["serve_start_s"] + min(traffic, spec.release.max_minutes * 60)
    memory = costs.engine_memory(2, 2 * spec.release.concurrency) | {"gateway": round(TYPICAL["process_bytes"])}
    return costs.stage("canary", tokens, memory, seconds)


def render_plan(plan: Plan) -> Group:
    """Return the plan as tables for people."""
    batch = Table(title="One PPO step", show_header=False)
    for name in BatchPlan.__dataclass_fields__:
        batch.add_row(name.replace("_", " "), f"{getattr(plan.batch, name):,}")
    stages = Table(title=f"{plan.params:,} parameters ({plan.active_params:,} active), {plan.device}; estimates")
    for column in ("stage", "tokens", "memory", "CPU", "GPU", "minutes"):
        stages.add_column(column, justify="left" if column == "stage" else "right")
    for stage in plan.stages:
        memory = f"{stage.total_memory_bytes / GIB:.1f} GiB"
        stages.add_row(
            stage.stage, f"{stage.tokens:,}", memory, f"{stage.cpus:g}", f"{stage.gpus:g}", f"{stage.minutes:.1f}"
        )
    peak = f"{plan.peak_memory_bytes / GIB:.1f} GiB"
    stages.add_section()
    stages.add_row("all", "", f"peak {peak}", "", "", f"{plan.total_minutes:.1f}")
    return Group(batch, stages)
