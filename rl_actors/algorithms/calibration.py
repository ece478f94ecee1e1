"""Losses of the reward model, how far its probabilities can be believed, and how far its annotators agree."""

from __future__ import annotations

import math
from typing import Literal

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from rl_actors.algorithms.losses import require_one_of, zero_masked
from rl_actors.contracts import BadDataError, BadInputError

RatingScale = Literal["nominal", "ordinal", "interval"]

_TEMPERATURE_BOUNDS = (0.02, 50.0)


def bradley_terry_loss(margin_B: Tensor, preference_B: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of preferences under P(first preferred) = sigmoid(margin); 0 for none.

    A preference is the share of annotators for the first answer, 0.5 a tie (Bradley and Terry, 1952).

    Raises:
        BadDataError: a preference outside [0, 1].
    """
    _require_unit_interval("preference", preference_B)
    total = binary_cross_entropy_with_logits(margin_B, preference_B.to(margin_B), reduction="sum")
    return total / max(margin_B.numel(), 1)


def rubric_loss(predictions_BC: Tensor, labels_BC: Tensor) -> Tensor:
    """Return half the mean squared error over the labels that exist; a label that no annotator gave is NaN."""
    labels_BC = labels_BC.to(predictions_BC)
    has_label_BC = ~labels_BC.isnan()
    errors_BC = zero_masked(predictions_BC, has_label_BC) - zero_masked(labels_BC, has_label_BC)
    return (0.5 * errors_BC.square()).sum() / max(float(has_label_BC.sum()), 1.0)


def expected_calibration_error(prob_B: Tensor, label_B: Tensor, num_bins: int = 10) -> float:
    """Return mean |mean probability - mean label| over equal-width bins, weighted by count (arXiv 1706.04599 eq. 3).

    Raises:
        BadDataError: no data, or a probability or label outside [0, 1].
    """
    prob_B, label_B = _calibration_data(prob_B, label_B)
    # A probability of 1 belongs to the last bin.
    bin_B = (prob_B * num_bins).long().clamp(max=num_bins - 1)
    gap_bins = prob_B.new_zeros(num_bins).index_add(0, bin_B, prob_B - label_B)
    return float(gap_bins.abs().sum() / prob_B.numel())


def brier_score(prob_B: Tensor, label_B: Tensor) -> float:
    """Return the mean squared difference of probability and label, in [0, 1] (Brier, 1950).

    Raises:
        BadDataError: no data, or a probability or label outside [0, 1].
    """
    prob_B, label_B = _calibration_data(prob_B, label_B)
    return float((prob_B - label_B).square().mean())


def fit_temperature(margin_B: Tensor, label_B: Tensor) -> float:
    """Return T in [0.02, 50] that minimises the log loss of sigmoid(margin / T) (arXiv 1706.04599 section 4.2).

    Margins are score differences (logits). Fit on a split that is neither trained nor tested on. Order is untouched:
    accuracy cannot change.

    Raises:
        BadDataError: no data, a label outside [0, 1], or a non-finite margin.
    """
    if not bool(margin_B.isfinite().all()):
        raise BadDataError("margin", "non-finite", "the reward model diverged; a temperature cannot repair it")
    _, label_B = _calibration_data(torch.sigmoid(margin_B), label_B)
    margin_B = margin_B.detach().double()

    def log_loss(log_temperature: float) -> float:
        return float(binary_cross_entropy_with_logits(margin_B / math.exp(log_temperature), label_B))

    # The log loss is convex in 1 / T, so that a bounded search over log T finds the only minimum.
    low, high = _TEMPERATURE_BOUNDS
    found = minimize_scalar(log_loss, bounds=(math.log(low), math.log(high)), method="bounded", options={"xatol": 1e-6})
    return math.exp(float(found.x))


def krippendorff_alpha(ratings_AU: Tensor, *, scale: RatingScale) -> float | None:
    """Return Krippendorff's alpha, 1 - observed / expected disagreement (Krippendorff, "Content Analysis", chapter 12).

    1 is perfect agreement, 0 what chance gives, below 0 systematic disagreement. None when it is undefined: no unit
    with two ratings, or no variation at all. No data is inconclusive, never agreement.

    Args:
        ratings_AU: ratings `[annotators, units]`, NaN where missing.
        scale: `nominal` (equal or not), `ordinal` (ranks), `interval` (differences).

    Raises:
        BadInputError: unknown scale.
    """
    require_one_of("scale", scale, "nominal", "ordinal", "interval")
    ratings_AU = ratings_AU.detach().cpu().double()
    num_ratings_U = (~ratings_AU.isnan()).sum(0)
    ratings_AU = ratings_AU[:, num_ratings_U >= 2]
    levels_K = torch.unique(ratings_AU[~ratings_AU.isnan()])
    if levels_K.numel() < 2:
        return None
    counts_UK = (ratings_AU.unsqueeze(-1) == levels_K).double().sum(0)
    # Coincidences: ordered pairs of ratings of one unit, each unit weighted by the number of its ratings.
    weighted_UK = counts_UK / (counts_UK.sum(-1) - 1.0).unsqueeze(-1)
    coincidence_KK = weighted_UK.T @ counts_UK - torch.diag(weighted_UK.sum(0))
    totals_K = coincidence_KK.sum(-1)
    distance_KK = _distance(levels_K, totals_K, scale)
    observed = (coincidence_KK * distance_KK).sum()
    expected = (torch.outer(totals_K, totals_K) * distance_KK).sum() / (totals_K.sum() - 1.0)
    return float(1.0 - observed / expected)


def _distance(levels_K: Tensor, totals_K: Tensor, scale: RatingScale) -> Tensor:
    """Return the squared difference of every two levels under the scale."""
    if scale == "nominal":
        return 1.0 - torch.eye(len(levels_K), dtype=levels_K.dtype)
    # An ordinal step is as long as the number of ratings between the two levels, each end counted by half.
    position_K = levels_K if scale == "interval" else totals_K.cumsum(0) - totals_K / 2.0
    return (position_K.unsqueeze(0) - position_K.unsqueeze(1)).square()


def _calibration_data(prob_B: Tensor, label_B: Tensor) -> tuple[Tensor, Tensor]:
    if prob_B.shape != label_B.shape:
        remedy = f"must have the shape of the predictions, {tuple(prob_B.shape)}"
        raise BadInputError("label", tuple(label_B.shape), remedy)
    if prob_B.numel() == 0:
        raise BadDataError("pairs", 0, "calibration needs data; no data is inconclusive, never calibrated")
    _require_unit_interval("probability", prob_B)
    _require_unit_interval("label", label_B)
    return prob_B.detach().double(), label_B.detach().double()


def _require_unit_interval(field: str, x_B: Tensor) -> None:
    # Written as a positive claim, so that NaN fails it.
    is_inside_B = (x_B >= 0) & (x_B <= 1)
    if not bool(is_inside_B.all()):
        raise BadDataError(field, x_B[~is_inside_B][0].item(), "must lie in [0, 1]")
