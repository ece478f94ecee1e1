"""One PPO update on a real tiny model, in one process: what moves, what must not, and what a checkpoint keeps."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rl_actors.algorithms.stability import StabilityLimits
from rl_actors.contracts.errors import InstabilityError, TamperedError
from rl_actors.contracts.recipe import Recipe
from rl_actors.contracts.rollouts import TrainingSample
from rl_actors.learner import update as ppo_learner_module
from rl_actors.learner.objective import GlobalCounts, PpoSettings
from rl_actors.learner.tripwires import Tripwires, require_moved
from rl_actors.learner.update import PpoLearner
from rl_actors.models.scoring_head import token_logprobs_and_entropy

torch.set_num_threads(1)
slow = pytest.mark.slow
OFF = StabilityLimits(
    max_grad_norm=None, max_mismatch_mean=None, max_kl=None, max_ratio=None, max_clip_fraction=None, min_entropy=None
)
SETTINGS = PpoSettings(
    learning_rate=1e-3, kl_coef=0.0, limits=OFF, clip_low=0.2, clip_high=0.2, gamma=1.0, lam=0.95, epochs=1,
    num_minibatches=1, max_grad_norm=1.0, temperature=1.0, microbatch_tokens=4096, seed=0,
)  # fmt: skip
HEALTHY = {"grad_norm": 1.0, "ratio_max": 1.0}
PROBES = [[1, 20, 30, 40, 50], [1, 2, 3, 4, 5, 6]]


@torch.no_grad()
def logprobs(path: Path, ids: list[int], temperature: float = 1.0) -> list[float]:
    """What a policy directory says of a sequence, computed without the learner."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = torch.tensor([ids])
    found, _ = token_logprobs_and_entropy(model(input_ids=tokens).logits, tokens, temperature)
    return found[0].tolist()


