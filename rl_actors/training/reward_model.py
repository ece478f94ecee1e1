"""Reward-model training: Bradley-Terry on preference pairs plus one regression per rubric criterion, then calibration.

Pairs and labels carry task ids; whoever calls this has already put calibration tasks apart.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rl_actors.algorithms import (
    bradley_terry_loss,
    brier_score,
    expected_calibration_error,
    fit_temperature,
    rubric_loss,
)
from rl_actors.contracts import BadDataError, Calibration
from rl_actors.learner import OptimizerSettings, accumulate_and_step, build_engine
from rl_actors.models import RewardModel, pad_sequences

NUM_BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """Two finished runs of one task; `preference` is the share of annotators who prefer the first, in [0, 1].

    `first_rubric` and `second_rubric` hold the mean label per criterion, scaled to 0..1.
    """

    task_id: str
    first: tuple[int, ...]
    second: tuple[int, ...]
    preference: float
    first_rubric: Mapping[str, float]
    second_rubric: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSettings:
    """What decides a reward-model run, besides the data."""

    epochs: int
    learning_rate: float
    batch_pairs: int
    seed: int
    max_grad_norm: float = 1.0
    rubric_weight: float = 0.5
    microbatch_tokens: int = 2048


def train_reward_model(
    model: RewardModel,
    pairs: Sequence[PreferencePair],
    settings: RewardSettings,
    report: Callable[[int, Mapping[str, float]], None],
    *,
    rank: int = 0,
    num_ranks: int = 1,
) -> None:
    """Train in place; each rank takes every `num_ranks`-th pair of a batch, and `report` gets every step, from 1."""
    optimizer = OptimizerSettings(learning_rate=settings.learning_rate, max_grad_norm=settings.max_grad_norm)
    engine = build_engine(model, optimizer)
    rng = random.Random(settings.seed)
    num_batches = max(1, len(pairs) // settings.batch_pairs)
    num_steps = settings.epochs * num_batches
    order: list[PreferencePair] = []
    for step in range(num_steps):
        # The rest of an epoch's order is left out: a smaller last batch would weigh its pairs more.
        if step % num_batches == 0:
            order = rng.sample(list(pairs), len(pairs))
        start = (step % num_batches) * settings.batch_pairs
        batch = order[start : start + settings.batch_pairs][rank::num_ranks]
        loss, accuracy = _step(engine, batch, model.criteria, settings)
        report(step + 1, {"num_steps": num_steps, "loss": loss, "pair_accuracy": accuracy})


def _step(
    engine: Any, batch: Sequence[PreferencePair], criteria: Sequence[str], settings: RewardSettings
) -> tuple[float, float]:
    """Take one optimizer step in microbatches of similar length; returns loss and pair accuracy of the whole batch."""
    losses, correct, num_decided = [], 0.0, 0

    def loss_of(part: Sequence[PreferencePair]) -> torch.Tensor:
        nonlocal correct, num_decided
        loss, accuracy = pair_loss(engine, part, criteria, settings.rubric_weight, engine.device)
        decided = sum(pair.preference != 0.5 for pair in part)
        correct, num_decided = correct + accuracy * decided, num_decided + decided
        losses.append(float(loss.detach()) * len(part) / len(batch))
        return loss * (len(part) / len(batch))  # both losses are means over pairs, and every pair has all its labels

    accumulate_and_step(engine, pair_microbatches(batch, settings.microbatch_tokens), loss_of)
    return sum(losses), correct / num_decided if num_decided else 0.5


def pair_microbatches(pairs: Sequence[PreferencePair], max_tokens: int) -> list[list[PreferencePair]]:
    """Group pairs of similar length so that a padded group holds at most `max_tokens` tokens, one pair at the least."""
    groups: list[list[PreferencePair]] = [[]]
    for pair in sorted(pairs, key=_pair_length):
        # Sorted: this pair is the longest so far, and all runs of the group are padded to it.
        if groups[-1] and 2 * (len(groups[-1]) + 1) * _pair_length(pair) > max_tokens:
            groups.append([])
        groups[-1].append(pair)
    return groups


def _pair_length(pair: PreferencePair) -> int:
    return max(len(pair.first), len(pair.second))


def pair_loss(
    model: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    batch: Sequence[PreferencePair],
    criteria: Sequence[str],
    rubric_weight: float,
    device: torch.device,
) -> tuple[torch.Tensor, float]:
    """Return the joint loss (scalar) and the share of pairs ranked as the annotators' majority does."""
    margin, rubric, targets = _score_pairs(model, batch, criteria, device)
    preference = torch.tensor([pair.preference for pair in batch], device=device)
    loss = bradley_terry_loss(margin, preference)
    loss = loss + rubric_weight * rubric_loss(rubric, targets)
    # A tie has no right order; where all are ties the mean would be NaN, and a half is what chance gives.
    decided = preference != 0.5
    accuracy = ((margin > 0) == (preference > 0.5))[decided].float().mean()
    return loss, float(accuracy) if bool(decided.any()) else 0.5


