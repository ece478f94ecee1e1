"""Policy and value losses over global denominators: splitting a batch changes neither loss nor gradient.

A call on one part (a microbatch, a rank) given the *global* counts returns that part's share: add the losses, or let
autograd add the gradients. Data parallelism that *averages* gradients over N ranks (DeepSpeed, DDP) needs the share
multiplied by N. A row is one whole sequence; a sequence is never cut across rows.

An argument means the same in every function of this package. `loss_mask_BT` is True on tokens the policy sampled.
Log-probabilities are in nats: the learner's now, `old_` before the update, `ref_` the frozen reference's, `rollout_`
the engine's. `num_loss_tokens`, and `num_sequences` with at least one of them, count the whole global batch; None takes
this call's own. `correction_BT` are the weights of `rollout_correction`. Only a loss's first argument gets a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rl_actors.contracts import BadInputError

if TYPE_CHECKING:
    from rl_actors.contracts import Aggregation, PolicyLossKind

# exp(20) is 5e8: far beyond every tripwire, and finite, so that 0 * ratio stays 0.
MAX_ABS_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True)
class LossOutput:
    """A differentiable scalar `loss` and detached `metrics` with its denominators; `merge_metrics` adds up parts."""

    loss: Tensor
    metrics: Mapping[str, float]


def require_one_of(field: str, value: str, *choices: str) -> None:
    """Raise BadInputError with the alternatives where a value is none of them."""
    if value not in choices:
        raise BadInputError(field, value, f"choose one of {', '.join(choices)}")


def zero_masked(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return `x_BT` with exact zeros where the mask is False, in float32 or better."""
    wide_BT = x_BT if x_BT.dtype in (torch.float32, torch.float64) else x_BT.float()
    # `where` before any arithmetic keeps a masked NaN out of value and gradient; a product would not.
    return torch.where(mask_BT, wide_BT, torch.zeros((), dtype=wide_BT.dtype, device=wide_BT.device))


def token_share(x_BT: Tensor, mask_BT: Tensor, num_loss_tokens: float | None = None) -> Tensor:
    """Return the sum over loss tokens divided by `num_loss_tokens`; 0 when all are masked."""
    count = float(mask_BT.sum() if num_loss_tokens is None else num_loss_tokens)
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
    the mean over sequences of each one's token sum.

    Raises:
        BadInputError: unknown aggregation, or a sequence aggregation given one global count without the other.
    """
    require_one_of("aggregation", aggregation, "token_mean", "sequence_mean", "sequence_sum")
    if aggregation == "token_mean":
        return token_share(x_BT, mask_BT, num_loss_tokens)
    if (num_loss_tokens is None) != (num_sequences is None):
        counts = (num_loss_tokens, num_sequences)
        remedy = f"{aggregation} of a part needs both global counts"
        raise BadInputError("num_loss_tokens, num_sequences", counts, remedy)
    lengths_B, sums_B = mask_BT.sum(-1), zero_masked(x_BT, mask_BT).sum(-1)
    count = float((lengths_B > 0).sum() if num_sequences is None else num_sequences)
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
    """Return the clipped policy-gradient loss.

    `ppo`: arXiv 1707.06347 eq. 7, bounds apart (clip-higher, DAPO). `gspo`: sequence ratio, the geometric mean of token
    ratios, in its token form (GSPO-token, arXiv 2507.18071). `cispo`: clipped, detached importance weight times
    log-probability (arXiv 2506.13585). Dual clip bounds the loss where A < 0 by -A * dual_clip (arXiv 1912.09729).

    Args:
        kind: loss family.
        clip_low: ratio is clipped below at 1 - clip_low (>= 0; 1 or more means no lower bound).
        clip_high: ratio is clipped above at 1 + clip_high (>= 0).
        dual_clip: the bound c > 1, or None.

    Raises:
        BadInputError: an unknown or incompatible choice, with the reason.
    """
    require_one_of("kind", kind, "ppo", "gspo", "cispo")
    _require_clips(kind, clip_low, clip_high, dual_clip)
    logps_BT = zero_masked(logprobs_BT, loss_mask_BT)
    log_ratio_BT = logps_BT - zero_masked(old_logprobs_BT.detach(), loss_mask_BT)
    log_ratio_BT = log_ratio_BT.clamp(-MAX_ABS_LOG_RATIO, MAX_ABS_LOG_RATIO)
    ratio_BT = (_sequence_log_ratio(log_ratio_BT, loss_mask_BT) if kind == "gspo" else log_ratio_BT).exp()
    clipped_ratio_BT = ratio_BT.clamp(1.0 - clip_low, 1.0 + clip_high)
    advs_BT = zero_masked(advantages_BT.detach(), loss_mask_BT)
    if kind == "cispo":
        # The weight is a constant, so that a clipped token still moves its log-probability.
        terms_BT = -clipped_ratio_BT.detach() * advs_BT * logps_BT
        is_clipped_BT = clipped_ratio_BT != ratio_BT
    else:
        terms_BT, is_clipped_BT = _clipped_terms(ratio_BT, clipped_ratio_BT, advs_BT, dual_clip)
    if correction_BT is not None:
        terms_BT = terms_BT * zero_masked(correction_BT.detach(), loss_mask_BT)
    counts = {"num_loss_tokens": num_loss_tokens, "num_sequences": num_sequences}
    loss = aggregate(terms_BT, loss_mask_BT, aggregation=aggregation, **counts)
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
    """Return half the squared error of the critic, pessimistic under value clipping (baselines ppo2; arXiv 2005.12729).

    Per token 0.5 * max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2), in reward units.

    Args:
        clip: half width of the trust region around the old value, > 0; None turns clipping off.

    Raises:
        BadInputError: `clip` is not positive.
    """
    if clip is not None and clip <= 0:
        raise BadInputError("clip", clip, "value clip must be positive, or null for no clipping")
    values_BT = zero_masked(values_BT, loss_mask_BT)
    returns_BT = zero_masked(returns_BT.detach(), loss_mask_BT)
    error_BT = clipped_error_BT = (values_BT - returns_BT).square()
    if clip is not None:
        old_values_BT = zero_masked(old_values_BT.detach(), loss_mask_BT)
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


def merge_metrics(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Combine the metrics of all parts of one batch: names ending in `_max` by maximum, all others by sum."""
    merged: dict[str, float] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part[name] for part in parts if name in part]
        # numpy's maximum keeps NaN whatever the order; the builtin would lose it.
        merged[name] = float(np.max(values) if name.endswith("_max") else np.sum(values))
    return merged


