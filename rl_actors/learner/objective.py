"""The objective of an update: shaped rewards, advantages, the loss, and metrics that add up over ranks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rl_actors.algorithms import (
    MAX_ABS_LOG_RATIO,
    AdaptiveKLController,
    StabilityLimits,
    explained_variance,
    gae_advantages,
    group_advantages,
    groups_with_signal,
    kl_estimate,
    kl_loss,
    masked_moments,
    merge_metrics,
    moments_variance,
    overlong_penalty,
    policy_loss,
    rollout_correction,
    spread_over_tokens,
    to_floats,
    token_rewards,
    token_share,
    value_loss,
    whiten,
    zero_masked,
)
from rl_actors.contracts import Recipe, TrainingSample
from rl_actors.learner import ranks
from rl_actors.learner.batch import Microbatch

if TYPE_CHECKING:
    from rl_actors.models import TokenOutputs

_RHO, _RHO_SQUARE = "_rho_mean", "_rho_square_mean"


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoSettings:
    """Numbers of an update; `recipe` holds its choices, `limits` bounds every step. `kl_coef` turns nats to reward."""

    learning_rate: float
    kl_coef: float
    clip_low: float
    clip_high: float
    gamma: float
    lam: float
    epochs: int
    num_minibatches: int
    max_grad_norm: float
    temperature: float
    microbatch_tokens: int
    seed: int
    recipe: Recipe = field(default_factory=Recipe)
    limits: StabilityLimits = field(default_factory=StabilityLimits)
    value_coef: float = 0.5
    critic_learning_rate_factor: float = 10.0
    zero_stage: int = 0
    is_bf16: bool = field(default_factory=torch.cuda.is_available)


class KLCoefficient:
    """The coefficient of the KL to the reference. `value` is the whole state: to resume, set it."""

    def __init__(self, init: float, recipe: Recipe) -> None:
        """Start at `init`; with `recipe.kl_target` the coefficient adapts (arXiv 1909.08593 section 2.2)."""
        self.value, target = init, recipe.kl_target
        self._controller = AdaptiveKLController(init=init, target=target, horizon=recipe.kl_horizon) if target else None

    def observe(self, kl: float, num_rollouts: int) -> None:
        """Move towards the target where there is one."""
        # A KL that is no number was judged by the tripwires; the controller would refuse it, and so end the run.
        if self._controller and math.isfinite(kl):
            self._controller.value = self.value
            self.value = self._controller.update(kl, num_rollouts)


def shape_rewards(samples: Sequence[TrainingSample], recipe: Recipe) -> list[TrainingSample]:
    """Return this rank's samples with rewards as the recipe wants them; groups must be whole on a rank.

    In this order: the overlong penalty enters the reward, groups without signal are left out, rewards become group
    advantages (or lose the mean of the group's other attempts, arXiv 2402.14740 eq. 8), truncated rollouts lose their
    loss tokens.
    """
    kept = list(samples)
    if recipe.overlong_buffer:
        kept = [_penalise_overlong(sample, recipe) for sample in kept]
    if recipe.drop_flat_groups:
        kept = _drop_flat_groups(kept)
    kind = recipe.advantages
    if kind == "gae" and recipe.group_baseline and _has_groups(kept):
        # Tasks differ far more than attempts at one task do, and after a few dozen steps the critic alone has not
        # learned that. An attempt that lost its group becomes 0, the mean: its raw reward would look like a success.
        kind = "rloo"
    if kind != "gae":
        rewards = torch.tensor([sample.reward for sample in kept])
        values = group_advantages(rewards, _groups(kept), kind=kind).tolist()
        kept = [replace(sample, reward=value) for sample, value in zip(kept, values, strict=True)]
    if recipe.mask_truncated:
        kept = [replace(one, loss_mask=(False,) * len(one.loss_mask)) if one.truncated else one for one in kept]
    return kept


def _penalise_overlong(sample: TrainingSample, recipe: Recipe) -> TrainingSample:
    length = torch.tensor(sum(sample.loss_mask))
    penalty = overlong_penalty(length, max_tokens=recipe.overlong_max, buffer_tokens=recipe.overlong_buffer)
    return replace(sample, reward=sample.reward + float(penalty))


def _drop_flat_groups(samples: list[TrainingSample]) -> list[TrainingSample]:
    """Leave out groups whose attempts all had the same verified outcome; all stay where a rank would have nothing."""
    # By the outcome, not the reward: a reward model's score is never twice the same, and its noise is no signal.
    outcomes = torch.tensor([float(sample.succeeded) for sample in samples])
    has_signal = groups_with_signal(outcomes, _groups(samples)).tolist()
    kept = [sample for sample, keep in zip(samples, has_signal, strict=True) if keep]
    return kept if ranks.smallest(len(kept)) else samples


def _groups(samples: Sequence[TrainingSample]) -> Tensor:
    return torch.tensor([sample.group_id for sample in samples])


def _has_groups(samples: Sequence[TrainingSample]) -> bool:
    """Whether any rank holds two attempts at one task."""
    sizes = Counter(sample.group_id for sample in samples)
    return ranks.largest(max(sizes.values(), default=0)) > 1


def kept_fraction(kept: Sequence[TrainingSample], samples: Sequence[TrainingSample]) -> float:
    """Return the share of rollouts, over all ranks, that were not left out."""
    left, total = ranks.summed(torch.tensor([float(len(kept)), float(len(samples))])).tolist()
    return left / max(total, 1.0)


def fill_advantages(
    batches: Sequence[Microbatch], recipe: Recipe, *, kl_coef: float, gamma: float, lam: float
) -> dict[str, float]:
    """Set advantages and returns of every microbatch; returns metrics of the whole batch over all ranks.

    With a critic: KL in the reward where the recipe says so, GAE carried across tool tokens, whitening over the whole
    batch. With group advantages: the rollout's advantage on each of its tokens, as it is.
    """
    if not recipe.has_critic:
        for batch in batches:
            batch.advantages = spread_over_tokens(batch.inputs.rewards_B, batch.inputs.loss_mask_BT)
        return {"advantage_std": moments_variance(_global_moments(batches, lambda batch: batch.advantages)) ** 0.5}
    for batch in batches:
        mask = batch.inputs.loss_mask_BT
        kl = kl_estimate(batch.old_logprobs, batch.ref_logprobs, kind=recipe.kl_kind)
        rewards = token_rewards(batch.inputs.rewards_B, kl, mask, kl_coef=kl_coef if recipe.kl_in == "reward" else 0.0)
        beyond = zero_masked(batch.final_values, batch.inputs.truncated_B) if recipe.bootstrap_truncated else None
        batch.advantages, batch.returns = gae_advantages(
            rewards, batch.values, mask, gamma=gamma, lam=lam, bootstrap_B=beyond
        )
    advantages = _global_moments(batches, lambda batch: batch.advantages)
    returns = _global_moments(batches, lambda batch: batch.returns)
    residuals = _global_moments(batches, lambda batch: batch.returns - batch.values)
    for batch in batches:
        batch.advantages = whiten(batch.advantages, batch.inputs.loss_mask_BT, moments=advantages)
    explained = explained_variance(returns, residuals)
    return {"explained_variance": explained, "advantage_std": moments_variance(advantages) ** 0.5}


def _global_moments(batches: Sequence[Microbatch], value_of: Callable[[Microbatch], Tensor]) -> Tensor:
    """Return [count, sum, sum of squares] over the loss tokens of all ranks."""
    parts = [masked_moments(value_of(batch), batch.inputs.loss_mask_BT) for batch in batches]
    return ranks.summed(torch.stack(parts).sum(0) if parts else torch.zeros(3))


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


def microbatch_loss(
    outputs: TokenOutputs,
    batch: Microbatch,
    counts: GlobalCounts,
    settings: PpoSettings,
    *,
    kl_coef: float,
    is_critic_warmup: bool,
) -> tuple[Tensor, dict[str, float]]:
    """Return this microbatch's share of the loss and of the metrics.

    Loss = policy loss + kl_coef * KL loss (where the recipe has the KL in the loss) + value_coef * value loss (with a
    critic). While the critic warms up, the policy's part is multiplied by 0.
    """
    recipe, mask = settings.recipe, batch.inputs.loss_mask_BT
    shared = {"aggregation": recipe.aggregation, "correction_BT": batch.correction, **asdict(counts)}
    policy = policy_loss(
        outputs.logprobs_BT,
        batch.old_logprobs,
        batch.advantages,
        mask,
        kind=recipe.loss,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=recipe.dual_clip,
        **shared,
    )
    loss, metrics = policy.loss, {**policy.metrics, "policy_loss": float(policy.loss.detach())}
    if recipe.kl_in == "loss":
        logprobs, old = outputs.logprobs_BT, batch.old_logprobs
        pull = kl_loss(logprobs, batch.ref_logprobs, mask, kind=recipe.kl_kind, old_logprobs_BT=old, **shared)
        loss, metrics = loss + kl_coef * pull.loss, metrics | {"kl_loss": float(pull.loss.detach())}
    if is_critic_warmup:
        loss = loss * 0.0  # it stays in the graph: its parameters take part in the reduction over ranks
    if recipe.has_critic:
        values, total = outputs.values_BT, counts.num_loss_tokens
        value = value_loss(values, batch.values, batch.returns, mask, clip=recipe.value_clip, num_loss_tokens=total)
        loss = loss + settings.value_coef * value.loss
        metrics["value_loss"] = float(value.loss.detach())
    if recipe.routing == "replay":
        metrics |= _route_shares(batch, counts)
    metrics["entropy"] = float(token_share(outputs.entropy_BT.detach(), mask, counts.num_loss_tokens))
    return loss, metrics


def _route_shares(batch: Microbatch, counts: GlobalCounts) -> dict[str, float]:
    """Return this microbatch's share of the agreement with the routes replayed, and of routes that engines recorded."""
    mask, recorded_LBTK = batch.inputs.loss_mask_BT, batch.inputs.routes_LBTK
    total = max(counts.num_loss_tokens, 1.0)
    metrics = {"route_agreement": batch.route_agreement * (float(mask.sum()) / total), "engine_routes_fraction": 0.0}
    if recorded_LBTK.numel():
        # A loss token comes from what was computed at the token before it.
        known_BT = (recorded_LBTK[:, :, :-1] >= 0).all(-1).all(0)
        metrics["engine_routes_fraction"] = float((known_BT & mask[:, 1:]).sum()) / total
    return metrics


@torch.no_grad()
def correct_mismatch(batch: Microbatch, recipe: Recipe) -> None:
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


def mismatch_metrics(batches: Sequence[Microbatch], entropies_BT: Sequence[Tensor]) -> dict[str, float]:
    """Return what is known of the whole batch before any step: engine-learner gap, entropy, KL to the reference.

    Chi-squared is E[rho^2] - 1, the effective sample size E[rho]^2 / E[rho^2]. Nothing without an old pass.
    """
    if not entropies_BT:
        return {}
    counts = global_counts(batches)
    parts = zip(batches, entropies_BT, strict=True)
    merged = ranks.merge_ranks(merge_metrics([_mismatch_shares(batch, entropy, counts) for batch, entropy in parts]))
    mean, square = merged.pop(_RHO), merged.pop(_RHO_SQUARE)
    is_any = square > 0  # a batch without loss tokens has no gap
    merged["mismatch_chi2"] = square - 1.0 if is_any else 0.0
    merged["mismatch_ess_fraction"] = mean * mean / square if is_any else 1.0
    return merged


@torch.no_grad()
def _mismatch_shares(batch: Microbatch, entropy_BT: Tensor, counts: GlobalCounts) -> dict[str, float]:
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


def update_summary(
    history: Sequence[Mapping[str, float]], seen: Mapping[str, float], *, num_steps: int, stopped_early: bool
) -> dict[str, float]:
    """Average the minibatches of one update but for maxima, without what is in `seen`, which is of the whole batch.

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