def sample(number: int, length: int, reward: float) -> TrainingSample:
    """Random ids: four of prompt, sampled tokens, a tool's answer of two in the middle, sampled tokens."""
    rng = random.Random(number)
    ids = tuple(rng.randrange(8, 300) for _ in range(length))
    middle = length // 2
    mask = tuple(index >= 4 and index not in {middle, middle + 1} for index in range(length))
    return TrainingSample(
        rollout_id=f"r{number}", group_id=number, weights_versions=(0,), token_ids=ids, loss_mask=mask,
        rollout_logprobs=(0.0,) * length, reward=reward, truncated=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def batch(tiny_dir: Path) -> list[TrainingSample]:
    """On-policy samples: the engine's log-probabilities are those of the policy itself. Half are rewarded."""
    made = [sample(number, 12 + number, float(number % 2)) for number in range(8)]
    return [replace(one, rollout_logprobs=tuple(logprobs(tiny_dir, list(one.token_ids)))) for one in made]


def learner(tiny_dir: Path, **changes: Any) -> PpoLearner:
    return PpoLearner(str(tiny_dir), str(tiny_dir), replace(SETTINGS, **changes))


def sampled_mean(path_or_rows: list[list[float]], batch: list[TrainingSample], reward: float) -> float:
    """Mean log-probability of the sampled tokens of the samples with this reward."""
    values = [
        value
        for rows, one in zip(path_or_rows, batch, strict=True)
        for value, own in zip(rows, one.loss_mask[1:], strict=True)
        if own and one.reward == reward
    ]
    return sum(values) / len(values)


# --- the first step -------------------------------------------------------------------------------


@slow
def test_the_first_on_policy_step_has_ratio_one_and_clips_nothing(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None
):
    metrics = learner(tiny_dir).update(batch).metrics
    assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["clip_fraction"] == 0.0
    assert metrics["approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["mismatch_abs_mean"] < 1e-4
    assert metrics["mismatch_abs_max"] < 1e-3
    assert metrics["kl_to_reference"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["num_optimizer_steps"] == 1.0


@slow
def test_a_second_pass_over_the_same_batch_is_off_policy(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None
):
    """Negative control: once weights moved, the ratio is not 1 and the clip is used."""
    metrics = learner(tiny_dir, epochs=4, learning_rate=1e-2).update(batch).metrics
    assert metrics["ratio_max"] > 1.05
    assert metrics["clip_fraction"] > 0.0
    assert metrics["approx_kl"] > 1e-4
    assert metrics["num_optimizer_steps"] == 4.0


@slow
def test_a_stale_engine_shows_in_the_gap_and_not_in_the_ratio(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None
):
    stale = [replace(one, rollout_logprobs=tuple(x - 0.5 for x in one.rollout_logprobs)) for one in batch]
    metrics = learner(tiny_dir).update(stale).metrics
    assert metrics["mismatch_abs_mean"] == pytest.approx(0.5, abs=1e-3)
    assert metrics["mismatch_abs_max"] == pytest.approx(0.5, abs=1e-2)
    assert metrics["ratio_max"] == pytest.approx(1.0, abs=1e-4)


@slow
def test_the_learner_scores_at_the_temperature_that_was_sampled_with(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None
):
    warm = [replace(one, rollout_logprobs=tuple(logprobs(tiny_dir, list(one.token_ids), 0.5))) for one in batch]
    assert learner(tiny_dir, temperature=0.5).update(warm).metrics["mismatch_abs_mean"] < 1e-3
    assert learner(tiny_dir, temperature=1.0).update(warm).metrics["mismatch_abs_mean"] > 0.1


# --- what moves -----------------------------------------------------------------------------------


@slow
def test_rewarded_rollouts_become_likelier_than_others(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None
):
    one = learner(tiny_dir)
    ids = [list(sample.token_ids) for sample in batch]
    before = one.probe_logprobs(ids)
    for version in range(1, 5):
        assert one.update(batch).weights_version == version
    after = one.probe_logprobs(ids)
    gains = [sampled_mean(after, batch, reward) - sampled_mean(before, batch, reward) for reward in (0.0, 1.0)]
    assert gains[1] > gains[0] + 0.05


@slow
def test_the_policy_moves_and_what_was_published_before_does_not(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None
):
    one = learner(tiny_dir)
    before = one.weights()
    kept = {name: tensor.clone() for name, tensor in before.items()}
    one.update(batch)
    after = one.weights()
    assert all(torch.equal(before[name], kept[name]) for name in kept), "published weights are a copy"
    assert not all(torch.equal(after[name], before[name]) for name in kept)


@slow
def test_published_weights_are_the_policys_by_the_names_an_engine_knows(tiny_dir: Path, process_group: None):
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    published = learner(tiny_dir).weights()
    assert published.keys() == model.state_dict().keys()
    assert all(torch.equal(published[name], tensor) for name, tensor in model.state_dict().items())


@slow
def test_the_critic_learns_what_rollouts_are_worth(tiny_dir: Path, batch: list[TrainingSample], process_group: None):
    """All rollouts are worth 2: a critic that starts at 0 must come closer."""
    worth = [replace(one, reward=2.0) for one in batch]
    one = learner(tiny_dir, learning_rate=1e-2, recipe=Recipe(value_clip=10.0))
    losses = [one.update(worth).metrics["value_loss"] for _ in range(12)]
    assert losses[0] > 1.0
    assert losses[-1] < 0.6 * losses[0]


@slow
def test_the_reference_never_changes(tiny_dir: Path, batch: list[TrainingSample], process_group: None, tmp_path: Path):
    """KL to the reference, as reported, is that of the saved policy to the untouched starting point."""
    one = learner(tiny_dir, learning_rate=5e-3)
    for _ in range(3):
        one.update(batch)
    one.save_policy(str(tmp_path))
    reported = one.update(batch).metrics["kl_to_reference"]
    gaps = [
        now - start
        for item in batch
        for now, start, own in zip(
            logprobs(tmp_path, list(item.token_ids)),
            logprobs(tiny_dir, list(item.token_ids)),
            item.loss_mask,
            strict=True,
        )
        if own
    ]
    assert reported == pytest.approx(sum(gaps) / len(gaps), abs=1e-4)
    assert abs(reported) > 1e-3, "and the policy did move away from it"


@slow
@pytest.mark.parametrize("kl_coef", [0.0, 1.0])
def test_kl_in_the_reward_pulls_towards_the_reference(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None, tmp_path: Path, kl_coef: float
):
    """Nothing is rewarded but being near the reference: log-ratios must draw together; without KL nothing moves."""
    mover = learner(tiny_dir, learning_rate=3e-3)
    for _ in range(2):
        mover.update(batch)
    mover.save_policy(str(tmp_path))
    ids = [list(one.token_ids) for one in batch]
    here = [logprobs(tmp_path, one) for one in ids]
    idle = [replace(one, reward=0.0, rollout_logprobs=tuple(row)) for one, row in zip(batch, here, strict=True)]
    pulled = PpoLearner(str(tmp_path), str(tiny_dir), replace(SETTINGS, kl_coef=kl_coef, gamma=0.0, epochs=3))
    pulled.update(idle)
    there = [[0.0, *row] for row in pulled.probe_logprobs(ids)]
    before, after = spread(here, tiny_dir, batch), spread(there, tiny_dir, batch)
    if kl_coef:
        assert after < 0.95 * before
    else:
        assert after == pytest.approx(before, rel=1e-4)


def spread(rows: list[list[float]], reference: Path, batch: list[TrainingSample]) -> float:
    """Standard deviation of the log-ratio to the reference over sampled tokens."""
    ratios = [
        now - then
        for row, one in zip(rows, batch, strict=True)
        for now, then, own in zip(row, logprobs(reference, list(one.token_ids)), one.loss_mask, strict=True)
        if own
    ]
    return float(torch.tensor(ratios).std())


# --- bounds and invariances -----------------------------------------------------------------------


@slow
@pytest.mark.parametrize(("target_kl", "stops"), [(1e-4, True), (1e9, False)])
def test_an_update_stops_early_when_it_has_moved_enough(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None, target_kl: float, stops: bool
):
    metrics = (
        learner(tiny_dir, learning_rate=1e-2, epochs=6, limits=replace(OFF, max_kl=target_kl)).update(batch).metrics
    )
    assert metrics["stopped_early"] == float(stops)
    assert (metrics["num_optimizer_steps"] < 6) == stops


@slow
@pytest.mark.parametrize(("num_minibatches", "steps"), [(1, 1.0), (2, 2.0), (100, 8.0)])
def test_a_batch_is_split_into_at_most_so_many_steps(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None, num_minibatches: int, steps: float
):
    metrics = learner(tiny_dir, num_minibatches=num_minibatches, microbatch_tokens=1).update(batch).metrics
    assert metrics["num_optimizer_steps"] == steps


@slow
def test_what_a_tool_said_is_never_learned(tiny_dir: Path, batch: list[TrainingSample], process_group: None):
    """The engine's numbers on tokens the policy did not sample are junk and must not matter."""

    def with_junk(one: TrainingSample) -> TrainingSample:
        pairs = zip(one.rollout_logprobs, one.loss_mask, strict=True)
        return replace(one, rollout_logprobs=tuple(x if own else 99.0 for x, own in pairs))

    junk = [with_junk(one) for one in batch]
    clean, dirty = learner(tiny_dir), learner(tiny_dir)
    assert clean.update(batch).metrics == pytest.approx(dirty.update(junk).metrics)
    assert clean.probe_logprobs(PROBES) == dirty.probe_logprobs(PROBES)


# --- checkpoints ----------------------------------------------------------------------------------


@slow
def test_a_restored_learner_goes_on_as_if_nothing_had_happened(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None, tmp_path: Path
):
    changes = {"epochs": 2, "num_minibatches": 3, "microbatch_tokens": 40, "learning_rate": 3e-3}
    first = learner(tiny_dir, **changes)
    first.update(batch)
    first.save_checkpoint(str(tmp_path))
    expected = first.update(batch)

    second = learner(tiny_dir, **changes)
    second.load_checkpoint(str(tmp_path))
    assert second.weights_version == 1
    found = second.update(batch)
    assert found == expected
    assert second.probe_logprobs(PROBES) == first.probe_logprobs(PROBES)

    third = learner(tiny_dir, **changes)
    third.update(batch)
    assert third.update(batch) == expected, "two updates without a break are the same again"
    forgetful = learner(tiny_dir, **changes)
    forgetful.load_checkpoint(str(tmp_path))
    forgetful._rng.seed(999)
    assert forgetful.update(batch) != expected, "negative control: the order of minibatches is part of the state"


@slow
def test_a_saved_policy_is_the_policy(tiny_dir: Path, batch: list[TrainingSample], process_group: None, tmp_path: Path):
    one = learner(tiny_dir)
    one.update(batch)
    one.save_policy(str(tmp_path))
    for found, ids in zip(one.probe_logprobs(PROBES), PROBES, strict=True):
        assert found == pytest.approx(logprobs(tmp_path, ids)[1:], abs=1e-5)
        assert found != pytest.approx(logprobs(tiny_dir, ids)[1:], abs=1e-5)


# --- tripwires inside the update ------------------------------------------------------------------


def moved(one: PpoLearner, tiny_dir: Path) -> bool:
    """Whether the policy differs from where it started."""
    start: Any = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    return any(not torch.equal(one.weights()[name], tensor) for name, tensor in start.state_dict().items())


@slow
@pytest.mark.parametrize(
    "limits",
    [
        replace(OFF, max_grad_norm=1e-6),
        replace(OFF, max_mismatch_mean=0.0),
        replace(OFF, max_mismatch_max=0.0),
    ],
    ids=["grad_norm", "mismatch_mean", "mismatch_max"],
)
def test_a_step_that_trips_is_not_applied(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None, limits: StabilityLimits
):
    one = learner(tiny_dir, limits=limits)
    assert one.update(batch).weights_version == 1
    assert not moved(one, tiny_dir)
    free = learner(tiny_dir)
    free.update(batch)
    assert moved(free, tiny_dir), "negative control: without the limit the same batch moves the policy"


@slow
def test_a_poisoned_batch_moves_nothing_and_the_next_one_trains(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None
):
    """A discarded gradient must leave nothing behind: the update after it is the one a fresh learner takes."""
    one, fresh = learner(tiny_dir), learner(tiny_dir)
    poisoned = [replace(sample, reward=float("nan")) for sample in batch]
    one.update(poisoned)
    assert not moved(one, tiny_dir)
    assert one.update(batch).metrics["policy_loss"] == pytest.approx(fresh.update(batch).metrics["policy_loss"])
    for name, tensor in fresh.weights().items():
        assert torch.allclose(one.weights()[name], tensor, atol=1e-6), name


@slow
def test_a_poison_that_stays_asks_for_the_last_good_state_and_then_for_the_end(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None, tmp_path: Path
):
    one = learner(tiny_dir)
    one.save_checkpoint(str(tmp_path))
    poisoned = [replace(sample, reward=float("nan")) for sample in batch]
    for _ in range(2):
        assert [one.update(poisoned).restore_factor for _ in range(3)] == [0.0] * 3, "three skips in a row are borne"
        asked = one.update(poisoned)
        assert asked.restore_factor == 0.5
        assert asked.trips[-1].startswith("repeated_skips: consecutive_skips = 4, limit 3; non_finite: ")
        one.restore(str(tmp_path), asked.restore_factor)
    for _ in range(3):
        one.update(poisoned)
    with pytest.raises(InstabilityError, match=r"^repeated_restores: restores = 3, limit 2; repeated_skips"):
        one.update(poisoned)


@slow
def test_a_restore_brings_back_weights_and_optimizer_and_lowers_the_learning_rate(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None, tmp_path: Path
):
    one = learner(tiny_dir)
    one.update(batch)
    one.save_checkpoint(str(tmp_path))
    good = one.weights()
    for _ in range(2):
        one.update(batch)
    assert any(not torch.equal(good[name], tensor) for name, tensor in one.weights().items())
    one.restore(str(tmp_path), 0.5)
    assert all(torch.equal(good[name], tensor) for name, tensor in one.weights().items())
    assert one.weights_version == 3, "engines must see a version they have not seen"
    rates = [group["lr"] for group in one._engine.optimizer.param_groups]
    assert rates == pytest.approx([0.5e-3, 0.5e-2])
    one.restore(str(tmp_path), 0.5)
    assert one._engine.optimizer.param_groups[0]["lr"] == pytest.approx(0.25e-3), "a second cut comes on top"
    one.save_checkpoint(str(tmp_path / "later"))
    other = learner(tiny_dir)
    assert other.load_checkpoint(str(tmp_path / "later")) == ()
    assert other._engine.optimizer.param_groups[0]["lr"] == pytest.approx(0.25e-3), "and survives a resume"


@slow
def test_collapsed_entropy_asks_for_the_last_good_state(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None
):
    one = learner(tiny_dir, limits=replace(OFF, min_entropy=100.0))
    update = one.update(batch)
    assert (update.restore_factor, update.metrics["stopped_early"]) == (0.5, 1.0)
    assert update.trips[0].startswith("entropy_collapse: entropy = ")
    assert not moved(one, tiny_dir)


@slow
def test_a_parameter_that_the_optimizer_does_not_move_stops_the_run(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None
):
    """Steps too small for float32 stand for any reason why a parameter stays where it is."""
    with pytest.raises(InstabilityError, match=r"^parameter_not_trained: \d+ of \d+ trainable parameters did not move"):
        learner(tiny_dir, learning_rate=1e-30).update(batch)


@slow
@pytest.mark.parametrize("limits", [{"max_ratio": 1.001}, {"max_clip_fraction": 0.0}, {"max_kl": 1e-6}], ids=str)
def test_the_rest_of_an_update_is_dropped(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None, limits: dict[str, float]
):
    metrics = learner(tiny_dir, learning_rate=1e-2, epochs=6, limits=replace(OFF, **limits)).update(batch).metrics
    assert metrics["stopped_early"] == 1.0
    assert metrics["num_optimizer_steps"] < 6


# --- what there is nothing of ---------------------------------------------------------------------


@slow
def test_a_minibatch_in_which_nothing_trains_is_no_collapse(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None
):
    """Truncated rollouts alone, masked: no loss token, so no entropy either; nothing is stepped, and nothing trips."""
    one = learner(tiny_dir, recipe=Recipe(mask_truncated=True), limits=replace(OFF, min_entropy=0.0005))
    update = one.update([replace(item, truncated=True) for item in batch])
    assert (update.trips, update.restore_factor, update.metrics["num_optimizer_steps"]) == ((), 0.0, 0.0)
    assert not moved(one, tiny_dir)
    assert one.update([replace(item, weights_versions=(1,)) for item in batch]).metrics["num_optimizer_steps"] == 1.0


@slow
def test_only_steps_that_were_taken_are_counted(tiny_dir: Path, batch: list[TrainingSample], process_group: None):
    limits = replace(OFF, max_grad_norm=1e-9, max_consecutive_skips=99)
    skipped = learner(tiny_dir, limits=limits, num_minibatches=4).update(batch).metrics
    taken = learner(tiny_dir, num_minibatches=4).update(batch).metrics
    assert (skipped["num_optimizer_steps"], taken["num_optimizer_steps"]) == (0.0, 4.0)


@slow
@pytest.mark.parametrize(("changes", "moves"), [({}, True), ({"recipe": "warm"}, False), ({"limits": "tight"}, False)])
def test_the_kl_coefficient_adapts_only_when_the_policy_trained(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None, changes: dict[str, str], moves: bool
):
    recipe = Recipe(kl_target=0.01, kl_horizon=100.0, critic_warmup_updates=int("recipe" in changes))
    limits = replace(OFF, max_grad_norm=1e-9) if "limits" in changes else OFF
    one = learner(tiny_dir, kl_coef=0.1, recipe=recipe, limits=limits)
    one.update(batch)
    assert (one._kl.value != 0.1) is moves


@slow
@pytest.mark.parametrize("recipe", [Recipe(), Recipe(lora_rank=2)], ids=["own model", "adapters off"])
def test_a_reference_that_changes_in_memory_stops_the_run(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None, tmp_path: Path, recipe: Recipe
):
    one = learner(tiny_dir, recipe=recipe)
    one.update(batch)
    one.save_checkpoint(str(tmp_path / "before"))
    frozen = one._models._reference or one._models.policy
    with torch.no_grad():
        next(p for name, p in frozen.named_parameters() if name.endswith("mlp.experts.down_proj")).flatten()[0] += 1e-3
    for save in (one.save_checkpoint, one.save_policy):
        with pytest.raises(
            TamperedError, match=r"frozen reference changed in memory: 1 of \d+ parameters, .*down_proj"
        ):
            save(str(tmp_path / "after"))
    assert not (tmp_path / "after").exists()


def test_a_frozen_parameter_that_moved_is_named():
    before, after = {"a": (1.0, 1.0), "b": (2.0, 4.0)}, {"a": (1.5, 2.0), "b": (2.0, 4.1)}
    with pytest.raises(InstabilityError, match=r"^frozen_parameter_moved: 1 frozen parameters moved, b"):
        require_moved(before, after, trainable=["a"])
    require_moved(before, {**after, "b": before["b"]}, trainable=["a"])


@pytest.mark.parametrize("num_draws", [(0, 0), (92, 100), (3, 17)])
def test_ranks_take_their_minibatches_in_the_same_order(monkeypatch: pytest.MonkeyPatch, num_draws: tuple[int, int]):
    """However differently their own random states have moved on: collectives of a step must meet."""
    monkeypatch.setattr(
        ppo_learner_module, "global_counts", lambda part: GlobalCounts(num_loss_tokens=1, num_sequences=1)
    )
    orders = []
    for draws in num_draws:
        rank, seen = object.__new__(PpoLearner), list[Any]()
        rank._settings, rank.weights_version, rank._tripwires = replace(SETTINGS, epochs=3), 4, Tripwires(OFF)
        rank._rng = random.Random(0)
        rank._rng.shuffle(list(range(draws)))
        monkeypatch.setattr(rank, "_gradients", lambda part, counts, seen=seen: seen.append(part) or dict(HEALTHY))
        monkeypatch.setattr(rank, "_step", lambda norm: None)
        rank._epochs([[part] for part in "abcdef"], {})  # type: ignore[list-item]
        orders.append(seen)
    assert orders[0] == orders[1]
    assert len({tuple(map(str, orders[0][at : at + 6])) for at in (0, 6, 12)}) > 1, "and not always in the same one"
