"""Supervised fine-tuning on demonstrations: cross-entropy on the assistant's own tokens, token-mean over the batch.

Copy drills may be interleaved: numbers announced by a marker and asked for again. A freshly built model learns to copy
order numbers late and suddenly (the phase change of induction heads, arXiv 2209.11895); drills among the first
demonstrations bring it forward. A pre-trained model needs none.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rl_actors.contracts import BadInputError
from rl_actors.learner import OptimizerSettings, accumulate_and_step, build_engine, scale_learning_rate, summed
from rl_actors.models import pad_sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class SftSettings:
    """What decides the result of an SFT run, besides the data and the starting weights."""

    epochs: int
    learning_rate: float
    batch_tokens: int
    max_grad_norm: float
    seed: int
    warmup_fraction: float = 0.05
    zero_stage: int = 0
    muon_learning_rate: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """Token ids of one demonstration and True where the assistant spoke. Equal lengths."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]

    def __post_init__(self) -> None:
        """Refuse arrays of different length."""
        if len(self.token_ids) != len(self.loss_mask):
            raise ValueError(f"{len(self.token_ids)} tokens but a loss mask of {len(self.loss_mask)}")


def copy_drill(rng: random.Random, number_ids: Sequence[int], other_ids: Sequence[int]) -> Example:
    """Return one drill of about 50 tokens; the loss is on what is repeated: numbers, or any other tokens."""
    # Half of them over other tokens: the model is to learn copying, not which tokens are numbers.
    pool = number_ids if rng.random() < 0.5 else other_ids
    numbers = [[rng.choice(pool) for _ in range(rng.choice((2, 3)))] for _ in range(rng.randint(2, 4))]
    markers = rng.sample(list(other_ids), len(numbers))
    ids = _filler(rng, other_ids, 0, 6)
    mask = [False] * len(ids)
    for marker, number in zip(markers, numbers, strict=True):
        part = [marker, *number, *_filler(rng, other_ids, 1, 5)]
        ids, mask = ids + part, mask + [False] * len(part)
    for _ in range(3):
        index = rng.randrange(len(numbers))
        gap = _filler(rng, other_ids, 0, 4)
        ids += [markers[index], *numbers[index], *gap]
        mask += [False, *[True] * len(numbers[index]), *[False] * len(gap)]
    return Example(token_ids=tuple(ids), loss_mask=tuple(mask))


def drill_batches(
    count: int, batch_tokens: int, vocabulary: dict[str, int], first_plain_id: int, rng: random.Random
) -> list[list[Example]]:
    """Return `count` batches of about `batch_tokens` tokens each, over a tokenizer's number tokens and all others."""
    number_ids = sorted(index for text, index in vocabulary.items() if text.isdigit())
    other_ids = sorted(index for index in vocabulary.values() if index >= first_plain_id)
    size = max(1, batch_tokens // 64)
    return [[copy_drill(rng, number_ids, other_ids) for _ in range(size)] for _ in range(count)]


def _filler(rng: random.Random, other_ids: Sequence[int], low: int, high: int) -> list[int]:
    return [rng.choice(other_ids) for _ in range(rng.randint(low, high))]


def batches_by_tokens(examples: Sequence[Example], batch_tokens: int, rng: random.Random) -> list[list[Example]]:
    """Group examples of similar length into batches of at most `batch_tokens` padded tokens, in random order."""
    shuffled = list(examples)
    rng.shuffle(shuffled)  # before a stable sort: those of equal length meet others in each epoch
    ordered = sorted(shuffled, key=lambda example: len(example.token_ids))
    # Neighbours in length share a batch: what is padding is computed all the same.
    batches: list[list[Example]] = [[]]
    for example in ordered:
        if batches[-1] and (len(batches[-1]) + 1) * len(example.token_ids) > batch_tokens:
            batches.append([])
        batches[-1].append(example)
    rng.shuffle(batches)
    return batches


def pad(examples: Sequence[Example], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return token ids, attention mask and loss mask, each [B, T]; padding is on the right with id 0."""
    ids, attention = pad_sequences([example.token_ids for example in examples], device)
    mask, _ = pad_sequences([example.loss_mask for example in examples], device)
    return ids, attention, mask.bool()


def cross_entropy(model: Any, examples: Sequence[Example], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (summed negative log likelihood in nats, number of loss tokens), both scalars."""
    ids, attention, mask = pad(examples, device)
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1]
    targets = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
    # In float32: bfloat16 logits would round the loss. A sum, because the mean is over all ranks.
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    return total, mask[:, 1:].sum()


def warmup_cosine(step: int, num_steps: int, warmup_fraction: float) -> float:
    """Return the share of the peak learning rate at a step: linear warm-up, then cosine decay to 0.05."""
    warmup = max(1, int(num_steps * warmup_fraction))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * progress))


