"""What an update aims at: rewards shaped by the recipe and its KL coefficient, then advantages and returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rl_actors.algorithms import (
    AdaptiveKLController,
    explained_variance,
    gae_advantages,
    group_advantages,
    groups_with_signal,
    kl_estimate,
    masked_moments,
    moments_variance,
    overlong_penalty,
    spread_over_tokens,
    token_rewards,
    whiten,
    zero_masked,
)
from rl_actors.contracts import Recipe, TrainingSample
from rl_actors.learner import ranks
from rl_actors.learner.batch import Microbatch, against_group


class KLCoefficient:
    """`value` is the whole state: to resume, set it."""

    def __init__(self, init: float, recipe: Recipe) -> None:
        """Start at `init`; with `recipe.kl_target` the coefficient adapts (arXiv 1909.08593 section 2.2)."""
        self.value = init
        self._controller = (
            AdaptiveKLController(init=init, target=recipe.kl_target, horizon=recipe.kl_horizon)
            if recipe.kl_target
            else None
        )

    def observe(self, kl: float, num_rollouts: int) -> None:
        """Move towards the target; a KL that is no number was judged by the tripwires and teaches nothing."""
        if self._controller is None or not math.isfinite(kl):
            return
        self._controller.value = self.value
        self.value = self._controller.update(kl, num_rollouts)


def shaped(samples: Sequence[TrainingSample], recipe: Recipe) -> list[TrainingSample]:
    """Return this rank's samples with rewards as the recipe wants them; groups must be whole on a rank.

    In this order: the overlong penalty enters the reward, groups without signal are left out, rewards become group
    advantages (or lose the group's baseline), truncated rollouts lose their loss tokens.
    """
    kept = with_signal([_penalised(sample, recipe) for sample in samples], recipe)
    if recipe.advantages != "gae":
        scores, groups = _rewards_and_groups(kept)
        values = group_advantages(scores, groups, kind=recipe.advantages).tolist()
        kept = [replace(sample, reward=value) for sample, value in zip(kept, values, strict=True)]
    elif recipe.group_baseline:
        kept = against_group(kept)
    return [_without_loss(sample) if recipe.mask_truncated and sample.truncated else sample for sample in kept]


def with_signal(samples: Sequence[TrainingSample], recipe: Recipe) -> list[TrainingSample]:
    """Leave out groups whose attempts all came to the same verified outcome; all stay where a rank would have nothing.

    By the outcome, not the reward: a reward model's score is never twice the same, and its noise is no signal. The loop
    has already tried other tasks in their place; `kept_fraction` says how much is left.
    """
    if not recipe.drop_flat_groups:
        return list(samples)
    outcomes = torch.tensor([float(sample.succeeded) for sample in samples])
    groups = torch.tensor([sample.group_id for sample in samples])
    has_signal = groups_with_signal(outcomes, groups).tolist()
    kept = [sample for sample, keep in zip(samples, has_signal, strict=True) if keep]
    return kept if ranks.smallest(len(kept)) else list(samples)


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
            mask = batch.inputs.loss_mask_BT
            batch.advantages = spread_over_tokens(batch.inputs.rewards_B, mask)
        moments = _global_moments([b.advantages for b in batches], batches)
        return {"advantage_std": moments_variance(moments) ** 0.5}
    for batch in batches:
        mask = batch.inputs.loss_mask_BT
        kl = kl_estimate(batch.old_logprobs, batch.ref_logprobs, kind=recipe.kl_kind)
        rewards = token_rewards(batch.inputs.rewards_B, kl, mask, kl_coef=kl_coef if recipe.kl_in == "reward" else 0.0)
        beyond = zero_masked(batch.final_values, batch.inputs.truncated_B) if recipe.bootstrap_truncated else None
        batch.advantages, batch.returns = gae_advantages(
            rewards, batch.values, mask, gamma=gamma, lam=lam, bootstrap_B=beyond
        )
    advantages = _global_moments([b.advantages for b in batches], batches)
    returns = _global_moments([b.returns for b in batches], batches)
    residuals = _global_moments([b.returns - b.values for b in batches], batches)
    for batch in batches:
        batch.advantages = whiten(batch.advantages, batch.inputs.loss_mask_BT, moments=advantages)
    explained = explained_variance(returns, residuals)
    return {"explained_variance": explained, "advantage_std": moments_variance(advantages) ** 0.5}


def _rewards_and_groups(samples: Sequence[TrainingSample]) -> tuple[Tensor, Tensor]:
    rewards = torch.tensor([sample.reward for sample in samples])
    return rewards, torch.tensor([sample.group_id for sample in samples])


def _penalised(sample: TrainingSample, recipe: Recipe) -> TrainingSample:
    if not recipe.overlong_buffer:
        return sample
    length = torch.tensor(sum(sample.loss_mask))
    penalty = overlong_penalty(length, max_tokens=recipe.overlong_max, buffer_tokens=recipe.overlong_buffer)
    return replace(sample, reward=sample.reward + float(penalty))


def _without_loss(sample: TrainingSample) -> TrainingSample:
    return replace(sample, loss_mask=(False,) * len(sample.loss_mask))


def _global_moments(arrays: Sequence[Tensor], batches: Sequence[Microbatch]) -> Tensor:
    """Return [count, sum, sum of squares] over the loss tokens of all ranks."""
    parts = [masked_moments(x, batch.inputs.loss_mask_BT) for x, batch in zip(arrays, batches, strict=True)]
    return ranks.summed(torch.stack(parts).sum(0) if parts else torch.zeros(3))
