"""From samples to a gradient: planning, padding, idle ranks and scoring together change neither loss nor gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from rl_actors.algorithms.advantages import spread_over_tokens
from rl_actors.algorithms.batching import TrainingBatch, collate, filler_batch, plan_microbatches
from rl_actors.algorithms.kl import kl_loss
from rl_actors.algorithms.losses import policy_loss
from rl_actors.contracts.rollouts import TrainingSample
from rl_actors.models.scoring_head import chunked_token_logprobs_and_entropy

torch.set_num_threads(1)
quick = settings(deadline=None, max_examples=15)
AGGREGATIONS = ["token_mean", "sequence_mean", "sequence_sum"]
KINDS = ["ppo", "gspo", "cispo"]
VOCABULARY, HIDDEN = 11, 5
Ranks = Sequence[Sequence[TrainingBatch]]
Result = tuple[float, Tensor]


def samples_of(lengths: Sequence[int], seed: int, density: float) -> list[TrainingSample]:
    """Samples with tool tokens in between; at a low density some have no loss token at all."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index, length in enumerate(lengths):
        mask = torch.rand(length, generator=generator) < density
        mask[0] = False
        samples.append(
            TrainingSample(
                rollout_id=str(index),
                group_id=0,
                weights_versions=(0,),
                token_ids=tuple(torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()),
                loss_mask=tuple(mask.tolist()),
                rollout_logprobs=tuple((torch.randn(length, generator=generator) * 0.4 - 2.4).tolist()),
                reward=float(torch.randn((), generator=generator)),
                truncated=False,
            )
        )
    return samples


