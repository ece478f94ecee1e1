"""Policy and value losses over global denominators: splitting a batch changes neither loss nor gradient.

A call on one part (a microbatch, a rank) given the *global* `num_loss_tokens` and `num_sequences` returns that part's
share: add the losses, or let autograd add the gradients. Data parallelism that *averages* gradients over N ranks
(DeepSpeed, DDP) needs the share multiplied by N. A row is one whole sequence; a sequence is never cut across rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rl_actors.contracts import Aggregation, BadInputError, PolicyLossKind, require_choice

# exp(20) is 5e8: far beyond every tripwire, and finite, so that 0 * ratio stays 0.
MAX_ABS_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True)
class LossOutput:
    """A differentiable scalar `loss` and detached `metrics` of the same call.

    Metrics carry the same denominators as the loss: `merge_metrics` adds the parts, except names ending in `_max`.
    """

    loss: Tensor
    metrics: Mapping[str, float]


def zero_masked(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return `x_BT` with exact zeros where the mask is False, in float32 or better.

    `where` before any arithmetic keeps a masked NaN out of the value and out of the gradient; a product would not.
    """
    wide_BT = x_BT if x_BT.dtype in (torch.float32, torch.float64) else x_BT.float()
    return torch.where(mask_BT, wide_BT, torch.zeros((), dtype=wide_BT.dtype, device=wide_BT.device))


def token_share(x_BT: Tensor, mask_BT: Tensor, num_loss_tokens: float | None = None) -> Tensor:
    """Sum over loss tokens divided by `num_loss_tokens` (default: this call's own count); 0 when all are masked."""
    count = float(num_loss_tokens) if num_loss_tokens is not None else float(mask_BT.sum())
    return zero_masked(x_BT, mask_BT).sum() / max(count, 1.0)


