"""Reward-model losses and calibration at hand-computed points, and alpha against published data."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rl_actors.algorithms.calibration import (
    RatingScale,
    bradley_terry_loss,
    brier_score,
    expected_calibration_error,
    fit_temperature,
    krippendorff_alpha,
    rubric_loss,
)
from rl_actors.contracts.errors import BadDataError, BadInputError

torch.set_num_threads(1)
quick = settings(deadline=None, max_examples=30)
NAN = math.nan
# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section D: four observers, twelve units.
PUBLISHED = torch.tensor(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
        [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
    ]
)


def test_bradley_terry_by_hand() -> None:
    loss = bradley_terry_loss(torch.tensor([0.0, 2.0, -1.0]), torch.tensor([1.0, 1.0, 0.0]))
    expected = (math.log(2) + math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 3
    assert loss.item() == pytest.approx(expected)


def test_bradley_terry_of_a_tie_is_least_at_margin_zero() -> None:
    margin = torch.tensor([0.7], requires_grad=True)
    bradley_terry_loss(margin, torch.tensor([0.5])).backward()
    assert margin.grad is not None
    assert margin.grad.item() == pytest.approx(1 / (1 + math.exp(-0.7)) - 0.5)


@quick
@given(seed=st.integers(0, 1000), cut=st.integers(0, 8))
def test_bradley_terry_parts_add_up_by_their_size_and_order_is_symmetric(seed: int, cut: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    margin = torch.randn(8, generator=generator, dtype=torch.float64)
    preference = torch.rand(8, generator=generator, dtype=torch.float64)
    whole = bradley_terry_loss(margin, preference)
    first, second = (bradley_terry_loss(margin[s], preference[s]) for s in (slice(cut), slice(cut, None)))
    torch.testing.assert_close(first * (cut / 8) + second * (1 - cut / 8), whole)
    torch.testing.assert_close(bradley_terry_loss(-margin, 1 - preference), whole)
    # Negative control: swapping the answers without swapping the preference is not the same loss.
    assert not torch.allclose(bradley_terry_loss(-margin, preference), whole)


def test_bradley_terry_is_finite_at_extreme_margins_and_zero_without_pairs() -> None:
    assert bradley_terry_loss(torch.tensor([-1e4]), torch.tensor([1.0])).item() == pytest.approx(1e4)
    assert bradley_terry_loss(torch.zeros(0), torch.zeros(0)).item() == 0.0


@pytest.mark.parametrize("bad", [-0.1, 1.1, NAN])
def test_a_preference_outside_the_unit_interval_is_refused(bad: float) -> None:
    with pytest.raises(BadDataError, match="preference"):
        bradley_terry_loss(torch.zeros(2), torch.tensor([0.5, bad]))


def test_rubric_regression_by_hand_ignores_missing_labels() -> None:
    predictions = torch.tensor([[1.0, NAN], [3.0, 2.0]], requires_grad=True)
    labels = torch.tensor([[0.0, NAN], [3.0, 4.0]])
    loss = rubric_loss(predictions, labels)
    loss.backward()
    assert loss.item() == pytest.approx((0.5 + 0 + 2) / 3)
    assert predictions.grad is not None
    torch.testing.assert_close(predictions.grad, torch.tensor([[1.0, 0.0], [0.0, -2.0]]) / 3)


def test_rubric_without_any_label_is_silent() -> None:
    predictions = torch.tensor([[5.0, 1.0]], requires_grad=True)
    nothing = rubric_loss(predictions, torch.full((1, 2), NAN))
    nothing.backward()
    assert nothing.item() == 0.0
    assert predictions.grad is not None
    assert predictions.grad.tolist() == [[0.0, 0.0]]


def test_ece_and_brier_by_hand() -> None:
    prob, label = torch.tensor([0.1, 0.3, 0.9, 1.0]), torch.tensor([0.0, 1.0, 1.0, 1.0])
    # Two bins: |0.4 - 1| / 4 and |1.9 - 2| / 4.
    assert expected_calibration_error(prob, label, num_bins=2) == pytest.approx((0.6 + 0.1) / 4)
    assert brier_score(prob, label) == pytest.approx((0.01 + 0.49 + 0.01 + 0) / 4)


def calibrated_data(temperature: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Margins whose true probability is sigmoid(margin / temperature)."""
    generator = torch.Generator().manual_seed(seed)
    margin = 3 * torch.randn(20_000, generator=generator)
    return margin, (torch.rand(20_000, generator=generator) < torch.sigmoid(margin / temperature)).float()


