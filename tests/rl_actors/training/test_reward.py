"""Reward-model training: it learns the annotators' order, and calibration says how far to believe it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from rl_actors.contracts.errors import BadDataError
from rl_actors.models.reward_model import RewardModel, pad_sequences
from rl_actors.training.reward_model import (
    PreferencePair,
    RewardSettings,
    calibrate,
    pair_loss,
    train_reward_model,
)

torch.set_num_threads(1)
CPU = torch.device("cpu")
CRITERIA = ("correct", "polite")
SETTINGS = RewardSettings(epochs=10, learning_rate=5e-3, batch_pairs=8, seed=2)
GOOD_WORD, BAD_WORD = 60, 61


def pair(
    index: int, preference: float, *, first: tuple[int, ...] = (5, GOOD_WORD), second: tuple[int, ...] = (5, BAD_WORD)
) -> PreferencePair:
    return PreferencePair(
        task_id=f"task/{index}",
        first=first,
        second=second,
        preference=preference,
        first_rubric={"correct": preference, "polite": 0.5},
        second_rubric={"correct": 1.0 - preference, "polite": 0.5},
    )


def learnable_pairs(count: int, seed: int) -> list[PreferencePair]:
    """Runs that hold a good word are preferred; half of the time they are shown second."""
    rng = random.Random(seed)
    pairs = []
    for index in range(count):
        body = [rng.randrange(100, 300) for _ in range(rng.randint(3, 9))]
        good, bad = (1, *body, GOOD_WORD, 9), (1, *body, BAD_WORD, 9)
        shown_first = rng.random() < 0.5
        one = pair(index, 1.0, first=good, second=bad) if shown_first else pair(index, 0.0, first=bad, second=good)
        pairs.append(one)
    return pairs


def swapped(pairs: list[PreferencePair]) -> list[PreferencePair]:
    return [replace(one, preference=1.0 - one.preference) for one in pairs]


def last_word(table: dict[int, float]) -> Any:
    """A scorer that reads one token before the last from a table; rubric is always (0.5, 0.5)."""

    def model(ids: torch.Tensor, attention: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        last = attention.sum(1) - 1
        scores = torch.tensor([table[int(row[at])] for row, at in zip(ids, last, strict=True)])
        return scores, torch.full((len(ids), 2), 0.5)

    return model


# --- the loss -------------------------------------------------------------------------------------


def test_sequences_are_padded_on_the_right():
    ids, attention = pad_sequences([(1, 2, 3), (4,)], CPU)
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert attention.tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(("preference", "margin"), [(1.0, 2.0), (0.0, -2.0), (0.25, 0.5)])
def test_the_loss_by_hand(preference: float, margin: float):
    model = last_word({GOOD_WORD: margin, BAD_WORD: 0.0})
    loss, _ = pair_loss(model, [pair(0, preference)], CRITERIA, 0.0, CPU)
    chance = 1.0 / (1.0 + math.exp(-margin))
    expected = -(preference * math.log(chance) + (1 - preference) * math.log(1 - chance))
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_the_rubric_adds_half_its_mean_squared_error_times_its_weight():
    model = last_word({GOOD_WORD: 1.0, BAD_WORD: 0.0})
    plain, _ = pair_loss(model, [pair(0, 1.0)], CRITERIA, 0.0, CPU)
    weighted, _ = pair_loss(model, [pair(0, 1.0)], CRITERIA, 0.5, CPU)
    # correct: 1 and 0 against 0.5, polite: exactly right; half squared error over four labels
    assert float(weighted - plain) == pytest.approx(0.5 * (0.5 * 0.25 * 2) / 4, rel=1e-5)


@pytest.mark.parametrize(
    ("preferences", "accuracy"), [([1.0, 1.0], 1.0), ([1.0, 0.0], 0.5), ([0.1], 0.0), ([0.5], 0.5), ([0.5, 0.9], 1.0)]
)
def test_accuracy_counts_decided_pairs_only(preferences: list[float], accuracy: float):
    model = last_word({GOOD_WORD: 1.0, BAD_WORD: 0.0})
    _, found = pair_loss(model, [pair(i, p) for i, p in enumerate(preferences)], CRITERIA, 0.0, CPU)
    assert found == accuracy


# --- training -------------------------------------------------------------------------------------


def steps_into(seen: list[dict[str, float]]) -> Callable[[int, Mapping[str, float]], None]:
    """Keeps every step's metrics, with its number."""
    return lambda step, metrics: seen.append({"step": step, **metrics})


def reward_model(tiny_dir: Path) -> RewardModel:
    backbone: Any = AutoModel.from_pretrained(tiny_dir, dtype=torch.float32)
    return RewardModel(backbone, CRITERIA)


@pytest.fixture(scope="module")
def trained(tiny_dir: Path, process_group: None) -> tuple[RewardModel, list[dict[str, float]]]:
    """One reward model, trained on 48 pairs."""
    torch.manual_seed(0)
    model, seen = reward_model(tiny_dir), []
    train_reward_model(model, learnable_pairs(48, seed=1), SETTINGS, steps_into(seen))
    return model.eval(), seen


@pytest.mark.slow
def test_the_loss_falls(trained: tuple[RewardModel, list[dict[str, float]]]):
    _, seen = trained
    assert [progress["step"] for progress in seen] == list(range(1, 61))
    assert {progress["num_steps"] for progress in seen} == {60}
    assert seen[0]["loss"] == pytest.approx(math.log(2) + 0.5 * 0.5 * (1.0 + 0.25 + 0.0 + 0.25) / 4, rel=0.02)
    assert seen[-1]["loss"] < 0.5 * seen[0]["loss"]
    assert seen[-1]["pair_accuracy"] > 0.9


