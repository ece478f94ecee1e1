"""Pure tensor functions of the learner: no process, no engine, no file."""

from rl_actors.algorithms.advantages import (
    explained_variance,
    gae_advantages,
    group_advantages,
    groups_with_signal,
    masked_moments,
    moments_variance,
    overlong_penalty,
    spread_over_tokens,
    token_rewards,
    whiten,
)
from rl_actors.algorithms.batching import TrainingBatch, collate, filler_batch, plan_microbatches
from rl_actors.algorithms.calibration import (
    bradley_terry_loss,
    brier_score,
    expected_calibration_error,
    fit_temperature,
    rubric_loss,
)
from rl_actors.algorithms.correction import require_strictly_on_policy, rollout_correction
from rl_actors.algorithms.kl import AdaptiveKLController, kl_estimate, kl_loss
from rl_actors.algorithms.losses import (
    MAX_ABS_LOG_RATIO,
    merge_metrics,
    policy_loss,
    to_floats,
    token_share,
    value_loss,
    zero_masked,
)
from rl_actors.algorithms.rewards import RewardMix
from rl_actors.algorithms.stability import (
    Continue,
    ReasonCode,
    RestoreLastGood,
    SkipUpdate,
    StabilityDecision,
    StabilityLimits,
    StopTraining,
    StopUpdate,
    check_stability,
    escalate,
    reward_outcome_divergence,
)
