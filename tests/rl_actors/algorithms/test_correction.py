"""Engine-learner correction: exact weights, and rejection."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rl_actors.algorithms.correction import CorrectionOutput, require_strictly_on_policy, rollout_correction
from rl_actors.contracts.errors import BadInputError
from rl_actors.contracts.recipe import CorrectionMode

torch.set_num_threads(1)
quick = settings(deadline=None, max_examples=40)
MODES: list[CorrectionMode] = ["none", "token_tis", "sequence_tis", "sequence_mask", "token_icepop"]
MASK = torch.tensor([[True, True, False], [True, True, True]])
RHO = torch.tensor([[3.0, 0.6, math.nan], [0.1, 1.0, 1.5]], dtype=torch.float64)


def correct(rho: Tensor = RHO, mask: Tensor = MASK, **options: Any) -> CorrectionOutput:
    """Correction of a batch whose learner / engine ratios are `rho`."""
    rollout = torch.full_like(rho, -2.0)
    return rollout_correction(rollout + rho.log(), rollout, mask, **{"cap": 2.0, **options})


@pytest.mark.parametrize(
    ("mode", "weights", "kept"),
    [
        ("none", [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]], [[True, True, False], [True, True, True]]),
        ("token_tis", [[2.0, 0.6, 0.0], [0.1, 1.0, 1.5]], [[True, True, False], [True, True, True]]),
        ("sequence_tis", [[1.8, 1.8, 0.0], [0.15, 0.15, 0.15]], [[True, True, False], [True, True, True]]),
        ("sequence_mask", [[1.8, 1.8, 0.0], [0.15, 0.15, 0.15]], [[True, True, False], [True, True, True]]),
        ("token_icepop", [[0.0, 0.6, 0.0], [0.0, 1.0, 1.5]], [[False, True, False], [False, True, True]]),
    ],
)
def test_weights_by_hand(mode: str, weights: list[list[float]], kept: list[list[bool]]) -> None:
    output = correct(mode=mode)
    torch.testing.assert_close(output.weights_BT, torch.tensor(weights, dtype=torch.float64))
    assert output.mask_BT.tolist() == kept


def test_sequence_mask_rejects_whole_sequences_outside_the_bounds() -> None:
    assert correct(mode="sequence_mask", cap=1.5).mask_BT.tolist() == [[False] * 3, [True] * 3]
    output = correct(mode="sequence_mask", floor=0.2)
    assert output.mask_BT.tolist() == [[True, True, False], [False] * 3]
    assert output.weights_BT[1].tolist() == [0.0] * 3


def test_icepop_takes_its_own_bounds() -> None:
    output = correct(mode="token_icepop", cap=5.0, floor=0.5)
    assert output.mask_BT.tolist() == [[True, True, False], [False, True, True]]


@pytest.mark.parametrize("mode", MODES)
def test_veto_rejects_the_sequence_of_a_catastrophic_token(mode: str) -> None:
    rho = torch.tensor([[1.2, 1.0, 1.0], [1e-5, 1.0, 1.0]])
    vetoed = correct(rho, mode=mode, veto=1e-4)
    assert vetoed.mask_BT.tolist() == [[True, True, False], [False] * 3]
    # Negative control: without the veto the rest of that sequence still trains.
    assert bool(correct(rho, mode=mode).mask_BT[1, 1:].all())


def test_a_masked_token_cannot_veto() -> None:
    rho = torch.tensor([[1.0, 1e-9]], dtype=torch.float64)
    mask = torch.tensor([[True, False]])
    assert correct(rho, mask, mode="none", veto=1e-4).mask_BT.tolist() == [[True, False]]
    assert correct(rho, mask | True, mode="none", veto=1e-4).mask_BT.tolist() == [[False, False]]


@pytest.mark.parametrize("mode", MODES)
def test_no_gap_means_weight_one_and_nothing_masked(mode: str) -> None:
    output = correct(torch.ones(2, 3), mode=mode, cap=1.0, veto=0.5)
    assert output.weights_BT.tolist() == MASK.float().tolist()
    assert output.mask_BT.tolist() == MASK.tolist()


@quick
@given(seed=st.integers(0, 10_000), mode=st.sampled_from(MODES), cap=st.floats(1, 5))
def test_weights_stay_within_bounds_and_masked_values_never_leak(seed: int, mode: CorrectionMode, cap: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(3, 4, generator=generator) < 0.7
    rho = torch.randn(3, 4, generator=generator).exp()
    clean = correct(rho, mask, mode=mode, cap=cap)
    dirty = correct(torch.where(mask, rho, math.nan), mask, mode=mode, cap=cap)
    assert bool((clean.weights_BT >= 0).all())
    assert bool((clean.weights_BT <= cap + 1e-6).all())
    assert bool((clean.mask_BT <= mask).all())
    assert bool((clean.weights_BT[~clean.mask_BT] == 0).all())
    torch.testing.assert_close(clean.weights_BT, dirty.weights_BT, rtol=0, atol=0)


def test_uncapped_token_weights_are_unbiased_by_enumeration() -> None:
    generator = torch.Generator().manual_seed(0)
    engine, learner = (torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    value = torch.randn(6, generator=generator, dtype=torch.float64)

    def corrected_mean(cap: float) -> Tensor:
        weights = rollout_correction(
            learner.view(6, 1), engine.view(6, 1), torch.ones(6, 1).bool(), mode="token_tis", cap=cap
        ).weights_BT
        return (engine.exp() * weights.flatten() * value).sum()

    truth = (learner.exp() * value).sum()
    torch.testing.assert_close(corrected_mean(1e6), truth)
    # Negative control: truncation is biased, and so is no correction at all.
    assert not torch.allclose(corrected_mean(1.0), truth, atol=1e-3)
    assert not torch.allclose((engine.exp() * value).sum(), truth, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_all_masked_batch_is_silent(mode: str) -> None:
    output = correct(mask=torch.zeros_like(MASK), mode=mode)
    assert float(output.weights_BT.sum()) == 0.0
    assert not output.mask_BT.any()


def test_weights_carry_no_gradient() -> None:
    old = torch.zeros(1, 1, requires_grad=True)
    output = rollout_correction(old, torch.zeros(1, 1), torch.tensor([[True]]), mode="token_tis", cap=2.0)
    assert not output.weights_BT.requires_grad


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mode": "clip"}, "choose one of none, token_tis"),
        ({"mode": "token_tis", "cap": 0.5}, "1 or more"),
        ({"mode": "token_tis", "cap": math.nan}, "1 or more"),
        ({"mode": "token_icepop", "floor": 1.5}, r"\[0, 1\]"),
        ({"mode": "none", "veto": 1.0}, r"\(0, 1\)"),
    ],
)
def test_impossible_bounds_are_refused_with_the_reason(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadInputError, match=reason):
        correct(**options)


def test_strictly_on_policy_is_allowed() -> None:
    require_strictly_on_policy(sampled_versions=(3,), weights_version=3, num_epochs=1, num_minibatches=1)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sampled_versions": (2, 3)}, "sampled_versions"),
        ({"sampled_versions": ()}, "sampled_versions"),
        ({"num_epochs": 2}, "num_epochs"),
        ({"num_minibatches": 2}, "num_minibatches"),
    ],
)
def test_anything_else_is_refused_and_named(change: dict[str, Any], field: str) -> None:
    conditions = {"sampled_versions": (3,), "weights_version": 3, "num_epochs": 1, "num_minibatches": 1}
    with pytest.raises(BadInputError, match=field):
        require_strictly_on_policy(**(conditions | change))
