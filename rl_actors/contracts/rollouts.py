"""One attempt as values: an expert's demonstration; sampled tokens, turns, the rollout, its score, and its sample.

Completion -> Turn* -> Rollout -> Score -> TrainingSample -> LearnerUpdate. A stage adds a type, not an optional
field. Everything here pickles (Ray) and turns into plain JSON with `dataclasses.asdict`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

TurnKind = Literal["plan", "tool", "final", "malformed"]
RolloutStatus = Literal["ok", "truncated", "tool_budget", "timeout", "engine_error"]
PlanCause = Literal["request", "tool_error", "observation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemonstrationTurn:
    """One assistant turn a scripted expert wrote, and the observation that answered it (empty after the final turn)."""

    kind: TurnKind
    tool: str
    arguments: Mapping[str, Any]
    text: str
    observation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A whole expert attempt at one task; never used for a held-out, frozen or adversarial task."""

    task_id: str
    prompt: str
    turns: tuple[DemonstrationTurn, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The finding of a policy program over the final state of the world and the reply."""

    # Never a model's: it decides releases, and a policy learns to please a model.
    success: bool
    violations: tuple[str, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling of one completion."""

    max_tokens: int
    temperature: float = 1.0
    # Of the request, not of the engine: else what else is in the batch would change what is sampled.
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """Experts that an engine's tokens visited: token by token, within it layer by layer, `top_k` numbers each.

    Layers are all those of the model. Empty where no engine recorded.
    """

    # Dense layers included, whose numbers mean nothing.
    num_layers: int = 0
    top_k: int = 0
    experts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        width = self.num_layers * self.top_k
        if len(self.experts) % width if width else self.experts:
            raise ValueError(f"{len(self.experts)} experts do not fill tokens of {self.num_layers} x {self.top_k}")

    @property
    def num_tokens(self) -> int:
        """Return how many tokens have a route."""
        return len(self.experts) // (self.num_layers * self.top_k) if self.experts else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """Token ids an engine sampled in one turn. Lists have equal length; logprobs are nats under the sampler."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    weights_version: int
    finished: bool
    cached_tokens: int
    # Of the prompt and of all sampled tokens but the last, which no engine has read.
    routes: Routes = Routes()

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(f"{len(self.token_ids)} tokens but {len(self.logprobs)} logprobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call as the policy wrote it; `arguments` is None when the text was not a JSON object."""

    name: str
    arguments: Mapping[str, Any] | None
    raw: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """The executor's answer. `error` is empty on success, else a short class such as `unknown_tool`."""

    content: str
    error: str
    duration_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRevision:
    """One accepted plan of a run. `revision` 0 is the first; a later one is a replan after `after_calls` tool calls.

    `cause` is "tool_error" when the last call before it failed or was refused. `tool_budget` is what was granted.
    """

    revision: int
    after_calls: int
    cause: PlanCause
    steps: tuple[str, ...]
    tool_budget: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One generation plus the reply to it."""

    kind: TurnKind
    # The exact ids: text that is tokenised again may come out as other tokens, and old logprobs would be of those.
    prompt_token_ids: tuple[int, ...]
    completion: Completion
    tool_call: ToolCall | None
    tool_result: ToolResult | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One finished multi-turn attempt. Expected failure is data (`status`)."""

    rollout_id: str
    task_id: str
    group_id: int
    intent: str
    turns: tuple[Turn, ...]
    status: RolloutStatus
    reply: str
    outcome: Outcome
    tool_calls_count: int
    tool_error_count: int
    duration_ms: float
    policy_checks: Mapping[str, bool] = field(default_factory=dict)

    @property
    def tokens_in(self) -> int:
        """Return the prompt tokens over all model calls."""
        return sum(len(turn.prompt_token_ids) for turn in self.turns)

    @property
    def tokens_out(self) -> int:
        """Return the sampled tokens over all model calls."""
        return sum(len(turn.completion.token_ids) for turn in self.turns)

    @property
    def weights_versions(self) -> tuple[int, ...]:
        """Return the distinct weights versions that sampled this rollout, ascending."""
        return tuple(sorted({turn.completion.weights_version for turn in self.turns}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Full scorer result; `reward` is its scalar under the declared mix."""

    rollout_id: str
    # The mix is declared in the spec; its parts stay beside it, so that a reward can be explained.
    reward: float
    outcome_reward: float
    critic_score: float
    rubric: Mapping[str, float]
    reward_model_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSample:
    """One rollout as token arrays of one length L; `loss_mask` is True on tokens the policy sampled.

    `succeeded` is the verified outcome. `weights_versions` are the distinct versions that sampled it, ascending.
    `truncated` says that a limit of ours (context, turns, time) cut it short. `routes` cover the first tokens, or none.
    """

    rollout_id: str
    group_id: int
    weights_versions: tuple[int, ...]
    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    rollout_logprobs: tuple[float, ...]
    reward: float
    truncated: bool
    # Not the reward: a shaped reward differs within a group whose attempts all ended alike and teach nothing.
    succeeded: bool = False
    routes: Routes = Routes()

    def __post_init__(self) -> None:
        lengths = {len(self.token_ids), len(self.loss_mask), len(self.rollout_logprobs)}
        if len(lengths) != 1:
            raise ValueError(f"sample {self.rollout_id}: arrays of different length {sorted(lengths)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerUpdate:
    """One update: the weights version it produced, its metrics (plain floats), and the tripwires it met.

    `restore_factor` above 0 asks to go back to the newest checkpoint and multiply the learning rate by it.
    """

    weights_version: int
    metrics: Mapping[str, float]
    trips: tuple[str, ...] = ()
    restore_factor: float = 0.0
