"""The loss of one microbatch and the metrics that go with it, as shares that add up over microbatches and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from rl_actors.algorithms import (
    MAX_ABS_LOG_RATIO,
    kl_estimate,
    kl_loss,
    policy_loss,
    rollout_correction,
    to_floats,
    token_share,
    value_loss,
    zero_masked,
)
from rl_actors.contracts import Recipe
from rl_actors.learner import ranks
from rl_actors.learner.batch import Microbatch
from rl_actors.models import TokenOutputs

_RHO, _RHO_SQUARE = "_rho_mean", "_rho_square_mean"


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalCounts:
    """Denominators over all microbatches and ranks: they make parts of a batch add up to the whole."""

    num_loss_tokens: float
    num_sequences: float


def global_counts(batches: Sequence[Microbatch]) -> GlobalCounts:
    """Count loss tokens, and sequences with at least one, over all ranks."""
    masks = [batch.inputs.loss_mask_BT for batch in batches]
    own = [float(sum(int(mask.sum()) for mask in masks)), float(sum(int(mask.any(-1).sum()) for mask in masks))]
    tokens, sequences = ranks.summed(torch.tensor(own)).tolist()
    return GlobalCounts(num_loss_tokens=tokens, num_sequences=sequences)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """What the loss needs beside the recipe."""

    clip_low: float
    clip_high: float
    kl_coef: float
    value_coef: float
    is_critic_warmup: bool


def microbatch_loss(
    outputs: TokenOutputs, batch: Microbatch, recipe: Recipe, terms: LossTerms, counts: GlobalCounts
) -> tuple[Tensor, dict[str, float]]:
    """Return this microbatch's share of the loss and of the metrics.

    Loss = policy loss + kl_coef * KL loss (where the recipe has the KL in the loss) + value_coef * value loss (with a
    critic). While the critic warms up, the policy's part is multiplied by 0.
    """
    mask = batch.inputs.loss_mask_BT
    shape = {"aggregation": recipe.aggregation, **asdict(counts)}
    policy = policy_loss(
        outputs.logprobs_BT,
        batch.old_logprobs,
        batch.advantages,
        mask,
        kind=recipe.loss,
        clip_low=terms.clip_low,
        clip_high=terms.clip_high,
        dual_clip=recipe.dual_clip,
        correction_BT=batch.correction,
        **shape,
    )
    loss, metrics = policy.loss, {**policy.metrics, "policy_loss": float(policy.loss.detach())}
    if recipe.kl_in == "loss":
        pull = kl_loss(
            outputs.logprobs_BT,
            batch.ref_logprobs,
            mask,
            kind=recipe.kl_kind,
            old_logprobs_BT=batch.old_logprobs,
            correction_BT=batch.correction,
            **shape,
        )
        loss, metrics = loss + terms.kl_coef * pull.loss, metrics | {"kl_loss": float(pull.loss.detach())}
    if terms.is_critic_warmup:
        loss = loss * 0.0
    if recipe.has_critic:
        value = value_loss(
            outputs.values_BT,
            batch.values,
            batch.returns,
            mask,
            clip=recipe.value_clip,
            num_loss_tokens=counts.num_loss_tokens,
        )
        loss, metrics = loss + terms.value_coef * value.loss, metrics | {"value_loss": float(value.loss.detach())}
    if recipe.routing == "replay":
        metrics |= _route_shares(batch, counts)
    metrics["entropy"] = float(token_share(outputs.entropy_BT.detach(), mask, counts.num_loss_tokens))
    return loss, metrics


def _route_shares(batch: Microbatch, counts: GlobalCounts) -> dict[str, float]:
    """Return this microbatch's share of the agreement with the routes replayed, and of routes that engines recorded.

    A loss token comes from what was computed at the token before it.
    """
    mask, recorded_LBTK = batch.inputs.loss_mask_BT, batch.inputs.routes_LBTK
    own = float(mask.sum()) / max(counts.num_loss_tokens, 1.0)
    metrics = {"route_agreement": batch.route_agreement * own, "engine_routes_fraction": 0.0}
    if recorded_LBTK.numel():
        known_BT = (recorded_LBTK[:, :, :-1] >= 0).all(-1).all(0)
        metrics["engine_routes_fraction"] = float((known_BT & mask[:, 1:]).sum()) / max(counts.num_loss_tokens, 1.0)
    return metrics


@torch.no_grad()
def correct(batch: Microbatch, recipe: Recipe) -> None:
    """Set the microbatch's engine-learner weights, 0 where rejected; needs its old log-probabilities."""
    found = rollout_correction(
        batch.old_logprobs,
        batch.inputs.rollout_logprobs_BT,
        batch.inputs.loss_mask_BT,
        mode=recipe.correction,
        cap=recipe.correction_cap,
        floor=recipe.correction_floor,
        veto=recipe.veto,
    )
    batch.correction, batch.kept = found.weights_BT, found.mask_BT


