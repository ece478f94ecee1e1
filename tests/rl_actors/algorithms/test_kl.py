"""KL: unbiased values and the true gradient, both by exact enumeration of a small vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rl_actors.algorithms.kl import AdaptiveKLController, kl_estimate, kl_loss
from rl_actors.contracts.errors import BadInputError
from rl_actors.contracts.recipe import KLKind

torch.set_num_threads(1)
quick = settings(deadline=None, max_examples=40)
KINDS: list[KLKind] = ["k1", "k2", "k3"]
VOCABULARY = 5


def two_policies(seed: int) -> tuple[Tensor, Tensor]:
    """Logits of a policy (a leaf with gradient) and log-probabilities of a reference, float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64).requires_grad_()
    ref = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64).log_softmax(-1)
    return logits, ref


def exact_kl(logits: Tensor, ref: Tensor) -> Tensor:
    logps = logits.log_softmax(-1)
    return (logps.exp() * (logps - ref)).sum()


def expected_gradient(per_token: Tensor, sampler: Tensor, logits: Tensor) -> Tensor:
    """Gradient of E_sampler[loss of the token] with the sampler held fixed: what training on samples averages to."""
    (gradient,) = torch.autograd.grad((sampler.detach() * per_token).sum(), logits)
    return gradient


def losses_by_token(logits: Tensor, ref: Tensor, kind: KLKind, old: Tensor | None = None) -> Tensor:
    """`kl_loss` of every single-token sample of the vocabulary."""
    logps, is_loss_token = logits.log_softmax(-1), torch.tensor([[True]])
    return torch.stack(
        [
            kl_loss(
                logps[token].view(1, 1),
                ref[token].view(1, 1),
                is_loss_token,
                kind=kind,
                old_logprobs_BT=None if old is None else old[token].view(1, 1),
            ).loss
            for token in range(VOCABULARY)
        ]
    )


@quick
@given(seed=st.integers(0, 100_000), kind=st.sampled_from(["k1", "k3"]))
def test_k1_and_k3_are_unbiased(seed: int, kind: KLKind) -> None:
    logits, ref = two_policies(seed)
    logps = logits.detach().log_softmax(-1)
    estimate = (logps.exp() * kl_estimate(logps, ref, kind=kind)).sum()
    torch.testing.assert_close(estimate, exact_kl(logits, ref).detach())


def test_control_k2_is_biased_as_a_value() -> None:
    logits, ref = two_policies(0)
    logps = logits.detach().log_softmax(-1)
    estimate = (logps.exp() * kl_estimate(logps, ref, kind="k2")).sum()
    assert not torch.allclose(estimate, exact_kl(logits, ref).detach(), rtol=1e-2)


@quick
@given(seed=st.integers(0, 100_000))
def test_k2_and_k3_are_never_negative_and_zero_at_equality(seed: int) -> None:
    logits, ref = two_policies(seed)
    for kind in ("k2", "k3"):
        assert bool((kl_estimate(logits.detach().log_softmax(-1), ref, kind=kind) >= 0).all())
    for kind in KINDS:
        assert bool((kl_estimate(ref, ref, kind=kind) == 0).all())


def test_estimates_by_hand() -> None:
    logps, ref = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]])
    diff = math.log(2.0)
    assert kl_estimate(logps, ref, kind="k1").item() == pytest.approx(diff)
    assert kl_estimate(logps, ref, kind="k2").item() == pytest.approx(diff**2 / 2)
    assert kl_estimate(logps, ref, kind="k3").item() == pytest.approx(0.5 - 1 + diff)


def test_k3_stays_finite_where_the_policy_excludes_a_reference_token() -> None:
    assert bool(kl_estimate(torch.tensor([[-1e4]]), torch.tensor([[-1.0]]), kind="k3").isfinite().all())


@quick
@given(seed=st.integers(0, 100_000), kind=st.sampled_from(KINDS))
def test_kl_loss_gradient_is_the_true_gradient(seed: int, kind: KLKind) -> None:
    logits, ref = two_policies(seed)
    (true_gradient,) = torch.autograd.grad(exact_kl(logits, ref), logits)
    probabilities = logits.detach().softmax(-1)
    gradient = expected_gradient(losses_by_token(logits, ref, kind), probabilities, logits)
    torch.testing.assert_close(gradient, true_gradient)


