"""The sections of a workflow spec: every knob with its default and its limits. Closed to unknown keys."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from cluster.workflows import PATH_VARIABLE, known_workflows
from rl_actors.contracts import RECIPES, unknown_name
from serving.contracts import ARTICLE_GATES

MonitorName = Literal["human_override_rate", "tool_error_rate", "policy_kl_drift", "task_completion_quality"]
MONITORS: tuple[MonitorName, ...] = get_args(MonitorName)
ALGORITHMS = tuple(RECIPES)
DEFAULT_RAMP = (25.0, 50.0)
MAX_SHARE = 99.0  # percent: a canary needs stable traffic to be held against
NUM_RELEASES = 2  # the candidate, and the deliberately bad one after it: each gets live tickets of its own
VERSION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}(-[0-9a-f]{8})?")  # with the hash of a registered version


def is_pinned(name: str) -> bool:
    """Whether a name means a registered version. Example: is_pinned("rm_v1-77ab01cd"), but not is_pinned("rm_v1")."""
    return bool(re.fullmatch(r".+-[0-9a-f]{8}", name))


def refuse(remedy: str, *below: str | int, **found: object) -> PydanticCustomError:
    """Return an error on the field being checked, or on a path below it.

    `found=` gives the value to show where it is not the one at that path.
    """
    return PydanticCustomError("refused", "{remedy}", {"remedy": remedy, "below": below, **found})


def closed_list(names: object, known: Sequence[str]) -> object:
    """Check names against a closed list before pydantic does, to say which is nearest."""
    if not isinstance(names, Sequence) or isinstance(names, str):
        raise refuse(f"must be a list of names out of: {', '.join(known)}")
    for position, name in enumerate(names):
        if name not in known:
            raise refuse(f"{name!r}: {unknown_name(str(name), known)}", position)
    if len(set(names)) != len(names):
        raise refuse("the same name is given twice")
    return names


def known_gates() -> tuple[str, ...]:
    """Return every gate that is registered, the article's four first."""
    # Imported here: the gates load numpy, which most command lines can do without.
    from serving.gates import GATES

    return tuple(dict.fromkeys((*ARTICLE_GATES, *GATES)))


