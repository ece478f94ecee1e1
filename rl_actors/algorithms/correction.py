"""Engine-learner correction: the engine that sampled and the learner that trains disagree on log-probabilities.

This gap is kept apart from the PPO ratio (learner now / learner before the update): it is there on the first step,
before any weight has moved, and its cause is kernels, precision or stale weights, not learning.
Source of the estimators: Liu et al., "When Speed Kills Stability" (2025); Yao et al., "Your efficient RL framework
secretly brings you off-policy RL training" (2025); IcePop: Ling Team, arXiv 2510.18855.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rl_actors.algorithms.losses import MAX_ABS_LOG_RATIO, to_floats, token_share, zero_masked
from rl_actors.contracts import BadInputError, CorrectionMode, require_choice


@dataclass(frozen=True, slots=True)
class CorrectionOutput:
    """Weights for `policy_loss(correction_BT=...)`, the loss mask after rejection, and the gap's metrics.

    Take `num_loss_tokens` from the mask *before* rejection: rejected tokens then shrink the step, instead of raising
    the weight of those that remain.
    """

    weights_BT: Tensor
    mask_BT: Tensor
    metrics: Mapping[str, float]


@torch.no_grad()
def rollout_correction(
    old_logprobs_BT: Tensor,
    rollout_logprobs_BT: Tensor,
    loss_mask_BT: Tensor,
    *,
    mode: CorrectionMode,
    cap: float,
    floor: float | None = None,
    veto: float | None = None,
) -> CorrectionOutput:
    """Importance weights rho = p_learner / p_engine, truncated or rejected; without gradient.

    `none`: weight 1. `token_tis`: min(rho_t, cap). `sequence_tis`: min(prod rho_t, cap) on every token of the sequence.
    `sequence_mask`: prod rho_t where it lies in [floor, cap], else the sequence is rejected. `token_icepop`: rho_t
    where it lies in [floor, cap], else the token is rejected. The product over a long sequence is close to 0 or huge:
    for long rollouts take a token mode.

    Args:
        old_logprobs_BT: learner log-probabilities before the update, nats.
        rollout_logprobs_BT: log-probabilities the engine sampled with, nats.
        loss_mask_BT: True on tokens the policy sampled.
        mode: how to use rho.
        cap: upper bound on rho, >= 1.
        floor: lower bound on rho in the rejecting modes; None is 1 / cap for `token_icepop`, 0 for `sequence_mask`.
        veto: reject a whole sequence that holds a token with rho below this (about 1e-4), in any mode; None is off.

    Raises:
        BadInputError: unknown mode or impossible bounds.
    """
    _require_bounds(mode, cap, floor, veto)
    delta_BT = zero_masked(old_logprobs_BT, loss_mask_BT) - zero_masked(rollout_logprobs_BT, loss_mask_BT)
    rho_BT = _bounded_exp(delta_BT)
    weights_BT = _raw_weights(delta_BT, mode)
    keep_BT = torch.ones_like(loss_mask_BT)
    if mode in ("sequence_mask", "token_icepop"):
        low = floor if floor is not None else (1.0 / cap if mode == "token_icepop" else 0.0)
        keep_BT = (weights_BT >= low) & (weights_BT <= cap)
    if veto is not None:
        # A masked token has rho 1, which no veto reaches.
        keep_BT = keep_BT & ~(rho_BT < veto).any(-1, keepdim=True)
    mask_BT = loss_mask_BT & keep_BT
    metrics = _gap_metrics(delta_BT, rho_BT, loss_mask_BT, mask_BT)
    metrics["mismatch_capped_fraction"] = float(token_share((weights_BT > cap).float(), mask_BT))
    return CorrectionOutput(zero_masked(weights_BT.clamp(max=cap), mask_BT), mask_BT, metrics)


def require_strictly_on_policy(
    *, sampled_versions: tuple[int, ...], weights_version: int, num_epochs: int, num_minibatches: int
) -> None:
    """Allow skipping the old-logprob pass (old = logprobs.detach(), ratio exactly 1) only where that changes nothing.

    Args:
        sampled_versions: distinct weights versions that sampled the batch.
        weights_version: weights version of the learner now.
        num_epochs: passes over the batch.
        num_minibatches: optimizer steps per pass.

    Raises:
        BadInputError: any condition is not met; names it.
    """
    if set(sampled_versions) != {weights_version}:
        raise BadInputError("sampled_versions", sampled_versions, f"only version {weights_version} is on-policy")
    if num_epochs != 1:
        raise BadInputError("num_epochs", num_epochs, "after the first pass the weights have moved; take 1")
    if num_minibatches != 1:
        raise BadInputError("num_minibatches", num_minibatches, "after the first step the weights have moved; take 1")


def _bounded_exp(x: Tensor) -> Tensor:
    return x.clamp(-MAX_ABS_LOG_RATIO, MAX_ABS_LOG_RATIO).exp()


def _raw_weights(delta_BT: Tensor, mode: CorrectionMode) -> Tensor:
    if mode == "none":
        return torch.ones_like(delta_BT)
    if mode in ("sequence_tis", "sequence_mask"):
        return _bounded_exp(delta_BT.sum(-1, keepdim=True)).expand_as(delta_BT)
    return _bounded_exp(delta_BT)


def _gap_metrics(delta_BT: Tensor, rho_BT: Tensor, loss_mask_BT: Tensor, mask_BT: Tensor) -> dict[str, float]:
    """The gap over all loss tokens of this batch, before truncation, so that modes can be compared.

    k3 estimates KL(engine || learner), chi2 the chi-squared divergence E[rho^2] - 1, the effective sample size is
    (sum rho)^2 / (n sum rho^2). The batch should be the global one: these are not additive over parts.
    """
    gap_BT = delta_BT.abs()
    mean_rho, mean_square = token_share(rho_BT, loss_mask_BT), token_share(rho_BT.square(), loss_mask_BT)
    is_any = loss_mask_BT.any()
    scalars = {
        "mismatch_abs_mean": token_share(gap_BT, loss_mask_BT),
        "mismatch_abs_max": gap_BT.max() if gap_BT.numel() else gap_BT.sum(),
        "mismatch_k3": token_share(torch.expm1(delta_BT.clamp(max=MAX_ABS_LOG_RATIO)) - delta_BT, loss_mask_BT),
        "mismatch_chi2": torch.where(is_any, mean_square - 1.0, torch.zeros_like(mean_square)),
        "mismatch_ess_fraction": torch.where(is_any, mean_rho.square() / mean_square, torch.ones_like(mean_rho)),
        "mismatch_masked_fraction": token_share((~mask_BT).float(), loss_mask_BT),
    }
    return to_floats(scalars)


def _require_bounds(mode: str, cap: float, floor: float | None, veto: float | None) -> None:
    require_choice("mode", mode, CorrectionMode)
    if not cap >= 1:
        raise BadInputError("cap", cap, "must be 1 or more: below 1 it would cut tokens without any gap")
    if floor is not None and not 0 <= floor <= 1:
        raise BadInputError("floor", floor, "must lie in [0, 1]: above 1 it would reject tokens without any gap")
    if veto is not None and not 0 < veto < 1:
        raise BadInputError("veto", veto, "must lie in (0, 1)")