@quick
@given(seed=st.integers(0, 100_000), kind=st.sampled_from(KINDS))
def test_kl_loss_gradient_is_true_off_policy_too(seed: int, kind: KLKind) -> None:
    logits, ref = two_policies(seed)
    old = two_policies(seed + 1)[0].detach().log_softmax(-1)
    (true_gradient,) = torch.autograd.grad(exact_kl(logits, ref), logits)
    losses = losses_by_token(logits, ref, kind, old=old)
    torch.testing.assert_close(expected_gradient(losses, old.exp(), logits), true_gradient)
    if kind != "k2":
        torch.testing.assert_close((old.exp() * losses).sum(), exact_kl(logits, ref))


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_control_differentiating_the_estimate_gives_a_wrong_gradient(kind: KLKind) -> None:
    logits, ref = two_policies(7)
    (true_gradient,) = torch.autograd.grad(exact_kl(logits, ref), logits)
    naive = kl_estimate(logits.log_softmax(-1), ref, kind=kind)
    gradient = expected_gradient(naive, logits.detach().softmax(-1), logits)
    assert not torch.allclose(gradient, true_gradient, atol=1e-2)
    if kind == "k1":
        torch.testing.assert_close(gradient, torch.zeros(VOCABULARY, dtype=torch.float64))


def test_control_naive_k3_pulls_along_the_reverse_divergence() -> None:
    logits, ref = two_policies(7)
    reverse = (ref.exp() * (ref - logits.log_softmax(-1))).sum()
    (reverse_gradient,) = torch.autograd.grad(reverse, logits)
    naive = kl_estimate(logits.log_softmax(-1), ref, kind="k3")
    torch.testing.assert_close(expected_gradient(naive, logits.detach().softmax(-1), logits), reverse_gradient)


def test_control_off_policy_without_the_weight_is_wrong() -> None:
    logits, ref = two_policies(7)
    old = two_policies(8)[0].detach().log_softmax(-1)
    (true_gradient,) = torch.autograd.grad(exact_kl(logits, ref), logits)
    gradient = expected_gradient(losses_by_token(logits, ref, "k3"), old.exp(), logits)
    assert not torch.allclose(gradient, true_gradient, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_kl_loss_reports_the_estimate_it_was_asked_for(kind: KLKind) -> None:
    logps, ref = torch.tensor([[-1.0, -0.3, math.nan]]), torch.tensor([[-2.0, -0.2, 5.0]])
    mask = torch.tensor([[True, True, False]])
    output = kl_loss(logps, ref, mask, kind=kind)
    expected = float(kl_estimate(logps, ref, kind=kind)[mask].mean())
    assert output.loss.item() == pytest.approx(expected)
    assert output.metrics["ref_kl"] == pytest.approx(expected)


def test_kl_loss_descends_to_the_reference() -> None:
    logits, ref = two_policies(3)
    start = float(exact_kl(logits, ref).detach())
    for _ in range(200):
        gradient = expected_gradient(losses_by_token(logits, ref, "k3"), logits.detach().softmax(-1), logits)
        logits = (logits.detach() - 0.5 * gradient).requires_grad_()
    assert float(exact_kl(logits, ref).detach()) < 0.01 * start


def test_kl_loss_gives_the_reference_no_gradient() -> None:
    logps, ref, old = (torch.full((1, 1), value, requires_grad=True) for value in (-1.0, -2.0, -1.5))
    kl_loss(logps, ref, torch.tensor([[True]]), old_logprobs_BT=old).loss.backward()
    assert logps.grad is not None
    assert ref.grad is None
    assert old.grad is None


def test_unknown_kind_is_refused_with_the_alternatives() -> None:
    with pytest.raises(BadInputError, match="k1, k2, k3"):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), kind="k4")  # pyright: ignore[reportArgumentType]


# Target 6, horizon 100: (observed KL, samples) and the factor by hand.
# errors: 12/6 - 1 = 1 -> 0.2; 5.4/6 - 1 = -0.1; 0 -> -1 -> -0.2; 6 -> 0; 7.2/6 - 1 = 0.2, the bound itself.
SEQUENCE = [(12.0, 50, 1.1), (5.4, 50, 0.95), (0.0, 100, 0.8), (6.0, 100, 1.0), (7.2, 25, 1.05)]
Update = Callable[[float, float, int], float]


def ours(value: float, observed: float, samples: int) -> float:
    controller = AdaptiveKLController(init=0.2, target=6.0, horizon=100)
    controller.value = value
    return controller.update(observed, samples)


def with_unclipped_error(value: float, observed: float, samples: int) -> float:
    return value * (1.0 + (observed / 6.0 - 1.0) * samples / 100)


def with_clipped_factor(value: float, observed: float, samples: int) -> float:
    """The bound on the factor of the update in place of the error."""
    return value * (1.0 + min(max((observed / 6.0 - 1.0) * samples / 100, -0.2), 0.2))


def with_difference_as_error(value: float, observed: float, samples: int) -> float:
    """KL minus target, not divided by it."""
    return value * (1.0 + min(max(observed - 6.0, -0.2), 0.2) * samples / 100)


