"""Attestation proves equality or raises; a publish is proved, healed once, or refused."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_actors.actors.publish import AttestedSync, attestation_gap, require_attested
from rl_actors.actors.rollouts import RolloutPool
from rl_actors.contracts.errors import AttestationError, InfrastructureError

needs_ray = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]
PROBES = [[1, 2, 3], [4, 5]]
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


class TestAttestedSync:
    """Published is not believed: proved, resynced or replaced once, or refused."""

    pytestmark = needs_ray

    def sync(self, local_ray: Any, pool: RolloutPool, *per_worker: list[float], **worker: Any) -> AttestedSync:
        for one, gaps in zip(pool.workers, per_worker, strict=True):
            local_ray.get(one.configure.remote(gaps, **worker))
        learners: Any = SimpleNamespace(
            weights=lambda: {"w": 1}, probe=lambda probes: [[-1.0 for _ in row[1:]] for row in probes]
        )
        return AttestedSync(learners, pool, PROBES, tolerance=0.01)

    def published(self, local_ray: Any, pool: RolloutPool) -> list[int]:
        return local_ray.get([worker.times_published.remote() for worker in pool.workers])

    def test_the_largest_gap_of_any_worker_is_reported(self, local_ray: Any, pool: RolloutPool):
        one = self.sync(local_ray, pool, [0.001], [0.004])
        assert one.publish(5) == pytest.approx(0.004)
        assert (one.num_resyncs, self.published(local_ray, pool)) == (0, [1, 1])

    def test_a_worker_that_fails_is_resynced_and_only_that_one(self, local_ray: Any, pool: RolloutPool):
        one = self.sync(local_ray, pool, [0.5, 0.002], [0.001])
        before = list(pool.workers)
        assert one.publish(5) == pytest.approx(0.002)
        assert (one.num_resyncs, self.published(local_ray, pool)) == (1, [2, 1])
        assert pool.workers == before, "wrong numbers cost a resync, not an engine"

    @pytest.mark.parametrize("gap", [0.5, float("nan"), float("-inf")])
    def test_a_worker_that_fails_twice_is_refused(self, local_ray: Any, pool: RolloutPool, gap: float):
        one = self.sync(local_ray, pool, [0.0], [gap, gap])
        with pytest.raises(AttestationError, match="rollout worker 1 does not serve weights version 5"):
            one.publish(5)

    def test_a_worker_that_breaks_is_replaced_and_published_to_again(self, local_ray: Any, pool: RolloutPool):
        one = self.sync(local_ray, pool, [0.0], [0.003])
        local_ray.get(pool.workers[0].break_next_publish.remote())
        broken, well = pool.workers
        assert one.publish(7) == pytest.approx(0.003)
        assert pool.workers[1] == well
        assert pool.workers[0] != broken
        assert (one.num_resyncs, self.published(local_ray, pool)) == (1, [1, 1])

    def test_a_dead_worker_is_replaced_too(self, local_ray: Any, pool: RolloutPool):
        one = self.sync(local_ray, pool, [0.0], [0.0])
        local_ray.kill(pool.workers[1])
        assert one.publish(8) == 0.0
        assert one.num_resyncs == 1

    def test_the_right_numbers_under_the_wrong_version_are_refused(
        self, local_ray: Any, pool: RolloutPool, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(pool, "restart", lambda rank: None)
        one = self.sync(local_ray, pool, [0.0], [0.0], skew=1)
        with pytest.raises(AttestationError, match=r"failed twice .*: it serves weights version 6, published was 5"):
            one.publish(5)