def test_ece_of_calibrated_probabilities_is_small_and_of_others_is_not() -> None:
    margin, label = calibrated_data(1.0)
    assert expected_calibration_error(torch.sigmoid(margin), label) < 0.02
    assert expected_calibration_error(torch.sigmoid(5 * margin), label) > 0.05


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_fit_temperature_recovers_the_truth_and_repairs_calibration(temperature: float) -> None:
    margin, label = calibrated_data(temperature)
    fitted = fit_temperature(margin, label)
    assert fitted == pytest.approx(temperature, rel=0.05)
    assert expected_calibration_error(torch.sigmoid(margin / fitted), label) < 0.02


def test_fit_temperature_is_the_minimum() -> None:
    margin, label = calibrated_data(2.0)
    fitted = fit_temperature(margin, label)

    def log_loss(value: float) -> float:
        return bradley_terry_loss(margin.double() / value, label).item()

    assert log_loss(fitted) <= min(log_loss(fitted * 1.01), log_loss(fitted / 1.01))


def test_fit_temperature_is_bounded_on_separable_and_on_reversed_data() -> None:
    margin = torch.tensor([1.0, 2.0, -1.0])
    assert fit_temperature(margin, (margin > 0).float()) == pytest.approx(0.02, rel=0.1)
    assert fit_temperature(margin, (margin < 0).float()) == pytest.approx(50.0, rel=0.01)


@pytest.mark.parametrize(
    "call",
    [
        lambda: expected_calibration_error(torch.zeros(0), torch.zeros(0)),
        lambda: brier_score(torch.zeros(0), torch.zeros(0)),
        lambda: fit_temperature(torch.zeros(0), torch.zeros(0)),
    ],
)
def test_no_data_is_refused_not_calibrated(call: object) -> None:
    with pytest.raises(BadDataError, match="inconclusive"):
        call()  # pyright: ignore[reportCallIssue]


def test_bad_calibration_data_is_refused() -> None:
    with pytest.raises(BadDataError, match="probability"):
        brier_score(torch.tensor([NAN]), torch.tensor([1.0]))
    with pytest.raises(BadDataError, match="label"):
        brier_score(torch.tensor([0.5]), torch.tensor([2.0]))
    with pytest.raises(BadInputError, match="shape"):
        brier_score(torch.zeros(2), torch.zeros(3))
    with pytest.raises(BadDataError, match="diverged"):
        fit_temperature(torch.tensor([math.inf]), torch.tensor([1.0]))


@pytest.mark.parametrize(("scale", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_the_published_example(scale: RatingScale, alpha: float) -> None:
    assert krippendorff_alpha(PUBLISHED, scale=scale) == pytest.approx(alpha, abs=6e-4)


@pytest.mark.parametrize("scale", ["nominal", "ordinal", "interval"])
def test_alpha_of_perfect_and_of_random_agreement(scale: RatingScale) -> None:
    ratings = torch.randint(0, 4, (3, 3000), generator=torch.Generator().manual_seed(0)).double()
    assert krippendorff_alpha(ratings[:1].repeat(3, 1), scale=scale) == pytest.approx(1.0)
    assert krippendorff_alpha(ratings, scale=scale) == pytest.approx(0.0, abs=0.03)


def test_alpha_of_opposed_annotators_is_negative() -> None:
    alpha = krippendorff_alpha(torch.tensor([[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]]), scale="interval")
    assert alpha is not None
    assert alpha < -0.5


@quick
@given(seed=st.integers(0, 1000))
def test_ordinal_alpha_depends_on_order_alone_and_interval_alpha_does_not(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ratings = torch.randint(1, 5, (3, 12), generator=generator).double()
    ordinal = krippendorff_alpha(ratings, scale="ordinal")
    assert krippendorff_alpha(ratings.exp(), scale="ordinal") == pytest.approx(ordinal)
    assert krippendorff_alpha(3 * ratings - 7, scale="interval") == pytest.approx(
        krippendorff_alpha(ratings, scale="interval")
    )


def test_control_interval_alpha_sees_a_stretched_scale() -> None:
    stretched = krippendorff_alpha(PUBLISHED.exp(), scale="interval")
    assert stretched != pytest.approx(krippendorff_alpha(PUBLISHED, scale="interval"), abs=0.01)


@pytest.mark.parametrize(
    "ratings", [torch.full((3, 4), 2.0), torch.full((3, 4), NAN), torch.tensor([[1.0, NAN], [NAN, 2.0]])]
)
def test_alpha_without_evidence_is_undefined(ratings: Tensor) -> None:
    assert krippendorff_alpha(ratings, scale="ordinal") is None
