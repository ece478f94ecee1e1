"""Engine-learner correction: the engine that sampled and the learner that trains disagree on log-probabilities.

Source of the estimators: Liu et al., "When Speed Kills Stability" (2025); Yao et al., "Your efficient RL framework
secretly brings you off-policy RL training" (2025); IcePop: Ling Team, arXiv 2510.18855.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rl_actors.algorithms.losses import MAX_ABS_LOG_RATIO, require_one_of, zero_masked
from rl_actors.contracts import BadInputError

if TYPE_CHECKING:
    from rl_actors.contracts import CorrectionMode


@dataclass(frozen=True, slots=True)
class CorrectionOutput:
    """Weights for `policy_loss(correction_BT=...)`, and the loss mask after rejection.

    Take `num_loss_tokens` from the mask *before* rejection: rejected tokens then shrink the step, instead of raising
    the weight of those that remain.
    """

    weights_BT: Tensor
    mask_BT: Tensor


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
    """Return importance weights rho = p_learner / p_engine, truncated or rejected; without gradient.

    `none`: weight 1. `token_tis`: min(rho_t, cap). `sequence_tis`: min(prod rho_t, cap) on every token of the sequence.
    `sequence_mask`: prod rho_t where it lies in [floor, cap], else the sequence is rejected. `token_icepop`: rho_t
    where it lies in [floor, cap], else the token is rejected. The product over a long sequence is close to 0 or huge:
    for long rollouts take a token mode.

    Args:
        mode: how to use rho.
        cap: upper bound on rho, >= 1.
        floor: lower bound on rho in the rejecting modes; None is 1 / cap for `token_icepop`, 0 for `sequence_mask`.
        veto: reject a whole sequence that holds a token with rho below this (about 1e-4), in any mode; None is off.

    Raises:
        BadInputError: unknown mode or impossible bounds.
    """
    require_one_of("mode", mode, "none", "token_tis", "sequence_tis", "sequence_mask", "token_icepop")
    _require_bounds(cap, floor, veto)
    # Kept apart from the PPO ratio (learner now / learner before the update): this gap is there on the first step,
    # before any weight has moved, and its cause is kernels, precision or stale weights, not learning.
    delta_BT = zero_masked(old_logprobs_BT, loss_mask_BT) - zero_masked(rollout_logprobs_BT, loss_mask_BT)
    rho_BT = weights_BT = _bounded_exp(delta_BT)
    if mode == "none":
        weights_BT = torch.ones_like(delta_BT)
    elif mode in ("sequence_tis", "sequence_mask"):
        weights_BT = _bounded_exp(delta_BT.sum(-1, keepdim=True)).expand_as(delta_BT)
    mask_BT = loss_mask_BT
    if mode in ("sequence_mask", "token_icepop"):
        low = floor if floor is not None else (1.0 / cap if mode == "token_icepop" else 0.0)
        mask_BT = mask_BT & (weights_BT >= low) & (weights_BT <= cap)
    if veto is not None:
        # A masked token has rho 1, which no veto reaches.
        mask_BT = mask_BT & ~(rho_BT < veto).any(-1, keepdim=True)
    return CorrectionOutput(zero_masked(weights_BT.clamp(max=cap), mask_BT), mask_BT)


def require_strictly_on_policy(
    *, sampled_versions: tuple[int, ...], weights_version: int, num_epochs: int, num_minibatches: int
) -> None:
    """Allow skipping the old-logprob pass (old = logprobs.detach(), ratio exactly 1) only where that changes nothing.

    `sampled_versions` are the distinct weights versions that sampled the batch, `weights_version` is the learner's now.

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


def _require_bounds(cap: float, floor: float | None, veto: float | None) -> None:
    # Positive claims, so that NaN fails them.
    if not cap >= 1:
        raise BadInputError("cap", cap, "must be 1 or more: below 1 it would cut tokens without any gap")
    if floor is not None and not 0 <= floor <= 1:
        raise BadInputError("floor", floor, "must lie in [0, 1]: above 1 it would reject tokens without any gap")
    if veto is not None and not 0 < veto < 1:
        raise BadInputError("veto", veto, "must lie in (0, 1)")
