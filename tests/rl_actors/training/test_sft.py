"""Supervised fine-tuning: what is in a batch, what carries loss, and that a real model learns from it."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_actors.contracts.errors import BadInputError
from rl_actors.training import sft
from rl_actors.training.sft import (
    Example,
    SftSettings,
    batches_by_tokens,
    cross_entropy,
    interleave,
    pad,
    train_sft,
    warmup_cosine,
)

torch.set_num_threads(1)
CPU = torch.device("cpu")
SETTINGS = SftSettings(epochs=1, learning_rate=1e-2, batch_tokens=64, max_grad_norm=1.0, seed=3)


def example(length: int, *, first: int = 10, own: int = 2) -> Example:
    """Ids first, first+1, ...; the last `own` carry loss."""
    ids = tuple(range(first, first + length))
    return Example(token_ids=ids, loss_mask=(False,) * (length - own) + (True,) * own)


# --- batches --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30), budget=st.integers(40, 200), seed=st.integers(0, 9)
)
def test_batches_hold_every_example_once_within_the_budget(lengths: list[int], budget: int, seed: int):
    examples = [example(length, first=100 * index) for index, length in enumerate(lengths)]
    batches = batches_by_tokens(examples, budget, random.Random(seed))
    assert Counter(one for batch in batches for one in batch) == Counter(examples)
    for batch in batches:
        assert len(batch) * max(len(one.token_ids) for one in batch) <= budget


def test_an_example_over_the_budget_stands_alone():
    batches = batches_by_tokens([example(50), example(4), example(4, first=20)], 10, random.Random(0))
    assert sorted(len(batch) for batch in batches) == [1, 2]


def test_batches_are_shuffled_and_reproducible():
    examples = [example(8, first=index) for index in range(40)]
    one, two, other = (batches_by_tokens(examples, 64, random.Random(seed)) for seed in (1, 1, 2))
    assert one == two != other


def test_similar_lengths_share_a_batch():
    examples = [example(length) for length in (4, 30, 5, 31, 4, 30)]
    for batch in batches_by_tokens(examples, 93, random.Random(5)):
        lengths = [len(one.token_ids) for one in batch]
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("mask", [(), (True,), (True,) * 4])
def test_an_example_with_arrays_of_different_length_is_refused(mask: tuple[bool, ...]):
    with pytest.raises(ValueError, match="3 tokens but"):
        Example(token_ids=(1, 2, 3), loss_mask=mask)


# --- padding and loss -----------------------------------------------------------------------------


def test_padding_is_on_the_right_and_carries_nothing():
    ids, attention, mask = pad([example(3, own=1), example(5, own=2)], CPU)
    assert ids.tolist() == [[10, 11, 12, 0, 0], [10, 11, 12, 13, 14]]
    assert attention.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert mask.tolist() == [[False, False, True, False, False], [False, False, False, True, True]]


class Scripted:
    """A model with fixed logits, whatever it is asked."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.logits)


def test_loss_is_the_mean_over_loss_tokens_of_what_came_before_them():
    logits = torch.zeros(1, 4, 16)
    logits[0, 1, 12] = 3.0  # predicts token 12, the third
    logits[0, 2, 13] = 1.0  # predicts token 13, the fourth
    logits[0, 0, 5] = 99.0  # predicts the second token wrongly: no loss there
    total, count = cross_entropy(Scripted(logits), [example(4, own=2)], CPU)
    expected = [math.log(math.exp(x) + 15) - x for x in (3.0, 1.0)]
    assert (float(total), int(count)) == (pytest.approx(sum(expected)), 2)


def test_loss_weighs_tokens_and_not_examples():
    logits = torch.zeros(2, 5, 16)
    logits[0, 1, 12] = 3.0
    total, count = cross_entropy(Scripted(logits), [example(3, own=1), example(5, own=3)], CPU)
    assert (float(total), int(count)) == (pytest.approx(math.log(math.exp(3.0) + 15) - 3.0 + 3 * math.log(16)), 4)


@pytest.mark.parametrize("position", range(5))
def test_only_predictions_of_loss_tokens_have_a_gradient(position: int):
    logits = torch.zeros(1, 5, 16, requires_grad=True)
    cross_entropy(Scripted(logits), [example(5, own=2)], CPU)[0].backward()
    assert logits.grad is not None
    assert bool(logits.grad[0, position].abs().sum() > 0) == (position in {2, 3})


def test_a_batch_without_loss_tokens_is_zero_and_not_nan():
    """A NaN here would reach every weight in one step."""
    logits = torch.zeros(1, 4, 16, requires_grad=True)
    total, count = cross_entropy(Scripted(logits), [example(4, own=0)], CPU)
    total.backward()
    assert (float(total.detach()), int(count)) == (0.0, 0)
    assert logits.grad is not None
    assert float(logits.grad.abs().sum()) == 0.0


