"""What trains and what it is held near: adapters, replayed or frozen routers, bfloat16 with float32 masters."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rl_actors.contracts.errors import BadInputError, InstabilityError
from rl_actors.contracts.recipe import Recipe
from rl_actors.contracts.rollouts import Routes, TrainingSample
from rl_actors.learner import tripwires
from rl_actors.learner.update import LearnerModels, PpoLearner
from rl_actors.models.experts import record_routes
from rl_actors.models.loading import build_tiny_model, tiny_config
from tests.rl_actors.learner.test_update import PROBES, learner, logprobs, sample

pytestmark = pytest.mark.slow
LORA = Recipe(lora_rank=4)


@pytest.fixture(scope="module")
def batch(tiny_dir: Path) -> list[TrainingSample]:
    """On-policy samples, half of them rewarded."""
    made = [sample(number, 12 + number, float(number % 2)) for number in range(8)]
    return [replace(one, rollout_logprobs=tuple(logprobs(tiny_dir, list(one.token_ids)))) for one in made]


@pytest.fixture(scope="module")
def routed_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose routers have a choice: two of eight experts."""
    directory = tmp_path_factory.mktemp("routed")
    config = tiny_config(vocab_size=330, hidden_size=64, num_layers=2, num_experts=8, max_length=512, eos_token_id=2)
    build_tiny_model(config, seed=1).save_pretrained(directory)
    return directory


def changed(one: PpoLearner, before: dict[str, torch.Tensor]) -> set[str]:
    after = one.weights()
    assert after.keys() == before.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


# --- adapters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_adapters_learn_and_what_is_published_is_the_whole_model(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None, tmp_path: Path, stage: int
):
    one = learner(tiny_dir, recipe=LORA, zero_stage=stage)
    before = one.weights()
    metrics = [one.update(batch).metrics for _ in range(3)]
    assert metrics[0]["kl_to_reference"] == pytest.approx(0.0, abs=1e-6), "before a step, policy and reference agree"
    assert abs(metrics[2]["kl_to_reference"]) > 1e-4, "afterwards the reference is still the frozen model"
    moved = changed(one, before)
    assert moved == {name for name in before if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight",
                                                               "o_proj.weight"))}  # fmt: skip
    one.save_policy(str(tmp_path))
    for found, expected in zip(one.probe_logprobs(PROBES), PROBES, strict=True):
        assert found == pytest.approx(logprobs(tmp_path, expected)[1:], abs=1e-4)


def test_a_checkpoint_of_adapters_goes_on_bit_for_bit(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None, tmp_path: Path
):
    first = learner(tiny_dir, recipe=LORA)
    first.update(batch)
    first.save_checkpoint(str(tmp_path))
    second = learner(tiny_dir, recipe=LORA)
    assert second.load_checkpoint(str(tmp_path)) == ()
    assert first.update(batch).metrics == second.update(batch).metrics
    assert not changed(first, second.weights())


def test_adapters_on_another_model_than_the_reference_are_refused(tiny_dir: Path, tmp_path: Path):
    shutil.copytree(tiny_dir, tmp_path / "other")
    with pytest.raises(BadInputError, match=r"recipe\.lora_rank = 4: with adapters the reference is the policy"):
        LearnerModels(str(tiny_dir), str(tmp_path / "other"), LORA)


def test_an_adapter_that_never_moves_is_seen(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None, monkeypatch: pytest.MonkeyPatch
):
    """A waits for B by one step; judged after the first, or never reached, it must be named."""
    monkeypatch.setattr(Recipe, "steps_to_move_all", property(lambda _self: 1))
    with pytest.raises(InstabilityError, match=r"parameter_not_trained: 8 of 16 .*lora_A"):
        learner(tiny_dir, recipe=LORA).update(batch)


# --- routers ----------------------------------------------------------------------------------------


def test_replayed_routes_change_nothing_while_the_weights_have_not_moved(
    routed_dir: Path, batch: list[TrainingSample], process_group: None
):
    plain, replayed = (
        learner(routed_dir, recipe=recipe).update(batch).metrics for recipe in (Recipe(), Recipe(routing="replay"))
    )
    assert (replayed.pop("route_agreement"), replayed.pop("engine_routes_fraction")) == (1.0, 0.0)
    assert replayed == plain


def test_once_weights_moved_routes_are_those_of_the_old_pass(
    routed_dir: Path, batch: list[TrainingSample], process_group: None
):
    free, replayed = (
        learner(routed_dir, recipe=Recipe(routing=routing), epochs=4, learning_rate=1e-2).update(batch).metrics
        for routing in ("free", "replay")
    )
    assert 0.5 < replayed["route_agreement"] < 1.0, "the router would by now choose others"
    assert replayed["ratio_mean"] != free["ratio_mean"], "and the ratio is that of the old ones"


