"""Copy drills: every token in the loss was announced before, after the same marker."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_actors.training.sft import Example, copy_drill, drill_batches

NUMBERS = list(range(100, 200))
OTHERS = list(range(8, 100))


def repeated_parts(drill: Example) -> list[tuple[int, ...]]:
    """Each marker with the tokens that carry loss after it."""
    parts: list[list[int]] = []
    for index, own in enumerate(drill.loss_mask):
        if own and not drill.loss_mask[index - 1]:
            parts.append([drill.token_ids[index - 1]])
        if own:
            parts[-1].append(drill.token_ids[index])
    return [tuple(part) for part in parts]


def occurrences(ids: tuple[int, ...], part: tuple[int, ...]) -> int:
    return sum(ids[at : at + len(part)] == part for at in range(len(ids)))


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 10**6))
def test_what_is_asked_for_was_announced_after_the_same_marker(seed: int):
    drill = copy_drill(random.Random(seed), NUMBERS, OTHERS)
    parts = repeated_parts(drill)
    assert 1 <= len(parts) <= 3
    for part in parts:
        assert 3 <= len(part) <= 4
        assert occurrences(drill.token_ids, part) >= 2, "once announced, once asked for"


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6))
def test_the_announcement_itself_carries_no_loss(seed: int):
    drill = copy_drill(random.Random(seed), NUMBERS, OTHERS)
    for part in repeated_parts(drill):
        first = next(at for at in range(len(drill.token_ids)) if drill.token_ids[at : at + len(part)] == part)
        assert not any(drill.loss_mask[first : first + len(part)])


def test_only_given_tokens_are_used():
    for seed in range(50):
        drill = copy_drill(random.Random(seed), NUMBERS, OTHERS)
        assert set(drill.token_ids) <= {*NUMBERS, *OTHERS}
        assert not set(drill.token_ids) & set(range(8)), "a drill teaches no special token"


def test_drills_differ_and_equal_seeds_do_not():
    drills = {copy_drill(random.Random(seed), NUMBERS, OTHERS).token_ids for seed in range(30)}
    assert len(drills) == 30
    assert copy_drill(random.Random(3), NUMBERS, OTHERS) == copy_drill(random.Random(3), NUMBERS, OTHERS)


VOCABULARY = {"<|end|>": 2, "<|call|>": 6, **{str(n): 8 + n for n in range(20)}, **{f"w{n}": 28 + n for n in range(40)}}


@pytest.mark.parametrize(("count", "batch_tokens", "size"), [(0, 4096, 0), (3, 4096, 64), (2, 10, 1)])
def test_batches_have_about_the_size_of_the_demonstrations(count: int, batch_tokens: int, size: int):
    batches = drill_batches(count, batch_tokens, VOCABULARY, 8, random.Random(1))
    assert [len(batch) for batch in batches] == [size] * count
    tokens = [sum(len(drill.token_ids) for drill in batch) for batch in batches]
    assert all(0.4 * batch_tokens < total < 1.4 * batch_tokens for total in tokens if batch_tokens > 64)


def test_batches_leave_special_tokens_out():
    (batch,) = drill_batches(1, 4096, VOCABULARY, 8, random.Random(2))
    seen = {token for drill in batch for token in drill.token_ids}
    assert seen <= set(range(8, 68))
    assert seen & set(range(8, 28)), "numbers are among them"
    assert seen & set(range(28, 68)), "and other tokens"
