"""Losses of the reward model, how far its probabilities can be believed, and how far its annotators agree."""

from __future__ import annotations

import math
from typing import Literal

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from rl_actors.algorithms.losses import LossOutput, to_floats, zero_masked
from rl_actors.contracts import BadDataError, BadInputError, require_choice

RubricKind = Literal["ordinal", "regression"]
RatingScale = Literal["nominal", "ordinal", "interval"]

_TEMPERATURE_BOUNDS = (0.02, 50.0)


def bradley_terry_loss(margin_B: Tensor, preference_B: Tensor, *, num_pairs: float | None = None) -> LossOutput:
    """Negative log-likelihood of preferences under P(first preferred) = sigmoid(margin) (Bradley and Terry, 1952).

    Args:
        margin_B: score of the first answer minus score of the second.
        preference_B: share of annotators who preferred the first, in [0, 1]; 0.5 is a tie.
        num_pairs: pairs of the whole global batch, which makes parts additive; None takes this call's own.

    Raises:
        BadDataError: a preference outside [0, 1].
    """
    _require_unit_interval("preference", preference_B)
    count = max(float(margin_B.numel() if num_pairs is None else num_pairs), 1.0)
    targets_B = preference_B.to(margin_B)
    loss = binary_cross_entropy_with_logits(margin_B, targets_B, reduction="sum") / count
    # A tie has no right order: it counts as half right, as does a margin of exactly 0.
    agreement_B = 0.5 * (1.0 + torch.sign(margin_B.detach()) * torch.sign(targets_B - 0.5))
    return LossOutput(loss, to_floats({"pair_accuracy": agreement_B.sum() / count}))


def rubric_loss(
    predictions: Tensor,
    labels_BC: Tensor,
    *,
    kind: RubricKind,
    mask_BC: Tensor | None = None,
    num_labels: float | None = None,
) -> LossOutput:
    """Loss of one rubric head per criterion over the labels that exist.

    `regression`: predictions `[B, C]`, half squared error. `ordinal`: predictions `[B, C, K - 1]` are the logits of
    "level > k" for labels 0..K-1, cross-entropy summed over thresholds (cumulative links; CORAL, arXiv 1901.07884).
    The metric `rubric_mae` is in label units; an ordinal head's level is its expected one.

    Args:
        predictions: see above.
        labels_BC: labels; NaN where an annotator gave none.
        kind: how a criterion is scaled.
        mask_BC: True on labels to use; None takes all that are not NaN.
        num_labels: labels of the whole global batch, which makes parts additive; None takes this call's own.

    Raises:
        BadInputError: unknown kind.
        BadDataError: an ordinal label that is not a level of the head.
    """
    require_choice("kind", kind, RubricKind)
    labels_BC = labels_BC.to(predictions)
    has_label_BC = ~labels_BC.isnan() if mask_BC is None else mask_BC & ~labels_BC.isnan()
    labels_BC = zero_masked(labels_BC, has_label_BC)
    if kind == "ordinal":
        losses_BC, levels_BC = _ordinal_terms(predictions, labels_BC, has_label_BC)
    else:
        levels_BC = zero_masked(predictions, has_label_BC)
        losses_BC = 0.5 * (levels_BC - labels_BC).square()
    count = max(float(has_label_BC.sum() if num_labels is None else num_labels), 1.0)
    mae = (levels_BC.detach() - labels_BC).abs().sum() / count
    return LossOutput(losses_BC.sum() / count, to_floats({"rubric_mae": mae}))


def expected_calibration_error(prob_B: Tensor, label_B: Tensor, num_bins: int = 10) -> float:
    """Mean |mean probability - mean label| over equal-width bins, weighted by count (arXiv 1706.04599 eq. 3).

    Args:
        prob_B: predicted probabilities in [0, 1].
        label_B: outcomes in [0, 1].
        num_bins: bins over [0, 1]; a probability of 1 belongs to the last.

    Raises:
        BadDataError: no data, or a value outside [0, 1].
    """
    prob_B, label_B = _calibration_data(prob_B, label_B)
    bin_B = (prob_B * num_bins).long().clamp(max=num_bins - 1)
    gap_bins = prob_B.new_zeros(num_bins).index_add(0, bin_B, prob_B - label_B)
    return float(gap_bins.abs().sum() / prob_B.numel())


def brier_score(prob_B: Tensor, label_B: Tensor) -> float:
    """Mean squared difference of probability and outcome, in [0, 1] (Brier, 1950).

    Raises:
        BadDataError: no data, or a value outside [0, 1].
    """
    prob_B, label_B = _calibration_data(prob_B, label_B)
    return float((prob_B - label_B).square().mean())


