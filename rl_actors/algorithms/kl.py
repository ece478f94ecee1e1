"""KL divergence to the reference: estimators for the reward, a loss with the true gradient, the adaptive coefficient.

Sources: J. Schulman, "Approximating KL divergence" (2020); arXiv 2506.09477. Arguments are those of `losses`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rl_actors.algorithms.losses import (
    MAX_ABS_LOG_RATIO,
    LossOutput,
    aggregate,
    require_one_of,
    to_floats,
    token_share,
    zero_masked,
)
from rl_actors.contracts import MAX_RELATIVE_KL_ERROR, BadInputError

if TYPE_CHECKING:
    from rl_actors.contracts import Aggregation, KLKind


def kl_estimate(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, *, kind: KLKind) -> Tensor:
    """Return the per-token estimate of KL(policy || reference) in nats from tokens the policy sampled; masks nothing.

    With d = log p - log ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. k1 and k3 are unbiased, k3 is never negative.

    Raises:
        BadInputError: unknown kind.
    """
    require_one_of("kind", kind, "k1", "k2", "k3")
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
    """Return KL(policy || reference) as a loss: value of the chosen estimator, expected gradient that of the KL itself.

    Per token the gradient is w * (log p - log ref) * grad log p, the score-function term of the next-token KL; how an
    earlier token changes later states is left to the reward form of the penalty. w = p / p_old (detached, times the
    correction) makes both unbiased once the policy has moved away from the one that sampled; without old
    log-probabilities w = 1, which is right strictly on-policy.

    Raises:
        BadInputError: unknown kind or aggregation.
    """
    logps_BT = zero_masked(logprobs_BT, loss_mask_BT)
    frozen_BT, ref_BT = logps_BT.detach(), zero_masked(ref_logprobs_BT.detach(), loss_mask_BT)
    value_BT = kl_estimate(frozen_BT, ref_BT, kind=kind)
    # All three are unbiased or low-bias as values; under autograd k1 has expected gradient 0, k3 that of the reverse
    # divergence. Only k2's gradient is the score-function gradient of KL(p || ref), so it is taken for all of them.
    slope_BT = frozen_BT - ref_BT
    if old_logprobs_BT is not None:
        log_weight_BT = frozen_BT - zero_masked(old_logprobs_BT.detach(), loss_mask_BT)
        weight_BT = log_weight_BT.clamp(-MAX_ABS_LOG_RATIO, MAX_ABS_LOG_RATIO).exp()
        value_BT, slope_BT = weight_BT * value_BT, weight_BT * slope_BT
    if correction_BT is not None:
        correction_BT = zero_masked(correction_BT.detach(), loss_mask_BT)
        value_BT, slope_BT = correction_BT * value_BT, correction_BT * slope_BT
    # The last factor is 0 in value and grad log p in gradient: value and slope are set apart.
    terms_BT = value_BT + slope_BT * (logps_BT - frozen_BT)
    counts = {"num_loss_tokens": num_loss_tokens, "num_sequences": num_sequences}
    loss = aggregate(terms_BT, loss_mask_BT, aggregation=aggregation, **counts)
    return LossOutput(loss, to_floats({"ref_kl": token_share(value_BT, loss_mask_BT, num_loss_tokens)}))


@dataclass(slots=True)
class AdaptiveKLController:
    """Proportional controller of the KL coefficient (arXiv 1909.08593 section 2.2); `value` is the whole state.

    beta *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon.

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
            BadInputError: a non-finite KL, or so many samples that the factor would not stay positive.
        """
        # It would poison the coefficient for good.
        if not math.isfinite(observed_kl):
            raise BadInputError("observed_kl", observed_kl, "stop the update: a non-finite KL is an instability")
        error = observed_kl / self.target - 1.0
        factor = 1.0 + min(max(error, -MAX_RELATIVE_KL_ERROR), MAX_RELATIVE_KL_ERROR) * num_samples / self.horizon
        if factor <= 0:
            raise BadInputError("kl.horizon", self.horizon, f"must exceed {num_samples} / 5 samples of one update")
        self.value *= factor
        return self.value