def train_sft(
    model: torch.nn.Module,
    examples: Sequence[Example],
    settings: SftSettings,
    report: Callable[[int, Mapping[str, float]], None],
    *,
    drills: Sequence[list[Example]] = (),
    rank: int = 0,
    num_ranks: int = 1,
) -> None:
    """Train `model` in place. Each rank takes every `num_ranks`-th batch.

    `report` gets every step, from 1, with its metrics; `loss` is in nats per loss token. `drills` are extra batches,
    interleaved one by one with the first batches of demonstrations.

    Raises:
        BadInputError: The examples do not fill one batch per rank: nothing would be trained.
    """
    plain = list(_batches_of_rank(examples, settings, rank, num_ranks))
    if not any(plain):
        remedy = (
            f"{len(examples)} examples do not fill a batch for each of {num_ranks} learners; lower it or add examples"
        )
        raise BadInputError("sft.batch_tokens", settings.batch_tokens, remedy)
    optimizer = OptimizerSettings(
        learning_rate=settings.learning_rate,
        max_grad_norm=settings.max_grad_norm,
        zero_stage=settings.zero_stage,
        muon_learning_rate=settings.muon_learning_rate,
    )
    engine = build_engine(model, optimizer)
    schedule = interleave(plain, drills)
    for step, batch in enumerate(schedule):
        share = warmup_cosine(step, len(schedule), settings.warmup_fraction)
        scale_learning_rate(engine, share)
        total, count = cross_entropy(engine, batch, engine.device)
        # Of all ranks: a mean of each rank's own means would weigh tokens by how few their rank has.
        whole, num_loss_tokens = summed(torch.stack([total.detach(), count])).tolist()
        num_loss_tokens = max(num_loss_tokens, 1.0)
        norm = accumulate_and_step(engine, [total * num_ranks / num_loss_tokens], lambda value: value)
        metrics = {
            "num_steps": len(schedule),
            "loss": whole / num_loss_tokens,
            "grad_norm": norm,
            "learning_rate": settings.learning_rate * share,
            "num_tokens": sum(len(example.token_ids) for example in batch),
        }
        report(step + 1, metrics)


def interleave(batches: Sequence[list[Example]], drills: Sequence[list[Example]]) -> list[list[Example]]:
    """Return the batches with one drill before each of the first ones."""
    mixed = [batch for pair in zip(drills, batches, strict=False) for batch in pair]
    used = min(len(drills), len(batches))
    return [*mixed, *batches[used:]]


def _batches_of_rank(
    examples: Sequence[Example], settings: SftSettings, rank: int, num_ranks: int
) -> Iterator[list[Example]]:
    """Yield this rank's batches over all epochs; every rank gets the same number."""
    rng = random.Random(settings.seed)
    for _ in range(settings.epochs):
        batches = batches_by_tokens(examples, settings.batch_tokens, rng)
        # The rest is left out: a rank with a batch more would wait for the others for ever.
        usable = len(batches) - len(batches) % num_ranks
        yield from batches[rank:usable:num_ranks]