def fit_temperature(margin_B: Tensor, label_B: Tensor) -> float:
    """Temperature T that minimises the log loss of sigmoid(margin / T), in [0.02, 50] (arXiv 1706.04599 section 4.2).

    The log loss is convex in 1 / T, so the bounded search over log T finds the only minimum. Fit on a split that is
    neither trained nor tested on. Order is untouched: accuracy cannot change.

    Args:
        margin_B: score differences (logits).
        label_B: outcomes in [0, 1].

    Raises:
        BadDataError: no data, a label outside [0, 1], or a non-finite margin.
    """
    if not bool(margin_B.isfinite().all()):
        raise BadDataError("margin", "non-finite", "the reward model diverged; a temperature cannot repair it")
    _, label_B = _calibration_data(torch.sigmoid(margin_B), label_B)
    margin_B = margin_B.detach().double()

    def log_loss(log_temperature: float) -> float:
        return float(binary_cross_entropy_with_logits(margin_B / math.exp(log_temperature), label_B))

    low, high = _TEMPERATURE_BOUNDS
    found = minimize_scalar(log_loss, bounds=(math.log(low), math.log(high)), method="bounded", options={"xatol": 1e-6})
    return math.exp(float(found.x))


def krippendorff_alpha(ratings_AU: Tensor, *, scale: RatingScale) -> float | None:
    """Krippendorff's alpha, 1 - observed / expected disagreement (Krippendorff, "Content Analysis", chapter 12).

    1 is perfect agreement, 0 what chance gives, below 0 systematic disagreement. None when it is undefined: no unit
    with two ratings, or no variation at all. No data is inconclusive, never agreement.

    Args:
        ratings_AU: ratings `[annotators, units]`, NaN where missing.
        scale: `nominal` (equal or not), `ordinal` (ranks), `interval` (differences).

    Raises:
        BadInputError: unknown scale.
    """
    require_choice("scale", scale, RatingScale)
    ratings_AU = ratings_AU.detach().cpu().double()
    num_ratings_U = (~ratings_AU.isnan()).sum(0)
    ratings_AU = ratings_AU[:, num_ratings_U >= 2]
    levels_K = torch.unique(ratings_AU[~ratings_AU.isnan()])
    if levels_K.numel() < 2:
        return None
    counts_UK = (ratings_AU.unsqueeze(-1) == levels_K).double().sum(0)
    pairs_per_rating_U = counts_UK.sum(-1) - 1.0
    # Coincidences: ordered pairs of ratings of one unit, each unit weighted by the number of its ratings.
    coincidence_KK = (counts_UK / pairs_per_rating_U.unsqueeze(-1)).T @ counts_UK
    coincidence_KK -= torch.diag((counts_UK / pairs_per_rating_U.unsqueeze(-1)).sum(0))
    totals_K = coincidence_KK.sum(-1)
    distance_KK = _distance(levels_K, totals_K, scale)
    observed = (coincidence_KK * distance_KK).sum()
    expected = (torch.outer(totals_K, totals_K) * distance_KK).sum() / (totals_K.sum() - 1.0)
    return float(1.0 - observed / expected)


def _distance(levels_K: Tensor, totals_K: Tensor, scale: RatingScale) -> Tensor:
    """Squared difference of every two levels under the scale."""
    if scale == "nominal":
        return 1.0 - torch.eye(len(levels_K), dtype=levels_K.dtype)
    # An ordinal step is as long as the number of ratings between the two levels, each end counted by half.
    position_K = levels_K if scale == "interval" else totals_K.cumsum(0) - totals_K / 2.0
    return (position_K.unsqueeze(0) - position_K.unsqueeze(1)).square()


def _ordinal_terms(logits_BCK: Tensor, labels_BC: Tensor, has_label_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over thresholds, and the expected level; both 0 without a label."""
    num_thresholds = logits_BCK.shape[-1]
    is_level_BC = (labels_BC == labels_BC.round()) & (labels_BC >= 0) & (labels_BC <= num_thresholds)
    if not bool(is_level_BC.all()):
        raise BadDataError("labels", labels_BC[~is_level_BC][0].item(), f"use whole levels 0..{num_thresholds}")
    thresholds_K = torch.arange(num_thresholds, device=logits_BCK.device)
    is_above_BCK = (labels_BC.unsqueeze(-1) > thresholds_K).to(logits_BCK)
    safe_BCK = zero_masked(logits_BCK, has_label_BC.unsqueeze(-1))
    terms_BC = binary_cross_entropy_with_logits(safe_BCK, is_above_BCK, reduction="none").sum(-1)
    return zero_masked(terms_BC, has_label_BC), zero_masked(torch.sigmoid(safe_BCK).sum(-1), has_label_BC)


def _calibration_data(prob_B: Tensor, label_B: Tensor) -> tuple[Tensor, Tensor]:
    if prob_B.shape != label_B.shape:
        raise BadInputError(
            "label", tuple(label_B.shape), f"must have the shape of the predictions, {tuple(prob_B.shape)}"
        )
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
