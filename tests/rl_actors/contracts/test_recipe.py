"""Recipes: every shipped one is consistent, and choices that contradict each other are refused with the reason."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from rl_actors.contracts.errors import BadInputError
from rl_actors.contracts.recipe import RECIPES, Recipe, require_batch_choices

GROUP: dict[str, Any] = {"advantages": "rloo", "group_baseline": False, "value_clip": None, "kl_in": "loss"}


@pytest.mark.parametrize(
    ("choices", "field", "reason"),
    [
        ({"advantages": "grpoo"}, "advantages", "gae, grpo, dr_grpo, rloo"),
        ({"loss": "reinforce"}, "loss", "ppo, gspo, cispo"),
        ({"aggregation": "mean"}, "aggregation", "token_mean, sequence_mean, sequence_sum"),
        ({"kl_in": "advantage"}, "kl_in", "reward, loss"),
        ({"kl_kind": "k4"}, "kl_kind", "k1, k2, k3"),
        ({"clip_high": 0.0}, "clip_high", "must be positive"),
        ({"kl_kind": "k3"}, "kl_kind", "as a reward only k1 has the KL's gradient"),
        ({"correction": "tis"}, "correction", "token_tis"),
        ({**GROUP, "kl_in": "reward"}, "kl_in", "put the KL in the loss"),
        ({**GROUP, "group_baseline": True}, "group_baseline", "already compare attempts"),
        ({**GROUP, "value_clip": 0.2}, "value_clip", "no critic"),
        ({**GROUP, "critic_warmup_updates": 1}, "critic_warmup_updates", "no critic"),
        ({**GROUP, "bootstrap_truncated": True}, "bootstrap_truncated", "no critic"),
        ({"critic_warmup_updates": -1}, "critic_warmup_updates", "0 or more"),
        ({"bootstrap_truncated": True, "mask_truncated": True}, "bootstrap_truncated", "choose one of the two"),
        ({**GROUP, "advantages": "dr_grpo", "aggregation": "sequence_mean"}, "aggregation", "brings back the bias"),
        ({"loss": "gspo"}, "correction", "one ratio per sequence"),
        ({"loss": "gspo", "correction": "token_icepop"}, "correction", "one ratio per sequence"),
        ({"loss": "cispo", "dual_clip": 3.0}, "dual_clip", "already bounds"),
        ({"skip_old_pass": True}, "skip_old_pass", "critic's values"),
        ({"kl_target": 0.0}, "kl_target", "positive"),
        ({"kl_horizon": 0.0}, "kl_horizon", "positive"),
        ({"overlong_buffer": 20, "overlong_max": 10}, "overlong_buffer", "between 0 and overlong_max"),
        ({"overlong_buffer": -1}, "overlong_buffer", "between 0 and overlong_max"),
    ],
)
def test_contradictions_are_refused_with_the_reason(choices: dict[str, Any], field: str, reason: str):
    with pytest.raises(BadInputError, match=re.escape(reason)) as caught:
        Recipe(**choices)
    assert caught.value.field == f"recipe.{field}"


@pytest.mark.parametrize(
    "choices",
    [
        GROUP,
        {"loss": "gspo", "correction": "sequence_tis"},
        {"kl_in": "loss"},
        {"bootstrap_truncated": True},
        {**GROUP, "skip_old_pass": True},
        {**GROUP, "advantages": "dr_grpo", "aggregation": "sequence_sum"},
        {"overlong_buffer": 10, "overlong_max": 10, "kl_target": 0.1},
    ],
)
def test_what_goes_together_is_taken(choices: dict[str, Any]):
    assert Recipe(**choices)


def test_the_default_is_ppo_kl_and_only_it_has_a_critic():
    assert RECIPES["ppo_kl"] == Recipe()
    assert [name for name, recipe in RECIPES.items() if recipe.has_critic] == ["ppo_kl"]


@pytest.mark.parametrize(
    ("recipe", "changes", "field"),
    [
        (Recipe(kl_target=0.1), {"kl_coef": 0.0}, "recipe.kl_target"),
        (Recipe(**GROUP, skip_old_pass=True), {"epochs": 2}, "recipe.skip_old_pass"),
        (Recipe(**GROUP, skip_old_pass=True), {"num_minibatches": 2}, "recipe.skip_old_pass"),
        (Recipe(kl_target=0.1, kl_horizon=20.0), {"num_rollouts": 100}, "recipe.kl_horizon"),
        (Recipe(**GROUP), {"group_size": 1}, "ppo.rollouts_per_task"),
    ],
)
def test_the_batch_must_suit_the_recipe(recipe: Recipe, changes: dict[str, Any], field: str):
    fitting = {"kl_coef": 0.1, "epochs": 1, "num_minibatches": 1, "group_size": 4, "num_rollouts": 16}
    require_batch_choices(recipe, **fitting)
    with pytest.raises(BadInputError) as caught:
        require_batch_choices(recipe, **(fitting | changes))
    assert caught.value.field == field


def test_recipes_are_known_without_loading_torch():
    """A spec is validated in a fraction of a second; torch alone takes seconds to import."""
    code = "import sys, rl_actors.contracts.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
