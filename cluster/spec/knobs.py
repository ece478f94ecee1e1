"""The meaning of every knob of the spec in one sentence, its default and its limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from cluster.spec.errors import leaf_fields
from cluster.spec.sections import ALGORITHMS, known_gates
from cluster.spec.spec import WorkflowSpec
from cluster.workflows import known_workflows
from rl_actors.contracts import BadInputError, nearest

# For a reader who must decide: in which direction it moves learning or release, not how it is computed.
MEANINGS: Final[Mapping[str, str]] = {
    "workflow.name": "The job to learn: its tasks, tools, policies and annotators.",
    "workflow.target": "The task in words, for whoever reads the spec; nothing is computed from it.",
    "workflow.baseline": "Names the SFT policy to train, KL reference and first stable version; with the hash of a "
    "registered one, uses that.",
    "workflow.reward_model": "Names the reward model to train, as responses show it; with the hash of a registered "
    "one, uses that.",
    "workflow.policy_training": "The update: ppo_kl trains a critic (GAE), the others have none and compare attempts "
    "at one task.",
    "release.canary_traffic_percent": "First share of sessions for the candidate; lower exposes fewer users and "
    "gathers evidence more slowly.",
    "release.gates": "What a candidate must pass offline and live: the article's four, and more where wanted.",
    "release.ramp": "Shares of traffic in rising order; more steps expose users more gradually and need more tickets.",
    "release.min_canary_requests": "Candidate runs that each ramp step waits for; higher gives the tests more power, "
    "lower decides sooner.",
    "release.alpha": "Bounds the chance that a test rolls back or promotes wrongly; lower needs more tickets for "
    "either verdict.",
    "release.max_minutes": "Longest time of a release; one that has no verdict by then is not promoted.",
    "release.concurrency": "Tickets open at a time; where they saturate the machine, the arm with fewer of them looks "
    "faster than it is.",
    "charter.constraints": "What a run must keep to, in words; left out, budget, policy checks and gates are named.",
    "charter.rollback_path": "The way back to stable, in words; left out, it names the first stable version and the "
    "limit.",
    "monitoring": "Names the live series to watch; gates decide, these do not.",
    "model.path": "The pretrained model to start from; empty builds a tiny GPT-OSS that knows nothing yet.",
    "model.hidden_size": "Width of the model built on the spot; higher adds capacity, and parameters grow with its "
    "square.",
    "model.num_layers": "Depth of the model built on the spot; higher adds capacity at proportional time and memory.",
    "model.num_experts": "Experts in each layer, two visited per token; higher adds capacity and memory, and hardly "
    "any compute.",
    "model.vocab_size": "Most tokens the tokenizer may learn; higher shortens texts and enlarges embeddings and "
    "logits.",
    "model.max_length": "Context of a rollout; lower truncates long attempts, higher costs KV cache and activations.",
    "data.num_train": "Tasks to learn from, each with a demonstration for SFT; more lets SFT generalise and PPO "
    "repeat tasks less.",
    "data.num_calibration": "Tasks whose pairs calibrate the reward model and never train it; more makes its ECE less "
    "noisy.",
    "data.num_held_out": "Unseen tasks of the capability suite; four times as many halve the standard error of "
    "success.",
    "data.num_frozen": "Tasks of the regression suite; four times as many halve the standard error of success.",
    "data.num_adversarial": "Hostile tasks of the safety suite; more gives the safety gate power against rarer "
    "violations.",
    "data.num_live": "Tickets that a release may receive; too few end it before its gates have seen enough.",
    "sft.epochs": "Passes over the demonstrations; more imitates them closer, mistakes included, and overfits in the "
    "end.",
    "sft.learning_rate": "Peak AdamW step size of SFT; higher learns faster up to divergence, lower may underfit.",
    "sft.muon_learning_rate": "Peak Muon step size for the matrices of a model built on the spot; 0 trains them by "
    "AdamW instead.",
    "sft.batch_tokens": "Tokens in an SFT batch; higher gives less gradient noise in fewer optimizer steps.",
    "reward.epochs": "Passes over the preference pairs; more fits them closer and makes the reward model "
    "overconfident.",
    "reward.learning_rate": "AdamW step size of the reward model; higher learns faster and calibrates worse when it "
    "overfits.",
    "reward.num_pairs": "Preference pairs to rank; more raises pair accuracy, and those set apart steady the "
    "calibration.",
    "reward.max_ece": "Highest expected calibration error that PPO accepts; lower refuses more reward models.",
    "reward.min_pair_accuracy": "Lowest held-out ranking accuracy that PPO accepts; 0.5 is chance, higher refuses "
    "more.",
    "ppo.num_steps": "Rounds of sampling and updating; more moves further from the baseline, with more room for "
    "reward hacking.",
    "ppo.tasks_per_step": "Different tasks in a batch; more lowers the gradient's variance between tasks.",
    "ppo.rollouts_per_task": "Attempts at each task, each other's baseline; more lowers the variance of advantages.",
    "ppo.learning_rate": "AdamW step size of the policy (the critic's is ten times it); higher learns faster and "
    "raises KL per step.",
    "ppo.kl_coef": "Weight of the KL penalty to the frozen baseline; higher holds the policy nearer to it.",
    "ppo.target_kl": "KL from the sampling policy that ends an update early; lower keeps each step smaller.",
    "ppo.clip": "Half-width of the trust region of the probability ratio, 1 +- clip; higher allows larger policy "
    "steps.",
    "ppo.lam": "Lambda of GAE: 1 is unbiased with high variance, lower trusts the critic more; unused without a "
    "critic.",
    "ppo.epochs": "Passes over each batch; more reuses samples that are further off-policy, so more ratios are "
    "clipped.",
    "ppo.minibatches": "Optimizer steps per pass; more takes noisier steps that end further from the sampling policy.",
    "ppo.max_grad_norm": "Gradients of SFT and PPO are scaled down to this norm; lower damps outliers and slows "
    "learning.",
    "ppo.temperature": "Divides the logits when sampling; higher explores more, lower exploits; evaluation samples "
    "alike.",
    "ppo.outcome_weight": "Share of the verified outcome in the reward; lower gives the learned reward model more say.",
    "ppo.num_rollout_workers": "Engines that sample; more on GPUs sample faster, on CPU they share the cores; "
    "learning is the same.",
    "ppo.num_learners": "Data-parallel ranks; more train faster on the same PPO minibatches, and SFT batches grow "
    "with them.",
    "ppo.attestation_tolerance": "Largest mean gap of log-probabilities between engine and learner; lower refuses a "
    "publish sooner.",
    "ppo.checkpoint_every": "Steps between checkpoints; lower loses less to a kill or a restore and writes more.",
    "ppo.recipe": "Changes single choices of the recipe, such as lora_rank or dual_clip; contradictions are refused.",
    "agent.tool_calls": "Most tool calls of a run; fewer cut off long tasks, more let a lost policy wander.",
    "agent.max_tokens_per_turn": "Most tokens of a turn; fewer truncate replies, more cost sampling time.",
    "agent.timeout_s": "Longest run of the agent; a live run that takes longer has failed.",
    "cluster.address": "The Ray cluster to run on; empty starts a local one; learning is the same.",
    "cluster.gpus_per_learner": "GPU share of a learner; above 0 computes in bfloat16, below 1 shares it with an "
    "engine.",
    "cluster.gpus_per_rollout_worker": "GPUs of an engine; above 1 the engine spans that many.",
    "cluster.serve_port": "Port of the gateway; learning and release are the same.",
    "seed": "Draws tasks, initial weights, order and sampling; another seed shows how much of a result is chance.",
}
_BOUNDS: Final = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "multiple_of": "a multiple of"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """One knob: where it is, what it does, its default and what it may be."""

    path: str
    meaning: str
    default: Any
    is_required: bool
    limits: str


def knob_named(name: str) -> Knob:
    """Return a knob by its dotted path. Raises BadInputError naming the nearest one."""
    knobs = leaf_fields(WorkflowSpec)
    if name not in knobs:
        raise BadInputError("--explain", name, _nearest_knob(name, list(knobs)))
    info = knobs[name]
    default = None if info.is_required() else info.get_default(call_default_factory=True)
    limits = limits_of(name, info)
    return Knob(path=name, meaning=MEANINGS[name], default=default, is_required=info.is_required(), limits=limits)


def limits_of(path: str, info: FieldInfo) -> str:
    """Return in words what a knob may be, as far as it does not depend on other knobs."""
    choices = _choices(path, info.annotation)
    if choices:
        return f"{'any of' if get_origin(info.annotation) is tuple else 'one of'} {', '.join(choices)}"
    bounds = [
        f"{words} {getattr(bound, name):g}"
        for bound in info.metadata
        for name, words in _BOUNDS.items()
        if isinstance(getattr(bound, name, None), int | float)
    ]
    return ", ".join([_kind(info.annotation), *bounds])


def _choices(path: str, annotation: Any) -> tuple[str, ...]:
    # These are plain strings to pydantic, since what they may be depends on folders and registries.
    known = {
        "workflow.name": tuple(known_workflows()),
        "workflow.policy_training": ALGORITHMS,
        "release.gates": known_gates(),
    }
    inner = get_args(annotation)[0] if get_origin(annotation) is tuple else annotation
    return known.get(path, get_args(inner) if get_origin(inner) is Literal else ())


def _kind(annotation: Any) -> str:
    kinds = {int: "a whole number", float: "a number", str: "text"}
    # The only tuple without names to choose from is the ramp; the only mapping is the recipe.
    return kinds.get(annotation, "a list of numbers" if get_origin(annotation) is tuple else "keys and values")


def _nearest_knob(name: str, knobs: list[str]) -> str:
    # Knobs of that very name in any section first, then the knobs of a section, then what is spelled alike.
    alike = [knob for knob in knobs if knob.rpartition(".")[2] == name]
    inside = [knob for knob in knobs if knob.startswith(f"{name}.")]
    best = nearest(name, knobs)
    if alike:
        return f"give the whole path; did you mean {' or '.join(map(repr, alike))}?"
    if inside:
        return f"is a section; name one of its knobs: {', '.join(inside)}"
    if best:
        return f"unknown knob; did you mean {best!r}?"
    return "unknown knob; `seatrial validate SPEC --json` lists them all"
