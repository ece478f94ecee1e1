"""Samples dealt into random minibatches, each cut into even microbatches that fit a budget of tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rl_actors.algorithms import TrainingBatch, collate, filler_batch, plan_microbatches
from rl_actors.contracts import TrainingSample
from rl_actors.learner import ranks

MAX_WASTE_FRACTION = 0.1
_NOTHING = torch.zeros(0)


@dataclass(slots=True)
class Microbatch:
    """One forward pass: collated samples, and what the old pass and the advantages add to them, [B, T].

    `correction` holds engine-learner weights, 0 where rejected, and `kept` the loss tokens that were not. Of other
    shapes: `final_values` [B], the critic on the state after the last token, and `routes` [layers, B, T, K], the
    experts of the old pass, with the share of them that the router would choose again.
    """

    inputs: TrainingBatch
    old_logprobs: Tensor = _NOTHING
    ref_logprobs: Tensor = _NOTHING
    values: Tensor = _NOTHING
    advantages: Tensor = _NOTHING
    returns: Tensor = _NOTHING
    correction: Tensor = _NOTHING
    kept: Tensor = _NOTHING
    final_values: Tensor = _NOTHING
    routes: Tensor = _NOTHING
    route_agreement: float = 1.0


Minibatch = list[Microbatch]
"""What one optimizer step sees on this rank."""


def minibatches(
    samples: Sequence[TrainingSample],
    *,
    count: int,
    token_budget: int,
    rng: random.Random,
    device: torch.device | str,
) -> list[Minibatch]:
    """Deal samples at random into at most `count` minibatches of equal size, each cut into even microbatches.

    All ranks get the same number of minibatches, and the same number of microbatches in each.
    """
    # The order in which workers hand rollouts back must not matter; the seed alone decides.
    order = sorted(samples, key=lambda sample: sample.rollout_id)
    # At random: length goes with the kind of task, and minibatches of equal length would each see only some kinds.
    rng.shuffle(order)
    parts = ranks.smallest(min(count, len(order)))
    return [_microbatches(order[index::parts], token_budget, device) for index in range(parts)]


def _microbatches(samples: Sequence[TrainingSample], token_budget: int, device: torch.device | str) -> Minibatch:
    lengths = [len(sample.token_ids) for sample in samples]
    budget = max(token_budget, *lengths)  # a sample longer than the budget stands alone
    plan = plan_microbatches(lengths, token_budget=budget, max_waste_fraction=MAX_WASTE_FRACTION)
    batches = [collate([samples[index] for index in group]) for group in plan]
    # Every backward pass is a collective: a rank with fewer parts would leave the others waiting.
    batches += [filler_batch()] * (ranks.largest(len(batches)) - len(batches))
    return [Microbatch(batch.to(device)) for batch in batches]
