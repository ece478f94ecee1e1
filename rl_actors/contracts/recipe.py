"""The choices that make up an update, by name, which of them do not go together, and how much is worked on at a time.

Free of torch: a spec is checked, and its memory and minutes are foreseen, before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args, get_origin, get_type_hints

from rl_actors.contracts.errors import BadInputError

GroupAdvantageKind = Literal["grpo", "dr_grpo", "rloo"]
AdvantageKind = Literal["gae", GroupAdvantageKind]
PolicyLossKind = Literal["ppo", "gspo", "cispo"]
Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum"]
KLPlace = Literal["reward", "loss"]
KLKind = Literal["k1", "k2", "k3"]
CorrectionMode = Literal["none", "token_tis", "sequence_tis", "sequence_mask", "token_icepop"]
Routing = Literal["free", "replay", "frozen"]

# The adaptive KL coefficient's error is clipped to this (arXiv 1909.08593 section 2.2).
MAX_RELATIVE_KL_ERROR: Final = 0.2
# Tries to replace a group without signal: a task set that is nearly solved must not hold up a step for ever.
RESAMPLE_ROUNDS: Final = 2
# Logits that exist at a time: 64 MiB of float32 on CPU, 512 MiB on a GPU.
LOGIT_CHUNK_VALUES: Final[Mapping[str, int]] = {"cpu": 1 << 24, "cuda": 1 << 27}
# What fits the caches of two CPU cores: 8 sequences run 40 % faster a token than 32.
MICROBATCH_TOKENS: Final = 2048
MAX_IN_FLIGHT: Final = 128  # rollouts of one worker
BATCH_PAIRS: Final = 32  # in one step of the reward model
# Share of the pairs that comes from calibration tasks, which never train (decision 20 says why it is so large).
CALIBRATION_FRACTION: Final = 0.45


def require_choice(field: str, value: str, choices: object) -> None:
    """Refuse a value that is not one of the alternatives of a `Literal`.

    Raises:
        BadInputError: names the field, the value and the alternatives.
    """
    if value not in get_args(choices):
        raise BadInputError(field, value, f"choose one of {', '.join(get_args(choices))}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One way to update. The default is `ppo_kl`: a critic, GAE, KL in the reward.

    Args:
        advantages: `gae` needs a critic; the others compare the attempts at one task with each other and have none.
        group_baseline: with `gae`, take the mean reward of a task's other attempts off each reward first.
        loss: see `losses.policy_loss`.
        aggregation: see `losses.aggregate`.
        dual_clip: bound of the loss where the advantage is negative, > 1; None is off.
        clip_high: half width of the trust region above ratio 1 (clip-higher, DAPO section 3.1); None is that below.
        kl_in: where the KL to the reference acts: in each token's reward, or as a loss of its own.
        kl_kind: estimator used as reward or reported as loss; the loss's gradient is the true one for all three.
        kl_target: nats per token to hold by adapting the coefficient; None keeps it fixed.
        kl_horizon: rollouts over which a full correction of the coefficient is spread.
        correction: how engine-learner weights are used, with `correction_cap`, `correction_floor` and `veto`.
        value_clip: half width of the critic's trust region, reward units; None is off.
        critic_warmup_updates: first updates, which train the critic alone.
        bootstrap_truncated: take the critic's value for what lies beyond a truncated rollout; otherwise it is worth 0.
        overlong_buffer: tokens before `overlong_max` over which a penalty grows to -1 (DAPO eq. 13); 0 is off.
        overlong_max: sampled tokens at which the penalty is full.
        mask_truncated: truncated rollouts train nothing (overlong filtering, DAPO section 3.4).
        drop_flat_groups: groups whose attempts all ended alike give way to other tasks, in `RESAMPLE_ROUNDS` tries, and
            are left out where none helps (dynamic sampling, DAPO section 3.2).
        skip_old_pass: on strictly on-policy updates take old = current log-probabilities, ratio exactly 1.
        routing: of a model with experts: `replay` visits in both passes the experts that the engine recorded (arXiv
            2510.11370; vLLM does on a GPU), or else in the update those of the old pass (arXiv 2507.18071 section
            5.3); `frozen` does not train the routers.
        lora_rank: train adapters of this rank instead of all weights (arXiv 2106.09685); 0 trains all weights.
    """

    advantages: AdvantageKind = "gae"
    group_baseline: bool = True
    loss: PolicyLossKind = "ppo"
    aggregation: Aggregation = "token_mean"
    dual_clip: float | None = None
    clip_high: float | None = None
    kl_in: KLPlace = "reward"
    kl_kind: KLKind = "k1"
    kl_target: float | None = None
    kl_horizon: float = 10_000.0
    correction: CorrectionMode = "token_tis"
    correction_cap: float = 2.0
    correction_floor: float | None = None
    veto: float | None = None
    value_clip: float | None = 0.5
    critic_warmup_updates: int = 0
    bootstrap_truncated: bool = False
    overlong_buffer: int = 0
    overlong_max: int = 0
    mask_truncated: bool = False
    drop_flat_groups: bool = False
    skip_old_pass: bool = False
    routing: Routing = "free"
    lora_rank: int = 0

    def __post_init__(self) -> None:
        # A recipe is read from YAML: only here are its words held against the closed sets.
        for name, kind in get_type_hints(Recipe).items():
            if get_origin(kind) is Literal:
                require_choice(f"recipe.{name}", getattr(self, name), kind)
        for field, is_wrong, reason in _contradictions(self):
            if is_wrong:
                raise BadInputError(f"recipe.{field}", getattr(self, field), reason)

    @property
    def has_critic(self) -> bool:
        """True when a critic is trained."""
        return self.advantages == "gae"

    @property
    def steps_to_move_all(self) -> int:
        """Return the steps after which all that trains has moved."""
        # An adapter's B begins at 0, so its A has no gradient in the first step.
        return 2 if self.lora_rank else 1