def recorded(one: PpoLearner, batch: list[TrainingSample], *, shift: int = 0) -> list[TrainingSample]:
    """The samples as an engine's that records routes: those of this learner's policy, or `shift` experts further."""
    found = []
    for item in batch:
        ids = torch.tensor([item.token_ids])
        with torch.no_grad(), record_routes(one._models.policy) as routes:
            one._models.policy(input_ids=ids, attention_mask=torch.ones_like(ids))
        experts_TLK = ((routes.joined()[:, 0, :-1] + shift) % 8).permute(1, 0, 2)
        flat = tuple(experts_TLK.flatten().tolist())
        found.append(replace(item, routes=Routes(num_layers=2, top_k=2, experts=flat)))
    return found


def test_an_engines_routes_equal_to_the_learners_change_nothing(
    routed_dir: Path, batch: list[TrainingSample], process_group: None
):
    plain, one = learner(routed_dir), learner(routed_dir, recipe=Recipe(routing="replay"))
    expected, found = plain.update(batch).metrics, one.update(recorded(one, batch)).metrics
    assert (found.pop("route_agreement"), found.pop("engine_routes_fraction")) == (1.0, 1.0)
    assert found == expected


def test_an_engines_other_routes_are_taken_in_both_passes(
    routed_dir: Path, batch: list[TrainingSample], process_group: None
):
    """Negative control: with experts the router would not choose, logprobs are others, and the ratio is still 1."""
    one = learner(routed_dir, recipe=Recipe(routing="replay"), epochs=1, num_minibatches=1)
    own = learner(routed_dir, recipe=Recipe(routing="replay"), epochs=1, num_minibatches=1).update(batch).metrics
    found = one.update(recorded(one, batch, shift=1)).metrics
    assert found["route_agreement"] < 0.6
    assert own["kl_to_reference"] == pytest.approx(0.0, abs=1e-6)
    assert abs(found["kl_to_reference"]) > 1e-4, "the reference is free to route as it does"
    assert found["ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert own["engine_routes_fraction"] == 0.0


def test_frozen_routers_stay_and_all_else_moves(tiny_dir: Path, batch: list[TrainingSample], process_group: None):
    one = learner(tiny_dir, recipe=Recipe(routing="frozen"))
    before = one.weights()
    one.update(batch)
    assert before.keys() - changed(one, before) == {name for name in before if ".router." in name}


@pytest.mark.parametrize("routing", ["replay", "frozen"])
def test_a_model_without_experts_has_no_routes_to_keep(tmp_path: Path, routing: Any):
    config = Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=1, num_key_value_heads=1, head_dim=32)  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(BadInputError, match=f"recipe.routing = '{routing}': the model has no experts"):
        LearnerModels(str(tmp_path), str(tmp_path), Recipe(routing=routing))
    assert LearnerModels(str(tmp_path), str(tmp_path), Recipe()).trainable()


# --- bfloat16 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 3])
def test_bfloat16_weights_have_float32_masters_that_keep_small_steps(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None, stage: int
):
    """A step of 1e-4 on a weight of 1 is lost in bfloat16 (half a unit there is 2e-3); eight of them are kept."""
    from deepspeed.utils import safe_get_full_fp32_param

    one = learner(tiny_dir, is_bf16=True, zero_stage=stage, learning_rate=1e-4)
    metrics = [one.update(batch).metrics for _ in range(8)]
    assert metrics[0]["kl_to_reference"] == 0.0, "policy and reference are in the same precision"
    weight = one._models.policy.model.norm.weight
    assert weight.dtype == torch.bfloat16
    master = safe_get_full_fp32_param(weight)
    assert master is not None
    assert master.dtype == torch.float32
    assert 3e-4 < float((master - 1.0).abs().max()) < 1e-3
    assert set(one.weights()["model.norm.weight"].float().tolist()) == {1.0}, "the published copy does not show it yet"
    assert metrics[0]["grad_norm"] == pytest.approx(learner(tiny_dir).update(batch).metrics["grad_norm"], rel=0.05)


def test_the_check_of_the_first_step_looks_at_the_masters(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None, monkeypatch: pytest.MonkeyPatch
):
    """Negative control: looking at bfloat16 weights, it would stop every run at its first step."""
    learner(tiny_dir, is_bf16=True, learning_rate=1e-4).update(batch)
    monkeypatch.setattr(tripwires, "_stepped", lambda parameter: parameter)
    with pytest.raises(InstabilityError, match="parameter_not_trained"):
        learner(tiny_dir, is_bf16=True, learning_rate=1e-4).update(batch)


def test_a_bfloat16_checkpoint_goes_on_bit_for_bit(
    tiny_dir: Path, batch: list[TrainingSample], process_group: None, tmp_path: Path
):
    first = learner(tiny_dir, is_bf16=True)
    first.update(batch)
    first.save_checkpoint(str(tmp_path))
    second = learner(tiny_dir, is_bf16=True)
    assert second.load_checkpoint(str(tmp_path)) == ()
    assert first.update(batch).metrics == second.update(batch).metrics
