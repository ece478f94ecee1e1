"""Synthetic copy drills: numbers announced by a marker and asked for again, for a model that starts from nothing.

A freshly built model learns to copy order numbers late and suddenly (the phase change of induction heads,
arXiv 2209.11895). Drills interleaved with the first demonstrations bring it forward. A pre-trained model needs none.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from rl_actors.training.sft import Example

_NUM_REPEATS = 3


def copy_drill(rng: random.Random, number_ids: Sequence[int], other_ids: Sequence[int]) -> Example:
    """Return one drill of about 50 tokens; the loss is on what is repeated: numbers, or any other tokens."""
    pool = number_ids if rng.random() < 0.5 else other_ids
    numbers = [[rng.choice(pool) for _ in range(rng.choice((2, 3)))] for _ in range(rng.randint(2, 4))]
    markers = rng.sample(list(other_ids), len(numbers))
    ids = _filler(rng, other_ids, 0, 6)
    mask = [False] * len(ids)
    for marker, number in zip(markers, numbers, strict=True):
        part = [marker, *number, *_filler(rng, other_ids, 1, 5)]
        ids, mask = ids + part, mask + [False] * len(part)
    for _ in range(_NUM_REPEATS):
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