# --- schedule -------------------------------------------------------------------------------------


def test_the_learning_rate_rises_then_falls_to_a_twentieth():
    rates = [warmup_cosine(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.05 + 0.95 / 2)
    assert 0.05 < rates[99] < 0.052


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_short_runs_have_a_usable_rate(num_steps: int):
    rates = [warmup_cosine(step, num_steps, SETTINGS.warmup_fraction) for step in range(num_steps)]
    assert rates[0] == 1.0
    assert all(0.0 < rate <= 1.0 for rate in rates)


@pytest.mark.parametrize(
    ("batches", "drills", "expected"),
    [("abc", "", "abc"), ("abc", "x", "xabc"), ("abc", "xy", "xaybc"), ("ab", "xyz", "xayb"), ("", "xyz", "")],
)
def test_a_drill_comes_before_each_of_the_first_batches(batches: str, drills: str, expected: str):
    marks = {mark: [example(2, first=ord(mark))] for mark in "abcxyz"}
    mixed = interleave([marks[mark] for mark in batches], [marks[mark] for mark in drills])
    assert mixed == [marks[mark] for mark in expected]


# --- training a real model ------------------------------------------------------------------------

DATA = [example(12, first=20 + 13 * index, own=6) for index in range(6)]


def train(tiny_dir: Path, examples: Any = DATA, plan: SftSettings = SETTINGS, **ranks: Any) -> list[dict[str, float]]:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    seen: list[dict[str, float]] = []
    train_sft(model, examples, plan, lambda step, metrics: seen.append({"step": step, **metrics}), **ranks)
    return seen


@pytest.mark.slow
def test_a_rank_with_few_loss_tokens_weighs_no_more_than_one_with_many(
    tiny_dir: Path, process_group: None, monkeypatch: pytest.MonkeyPatch
):
    """The other rank has 30 loss tokens with 90 nats: this rank's gradient is a share of the whole, times two ranks."""
    (alone,) = train(tiny_dir, DATA[:1])
    others = torch.tensor([90.0, 30.0], dtype=torch.float64)
    monkeypatch.setattr(sft, "summed", lambda values: values.double() + others)
    (shared,) = train(tiny_dir, DATA[:1], num_ranks=1)
    count = sum(DATA[0].loss_mask)
    assert shared["loss"] == pytest.approx((alone["loss"] * count + 90.0) / (count + 30.0))
    assert shared["grad_norm"] == pytest.approx(alone["grad_norm"] * count / (count + 30.0), rel=1e-5)


@pytest.mark.slow
def test_the_loss_falls_on_a_few_examples(tiny_dir: Path, process_group: None):
    seen = train(tiny_dir, plan=replace(SETTINGS, epochs=12))
    assert [progress["step"] for progress in seen] == list(range(1, len(seen) + 1))
    assert seen[-1]["loss"] < 0.3 * seen[0]["loss"]
    assert all(math.isfinite(progress["grad_norm"]) and progress["grad_norm"] > 0.0 for progress in seen)
    assert all(progress["num_steps"] == len(seen) for progress in seen)
    assert seen[0]["learning_rate"] == SETTINGS.learning_rate


@pytest.mark.slow
def test_equal_seeds_train_equally_and_drills_come_first(tiny_dir: Path, process_group: None):
    drills = [[example(5, first=200)], [example(5, first=210)]]
    one, two = train(tiny_dir, drills=drills), train(tiny_dir, drills=drills)
    assert [progress["loss"] for progress in one] == [progress["loss"] for progress in two]
    assert [progress["num_tokens"] for progress in one[:3:2]] == [5, 5]
    other = train(tiny_dir, plan=replace(SETTINGS, seed=4))
    assert [progress["loss"] for progress in other] != [progress["loss"] for progress in one]


@pytest.mark.slow
def test_ranks_take_the_same_number_of_batches(tiny_dir: Path, process_group: None):
    plan = replace(SETTINGS, batch_tokens=24)  # two examples a batch, three batches
    counts = [len(train(tiny_dir, plan=plan, rank=rank, num_ranks=2)) for rank in range(2)]
    assert counts == [1, 1]
    assert len(train(tiny_dir, plan=plan)) == 3


@pytest.mark.parametrize(("examples", "num_ranks"), [(DATA[:1], 2), ([], 1)])
def test_examples_that_fill_no_batch_are_refused_before_anything_starts(examples: list[Example], num_ranks: int):
    """Else the run would end at once and hand the untrained model on."""
    with pytest.raises(BadInputError, match=r"sft\.batch_tokens"):
        train_sft(torch.nn.Linear(1, 1), examples, SETTINGS, lambda step, metrics: None, num_ranks=num_ranks)