def aggregate(
    x_BT: Tensor,
    mask_BT: Tensor,
    *,
    aggregation: Aggregation,
    num_loss_tokens: float | None = None,
    num_sequences: float | None = None,
) -> Tensor:
    """Reduce per-token terms to a scalar.

    `token_mean` (DAPO, arXiv 2503.14476, eq. 12) divides by loss tokens, `sequence_mean` (GRPO, arXiv 2402.03300) takes
    the mean over sequences of each one's token mean, `sequence_sum` (Dr. GRPO, arXiv 2503.20783, up to its constant)
    the mean over sequences of each one's token sum. `num_sequences` counts sequences with at least one loss token.

    Raises:
        BadInputError: unknown aggregation, or a sequence aggregation given one global count without the other.
    """
    require_choice("aggregation", aggregation, Aggregation)
    if aggregation == "token_mean":
        return token_share(x_BT, mask_BT, num_loss_tokens)
    if (num_loss_tokens is None) != (num_sequences is None):
        counts = (num_loss_tokens, num_sequences)
        raise BadInputError(
            "num_loss_tokens, num_sequences", counts, f"{aggregation} of a part needs both global counts"
        )
    lengths_B = mask_BT.sum(-1)
    sums_B = zero_masked(x_BT, mask_BT).sum(-1)
    count = float(num_sequences) if num_sequences is not None else float((lengths_B > 0).sum())
    per_sequence_B = sums_B / lengths_B.clamp(min=1) if aggregation == "sequence_mean" else sums_B
    return per_sequence_B.sum() / max(count, 1.0)


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    loss_mask_BT: Tensor,
    *,
    kind: PolicyLossKind = "ppo",
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    correction_BT: Tensor | None = None,
    aggregation: Aggregation = "token_mean",
    num_loss_tokens: float | None = None,
    num_sequences: float | None = None,
) -> LossOutput:
    """Clipped policy-gradient loss.

    `ppo`: arXiv 1707.06347 eq. 7, bounds apart (clip-higher, DAPO). `gspo`: sequence ratio, the geometric mean of token
    ratios, in its token form (GSPO-token, arXiv 2507.18071). `cispo`: clipped, detached importance weight times
    log-probability (arXiv 2506.13585). Dual clip bounds the loss where A < 0 by -A * dual_clip (arXiv 1912.09729).

    Args:
        logprobs_BT: learner log-probabilities in nats; the only input that receives a gradient.
        old_logprobs_BT: learner log-probabilities before the update, nats.
        advantages_BT: advantages, any scale.
        loss_mask_BT: True on tokens the policy sampled.
        kind: loss family.
        clip_low: ratio is clipped below at 1 - clip_low (>= 0; 1 or more means no lower bound).
        clip_high: ratio is clipped above at 1 + clip_high (>= 0).
        dual_clip: the bound c > 1, or None.
        correction_BT: engine-learner weights, used as constants (see `correction`).
        aggregation: see `aggregate`.
        num_loss_tokens: loss tokens of the whole global batch; None takes this call's own.
        num_sequences: sequences of the whole global batch with at least one loss token; None takes this call's own.

    Raises:
        BadInputError: an unknown or incompatible choice, with the reason.
    """
    _require_policy_choices(kind, clip_low, clip_high, dual_clip)
    logps_BT = zero_masked(logprobs_BT, loss_mask_BT)
    log_ratio_BT = logps_BT - zero_masked(old_logprobs_BT.detach(), loss_mask_BT)
    log_ratio_BT = log_ratio_BT.clamp(-MAX_ABS_LOG_RATIO, MAX_ABS_LOG_RATIO)
    ratio_BT = (_sequence_log_ratio(log_ratio_BT, loss_mask_BT) if kind == "gspo" else log_ratio_BT).exp()
    clipped_ratio_BT = ratio_BT.clamp(1.0 - clip_low, 1.0 + clip_high)
    advs_BT = zero_masked(advantages_BT.detach(), loss_mask_BT)
    if kind == "cispo":
        terms_BT = -clipped_ratio_BT.detach() * advs_BT * logps_BT
        is_clipped_BT = clipped_ratio_BT != ratio_BT
    else:
        terms_BT, is_clipped_BT = _clipped_terms(ratio_BT, clipped_ratio_BT, advs_BT, dual_clip)
    if correction_BT is not None:
        terms_BT = terms_BT * zero_masked(correction_BT.detach(), loss_mask_BT)
    loss = aggregate(
        terms_BT,
        loss_mask_BT,
        aggregation=aggregation,
        num_loss_tokens=num_loss_tokens,
        num_sequences=num_sequences,
    )
    return LossOutput(loss, _ratio_metrics(ratio_BT, log_ratio_BT, is_clipped_BT, loss_mask_BT, num_loss_tokens))


def value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    loss_mask_BT: Tensor,
    *,
    clip: float | None,
    num_loss_tokens: float | None = None,
) -> LossOutput:
    """Half squared error of the critic, pessimistic under value clipping (openai/baselines ppo2; arXiv 2005.12729).

    Per token 0.5 * max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2); `clip=None` turns clipping off.

    Args:
        values_BT: critic values, reward units; the only input that receives a gradient.
        old_values_BT: values the advantages were computed from.
        returns_BT: regression targets.
        loss_mask_BT: True on tokens the policy sampled.
        clip: half width of the trust region around the old value, reward units, > 0.
        num_loss_tokens: loss tokens of the whole global batch; None takes this call's own.

    Raises:
        BadInputError: `clip` is not positive.
    """
    if clip is not None and clip <= 0:
        raise BadInputError("clip", clip, "value clip must be positive, or null for no clipping")
    values_BT = zero_masked(values_BT, loss_mask_BT)
    old_values_BT = zero_masked(old_values_BT.detach(), loss_mask_BT)
    returns_BT = zero_masked(returns_BT.detach(), loss_mask_BT)
    error_BT = (values_BT - returns_BT).square()
    clipped_error_BT = error_BT
    if clip is not None:
        clipped_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip)
        clipped_error_BT = (clipped_BT - returns_BT).square()
    loss = token_share(0.5 * torch.maximum(error_BT, clipped_error_BT), loss_mask_BT, num_loss_tokens)
    parts = {
        "value_clip_fraction": (clipped_error_BT > error_BT).float(),
        "value_mean": values_BT.detach(),
        "return_mean": returns_BT,
    }
    shares = {name: token_share(x_BT, loss_mask_BT, num_loss_tokens) for name, x_BT in parts.items()}
    return LossOutput(loss, to_floats(shares))