class Section(BaseModel):
    """A closed, frozen part of the spec. Strict: `yes` is not 1 and "10" is not 10."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class WorkflowSection(Section):
    """What is trained, from which baseline, with which reward model and algorithm (requirements 62-65).

    A baseline or reward model is trained under the name given, unless that ends in `-` and 8 hex digits: then it is a
    registered version and is used as it is.
    """

    name: str = "support_desk"
    target: str
    baseline: str
    reward_model: str
    policy_training: str

    @field_validator("name")
    @classmethod
    def _is_there(cls, name: str) -> str:
        known = known_workflows()
        if name not in known:
            raise refuse(f"{unknown_name(name, known)}; add folders of your own with {PATH_VARIABLE}")
        return name

    @field_validator("policy_training")
    @classmethod
    def _is_known(cls, algorithm: str) -> str:
        if algorithm not in ALGORITHMS:
            raise refuse(unknown_name(algorithm, ALGORITHMS))
        return algorithm

    @field_validator("baseline", "reward_model")
    @classmethod
    def _names_a_version(cls, name: str) -> str:
        if name.strip() and not VERSION_NAME.fullmatch(name):
            raise refuse("names files and response headers: use letters, digits, '.', '_', '-', at most 80")
        return name

    @field_validator("target", "baseline", "reward_model")
    @classmethod
    def _says_something(cls, text: str) -> str:
        if not text.strip():
            raise refuse("must not be empty; name it, for example 'sft_checkpoint_v1'")
        return text.strip()


class CharterSection(Section):
    """What a charter answers beside `workflow.target` (requirement 15). What is left out follows from the spec."""

    constraints: str = ""
    rollback_path: str = ""

    @field_validator("constraints", "rollback_path")
    @classmethod
    def _answers(cls, text: str) -> str:
        if not text.strip():
            raise refuse("a charter with an empty answer starts nothing; answer it, or leave the key out")
        return " ".join(text.split())


class ModelSection(Section):
    """The base model: a Hugging Face directory, or (empty path) a tiny GPT-OSS architecture built on the spot."""

    path: str = ""
    hidden_size: int = Field(default=128, ge=32, multiple_of=32)  # AMX experts need multiples of 32
    num_layers: int = Field(default=4, ge=1)
    num_experts: int = Field(default=4, ge=2)
    vocab_size: int = Field(default=2048, ge=300)
    max_length: int = Field(default=1024, ge=128)


class DataSection(Section):
    """Tasks by split. `num_live` is how many tickets one release may receive."""

    num_train: int = Field(default=3000, ge=1)
    num_calibration: int = Field(default=200, ge=1)
    num_held_out: int = Field(default=400, ge=1)
    num_frozen: int = Field(default=200, ge=1)
    num_adversarial: int = Field(default=200, ge=1)
    num_live: int = Field(default=1500, ge=1)


class SftSection(Section):
    """Supervised fine-tuning on the expert's demonstrations; runs on as many workers as PPO has learners."""

    # Bounds of the baseline over the seeds of its own evaluation (requirement 17): the share of attempts that come to
    # an answer, how far success may move from seed to seed beyond chance, and the variance of success at one task.
    min_finished: ClassVar[float] = 0.5
    max_seed_sd: ClassVar[float] = 0.05
    max_within_task: ClassVar[float] = 0.2  # two attempts end alike three times in five; a coin has 0.25
    epochs: int = Field(default=3, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0, le=1)
    muon_learning_rate: float = Field(default=0.015, ge=0, le=1)
    batch_tokens: int = Field(default=8192, ge=256)


