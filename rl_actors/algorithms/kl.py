"""KL divergence to the reference: estimators for the reward, a loss with the true gradient, the adaptive coefficient.

All three estimators are unbiased or low-bias as *values*. As *losses* under autograd they are not: k1 has expected
gradient 0 and k3 that of the reverse divergence. Only k2's gradient, (log p - log ref) * grad log p, is the
score-function gradient of KL(p || ref); `kl_loss` uses it whatever estimator it reports (arXiv 2506.09477;
J. Schulman, "Approximating KL divergence", 2020).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rl_actors.algorithms.losses import MAX_ABS_LOG_RATIO, LossOutput, aggregate, to_floats, token_share, zero_masked
from rl_actors.contracts import MAX_RELATIVE_KL_ERROR, Aggregation, BadInputError, KLKind, require_choice


def kl_estimate(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, *, kind: KLKind) -> Tensor:
    """Per-token estimate of KL(policy || reference) in nats from tokens the policy sampled.

    With d = log p - log ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. k1 and k3 are unbiased, k3 is never negative.
    Do not minimise the result: its gradient is wrong for k1 and k3 (see `kl_loss`). Nothing is masked here.

    Raises:
        BadInputError: unknown kind.
    """
    require_choice("kind", kind, KLKind)
    diff_BT = logprobs_BT - ref_logprobs_BT
    if kind == "k1":
        return diff_BT
    if kind == "k2":
        return 0.5 * diff_BT.square()
    # Only the exponent is bounded, so that k3 stays finite where the policy all but excludes a reference token.
    return torch.expm1((-diff_BT).clamp(max=MAX_ABS_LOG_RATIO)) + diff_BT


def kl_loss(
    logprobs_BT: Tensor,
    ref_logprobs_BT: Tensor,
    loss_mask_BT: Tensor,
    *,
    kind: KLKind = "k3",
    old_logprobs_BT: Tensor | None = None,
    correction_BT: Tensor | None = None,
    aggregation: Aggregation = "token_mean",
    num_loss_tokens: float | None = None,
    num_sequences: float | None = None,
) -> LossOutput:
    """KL(policy || reference) as a loss: value of the chosen estimator, expected gradient that of the KL itself.

    Per token the gradient is w * (log p - log ref) * grad log p, the score-function term of the next-token KL; how an
    earlier token changes later states is left to the reward form of the penalty. w = p / p_old (detached) makes both
    value and gradient unbiased once the policy has moved away from the one that sampled.

    Args:
        logprobs_BT: learner log-probabilities in nats; the only input that receives a gradient.
        ref_logprobs_BT: log-probabilities of the frozen reference.
        loss_mask_BT: True on tokens the policy sampled.
        kind: estimator reported as the value.
        old_logprobs_BT: log-probabilities of the policy that sampled; None means strictly on-policy, w = 1.
        correction_BT: engine-learner weights that multiply w, 0 for a rejected token; None means 1.
        aggregation: see `losses.aggregate`.
        num_loss_tokens: loss tokens of the whole global batch; None takes this call's own.
        num_sequences: sequences of the whole global batch with a loss token; None takes this call's own.

    Raises:
        BadInputError: unknown kind or aggregation.
    """
    logps_BT = zero_masked(logprobs_BT, loss_mask_BT)
    frozen_BT, ref_BT = logps_BT.detach(), zero_masked(ref_logprobs_BT.detach(), loss_mask_BT)
    value_BT = kl_estimate(frozen_BT, ref_BT, kind=kind)
    slope_BT = frozen_BT - ref_BT
    if old_logprobs_BT is not None:
        log_weight_BT = frozen_BT - zero_masked(old_logprobs_BT.detach(), loss_mask_BT)
        weight_BT = log_weight_BT.clamp(-MAX_ABS_LOG_RATIO, MAX_ABS_LOG_RATIO).exp()
        value_BT, slope_BT = weight_BT * value_BT, weight_BT * slope_BT
    if correction_BT is not None:
        correction_BT = zero_masked(correction_BT.detach(), loss_mask_BT)
        value_BT, slope_BT = correction_BT * value_BT, correction_BT * slope_BT
    loss = aggregate(
        value_BT + slope_BT * (logps_BT - frozen_BT),
        loss_mask_BT,
        aggregation=aggregation,
        num_loss_tokens=num_loss_tokens,
        num_sequences=num_sequences,
    )
    return LossOutput(loss, to_floats({"ref_kl": token_share(value_BT, loss_mask_BT, num_loss_tokens)}))


@dataclass(slots=True)
class AdaptiveKLController:
    """Proportional controller of the KL coefficient (arXiv 1909.08593 section 2.2).

    beta *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon. `value` is the whole state: to resume, set it.

    Args:
        init: first coefficient, > 0.
        target: KL to hold, in the unit of the observed KL (nats per token or per sequence), > 0.
        horizon: samples over which a full correction is spread, > 0.

    Raises:
        BadInputError: an argument that is not positive.
    """

    init: float
    target: float
    horizon: float
    value: float = field(init=False)

    def __post_init__(self) -> None:
        """Refuse settings under which the coefficient could not move or would change sign."""
        for name in ("init", "target", "horizon"):
            if not getattr(self, name) > 0:
                raise BadInputError(f"kl.{name}", getattr(self, name), "must be positive")
        self.value = self.init

    def update(self, observed_kl: float, num_samples: int) -> float:
        """Return the new coefficient after `num_samples` samples showed a mean KL of `observed_kl`.

        Raises:
            BadInputError: a non-finite KL (it would poison the coefficient for good), or so many samples that the
                factor would not stay positive.
        """
        if not math.isfinite(observed_kl):
            raise BadInputError("observed_kl", observed_kl, "stop the update: a non-finite KL is an instability")
        error = observed_kl / self.target - 1.0
        factor = 1.0 + min(max(error, -MAX_RELATIVE_KL_ERROR), MAX_RELATIVE_KL_ERROR) * num_samples / self.horizon
        if factor <= 0:
            raise BadInputError("kl.horizon", self.horizon, f"must exceed {num_samples} / 5 samples of one update")
        self.value *= factor
        return self.value
