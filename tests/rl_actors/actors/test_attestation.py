"""Attestation proves equality or raises; silence is no proof."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_actors.actors.attested_sync import attestation_gap, require_attested
from rl_actors.contracts.errors import AttestationError, InfrastructureError

rows = st.lists(st.lists(st.floats(-20, 0), min_size=1, max_size=5), min_size=1, max_size=4)


@pytest.mark.parametrize(
    ("engine", "learner", "gap"),
    [
        ([[-1.0, -2.0]], [[-1.0, -2.0]], 0.0),
        ([[-1.0, -2.0]], [[-1.5, -1.5]], 0.5),  # opposite signs do not cancel
        ([[-1.0], [-1.0, -1.0, -1.0]], [[-2.0], [-1.0, -1.0, -1.0]], 0.25),  # tokens weigh equally, not sequences
        ([[-1.0], []], [[-1.0], []], 0.0),
    ],
)
def test_the_gap_is_the_mean_over_tokens(engine: list[list[float]], learner: list[list[float]], gap: float):
    assert attestation_gap(engine, learner) == pytest.approx(gap)


@given(engine=rows, shift=st.floats(-3, 3))
def test_a_shift_is_its_size_and_the_order_of_the_two_does_not_matter(engine: list[list[float]], shift: float):
    learner = [[x + shift for x in row] for row in engine]
    assert attestation_gap(engine, learner) == pytest.approx(abs(shift), abs=1e-9)
    assert attestation_gap(learner, engine) == pytest.approx(abs(shift), abs=1e-9)


@pytest.mark.parametrize("nothing", [[], [[]], [[], []]])
def test_no_probe_token_proves_nothing(nothing: list[list[float]]):
    with pytest.raises(AttestationError, match="at least one probe"):
        attestation_gap(nothing, nothing)


@pytest.mark.parametrize(
    ("engine", "learner"),
    [([[-1.0]], [[-1.0], [-1.0]]), ([[-1.0]], [[-1.0, -2.0]]), ([[-1.0], [-2.0]], [[-1.0, -2.0]])],
)
def test_different_shapes_never_pass(engine: list[list[float]], learner: list[list[float]]):
    """A sequence that one side cut short must not pass on the tokens that are left."""
    with pytest.raises((AttestationError, ValueError)):
        attestation_gap(engine, learner)


@pytest.mark.parametrize("gap", [0.0, 0.009, 0.01])
def test_a_gap_within_tolerance_passes(gap: float):
    require_attested(gap, tolerance=0.01, worker="worker 0", weights_version=3)


@pytest.mark.parametrize("gap", [0.0101, 1.0, math.inf, math.nan])
def test_anything_else_is_refused_with_its_numbers(gap: float):
    with pytest.raises(AttestationError, match=r"worker 7 does not serve weights version 3: .*allowed 0\.01") as caught:
        require_attested(gap, tolerance=0.01, worker="worker 7", weights_version=3)
    assert isinstance(caught.value, InfrastructureError)


def test_one_nan_among_many_tokens_is_refused():
    gap = attestation_gap([[-1.0, math.nan, -1.0]], [[-1.0, -1.0, -1.0]])
    with pytest.raises(AttestationError):
        require_attested(gap, tolerance=0.5, worker="w", weights_version=1)