def _contradictions(r: Recipe) -> list[tuple[str, bool, str]]:
    """Return (field, whether it contradicts the rest, why)."""
    is_group = not r.has_critic
    needs_critic = "there is no critic with group advantages; take gae, or turn this off"
    return [
        (
            "kl_in",
            is_group and r.kl_in == "reward",
            "group advantages have no reward per token; put the KL in the loss",
        ),
        ("group_baseline", is_group and r.group_baseline, "group advantages already compare attempts; turn this off"),
        (
            "kl_kind",
            r.kl_in == "reward" and r.kl_kind != "k1",
            "as a reward only k1 has the KL's gradient; take k1, or kl_in: loss, where all three have",
        ),
        ("value_clip", is_group and r.value_clip is not None, needs_critic),
        ("critic_warmup_updates", is_group and r.critic_warmup_updates > 0, needs_critic),
        ("critic_warmup_updates", r.critic_warmup_updates < 0, "must be 0 or more"),
        ("bootstrap_truncated", is_group and r.bootstrap_truncated, needs_critic),
        (
            "bootstrap_truncated",
            r.bootstrap_truncated and r.mask_truncated,
            "truncated rollouts are left out by mask_truncated; choose one of the two",
        ),
        (
            "aggregation",
            r.advantages == "dr_grpo" and r.aggregation == "sequence_mean",
            "dividing by each rollout's length brings back the bias that dr_grpo removes; take sequence_sum",
        ),
        (
            "correction",
            r.loss == "gspo" and r.correction in ("token_tis", "token_icepop"),
            "token weights would undo gspo's one ratio per sequence; take a sequence mode or none",
        ),
        ("clip_high", r.clip_high is not None and not r.clip_high > 0, "must be positive, or null for ppo.clip"),
        ("dual_clip", r.loss == "cispo" and r.dual_clip is not None, "cispo already bounds every weight"),
        (
            "skip_old_pass",
            r.has_critic and r.skip_old_pass,
            "the critic's values come from that pass; group kinds only",
        ),
        (
            "routing",
            r.routing == "replay" and r.skip_old_pass,
            "the routes to replay come from the old pass; take skip_old_pass: false",
        ),
        ("routing", r.routing == "frozen" and r.lora_rank > 0, "adapters leave the routers as they are; use free"),
        ("lora_rank", r.lora_rank < 0, "must be 0 (train all weights) or more"),
        ("kl_target", r.kl_target is not None and not r.kl_target > 0, "must be positive, or null for a fixed KL"),
        ("kl_horizon", not r.kl_horizon > 0, "must be positive"),
        ("overlong_buffer", not 0 <= r.overlong_buffer <= r.overlong_max, "must lie between 0 and overlong_max"),
    ]


_GROUP: Final = {"group_baseline": False, "value_clip": None, "kl_in": "loss", "kl_kind": "k3"}
# The names that `workflow.policy_training` may give.
RECIPES: Final[Mapping[str, Recipe]] = {
    "ppo_kl": Recipe(),
    "grpo": Recipe(advantages="grpo", aggregation="sequence_mean", **_GROUP),
    "dr_grpo": Recipe(advantages="dr_grpo", aggregation="sequence_sum", **_GROUP),
    "rloo": Recipe(advantages="rloo", **_GROUP),
    "gspo": Recipe(advantages="grpo", loss="gspo", aggregation="sequence_mean", correction="sequence_tis", **_GROUP),
    "cispo": Recipe(advantages="grpo", loss="cispo", **_GROUP),
    "dapo": Recipe(advantages="grpo", clip_high=0.28, mask_truncated=True, drop_flat_groups=True, **_GROUP),
}


def require_batch_choices(
    recipe: Recipe, *, kl_coef: float, epochs: int, num_minibatches: int, group_size: int, num_rollouts: int
) -> None:
    """Refuse a recipe that the batch's own shape contradicts; `num_rollouts` are those of one update.

    Raises:
        BadInputError: names the field and the reason.
    """
    if recipe.kl_target is not None and kl_coef == 0:
        raise BadInputError("recipe.kl_target", recipe.kl_target, "a coefficient of 0 cannot adapt; give kl_coef > 0")
    least = MAX_RELATIVE_KL_ERROR * num_rollouts
    if recipe.kl_target is not None and not recipe.kl_horizon > least:
        remedy = f"must exceed {least:g}, a fifth of an update's rollouts, or the coefficient would change sign"
        raise BadInputError("recipe.kl_horizon", recipe.kl_horizon, remedy)
    if recipe.skip_old_pass and (epochs, num_minibatches) != (1, 1):
        raise BadInputError(
            "recipe.skip_old_pass",
            recipe.skip_old_pass,
            f"{epochs} epochs of {num_minibatches} minibatches move the weights within an update; take 1 and 1",
        )
    if not recipe.has_critic and group_size < 2:
        raise BadInputError(
            "ppo.rollouts_per_task", group_size, f"{recipe.advantages} compares attempts at one task; take 2 or more"
        )