def missed_steps(update: Update) -> list[int]:
    """The steps after which the coefficient is not the hand's, each from where the hand left it."""
    value, missed = 0.2, []
    for step, (observed, samples, factor) in enumerate(SEQUENCE):
        found, value = update(value, observed, samples), value * factor
        if found != pytest.approx(value, rel=1e-12):
            missed.append(step)
    return missed


def test_adaptive_coefficient_by_hand() -> None:
    assert missed_steps(ours) == []
    controller = AdaptiveKLController(init=0.2, target=6.0, horizon=100)
    found = [controller.update(observed, samples) for observed, samples, _ in SEQUENCE]
    assert found == pytest.approx([0.22, 0.209, 0.1672, 0.1672, 0.17556], rel=1e-12)


@pytest.mark.parametrize(
    ("update", "steps"),
    [(with_unclipped_error, [0, 2]), (with_clipped_factor, [0]), (with_difference_as_error, [1])],
)
def test_control_other_controllers_leave_the_sequence(update: Update, steps: list[int]) -> None:
    assert missed_steps(update) == steps


@quick
@given(seen=st.lists(st.tuples(st.floats(0, 60), st.integers(1, 100)), max_size=8))
def test_adaptive_coefficient_is_the_product_of_its_bounded_factors(seen: list[tuple[float, int]]) -> None:
    controller = AdaptiveKLController(init=0.2, target=6.0, horizon=100)
    expected = unclipped = 0.2
    for observed, samples in seen:
        controller.update(observed, samples)
        expected *= 1.0 + float(np.clip(observed / 6.0 - 1.0, -0.2, 0.2)) * samples / 100
        unclipped = with_unclipped_error(unclipped, observed, samples)
    assert controller.value == pytest.approx(expected, rel=1e-12)
    # Negative control, where every error lies beyond the bound on the same side.
    if seen and all(observed > 7.3 for observed, _ in seen):
        assert controller.value < unclipped


@quick
@given(observed=st.floats(0, 100), samples=st.integers(1, 100))
def test_adaptive_coefficient_moves_towards_the_target(observed: float, samples: int) -> None:
    controller = AdaptiveKLController(init=0.1, target=1.0, horizon=100)
    after = controller.update(observed, samples)
    assert (after - 0.1) * (observed - 1.0) >= 0
    assert 0.08 - 1e-12 <= after <= 0.12 + 1e-12


def test_adaptive_coefficient_resumes_from_its_value() -> None:
    first, resumed = (AdaptiveKLController(init=0.1, target=1.0, horizon=10) for _ in range(2))
    first.update(3.0, 5)
    resumed.value = first.value
    assert first.update(0.2, 5) == resumed.update(0.2, 5)


@pytest.mark.parametrize("observed", [math.nan, math.inf])
def test_non_finite_kl_is_refused_and_leaves_the_coefficient(observed: float) -> None:
    controller = AdaptiveKLController(init=0.1, target=1.0, horizon=10)
    with pytest.raises(BadInputError, match="instability"):
        controller.update(observed, 1)
    assert controller.value == 0.1


def test_a_step_that_would_flip_the_sign_is_refused() -> None:
    controller = AdaptiveKLController(init=0.1, target=1.0, horizon=10)
    with pytest.raises(BadInputError, match="must exceed 50 / 5"):
        controller.update(0.0, 50)
    assert controller.value == 0.1


@pytest.mark.parametrize("field", ["init", "target", "horizon"])
def test_settings_must_be_positive(field: str) -> None:
    arguments = {"init": 0.1, "target": 1.0, "horizon": 10.0} | {field: 0.0}
    with pytest.raises(BadInputError, match=f"kl.{field}"):
        AdaptiveKLController(**arguments)


def test_what_the_engine_correction_rejects_pulls_at_nothing() -> None:
    """A token rejected by veto or IcePop has weight 0 in the KL, as in the policy loss; others keep theirs."""
    generator = torch.Generator().manual_seed(3)
    logprobs, ref, old = (-torch.rand(2, 4, generator=generator) for _ in range(3))
    mask, weights = torch.ones(2, 4, dtype=torch.bool), torch.tensor([[0.0, 1.0, 2.0, 0.5], [0.0, 0.0, 1.0, 1.0]])
    grads = []
    for correction in (None, weights):
        leaf = logprobs.clone().requires_grad_()
        kl_loss(leaf, ref, mask, old_logprobs_BT=old, correction_BT=correction).loss.backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    plain, corrected = grads
    assert torch.allclose(corrected, weights * plain)
    assert bool((plain != 0).all()), "negative control: without the correction each of them pulls"