@torch.no_grad()
def merge_metrics(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Combine the metrics of all parts of one batch: names ending in `_max` by maximum, all others by sum."""
    merged: dict[str, float] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part[name] for part in parts if name in part]
        # numpy's maximum keeps NaN whatever the order; the builtin would lose it.
        merged[name] = float(np.max(values) if name.endswith("_max") else np.sum(values))
    return merged


def to_floats(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """Copy scalar tensors to floats in one transfer: one device synchronisation instead of one per metric."""
    stacked = torch.stack([value.detach().double() for value in scalars.values()])
    return dict(zip(scalars, stacked.tolist(), strict=True))


def _sequence_log_ratio(log_ratio_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Value of the sequence's mean log ratio at every token, gradient of the token's own (GSPO-token)."""
    mean_B1 = log_ratio_BT.detach().sum(-1, keepdim=True) / mask_BT.sum(-1, keepdim=True).clamp(min=1)
    return mean_B1 + (log_ratio_BT - log_ratio_BT.detach())


def _clipped_terms(
    ratio_BT: Tensor, clipped_ratio_BT: Tensor, advs_BT: Tensor, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """Pessimistic per-token loss, and where a clip is active."""
    plain_BT, clipped_BT = -ratio_BT * advs_BT, -clipped_ratio_BT * advs_BT
    terms_BT = torch.maximum(plain_BT, clipped_BT)
    is_clipped_BT = clipped_BT > plain_BT
    if dual_clip is None:
        return terms_BT, is_clipped_BT
    bound_BT = -advs_BT * dual_clip
    is_dual_BT = (advs_BT < 0) & (terms_BT > bound_BT)
    return torch.where(is_dual_BT, bound_BT, terms_BT), is_clipped_BT | is_dual_BT


@torch.no_grad()
def _ratio_metrics(
    ratio_BT: Tensor, log_ratio_BT: Tensor, is_clipped_BT: Tensor, mask_BT: Tensor, num_loss_tokens: float | None
) -> dict[str, float]:
    """Ratio mean and max, share clipped, and the k3 estimate of KL(old || new): E_old[r - 1 - log r]."""
    kl_BT = torch.expm1(log_ratio_BT) - log_ratio_BT
    masked_ratio_BT = zero_masked(ratio_BT, mask_BT)
    scalars = {
        "ratio_mean": token_share(ratio_BT, mask_BT, num_loss_tokens),
        "ratio_max": masked_ratio_BT.max() if masked_ratio_BT.numel() else masked_ratio_BT.sum(),
        "clip_fraction": token_share(is_clipped_BT.float(), mask_BT, num_loss_tokens),
        "approx_kl": token_share(kl_BT, mask_BT, num_loss_tokens),
    }
    return to_floats(scalars)


def _require_policy_choices(kind: str, clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    require_choice("kind", kind, PolicyLossKind)
    if not (clip_low >= 0 and clip_high >= 0):
        raise BadInputError("clip_low/clip_high", (clip_low, clip_high), "clip widths must be 0 or more")
    if dual_clip is not None and kind == "cispo":
        raise BadInputError("dual_clip", dual_clip, "cispo already bounds every weight; set dual_clip to null")
    if dual_clip is not None and not dual_clip > 1:
        raise BadInputError("dual_clip", dual_clip, "the bound must exceed 1, else it cuts on-policy tokens")