@torch.no_grad()
def look_shares(batch: Microbatch, entropy_BT: Tensor, counts: GlobalCounts) -> dict[str, float]:
    """Return this microbatch's share of what is known before any step: engine-learner gap, entropy, KL to reference."""
    mask = batch.inputs.loss_mask_BT
    delta = zero_masked(batch.old_logprobs, mask) - zero_masked(batch.inputs.rollout_logprobs_BT, mask)
    rho = delta.clamp(-MAX_ABS_LOG_RATIO, MAX_ABS_LOG_RATIO).exp()
    means = {
        "mismatch_abs_mean": delta.abs(),
        "mismatch_k3": torch.expm1(delta.clamp(max=MAX_ABS_LOG_RATIO)) - delta,
        "mismatch_masked_fraction": (~batch.kept).float(),
        _RHO: rho,
        _RHO_SQUARE: rho.square(),
        "entropy": entropy_BT,
        "kl_to_reference": kl_estimate(batch.old_logprobs, batch.ref_logprobs, kind="k1"),
        "kl_to_reference_k3": kl_estimate(batch.old_logprobs, batch.ref_logprobs, kind="k3"),
    }
    shares = {name: token_share(x, mask, counts.num_loss_tokens) for name, x in means.items()}
    return to_floats(shares | {"mismatch_abs_max": delta.abs().max()})


def finish_look(merged: Mapping[str, float]) -> dict[str, float]:
    """Turn merged shares into metrics: chi-squared is E[rho^2] - 1, effective sample size E[rho]^2 / E[rho^2].

    Both are of the whole batch; a batch without loss tokens has no gap.
    """
    metrics = {name: value for name, value in merged.items() if name not in (_RHO, _RHO_SQUARE)}
    mean, square = merged[_RHO], merged[_RHO_SQUARE]
    is_any = square > 0
    return metrics | {
        "mismatch_chi2": square - 1.0 if is_any else 0.0,
        "mismatch_ess_fraction": mean * mean / square if is_any else 1.0,
    }


def update_summary(
    history: Sequence[Mapping[str, float]], seen: Mapping[str, float], *, num_steps: int, stopped_early: bool
) -> dict[str, float]:
    """Average the minibatches of one update; maxima are kept as such, and what the old pass saw of the whole.

    `num_optimizer_steps` counts what was applied, not what was judged.
    """
    summary = {"num_optimizer_steps": float(num_steps), "stopped_early": float(stopped_early)}
    if not history:
        return summary
    names = [name for name in history[0] if name not in seen]
    summary |= {name: sum(step[name] for step in history) / len(history) for name in names}
    # numpy's maximum keeps NaN wherever it stands; the builtin would lose it.
    summary["ratio_max"] = float(np.max([step["ratio_max"] for step in history]))
    return summary | {"grad_norm_max": float(np.max([step["grad_norm"] for step in history]))}
