"""The plan of a run before it starts, and the plan of each changed knob alone. Pure arithmetic; only estimates."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from pydantic import BaseModel

from cluster.plan.memory import PROCESS_BYTES, Device, MemoryModel, ModelShape, Parts, shape_of
from cluster.plan.placement import Placement, Stage, place
from cluster.plan.workload import tickets_needed
from cluster.spec import MEANINGS, Knob, SpecSource, WorkflowSpec, is_pinned, knob_named, leaf_paths, override
from rl_actors.contracts import BATCH_PAIRS, CALIBRATION_FRACTION, BadInputError

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
        stages = [asdict(stage) | {"minutes": round(stage.minutes, 2)} for stage in self.stages]
        totals = {"total_minutes": round(self.total_minutes, 2), "peak_memory_bytes": self.peak_memory_bytes}
        return asdict(self) | {"stages": stages} | totals


def _plan_batch(spec: WorkflowSpec) -> BatchPlan:
    ppo = spec.ppo
    rollouts, per_step = ppo.rollouts_per_step, ppo.epochs * ppo.minibatches
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
    """Spec, memory and placement together: every stage's estimate is made of them."""

    spec: WorkflowSpec
    memory: MemoryModel
    placement: Placement

    def train_seconds(self, tokens: float) -> float:
        rate = RATES[self.memory.device]["train_params_tokens_per_s"] / self.memory.shape.active_params
        return tokens / rate / self.spec.ppo.num_learners

    def generate_seconds(self, tokens: float) -> float:
        device = self.memory.device
        rates = RATES[device]
        rate = min(rates["generate_params_tokens_per_s"] / self.memory.shape.active_params, rates["max_tokens_per_s"])
        workers = self.spec.ppo.num_rollout_workers if device == "gpu" else 1  # CPU workers share the cores
        return tokens / rate / workers

    def stage(
        self, stage: Stage | Literal["snapshot"], tokens: float, memory: Parts, seconds: float, optimizer_steps: int = 0
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
    shape = shape or shape_of(spec.model)
    costs = _Costs(spec=spec, memory=MemoryModel(spec=spec, shape=shape), placement=place(spec))
    planners = (_plan_snapshot, _plan_sft, _plan_reward, _plan_ppo, _plan_evaluation, _plan_canary)
    return RunPlan(
        params=shape.params,
        active_params=shape.active_params,
        device=costs.memory.device,
        batch=_plan_batch(spec),
        stages=tuple(plan_stage(costs) for plan_stage in planners),
        tickets_needed=tickets_needed(spec),
        tickets_given=spec.data.num_live,
    )


def _plan_snapshot(costs: _Costs) -> StagePlan:
    tasks = sum(costs.spec.num_tasks.values())
    memory = {"processes": PROCESS_BYTES}
    return costs.stage("snapshot", tasks * _rollout_tokens(costs.spec), memory, TYPICAL["ray_start_s"] + tasks * 2e-3)


def _plan_sft(costs: _Costs) -> StagePlan:
    spec = costs.spec
    if is_pinned(spec.workflow.baseline):
        return costs.stage("sft", 0, {}, 0.0)
    tokens = spec.data.num_train * _rollout_tokens(spec) * spec.sft.epochs
    # Each learner takes batches of its own, so that more of them take fewer steps on larger batches.
    steps = math.ceil(tokens / (spec.sft.batch_tokens * spec.ppo.num_learners))
    seconds = TYPICAL["engine_start_s"] + costs.train_seconds(tokens)
    return costs.stage("sft", tokens, costs.memory.sft(), seconds, steps)


def _plan_reward(costs: _Costs) -> StagePlan:
    reward, workflow = costs.spec.reward, costs.spec.workflow
    # Pairs are made of rollouts that the baseline samples first, about one for each.
    sampled = reward.num_pairs * _sampled_tokens(costs.spec)
    if is_pinned(workflow.reward_model):
        # It is not trained, but a baseline that is trained here is sampled all the same.
        if is_pinned(workflow.baseline) or not sampled:
            return costs.stage("reward_model", 0, {}, 0.0)
        seconds = TYPICAL["engine_start_s"] + costs.generate_seconds(sampled)
        return costs.stage("reward_model", sampled, costs.memory.evaluation(policies=1), seconds)
    pairs = reward.num_pairs * (1 - CALIBRATION_FRACTION)  # the others only calibrate
    trained = 2 * pairs * _rollout_tokens(costs.spec) * reward.epochs
    steps = reward.epochs * max(1, round(pairs) // BATCH_PAIRS)
    seconds = 2 * TYPICAL["engine_start_s"] + costs.generate_seconds(sampled) + costs.train_seconds(trained)
    return costs.stage("reward_model", sampled + trained, costs.memory.reward_model(), seconds, steps)


def _plan_ppo(costs: _Costs) -> StagePlan:
    spec, batch = costs.spec, _plan_batch(costs.spec)
    sampled = batch.sampled_tokens_per_step * spec.ppo.num_steps
    trained = batch.trained_tokens_per_step * spec.ppo.num_steps
    # Each rollout token also takes a forward of the old policy, one of the reference and one of the reward model.
    looked = trained / spec.ppo.epochs * 3 * FORWARD
    memory = costs.memory.ppo(batch.rollouts_per_minibatch * _rollout_tokens(spec))
    seconds = 2 * TYPICAL["engine_start_s"] + costs.generate_seconds(sampled) + costs.train_seconds(trained + looked)
    return costs.stage("ppo", sampled + trained, memory, seconds, batch.optimizer_steps)


def _plan_evaluation(costs: _Costs) -> StagePlan:
    data = costs.spec.data
    # Baseline and candidate take the same three suites.
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


# --- what a changed knob does -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """One quantity of the plan that moves. Example: optimizer_steps of ppo, 50 -> 200."""

    quantity: str
    before: float
    after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One knob's new value and what it moves on its own; `refusal` says why it cannot stand alone.

    `meaning` is the knob's sentence: it says what arithmetic cannot.
    """

    knob: str
    before: Any
    after: Any
    shifts: tuple[Shift, ...] = ()
    refusal: str = ""
    meaning: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A spec against another: each change on its own, and all of them together. `against` names the other spec."""

    against: str
    changes: tuple[Change, ...] = ()
    together: tuple[Shift, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """A knob, its value in a spec, and what half and double of that would do. A knob without numbers has no trials."""

    knob: Knob
    value: Any
    trials: Mapping[str, Change]

    def to_json(self) -> dict[str, Any]:
        """Return the knob, its value and its trials as one plain JSON object."""
        trials = {name: asdict(trial) for name, trial in self.trials.items()}
        return asdict(self.knob) | {"value": self.value, "trials": trials}


def quantities(plan: RunPlan) -> dict[str, float]:
    """Return every number of a plan by name. Example: `ppo.minutes` of a stage, `total_minutes` of the run."""
    found: dict[str, float] = {"params": plan.params, "active_params": plan.active_params}
    found |= {name: n for name, n in asdict(plan.batch).items() if name != "optimizer_steps"}
    for stage in plan.stages:
        numbers = {
            "tokens": stage.tokens,
            "optimizer_steps": stage.optimizer_steps,
            "memory_bytes": stage.total_memory_bytes,
            "cpus": stage.cpus,
            "gpus": stage.gpus,
            "minutes": stage.minutes,
        }
        found |= {f"{stage.stage}.{name}": number for name, number in numbers.items()}
    found |= {"tickets_needed": plan.tickets_needed, "tickets_given": plan.tickets_given}
    return found | {"peak_memory_bytes": plan.peak_memory_bytes, "total_minutes": plan.total_minutes}


def shifts(before: RunPlan, after: RunPlan) -> tuple[Shift, ...]:
    """Return the quantities that differ, in the order of the plan."""
    old, new = quantities(before), quantities(after)
    # The last bits round differently when the same sum is reached by other terms.
    moved = [name for name in old if not math.isclose(old[name], new[name], rel_tol=1e-9)]
    return tuple(Shift(quantity=name, before=old[name], after=new[name]) for name in moved)


def compare(before: WorkflowSpec, after: WorkflowSpec, against: str) -> Comparison:
    """Return what each knob that differs does on its own, starting from `before`, and what all do together."""
    old, new, plan = _values(before), _values(after), plan_run(before)
    knobs = [knob for knob in leaf_paths(WorkflowSpec) if old[knob] != new[knob]]
    # What nobody set follows from another knob: the ramp from the canary's share.
    chosen = [knob for knob in knobs if _is_set(before, knob) or _is_set(after, knob)]
    changes = tuple(change_alone(before, plan, knob, new[knob]) for knob in chosen)
    return Comparison(against=against, changes=changes, together=shifts(plan, plan_run(after)))


def change_alone(spec: WorkflowSpec, plan: RunPlan, knob: str, value: Any) -> Change:
    """Plan a spec again with one knob at another value; one that is refused alone says why."""
    change = Change(knob=knob, before=_values(spec)[knob], after=value, meaning=MEANINGS[knob])
    try:
        changed = override(spec, [f"{knob}={json.dumps(value)}"])
    except BadInputError as error:
        # Often it is another knob that objects: two that must move together.
        refusal = error.remedy if error.field == knob else f"{error.field}: {error.remedy}"
        return replace(change, refusal=refusal)
    return replace(change, shifts=shifts(plan, plan_run(changed)))


def explain(spec: WorkflowSpec, name: str) -> Explanation:
    """Return a knob with its value in a spec and what half and double of it would do. Raises BadInputError."""
    knob, plan = knob_named(name), plan_run(spec)
    value = _values(spec)[name]
    others = _half_and_double(value).items()
    trials = {word: change_alone(spec, plan, name, other) for word, other in others if other != value}
    return Explanation(knob=knob, value=value, trials=trials)


def _half_and_double(value: Any) -> dict[str, int | float]:
    """Return both for a number; whole ones are rounded, halves up, so that 1 has no half."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return {}
    return {"half": (value + 1) // 2 if isinstance(value, int) else value / 2, "double": value * 2}


def _values(spec: WorkflowSpec) -> dict[str, Any]:
    source = SpecSource(name="", tree=spec.model_dump(mode="json"))
    return {knob: source.value(knob) for knob in leaf_paths(WorkflowSpec)}


def _is_set(section: BaseModel, path: str) -> bool:
    """Whether someone wrote this knob down, instead of leaving it to its default."""
    first, _, rest = path.partition(".")
    if first not in section.model_fields_set:
        return False
    return not rest or _is_set(getattr(section, first), rest)
