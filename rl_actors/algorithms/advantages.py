"""Advantages of multi-turn rollouts: a token the policy did not sample is not a step of its decision process.

Every function treats masked tokens (prompt, tool output, padding) as absent: time runs over loss tokens only.
Arguments are those of `losses`; scores, rewards and values are in reward units.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rl_actors.algorithms.losses import require_one_of, zero_masked

if TYPE_CHECKING:
    from rl_actors.contracts import GroupAdvantageKind

_STD_FLOOR = 1e-6
_VARIANCE_FLOOR = 1e-8


@torch.no_grad()
def gae_advantages(
    rewards_BT: Tensor,
    values_BT: Tensor,
    loss_mask_BT: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns (advantage + value), [B, T], 0 where masked (arXiv 1506.02438 eq. 11 and 16).

    Between two loss tokens there is one step however many tool tokens lie there: neither gamma nor lambda decays over
    them and their values are never read. Rewards on masked tokens are ignored, so put each on a loss token.

    Args:
        values_BT: critic values V(s_t) of the state in which token t is sampled.
        gamma: discount per sampled token, in [0, 1].
        lam: lambda, in [0, 1].
        bootstrap_B: value of the state after the last loss token, for a truncated rollout; None and 0 mean terminal.
    """
    rewards_BT, values_BT = zero_masked(rewards_BT, loss_mask_BT), zero_masked(values_BT, loss_mask_BT)
    advantages_BT = torch.zeros_like(values_BT)
    next_advantage_B = values_BT.new_zeros(values_BT.shape[0])
    next_value_B = next_advantage_B if bootstrap_B is None else bootstrap_B.to(values_BT)
    for t in reversed(range(values_BT.shape[1])):
        is_step_B, value_B = loss_mask_BT[:, t], values_BT[:, t]
        delta_B = rewards_BT[:, t] + gamma * next_value_B - value_B
        # A masked token hands on what it was given, untouched: this is what carries the sum over tool output.
        next_advantage_B = torch.where(is_step_B, delta_B + gamma * lam * next_advantage_B, next_advantage_B)
        next_value_B = torch.where(is_step_B, value_B, next_value_B)
        advantages_BT[:, t] = next_advantage_B
    advantages_BT = zero_masked(advantages_BT, loss_mask_BT)
    return advantages_BT, advantages_BT + values_BT


@torch.no_grad()
def token_rewards(
    scores_B: Tensor,
    kl_BT: Tensor,
    loss_mask_BT: Tensor,
    *,
    kl_coef: float,
    score_clip: float | None = 10.0,
) -> Tensor:
    """Return -kl_coef * KL on every loss token plus the rollout's clipped score on the last one (arXiv 2203.02155).

    A row without loss tokens loses its score: it has no step to credit.

    Args:
        kl_BT: per-token KL estimate against the reference in nats (`kl.kl_estimate`).
        kl_coef: weight of the KL penalty; 0 when the KL is in the loss instead.
        score_clip: scores are clipped to +-score_clip; None leaves them.
    """
    penalty_BT = -kl_coef * zero_masked(kl_BT, loss_mask_BT)
    clipped_B = scores_B if score_clip is None else scores_B.clamp(-score_clip, score_clip)
    # Counted from the right, the last loss token is the first.
    is_last_BT = loss_mask_BT & (loss_mask_BT.flip(-1).cumsum(-1).flip(-1) == 1)
    return torch.where(is_last_BT, penalty_BT + clipped_B.to(penalty_BT).unsqueeze(-1), penalty_BT)


@torch.no_grad()
def group_advantages(scores_B: Tensor, group_ids_B: Tensor, *, kind: GroupAdvantageKind) -> Tensor:
    """Return the advantage of each rollout against the other rollouts of its task.

    `grpo`: (score - mean) / std with the sample standard deviation (arXiv 2402.03300 section 4.1.2). `dr_grpo`:
    score - mean (arXiv 2503.20783). `rloo`: score - mean of the others (arXiv 2402.14740). A group of one, or one
    in which all scores are equal, gives 0. Groups must be whole: compute over the global batch, before any split.

    Raises:
        BadInputError: unknown kind.
    """
    require_one_of("kind", kind, "grpo", "dr_grpo", "rloo")
    # float64: the mean of n equal float32 scores is not exactly that score, and grpo would divide the error by ~0.
    scores64_B = scores_B.double()
    index_B, counts_G = _group_index(group_ids_B)
    centred_B = scores64_B - (_group_sum(scores64_B, index_B, counts_G) / counts_G)[index_B]
    others_B = (counts_G - 1).clamp(min=1)[index_B]
    if kind == "rloo":
        centred_B = centred_B * counts_G[index_B] / others_B
    elif kind == "grpo":
        variance_B = _group_sum(centred_B.square(), index_B, counts_G)[index_B] / others_B
        centred_B = centred_B / (variance_B.sqrt() + _STD_FLOOR)
    # A lone NaN minus itself is NaN, not 0.
    return torch.where(counts_G[index_B] > 1, centred_B, torch.zeros_like(centred_B)).to(scores_B.dtype)


