"""k steps, a checkpoint, new objects, k more steps: the whole loop is that of 2k steps, bit for bit.

The real loop, learner and DeepSpeed engine; the relay game plays in process, so that rollouts repeat. The steps cross
the end of the task list, each trains two epochs, and the KL coefficient adapts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import learning_proof
import pytest
import token_game
import torch
from game_loop import GameLoop
from game_sampler import GameSampler, ReferenceSpec, make_reference

from rl_actors.algorithms.stability import StabilityLimits
from rl_actors.contracts.recipe import RECIPES, Recipe
from rl_actors.learner.update import PpoLearner
from rl_actors.training.ppo import PpoSchedule, run_ppo

pytestmark = pytest.mark.slow
torch.set_num_threads(1)
K = 5  # the reward-outcome watch compares steps 1-4 with the latest four: it speaks from step 8 on
PLAN = PpoSchedule(num_steps=2 * K, tasks_per_step=3, rollouts_per_task=4, checkpoint_every=K, seed=7)
TASKS = token_game.tasks(7)[:7]  # the list ends within step 3, 5, 7, 10
RUNS = {
    "ppo_kl": replace(RECIPES["ppo_kl"], kl_target=0.05, kl_horizon=50.0),
    "grpo": replace(RECIPES["grpo"], kl_target=0.05, kl_horizon=50.0),
}
CLOCK = ("generate_s", "score_s", "train_s", "sync_s", "tokens_per_s")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    spec = ReferenceSpec(skill=0.5, hidden_size=32, num_layers=1, num_steps=60)
    return make_reference(tmp_path_factory.mktemp("relay") / "reference", seed=0, spec=spec)


def loop_of(model: str, directory: Path, recipe: Recipe) -> GameLoop:
    settings = replace(learning_proof.SETTINGS, recipe=recipe, epochs=2, num_minibatches=2, kl_coef=0.05)
    return GameLoop(learner=PpoLearner(model, model, settings), sampler=GameSampler(model), checkpoints=directory)


def run(loop: GameLoop, **changes: Any) -> GameLoop:
    limits = StabilityLimits(max_kl=None, max_ratio=None, max_clip_fraction=None, max_reward_outcome_divergence=None)
    run_ppo(TASKS, PLAN, loop.ports(), limits, **changes)
    return loop


@pytest.fixture(scope="module", params=RUNS)
def undisturbed(
    request: pytest.FixtureRequest, model: str, tmp_path_factory: pytest.TempPathFactory, process_group: None
) -> tuple[Recipe, GameLoop]:
    recipe = RUNS[request.param]
    return recipe, run(loop_of(model, tmp_path_factory.mktemp("whole"), recipe))


def resumed(
    model: str,
    recipe: Recipe,
    checkpoints: Path,
    spoil: Callable[[GameLoop], None] = lambda _loop: None,
    **changes: Any,
) -> GameLoop:
    """Continue after step K with objects that have seen nothing of the first K steps."""
    loop = loop_of(model, checkpoints, recipe)
    state = loop.resume(K)
    spoil(loop)
    return run(loop, **{"start": K, "loop_state": state, **changes})


def untimed(rows: list[dict[str, float]]) -> list[Mapping[str, float]]:
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


def same_weights(one: GameLoop, other: GameLoop) -> bool:
    first, second = one.learner.weights(), other.learner.weights()
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_k_and_k_steps_are_two_k_steps(model: str, undisturbed: tuple[Recipe, GameLoop]):
    recipe, whole = undisturbed
    end = whole.checkpoints / f"step-{2 * K:05d}" / "loop_state.json"
    expected = json.loads(end.read_text(encoding="utf8"))
    again = resumed(model, recipe, whole.checkpoints)
    assert untimed(again.rows) == untimed(whole.rows[K:])
    assert same_weights(again, whole)
    assert again.learner.weights_version == whole.learner.weights_version == 2 * K
    assert json.loads(end.read_text(encoding="utf8")) == expected
    assert len({row["kl_coef"] for row in whole.rows}) == 2 * K, "the coefficient was on the move"
    assert any(row["reward_outcome_divergence"] for row in again.rows), "and so was the watch"


def test_other_random_numbers_are_another_run(model: str, undisturbed: tuple[Recipe, GameLoop]):
    """Negative control: the order of minibatches is part of the state."""
    recipe, whole = undisturbed
    again = resumed(model, recipe, whole.checkpoints, lambda loop: loop.learner._rng.seed(99))
    assert not same_weights(again, whole)


def test_another_coefficient_is_another_run(model: str, undisturbed: tuple[Recipe, GameLoop]):
    """Negative control: so is the KL coefficient."""
    recipe, whole = undisturbed
    again = resumed(model, recipe, whole.checkpoints, lambda loop: setattr(loop.learner._kl, "value", 0.05))
    assert not same_weights(again, whole)


def test_without_the_loops_own_state_the_watch_begins_anew(model: str, undisturbed: tuple[Recipe, GameLoop]):
    """Negative control: the weights are the same then, the warning is not."""
    recipe, whole = undisturbed
    again = resumed(model, recipe, whole.checkpoints, loop_state=None)
    assert same_weights(again, whole)
    assert not any(row["reward_outcome_divergence"] for row in again.rows)
