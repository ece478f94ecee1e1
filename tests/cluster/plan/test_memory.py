"""How far learners share a model: by its size and by how many there are."""

from __future__ import annotations

import pytest

from cluster.plan.memory import MIN_PARTITIONED_PARAMS, MIN_SHARDED_PARAMS, zero_stage


@pytest.mark.parametrize(
    ("params", "stage"),
    [
        (1, 0),
        (MIN_SHARDED_PARAMS - 1, 0),
        (MIN_SHARDED_PARAMS, 2),
        (MIN_PARTITIONED_PARAMS - 1, 2),
        (MIN_PARTITIONED_PARAMS, 3),
        (10**12, 3),
    ],
)
@pytest.mark.parametrize("num_learners", [2, 3, 64])
def test_sharding_begins_where_replicas_would_crowd_a_device(params: int, stage: int, num_learners: int):
    assert zero_stage(params, num_learners) == stage


@pytest.mark.parametrize("params", [1, MIN_SHARDED_PARAMS, MIN_PARTITIONED_PARAMS, 10**12])
def test_one_learner_has_nobody_to_share_with(params: int):
    assert zero_stage(params, 1) == 0


def test_the_borders_are_what_a_device_holds():
    """16 bytes a parameter in mixed precision, of which 4 are weights and gradients (arXiv 1910.02054 section 3)."""
    assert 16 * MIN_SHARDED_PARAMS == 8e9
    assert 4 * MIN_PARTITIONED_PARAMS == 32e9