@pytest.mark.slow
def test_it_ranks_pairs_it_never_saw_and_is_calibrated_on_them(trained: tuple[RewardModel, list[dict[str, float]]]):
    model, _ = trained
    calibration = calibrate(model, learnable_pairs(40, seed=9))
    assert calibration.num_pairs == 40
    assert calibration.pair_accuracy > 0.9
    assert calibration.ece < 0.2
    assert calibration.brier < 0.15
    assert set(calibration.criterion_mae) == set(CRITERIA)


@pytest.mark.slow
def test_against_swapped_labels_it_is_worse_than_chance(trained: tuple[RewardModel, list[dict[str, float]]]):
    """Negative control: the same model against the opposite truth."""
    model, _ = trained
    calibration = calibrate(model, swapped(learnable_pairs(40, seed=9)))
    assert calibration.pair_accuracy < 0.5
    assert calibration.brier > 0.2


@pytest.mark.slow
def test_training_on_swapped_labels_ranks_the_other_way(tiny_dir: Path, process_group: None):
    model = reward_model(tiny_dir)
    train_reward_model(
        model, swapped(learnable_pairs(48, seed=1)), replace(SETTINGS, epochs=5), lambda step, metrics: None
    )
    assert calibrate(model.eval(), learnable_pairs(40, seed=9)).pair_accuracy < 0.5


@pytest.mark.slow
def test_the_temperature_travels_with_the_model(trained: tuple[RewardModel, list[dict[str, float]]], tmp_path: Path):
    model, _ = trained
    calibration = calibrate(model, learnable_pairs(40, seed=9))
    model.save(tmp_path)
    assert RewardModel.load(tmp_path).temperature == model.temperature == calibration.temperature
    assert calibration.temperature != 1.0


@pytest.mark.slow
def test_ranks_share_a_batch(tiny_dir: Path, process_group: None):
    plan = replace(SETTINGS, epochs=1, batch_pairs=4)
    counts = []
    for rank in range(2):
        seen: list[dict[str, float]] = []
        train_reward_model(
            reward_model(tiny_dir), learnable_pairs(8, seed=1), plan, steps_into(seen), rank=rank, num_ranks=2
        )
        counts.append(len(seen))
    assert counts == [2, 2]


# --- calibration ----------------------------------------------------------------------------------


class Marks(RewardModel):
    """Scores a run by its last token, from a table; enough for `calibrate`."""

    def __init__(self, table: dict[int, float]) -> None:
        torch.nn.Module.__init__(self)
        self.one = torch.nn.Parameter(torch.zeros(1))
        self.criteria, self.temperature = CRITERIA, 1.0
        self._model = last_word(table)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._model(input_ids, attention_mask)


def test_calibration_splits_by_task_and_never_measures_where_it_fits():
    """Even tasks are always right, odd ones always wrong, and each half is measured with the other's temperature.

    Even: cooled to 0.505 by the wrong half, so 0.495 off. Odd: heated to 1 by the right half, so 1 off. Fitted on
    themselves the even ones would be 0 off.
    """
    pairs = [pair(index, 1.0 if index % 2 == 0 else 0.0) for index in range(10) for _ in range(2)]
    calibration = calibrate(Marks({GOOD_WORD: 1.0, BAD_WORD: 0.0}), pairs)
    assert calibration.num_pairs == 20
    assert calibration.pair_accuracy == 0.5
    assert calibration.ece == pytest.approx((0.495 + 1.0) / 2.0, abs=0.01)


def test_the_two_runs_of_a_task_stay_on_one_side():
    pairs = [pair(index, 1.0) for index in range(2) for _ in range(5)]
    assert calibrate(Marks({GOOD_WORD: 1.0, BAD_WORD: 0.0}), pairs).num_pairs == 10


def test_a_model_that_is_too_sure_is_cooled_down():
    """Right on 8 of 10 in both halves with a margin of 20: the temperature must bring 20 down to logit(0.8)."""
    pairs = [pair(task * 2 + half, 1.0 if task < 8 else 0.0) for task in range(10) for half in range(2)]
    pairs = [replace(one, task_id=f"{int(one.task_id[5:]):02d}") for one in pairs]
    model = Marks({GOOD_WORD: 20.0, BAD_WORD: 0.0})
    calibration = calibrate(model, pairs)
    assert model.temperature == calibration.temperature == pytest.approx(20.0 / math.log(4.0), rel=0.01)
    assert calibration.pair_accuracy == pytest.approx(0.8)
    assert calibration.ece == pytest.approx(0.0, abs=0.01)
    assert calibration.brier == pytest.approx(0.16, abs=0.01)


def test_the_criterion_error_is_the_mean_over_both_runs():
    pairs = [pair(index, 1.0) for index in range(4)]
    calibration = calibrate(Marks({GOOD_WORD: 1.0, BAD_WORD: 0.0}), pairs)
    assert calibration.criterion_mae == {"correct": pytest.approx(0.5), "polite": pytest.approx(0.0)}


@pytest.mark.parametrize(
    "pairs",
    [[], [pair(0, 1.0)] * 6, [pair(index, 0.5) for index in range(6)], [pair(0, 1.0), pair(1, 0.5)]],
    ids=["none", "one task", "only ties", "ties in one half"],
)
def test_no_data_is_an_error_and_never_a_calibration(pairs: list[PreferencePair]):
    with pytest.raises(BadDataError, match="decided pairs of two tasks"):
        calibrate(Marks({GOOD_WORD: 1.0, BAD_WORD: 0.0}), pairs)
