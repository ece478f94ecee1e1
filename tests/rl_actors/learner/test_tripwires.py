"""Tripwires through a real learner: a critic that explains too little lets no step through; the unchecked is named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from rl_actors.algorithms.stability import StabilityLimits
from rl_actors.contracts.recipe import RECIPES
from rl_actors.contracts.rollouts import LearnerUpdate, TrainingSample
from tests.rl_actors.learner.test_update import OFF, learner, logprobs, sample

pytestmark = pytest.mark.slow
MARGIN = 1e-4
UNREACHABLE = 0.99


@pytest.fixture(scope="module")
def batch(tiny_dir: Path) -> list[TrainingSample]:
    """Four groups of two attempts, of which one is rewarded; on-policy."""
    made = [replace(sample(n, 12 + n, float(n % 2)), group_id=n // 2) for n in range(8)]
    return [replace(one, rollout_logprobs=tuple(logprobs(tiny_dir, list(one.token_ids)))) for one in made]


# --- explained variance -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A checkpoint whose critic knows something, and the explained variance that its next update reports."""

    directory: str
    explained: float


@pytest.fixture(scope="module")
def trained(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    one, directory = learner(tiny_dir, learning_rate=3e-3), str(tmp_path_factory.mktemp("trained"))
    for _ in range(4):
        one.update(batch)
    one.save_checkpoint(directory)
    return Trained(directory, one.update(batch).metrics["explained_variance"])


def taken_under(
    limit: float | None, tiny_dir: Path, trained: Trained, batch: list[TrainingSample]
) -> tuple[LearnerUpdate, bool]:
    """The update that a learner from the checkpoint takes under this limit, and whether it moved the policy."""
    one = learner(tiny_dir, learning_rate=3e-3, limits=replace(OFF, min_explained_variance=limit))
    one.load_checkpoint(trained.directory)
    before = one.weights()
    update = one.update(batch)
    return update, any(not torch.equal(before[name], tensor) for name, tensor in one.weights().items())


def test_a_critic_that_explains_less_than_the_limit_lets_no_step_through(
    tiny_dir: Path, trained: Trained, batch: list[TrainingSample]
):
    limit = trained.explained + MARGIN
    update, is_moved = taken_under(limit, tiny_dir, trained, batch)
    assert 0.01 < trained.explained < 1.0, "a value of its own, not the 0 of a critic that knows nothing"
    assert update.trips == (f"explained_variance: explained_variance = {trained.explained:.6g}, limit {limit:.6g}",)
    assert (update.metrics["num_optimizer_steps"], update.restore_factor) == (0.0, 0.0)
    assert not is_moved


@pytest.mark.parametrize("distance", [-MARGIN, 0.0, None], ids=["below", "at", "off"])
def test_a_limit_that_is_not_crossed_lets_the_same_update_through(
    tiny_dir: Path, trained: Trained, batch: list[TrainingSample], distance: float | None
):
    """Negative control."""
    limit = None if distance is None else trained.explained + distance
    update, is_moved = taken_under(limit, tiny_dir, trained, batch)
    assert update.metrics["explained_variance"] == trained.explained
    assert (update.trips, update.metrics["num_optimizer_steps"]) == ((), 1.0)
    assert is_moved


def test_a_critic_that_never_explains_enough_asks_for_the_last_good_state(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None
):
    one = learner(tiny_dir, limits=replace(OFF, min_explained_variance=UNREACHABLE))
    assert [one.update(batch).restore_factor for _ in range(3)] == [0.0] * 3
    asked = one.update(batch)
    assert asked.restore_factor == 0.5
    assert asked.trips[-1].startswith("repeated_skips: consecutive_skips = 4, limit 3; explained_variance: ")


def test_a_critic_that_warms_up_is_not_judged_and_can_therefore_learn(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None
):
    """A fresh critic explains nothing; without the exemption any limit above 0 would skip for ever."""
    limits = replace(OFF, min_explained_variance=MARGIN)
    steps = {
        warmup: learner(
            tiny_dir, limits=limits, recipe=replace(RECIPES["ppo_kl"], critic_warmup_updates=warmup)
        ).update(batch)
        for warmup in (0, 1)
    }
    assert [update.metrics["num_optimizer_steps"] for update in steps.values()] == [0.0, 1.0]
    assert (len(steps[0].trips), steps[1].trips) == (1, ())
    assert unchecked(steps[1]) == {"unchecked_explained_variance": 1.0}


# --- what could not be checked ----------------------------------------------------------------------


def unchecked(update: LearnerUpdate) -> dict[str, float]:
    return {name: value for name, value in update.metrics.items() if name.startswith("unchecked_")}


def test_a_limit_without_its_metric_is_named_for_each_minibatch_of_the_update(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None
):
    """No critic, no explained variance: the steps go through, and the row says that nobody looked."""
    limits = replace(OFF, min_explained_variance=UNREACHABLE)
    one = learner(tiny_dir, recipe=RECIPES["rloo"], limits=limits, num_minibatches=2)
    for _ in range(2):
        update = one.update(batch)
        assert (update.trips, update.metrics["num_optimizer_steps"]) == ((), 2.0)
        assert unchecked(update) == {"unchecked_explained_variance": 2.0}, "of this update, not of all"


@pytest.mark.parametrize(("recipe", "limit"), [("ppo_kl", -UNREACHABLE), ("ppo_kl", None), ("rloo", None)])
def test_nothing_is_unchecked_where_the_metric_is_there_or_the_limit_off(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None, recipe: str, limit: float | None
):
    """Negative control, with the limits that are on by default: the loop's own limit is not the learner's to check."""
    limits = replace(StabilityLimits(), min_explained_variance=limit)
    assert unchecked(learner(tiny_dir, recipe=RECIPES[recipe], limits=limits).update(batch)) == {}
