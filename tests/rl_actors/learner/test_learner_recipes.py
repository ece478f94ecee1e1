"""Every recipe on a real tiny model: rewarded rollouts become likelier, and each choice does what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rl_actors.contracts.errors import BadInputError
from rl_actors.contracts.recipe import RECIPES, Recipe
from rl_actors.contracts.rollouts import TrainingSample
from rl_actors.learner.update import PpoLearner
from tests.rl_actors.learner.test_update import learner, logprobs, moved, sample, sampled_mean

pytestmark = pytest.mark.slow
GROUP = RECIPES["rloo"]


@pytest.fixture(scope="module")
def batch(tiny_dir: Path) -> list[TrainingSample]:
    """Four groups of two attempts, of which one is rewarded; on-policy."""
    made = [replace(sample(n, 12 + n, float(n % 2)), group_id=n // 2) for n in range(8)]
    return [replace(one, rollout_logprobs=tuple(logprobs(tiny_dir, list(one.token_ids)))) for one in made]


def ids_of(batch: list[TrainingSample]) -> list[list[int]]:
    return [list(one.token_ids) for one in batch]


@pytest.mark.parametrize("name", RECIPES)
def test_rewarded_attempts_become_likelier_than_others(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None, name: str
):
    one = learner(tiny_dir, recipe=RECIPES[name])
    before = one.probe_logprobs(ids_of(batch))
    for _ in range(4):
        metrics = one.update(batch).metrics
    after = one.probe_logprobs(ids_of(batch))
    gains = [sampled_mean(after, batch, reward) - sampled_mean(before, batch, reward) for reward in (0.0, 1.0)]
    assert gains[1] > gains[0] + 0.05
    assert {"mismatch_abs_mean", "mismatch_abs_max", "mismatch_k3", "mismatch_chi2"} <= set(metrics)
    assert {"mismatch_ess_fraction", "mismatch_masked_fraction", "kl_to_reference", "ratio_max"} <= set(metrics)
    assert ("value_loss" in metrics) == (name == "ppo_kl")
    assert ("kl_loss" in metrics) == (name != "ppo_kl")


@pytest.mark.parametrize("name", RECIPES)
def test_without_a_difference_in_reward_nothing_is_learned(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None, name: str
):
    """Negative control: equal rewards in a group have no signal, and on the reference the KL has no gradient."""
    one = learner(tiny_dir, recipe=RECIPES[name])
    one.update([replace(item, reward=0.7) for item in batch])
    assert not moved(one, tiny_dir)


def test_a_strictly_on_policy_update_skips_the_old_pass_and_changes_nothing(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None
):
    slow, fast = learner(tiny_dir, recipe=GROUP), learner(tiny_dir, recipe=replace(GROUP, skip_old_pass=True))
    first, second = slow.update(batch).metrics, fast.update(batch).metrics
    assert (second["ratio_mean"], second["ratio_max"], second["clip_fraction"]) == (pytest.approx(1.0), 1.0, 0.0)
    assert second["approx_kl"] == 0.0
    assert second.keys() == first.keys()
    assert {name: second[name] for name in second} == pytest.approx(first, rel=1e-4, abs=1e-5)
    for name, tensor in slow.weights().items():
        assert torch.allclose(fast.weights()[name], tensor, atol=1e-5), name


def test_the_old_pass_is_not_skipped_for_samples_of_other_weights(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None
):
    one = learner(tiny_dir, recipe=replace(GROUP, skip_old_pass=True))
    one.update(batch)
    with pytest.raises(BadInputError, match=r"sampled_versions = \(0,\): only version 1 is on-policy"):
        one.update(batch)
    assert one.update([replace(item, weights_versions=(1,)) for item in batch]).weights_version == 2


def test_a_warming_critic_leaves_the_policy_alone(tiny_dir: Path, batch: list[TrainingSample], process_group: None):
    worth = [replace(item, reward=2.0 + item.reward) for item in batch]
    one = learner(tiny_dir, recipe=Recipe(critic_warmup_updates=2, group_baseline=False))
    critic = [parameter.detach().clone() for parameter in one._models.module.value_head.parameters()]
    for _ in range(2):
        one.update(worth)
        assert not moved(one, tiny_dir)
    now = list(one._models.module.value_head.parameters())
    assert all(not torch.equal(was, parameter) for was, parameter in zip(critic, now, strict=True))
    one.update(worth)
    assert moved(one, tiny_dir), "negative control: after the warm-up it trains"


def test_kl_as_a_loss_pulls_towards_the_reference(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None, tmp_path: Path
):
    mover = learner(tiny_dir, learning_rate=3e-3)
    for _ in range(2):
        mover.update(batch)
    mover.save_policy(str(tmp_path))
    rows = [logprobs(tmp_path, list(one.token_ids)) for one in batch]
    idle = [replace(item, reward=0.0, rollout_logprobs=tuple(row)) for item, row in zip(batch, rows, strict=True)]
    kls = {}
    for kl_coef in (0.0, 1.0):
        settings = replace(mover._settings, kl_coef=kl_coef, learning_rate=1e-3, recipe=GROUP)
        pulled = PpoLearner(str(tmp_path), str(tiny_dir), settings)
        kls[kl_coef] = [pulled.update(idle).metrics["kl_to_reference_k3"] for _ in range(3)]
    assert kls[1.0][-1] < 0.9 * kls[1.0][0]
    assert kls[0.0][-1] == pytest.approx(kls[0.0][0]), "negative control: without a coefficient nothing pulls"


def test_the_coefficient_follows_the_kl_and_is_part_of_the_state(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None, tmp_path: Path
):
    recipe = replace(GROUP, kl_target=0.01, kl_horizon=100.0)
    one = learner(tiny_dir, recipe=recipe, kl_coef=0.2)
    assert one.update(batch).metrics["kl_coef"] == 0.2
    one.save_checkpoint(str(tmp_path))
    # On the reference the KL is 0, so the error is clipped to -0.2: 0.2 * (1 - 0.2 * 8 / 100)
    expected = 0.2 * (1 - 0.2 * len(batch) / 100.0)
    other = learner(tiny_dir, recipe=recipe, kl_coef=0.2)
    other.load_checkpoint(str(tmp_path))
    found = [item.update(batch).metrics["kl_coef"] for item in (one, other)]
    assert found == pytest.approx([expected, expected])


@pytest.mark.parametrize("correction", ["none", "token_tis", "sequence_mask", "token_icepop"])
def test_a_stale_engines_tokens_are_corrected_or_rejected(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None, correction: str
):
    """The engine thought every token e^2 likelier than the learner does: rho = e^-2 lies below any floor."""
    stale = [replace(one, rollout_logprobs=tuple(x + 2.0 for x in one.rollout_logprobs)) for one in batch]
    recipe = replace(GROUP, correction=correction, correction_floor=0.5)
    metrics = learner(tiny_dir, recipe=recipe).update(stale).metrics
    assert metrics["mismatch_abs_mean"] == pytest.approx(2.0, abs=1e-3)
    is_rejected = correction in ("sequence_mask", "token_icepop")
    assert metrics["mismatch_masked_fraction"] == pytest.approx(float(is_rejected), abs=1e-6)
    assert metrics["mismatch_ess_fraction"] == pytest.approx(1.0, abs=1e-3)
    assert metrics["mismatch_chi2"] == pytest.approx(torch.e**-4 - 1, abs=1e-3)
    assert metrics["ratio_max"] == pytest.approx(1.0, abs=1e-4), "the gap is no part of the PPO ratio"


def test_flat_groups_are_left_out_and_change_nothing_but_the_denominator(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None
):
    mixed = [replace(one, succeeded=index % 2 == 0) for index, one in enumerate(batch)]
    flat = [replace(one, succeeded=True) if one.group_id == 0 else one for one in mixed]
    kept = learner(tiny_dir, recipe=replace(GROUP, drop_flat_groups=True)).update(flat).metrics
    same = learner(tiny_dir, recipe=GROUP).update([one for one in flat if one.group_id != 0]).metrics
    assert kept["policy_loss"] == pytest.approx(same["policy_loss"], rel=1e-4)
    assert kept["grad_norm"] == pytest.approx(same["grad_norm"], rel=1e-3)
    everything = [replace(one, succeeded=True) for one in batch]
    assert learner(tiny_dir, recipe=replace(GROUP, drop_flat_groups=True)).update(everything).weights_version == 1


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_first_batch_without_signal_is_no_reason_to_stop(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None, zero_stage: int
):
    """Nothing moves because nothing pulls: the check of the first step waits for the first gradient, at any stage."""
    one = learner(tiny_dir, recipe=GROUP, zero_stage=zero_stage)
    one.update([replace(item, reward=0.7) for item in batch])
    assert not one._num_checked
    one.update(batch)
    assert one._num_checked
    assert moved(one, tiny_dir)