def _score_pairs(
    model: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    batch: Sequence[PreferencePair],
    criteria: Sequence[str],
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return margins [N] in logits, and rubric values and their labels [2 N, criteria], all first runs first."""
    # One pass over both runs: dropout and padding treat them alike.
    ids, attention = pad_sequences([pair.first for pair in batch] + [pair.second for pair in batch], device)
    scores, rubric = model(ids, attention)
    labels = [pair.first_rubric for pair in batch] + [pair.second_rubric for pair in batch]
    targets = torch.tensor([[row[name] for name in criteria] for row in labels], device=device)
    return scores[: len(batch)] - scores[len(batch) :], rubric, targets


@torch.no_grad()
def calibrate(model: RewardModel, pairs: Sequence[PreferencePair], *, batch_pairs: int = 64) -> Calibration:
    """Cross-fit: fit the temperature on one half, measure on the other, both ways; then fit on all and set it."""
    # By task id: pairs of one task on both sides would let the fit see what it is measured on.
    task_ids = sorted({pair.task_id for pair in pairs})
    first_half = set(task_ids[::2])
    halves = (
        [pair for pair in pairs if pair.task_id in first_half],
        [pair for pair in pairs if pair.task_id not in first_half],
    )
    measured = [_margins(model, half, batch_pairs) for half in halves]
    temperatures = [fit_temperature(margin, label) for margin, label, _ in measured]
    scaled = [m / t for (m, _, _), t in zip(measured, reversed(temperatures), strict=True)]
    probability, label = torch.sigmoid(torch.cat(scaled)), torch.cat([part[1] for part in measured])
    model.temperature = fit_temperature(torch.cat([part[0] for part in measured]), label)
    # Each pair once per direction: the order in which runs were shown carries no information.
    both, outcomes = torch.cat([probability, 1.0 - probability]), torch.cat([label, 1.0 - label])
    return Calibration(
        num_pairs=label.numel(),
        pair_accuracy=float(((probability > 0.5) == (label > 0.5)).float().mean()),
        ece=float(expected_calibration_error(both, outcomes, num_bins=NUM_BINS)),
        brier=float(brier_score(both, outcomes)),
        temperature=model.temperature,
        criterion_mae={name: (measured[0][2][name] + measured[1][2][name]) / 2.0 for name in model.criteria},
    )


def _margins(
    model: RewardModel, pairs: Sequence[PreferencePair], batch_pairs: int
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Return raw margins [N], majority labels [N] (ties dropped) and mean absolute error per criterion."""
    decided = [pair for pair in pairs if pair.preference != 0.5]
    if not decided:
        remedy = "calibration needs decided pairs of two tasks or more; add calibration pairs"
        raise BadDataError("reward.num_pairs", len(pairs), remedy)
    device = next(model.parameters()).device
    margins: list[torch.Tensor] = []
    errors: list[torch.Tensor] = []
    for start in range(0, len(decided), batch_pairs):
        batch = decided[start : start + batch_pairs]
        margin, rubric, targets = _score_pairs(model, batch, model.criteria, device)
        margins.append(margin)
        errors.append((rubric - targets).abs())
    label = torch.tensor([1.0 if pair.preference > 0.5 else 0.0 for pair in decided], device=device)
    mean_error = torch.cat(errors).mean(0).tolist()
    return torch.cat(margins), label, dict(zip(model.criteria, mean_error, strict=True))