class RewardSection(Section):
    """The reward model and what it must show on the calibration split before PPO may use it (requirements 19-21)."""

    rollouts_per_task: ClassVar[int] = 4
    epochs: int = Field(default=2, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    num_pairs: int = Field(default=2000, ge=8)
    max_ece: float = Field(default=0.1, gt=0, le=1)
    min_pair_accuracy: float = Field(default=0.6, ge=0.5, le=1)


class PpoSection(Section):
    """PPO on a KL leash to the frozen baseline (requirements 22-25). One learner is one data-parallel rank."""

    gamma: ClassVar[float] = 1.0  # the reward is one number at the end of a finite rollout: nothing to discount
    num_steps: int = Field(default=40, ge=1)
    tasks_per_step: int = Field(default=24, ge=1)
    rollouts_per_task: int = Field(default=8, ge=1)
    learning_rate: float = Field(default=3e-4, gt=0, le=1)
    kl_coef: float = Field(default=0.02, gt=0)  # not 0: ppo_kl without a KL term is another algorithm
    target_kl: float = Field(default=0.1, gt=0)
    clip: float = Field(default=0.2, gt=0, lt=1)
    lam: float = Field(default=1.0, ge=0, le=1)  # below 1 the reward at the end fades towards early turns
    epochs: int = Field(default=1, ge=1)
    minibatches: int = Field(default=4, ge=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    temperature: float = Field(default=1.0, gt=0)
    outcome_weight: float = Field(default=0.8, ge=0, le=1)
    num_rollout_workers: int = Field(default=1, ge=1)
    num_learners: int = Field(default=1, ge=1)
    attestation_tolerance: float = Field(default=0.01, gt=0)  # nats a token
    checkpoint_every: int = Field(default=5, ge=1)
    recipe: dict[Any, Any] = {}

    @property
    def rollouts_per_step(self) -> int:
        """Rollouts in one optimizer step's batch."""
        return self.tasks_per_step * self.rollouts_per_task

    @model_validator(mode="after")
    def _every_learner_gets_a_rollout(self) -> PpoSection:
        parts = self.minibatches * self.num_learners
        if parts > self.rollouts_per_step:
            raise refuse(
                f"minibatches * num_learners = {parts} cannot exceed tasks_per_step * rollouts_per_task = "
                f"{self.rollouts_per_step}",
                "minibatches",
                found=self.minibatches,
            )
        return self


class AgentSection(Section):
    """Budget of one attempt, in training and in serving alike."""

    tool_calls: int = Field(default=6, ge=1)
    max_tokens_per_turn: int = Field(default=96, ge=8)
    timeout_s: float = Field(default=30.0, gt=0)

    @property
    def max_turns(self) -> int:
        """Most turns of an attempt."""
        return self.tool_calls + 4  # a plan, two replans and the final answer


class ReleaseSection(Section):
    """How the candidate may reach users. Its gates are the article's four (requirement 127), or these and more."""

    canary_traffic_percent: float = Field(default=5.0, gt=0, le=MAX_SHARE)
    gates: tuple[str, ...] = Field(strict=False)
    ramp: tuple[float, ...] = Field(default=(), strict=False)
    min_canary_requests: int = Field(default=50, ge=1)
    alpha: float = Field(default=0.05, gt=0, lt=1)
    max_minutes: float = Field(default=10.0, gt=0)
    concurrency: int = Field(default=4, ge=1)

    @field_validator("gates", mode="before")
    @classmethod
    def _gates_are_known(cls, names: object) -> object:
        is_article = isinstance(names, Sequence) and all(name in ARTICLE_GATES for name in names)
        return closed_list(names, ARTICLE_GATES if is_article else known_gates())

    @field_validator("gates")
    @classmethod
    def _article_gates_are_there(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        missing = [gate for gate in ARTICLE_GATES if gate not in names]
        if missing:
            raise refuse(f"a canary needs the article's four gates; add {', '.join(missing)}")
        return names

    @model_validator(mode="after")
    def _ramp_rises_from_canary(self) -> ReleaseSection:
        canary = self.canary_traffic_percent
        if "ramp" not in self.model_fields_set:
            # Not through model_copy: the ramp must stay "unset", so that overriding the share moves it too.
            object.__setattr__(self, "ramp", (canary, *(share for share in DEFAULT_RAMP if share > canary)))
        if not self.ramp or self.ramp[0] != canary:
            raise refuse(f"must start at canary_traffic_percent = {canary:g}", "ramp")
        if any(later <= earlier for earlier, later in zip(self.ramp, self.ramp[1:], strict=False)):
            raise refuse("must increase from step to step", "ramp")
        if self.ramp[-1] > MAX_SHARE:
            last = f"the last step must be at most {MAX_SHARE:g}: a canary needs stable traffic to be held against"
            raise refuse(f"{last}; the promotion itself is the step to 100", "ramp")
        return self


class ClusterSection(Section):
    """Where it runs. Zero GPUs is the default; a fraction lets learner and engine share one."""

    address: str = ""
    gpus_per_learner: float = Field(default=0.0, ge=0, le=1)
    gpus_per_rollout_worker: float = Field(default=0.0, ge=0)
    serve_port: int = Field(default=8000, ge=1, le=65535)

    @field_validator("gpus_per_rollout_worker")
    @classmethod
    def _whole_above_one(cls, gpus: float) -> float:
        # An engine spans whole GPUs; only engines that fit into one can share it.
        if gpus > 1 and not gpus.is_integer():
            raise refuse("must be a fraction below 1 or a whole number: an engine spans whole GPUs")
        return gpus

    @property
    def uses_gpu(self) -> bool:
        """True when any actor asks for a GPU; decides device and dtype."""
        return self.gpus_per_learner > 0 or self.gpus_per_rollout_worker > 0

    @property
    def dtype(self) -> str:
        """Name of the dtype that models compute in."""
        # At small sizes float32 is the faster one on a CPU.
        return "bfloat16" if self.uses_gpu else "float32"
