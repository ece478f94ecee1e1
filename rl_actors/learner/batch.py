"""From rollouts to what an update computes with: rewards against the group, random minibatches, even microbatches."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rl_actors.algorithms import TrainingBatch, collate, filler_batch, group_advantages, plan_microbatches
from rl_actors.contracts import TrainingSample
from rl_actors.learner import ranks

MAX_WASTE_FRACTION = 0.1


_NOTHING = torch.zeros(0)


@dataclass(slots=True)
class Microbatch:
    """One forward pass: the collated samples, and what the old pass and the advantages add to them, all [B, T]."""

    inputs: TrainingBatch
    old_logprobs: Tensor = field(default_factory=lambda: _NOTHING)
    ref_logprobs: Tensor = field(default_factory=lambda: _NOTHING)
    values: Tensor = field(default_factory=lambda: _NOTHING)
    advantages: Tensor = field(default_factory=lambda: _NOTHING)
    returns: Tensor = field(default_factory=lambda: _NOTHING)
    correction: Tensor = field(default_factory=lambda: _NOTHING)  # engine-learner weights, 0 where rejected
    kept: Tensor = field(default_factory=lambda: _NOTHING)  # loss tokens that were not rejected
    final_values: Tensor = field(default_factory=lambda: _NOTHING)  # [B], the critic on the state after the last token
    routes: Tensor = field(default_factory=lambda: _NOTHING)  # [layers, B, T, K], experts of the old pass, for replay
    route_agreement: float = 1.0  # share of those that the router would choose again


Minibatch = list[Microbatch]
"""What one optimizer step sees on this rank."""


def against_group(samples: Sequence[TrainingSample]) -> list[TrainingSample]:
    """Return the samples with each reward less the mean of the other attempts at its task (arXiv 2402.14740 eq. 8).

    A baseline that the sampled tokens do not enter leaves the gradient unbiased. Tasks differ far more than attempts at
    one task do, and the critic alone has not learned that after a few dozen steps. Where every task has one attempt,
    on all ranks, rewards stay as they are. One that lost its group to infrastructure gets 0, the mean of all others:
    its raw reward would look like a huge success.
    """
    sizes = Counter(sample.group_id for sample in samples)
    if ranks.largest(max(sizes.values(), default=0)) <= 1:
        return list(samples)
    rewards = torch.tensor([sample.reward for sample in samples])
    groups = torch.tensor([sample.group_id for sample in samples])
    centred = group_advantages(rewards, groups, kind="rloo").tolist()  # 0 for a group of one
    return [replace(sample, reward=value) for sample, value in zip(samples, centred, strict=True)]


def minibatches(
    samples: Sequence[TrainingSample],
    *,
    count: int,
    token_budget: int,
    rng: random.Random,
    device: torch.device | str,
) -> list[Minibatch]:
    """Deal samples at random into at most `count` minibatches of equal size, each cut into even microbatches.

    At random, because length goes with the kind of task: minibatches of equal length would each see only some kinds.
    All ranks get the same number of minibatches, and the same number of microbatches in each.
    """
    order = sorted(samples, key=lambda sample: sample.rollout_id)
    rng.shuffle(order)
    parts = ranks.smallest(min(count, len(order)))
    return [_microbatches(order[index::parts], token_budget, device) for index in range(parts)]


def _microbatches(samples: Sequence[TrainingSample], token_budget: int, device: torch.device | str) -> Minibatch:
    lengths = [len(sample.token_ids) for sample in samples]
    budget = max(token_budget, *lengths)
    plan = plan_microbatches(lengths, token_budget=budget, max_waste_fraction=MAX_WASTE_FRACTION)
    batches = [collate([samples[index] for index in group]) for group in plan]
    batches += [filler_batch()] * (ranks.largest(len(batches)) - len(batches))
    return [Microbatch(batch.to(device)) for batch in batches]