def to_floats(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """Copy scalar tensors to floats."""
    # Stacked first: one device synchronisation instead of one per metric.
    stacked = torch.stack([value.detach().double() for value in scalars.values()])
    return dict(zip(scalars, stacked.tolist(), strict=True))


def _sequence_log_ratio(log_ratio_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the sequence's mean log ratio at every token, with the gradient of the token's own (GSPO-token)."""
    mean_B1 = log_ratio_BT.detach().sum(-1, keepdim=True) / mask_BT.sum(-1, keepdim=True).clamp(min=1)
    return mean_B1 + (log_ratio_BT - log_ratio_BT.detach())


def _clipped_terms(
    ratio_BT: Tensor, clipped_ratio_BT: Tensor, advs_BT: Tensor, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """Return the pessimistic per-token loss, and where a clip is active."""
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
    """Return ratio mean and max, share clipped, and the k3 estimate of KL(old || new): E_old[r - 1 - log r]."""
    masked_ratio_BT = zero_masked(ratio_BT, mask_BT)
    scalars = {
        "ratio_mean": token_share(ratio_BT, mask_BT, num_loss_tokens),
        # An empty tensor has no maximum; its sum is 0.
        "ratio_max": masked_ratio_BT.max() if masked_ratio_BT.numel() else masked_ratio_BT.sum(),
        "clip_fraction": token_share(is_clipped_BT.float(), mask_BT, num_loss_tokens),
        "approx_kl": token_share(torch.expm1(log_ratio_BT) - log_ratio_BT, mask_BT, num_loss_tokens),
    }
    return to_floats(scalars)


def _require_clips(kind: str, clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    # Every bound is written as a positive claim, so that NaN fails it.
    if not (clip_low >= 0 and clip_high >= 0):
        raise BadInputError("clip_low/clip_high", (clip_low, clip_high), "clip widths must be 0 or more")
    if dual_clip is not None and kind == "cispo":
        raise BadInputError("dual_clip", dual_clip, "cispo already bounds every weight; set dual_clip to null")
    if dual_clip is not None and not dual_clip > 1:
        raise BadInputError("dual_clip", dual_clip, "the bound must exceed 1, else it cuts on-policy tokens")