def parameters(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embedding, head = torch.randn(2, VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64).unbind()
    return embedding.requires_grad_(), head.requires_grad_()


def share(model: tuple[Tensor, Tensor], batch: TrainingBatch, counts: dict[str, int], **options: str) -> Tensor:
    """One microbatch's part of policy and KL loss, under a model that reads the mean of what came before."""
    embedding, head = model
    places = torch.arange(1, batch.token_ids_BT.shape[1] + 1, dtype=torch.float64)[:, None]
    hidden_BTH = embedding[batch.token_ids_BT].cumsum(1) / places
    mask_BT = batch.loss_mask_BT
    logprobs_BT, _ = chunked_token_logprobs_and_entropy(hidden_BTH, head, batch.token_ids_BT, 4, mask_BT=mask_BT)
    advantages_BT = spread_over_tokens(batch.rewards_B, mask_BT)
    old_BT, aggregation = batch.rollout_logprobs_BT, {"aggregation": options["aggregation"], **counts}
    arguments: Any = {"kind": options["kind"], "clip_low": 0.2, "clip_high": 0.3, **aggregation}
    policy = policy_loss(logprobs_BT, old_BT, advantages_BT, mask_BT, **arguments).loss
    leash: Any = {"old_logprobs_BT": old_BT, **aggregation}
    return policy + 0.1 * kl_loss(logprobs_BT, torch.full_like(logprobs_BT, -2.0), mask_BT, **leash).loss


def num_sequences(batch: TrainingBatch) -> int:
    return int(batch.loss_mask_BT.any(-1).sum())


def counts_of(batches: Sequence[TrainingBatch]) -> dict[str, int]:
    return {
        "num_loss_tokens": sum(int(batch.loss_mask_BT.sum()) for batch in batches),
        "num_sequences": sum(num_sequences(batch) for batch in batches),
    }


def loss_and_gradient(seed: int, terms: Callable[[tuple[Tensor, Tensor]], Tensor]) -> Result:
    model = parameters(seed)
    loss = terms(model)
    return float(loss.detach()), torch.stack(torch.autograd.grad(loss, model))


def dealt(groups: Sequence[tuple[int, ...]], lengths: Sequence[int], num_ranks: int) -> list[list[tuple[int, ...]]]:
    """Give each next microbatch to the rank with the fewest, then with the fewest tokens; fill up with empty ones."""
    ranks: list[list[tuple[int, ...]]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    cost = {group: sum(lengths[index] for index in group) for group in groups}
    for group in sorted(groups, key=lambda group: -cost[group]):
        rank = min(range(num_ranks), key=lambda rank: (len(ranks[rank]), loads[rank]))
        ranks[rank].append(group)
        loads[rank] += cost[group]
    depth = max(map(len, ranks))
    return [rank + [()] * (depth - len(rank)) for rank in ranks]


def planned(
    samples: list[TrainingSample], *, budget: int, num_ranks: int, multiple: int, pad_token_id: int
) -> list[list[TrainingBatch]]:
    """The microbatches of every rank, each padded to its own width, fillers where a rank has no work."""
    lengths = [len(sample.token_ids) for sample in samples]
    plan = [tuple(group) for group in plan_microbatches(lengths, token_budget=budget, max_waste_fraction=0.3)]

    def batch_of(group: tuple[int, ...]) -> TrainingBatch:
        batch = collate([samples[i] for i in group]) if group else filler_batch()
        return padded(batch, multiple=multiple, pad_token_id=pad_token_id)

    return [[batch_of(group) for group in groups] for groups in dealt(plan, lengths, num_ranks)]


def padded(batch: TrainingBatch, *, multiple: int, pad_token_id: int) -> TrainingBatch:
    """The same samples, wider, with another token where none is."""
    tail = -batch.token_ids_BT.shape[1] % multiple
    attention_BT = pad(batch.attention_mask_BT, (0, tail))
    return replace(
        batch,
        token_ids_BT=pad(batch.token_ids_BT, (0, tail)).masked_fill(~attention_BT, pad_token_id),
        attention_mask_BT=attention_BT,
        loss_mask_BT=pad(batch.loss_mask_BT, (0, tail)),
        rollout_logprobs_BT=pad(batch.rollout_logprobs_BT, (0, tail)),
    )


def as_the_learner_does(seed: int, ranks: Ranks, **options: str) -> Result:
    """Global counts; each rank sums its microbatches and is scaled, because the backend averages over ranks."""
    counts = counts_of([batch for batches in ranks for batch in batches])

    def of_rank(batches: Sequence[TrainingBatch]) -> Result:
        return loss_and_gradient(
            seed, lambda model: len(ranks) * sum_of([share(model, batch, counts, **options) for batch in batches])
        )

    return mean_of([of_rank(batches) for batches in ranks])


def normalised_per_microbatch(seed: int, ranks: Ranks, **options: str) -> Result:
    """Gradient accumulation as a mean of means."""
    batches = [batch for batches in ranks for batch in batches]
    return mean_of(
        [loss_and_gradient(seed, lambda model, batch=batch: share(model, batch, {}, **options)) for batch in batches]
    )


def normalised_per_rank(seed: int, ranks: Ranks, **options: str) -> Result:
    """Data parallelism that never exchanges its counts."""

    def of_rank(batches: Sequence[TrainingBatch]) -> Result:
        counts = counts_of(batches)
        return loss_and_gradient(
            seed, lambda model: sum_of([share(model, batch, counts, **options) for batch in batches])
        )

    return mean_of([of_rank(batches) for batches in ranks])


def normalised_by_positions(seed: int, ranks: Ranks, **options: str) -> Result:
    """Padding and tool tokens counted as if they trained, and fillers as sequences."""
    batches = [batch for batches in ranks for batch in batches]
    counts = {
        "num_loss_tokens": sum(batch.token_ids_BT.numel() for batch in batches),
        "num_sequences": sum(len(batch.token_ids_BT) for batch in batches) + 1,
    }
    return loss_and_gradient(seed, lambda model: sum_of([share(model, batch, counts, **options) for batch in batches]))


def sum_of(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()


def mean_of(results: Sequence[Result]) -> Result:
    losses, gradients = zip(*results, strict=True)
    return sum(losses) / len(losses), torch.stack(gradients).mean(0)


def split_errors(
    reduction: Callable[..., Result], samples: list[TrainingSample], seed: int, ranks: Ranks, **options: str
) -> dict[str, float]:
    """Largest differences of loss and gradient from all samples in one batch."""
    loss, gradient = loss_and_gradient(seed, lambda model: share(model, collate(samples), {}, **options))
    found, found_gradient = reduction(seed, ranks, **options)
    return {"loss": abs(found - loss), "gradient": float((found_gradient - gradient).abs().max())}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", KINDS)
@quick
@given(
    lengths=st.lists(st.integers(1, 16), min_size=1, max_size=9),
    seed=st.integers(0, 10_000),
    density=st.sampled_from([0.2, 0.6, 1.0]),
    budget=st.integers(16, 60),
    num_ranks=st.integers(1, 4),
    multiple=st.sampled_from([1, 8]),
    pad_token_id=st.integers(0, VOCABULARY - 1),
)
def test_any_plan_padding_and_number_of_ranks_gives_the_loss_and_gradient_of_one_batch(
    kind: str,
    aggregation: str,
    lengths: list[int],
    seed: int,
    density: float,
    budget: int,
    num_ranks: int,
    multiple: int,
    pad_token_id: int,
) -> None:
    samples = samples_of(lengths, seed, density)
    ranks = planned(samples, budget=budget, num_ranks=num_ranks, multiple=multiple, pad_token_id=pad_token_id)
    found = split_errors(as_the_learner_does, samples, seed, ranks, kind=kind, aggregation=aggregation)
    assert max(found.values()) < 1e-12


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [normalised_per_microbatch, normalised_per_rank, normalised_by_positions])
@quick
@given(seed=st.integers(0, 10_000))
def test_control_other_denominators_fail_for_loss_and_gradient(
    wrong: Callable[..., Result], kind: str, aggregation: str, seed: int
) -> None:
    samples = samples_of([16, 15, 5, 4, 3], seed, density=1.0)
    ranks = planned(samples, budget=16, num_ranks=2, multiple=1, pad_token_id=0)
    # Every count of a part is uneven, and one rank has a filler.
    assert [[num_sequences(batch) for batch in batches] for batches in ranks] == [[1, 0], [1, 3]]
    found = split_errors(wrong, samples, seed, ranks, kind=kind, aggregation=aggregation)
    assert min(found.values()) > 1e-9