@torch.no_grad()
def groups_with_signal(scores_B: Tensor, group_ids_B: Tensor) -> Tensor:
    """Return True on rollouts whose group holds at least two different scores (dynamic sampling, DAPO section 3.2)."""
    index_B, counts_G = _group_index(group_ids_B)
    low_G = scores_B.new_full(counts_G.shape, torch.inf).scatter_reduce(0, index_B, scores_B, "amin")
    high_G = scores_B.new_full(counts_G.shape, -torch.inf).scatter_reduce(0, index_B, scores_B, "amax")
    return (high_G > low_G)[index_B]


@torch.no_grad()
def spread_over_tokens(advantages_B: Tensor, loss_mask_BT: Tensor) -> Tensor:
    """Return the advantage of its rollout for every loss token; 0 where masked."""
    return zero_masked(advantages_B.unsqueeze(-1).expand(loss_mask_BT.shape), loss_mask_BT)


@torch.no_grad()
def overlong_penalty(num_tokens_B: Tensor, *, max_tokens: int, buffer_tokens: int) -> Tensor:
    """Return a penalty by sampled tokens: 0 up to max - buffer (> 0), then linear to -1 at max (DAPO eq. 13)."""
    return ((max_tokens - buffer_tokens - num_tokens_B.float()) / buffer_tokens).clamp(-1.0, 0.0)


@torch.no_grad()
def masked_moments(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return float64 `[count, sum, sum of squares]` over loss tokens: add them over parts (all-reduce over ranks)."""
    x64_BT = zero_masked(x_BT.double(), mask_BT)
    return torch.stack([mask_BT.sum().double(), x64_BT.sum(), x64_BT.square().sum()])


def moments_variance(moments: Tensor) -> float:
    """Return the sample variance behind `[count, sum, sum of squares]`; 0 for fewer than two values."""
    count, total, squares = moments.tolist()
    if count < 2:
        return 0.0
    spread = squares - total * total / count
    # What rounding leaves of equal values (relative 1e-12 of their mean square) counts as none.
    return spread / (count - 1.0) if spread > 1e-12 * squares else 0.0


def explained_variance(return_moments: Tensor, residual_moments: Tensor) -> float:
    """Return 1 - Var(returns - values) / Var(returns), each by its `masked_moments` over the whole global batch.

    1 is a perfect critic, 0 one that knows nothing, below 0 one that misleads. Returns that are all alike, or absent,
    have nothing to explain and give 0.
    """
    variance = moments_variance(return_moments)
    return 1.0 - moments_variance(residual_moments) / variance if variance else 0.0


@torch.no_grad()
def whiten(x_BT: Tensor, mask_BT: Tensor, *, moments: Tensor | None = None) -> Tensor:
    """Scale loss tokens to mean 0 and unit sample variance over the *global* batch; masked tokens give 0.

    Pass all of it, or a part with `moments`, the sum of every part's `masked_moments`. Fewer than two tokens have no
    variance and are only centred.
    """
    count, total, squares = (masked_moments(x_BT, mask_BT) if moments is None else moments).unbind()
    mean = total / count.clamp(min=1)
    variance = ((squares - total * mean) / (count - 1).clamp(min=1)).clamp(min=0)
    scale = torch.where(count > 1, (variance + _VARIANCE_FLOOR).rsqrt(), torch.ones_like(variance))
    return zero_masked((zero_masked(x_BT.double(), mask_BT) - mean) * scale, mask_BT).to(x_BT.dtype)


def _group_index(group_ids_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the dense group index of each rollout, and the size of each group."""
    _, index_B, counts_G = torch.unique(group_ids_B, return_inverse=True, return_counts=True)
    return index_B, counts_G


def _group_sum(x_B: Tensor, index_B: Tensor, counts_G: Tensor) -> Tensor:
    return x_B.new_zeros(counts_G.shape).index_add(0, index_B, x_B)
