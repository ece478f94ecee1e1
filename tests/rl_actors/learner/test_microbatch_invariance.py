"""However a batch is cut into microbatches, every recipe takes the same update: same metrics, same weights.

Two epochs, with an engine that is off and a reference of its own, so that ratios, clips, corrections and KL all count.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_actors.contracts.recipe import RECIPES, Recipe
from rl_actors.contracts.rollouts import TrainingSample
from rl_actors.learner import batch as ppo_batch
from rl_actors.learner import update as ppo_learner
from rl_actors.learner.batch import Microbatch, Minibatch
from rl_actors.learner.objective import GlobalCounts, global_counts, microbatch_loss
from rl_actors.learner.update import PpoLearner
from rl_actors.models.attachments import TokenOutputs
from tests.rl_actors.fakes import save_tiny_model
from tests.rl_actors.learner.test_update import SETTINGS, logprobs, sample

pytestmark = pytest.mark.slow
# Of unlike length: microbatches then hold unlike numbers of tokens and of sequences, which a mean must weigh.
LENGTHS = (10, 40, 13, 26, 27, 12, 11, 41)
WHOLE, CUT = 4096, max(LENGTHS)
SOFT = 20.0  # temperature: the untrained model is so sure of itself that log-probabilities of -50 would round coarsely
TIGHT = replace(
    SETTINGS, temperature=SOFT, learning_rate=3.0, max_grad_norm=1e9, kl_coef=0.1, epochs=2, clip_low=0.02,
    clip_high=0.02,
)  # fmt: skip
# Adam's first step is g / (|g| + eps): where g is nearly 0 it makes rounding as large as a gradient, and it hides a
# gradient of the wrong scale. With an eps of 1 it is smooth and nearly proportional to g.
SMOOTH_EPS = 1.0
# Sums in another order, in float32: over 20 random batches of each recipe metrics differed by at most 4e-7 absolutely
# or 1.2e-6 relatively, whichever is milder, and a parameter's move by 5.1e-7 of the norm of all moves.
METRICS_REL, METRICS_ABS = 5e-6, 1e-6
MOVES = 2e-6


@dataclass(frozen=True)
class Taken:
    """One update: its metrics, how far each parameter moved, critic included, and the microbatches of its last step."""

    metrics: dict[str, float]
    moves: dict[str, Tensor]
    num_sequences: tuple[int, ...]


Take = Callable[[str, int], Taken]
"""Name of a recipe and a token budget, to the update."""


def sequences_of(part: Minibatch) -> tuple[int, ...]:
    return tuple(int(batch.inputs.loss_mask_BT.any(-1).sum()) for batch in part)


def taken(one: PpoLearner, batch: list[TrainingSample], token_budget: int) -> Taken:
    """Take one update; with a budget for all samples they are one microbatch, however much of it is padding."""
    for group in one._engine.optimizer.param_groups:
        group["eps"] = SMOOTH_EPS
    parts = list[Minibatch]()
    before = {name: tensor.detach().clone() for name, tensor in one._models.module.named_parameters()}
    with pytest.MonkeyPatch.context() as patch:
        if token_budget == WHOLE:
            patch.setattr(ppo_batch, "MAX_WASTE_FRACTION", 0.99)
        gradients = one._gradients
        patch.setattr(one, "_gradients", lambda part, counts: parts.append(part) or gradients(part, counts))
        metrics = one.update(batch).metrics
    moves = {name: tensor.detach() - before[name] for name, tensor in one._models.module.named_parameters()}
    return Taken(dict(metrics), moves, sequences_of(parts[-1]))


def differences(one: Taken, other: Taken) -> set[str]:
    """Names of the metrics and parameters that are not the same; a move is held against the norm of all of them."""
    assert (one.metrics.keys(), one.moves.keys()) == (other.metrics.keys(), other.moves.keys())
    expected = {name: pytest.approx(value, rel=METRICS_REL, abs=METRICS_ABS) for name, value in other.metrics.items()}
    found = {name for name, value in one.metrics.items() if value != expected[name]}
    norm = torch.nn.utils.get_total_norm(list(one.moves.values()))
    return found | {name for name, move in one.moves.items() if (move - other.moves[name]).norm() > MOVES * norm}


@pytest.fixture(scope="module")
def batch(tiny_dir: Path) -> list[TrainingSample]:
    """Four groups of two attempts, all rewarded differently, one truncated; the engine is up to 0.6 nats off."""
    rng = random.Random(0)
    made = [sample(n, length, n % 2 + 0.1 * n) for n, length in enumerate(LENGTHS)]
    made = [replace(one, group_id=n // 2, succeeded=n % 2 > 0, truncated=n == 3) for n, one in enumerate(made)]
    rows = [logprobs(tiny_dir, list(one.token_ids), SOFT) for one in made]
    off = [tuple(value + rng.uniform(-0.6, 0.6) for value in row) for row in rows]
    return [replace(one, rollout_logprobs=row) for one, row in zip(made, off, strict=True)]


@pytest.fixture(scope="module")
def fresh(
    tiny_dir: Path, process_group: None, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Recipe, int], PpoLearner]:
    """Makes a learner whose reference is another model than its policy."""
    reference = str(save_tiny_model(tmp_path_factory.mktemp("reference"), seed=2))

    def make(recipe: Recipe, token_budget: int) -> PpoLearner:
        return PpoLearner(str(tiny_dir), reference, replace(TIGHT, recipe=recipe, microbatch_tokens=token_budget))

    return make


@pytest.fixture(scope="module")
def take(batch: list[TrainingSample], fresh: Callable[[Recipe, int], PpoLearner]) -> Take:
    """Takes each update once for all tests."""
    return cache(lambda name, token_budget: taken(fresh(RECIPES[name], token_budget), batch, token_budget))


@pytest.mark.parametrize("name", RECIPES)
def test_one_microbatch_or_several_is_the_same_update(take: Take, name: str):
    whole, cut = take(name, WHOLE), take(name, CUT)
    assert len(whole.num_sequences) == 1
    assert len(set(cut.num_sequences)) > 1, "several, and of unlike size"
    assert sum(cut.num_sequences) == sum(whole.num_sequences) == len(LENGTHS) - RECIPES[name].mask_truncated
    assert differences(whole, cut) == set()


@pytest.mark.parametrize("name", RECIPES)
def test_the_update_that_is_compared_uses_all_of_the_recipe(take: Take, name: str):
    """What is 0 everywhere is the same however it is cut: clips, KL, corrections and moves must be there."""
    whole = take(name, WHOLE)
    used = {"clip_fraction", "approx_kl", "kl_to_reference", "mismatch_abs_mean", "policy_loss"}
    used.add("value_loss" if RECIPES[name].has_critic else "kl_loss")
    assert {metric for metric in used if abs(whole.metrics[metric]) < 1e-4} == set()
    assert all(move.any() for move in whole.moves.values())


# --- negative control -------------------------------------------------------------------------------

ONE_OF_EACH_AGGREGATION = {RECIPES[name].aggregation: name for name in reversed(list(RECIPES))}


def mean_of_means(num_parts: int) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """The mistake: each microbatch divides by its own counts, and the step by the number of microbatches."""

    def loss(
        outputs: TokenOutputs, batch: Microbatch, counts: GlobalCounts, *settings: Any, **state: Any
    ) -> tuple[Tensor, dict[str, float]]:
        own = global_counts([batch])
        tokens, sequences = own.num_loss_tokens * num_parts, own.num_sequences * num_parts
        local = GlobalCounts(num_loss_tokens=tokens, num_sequences=sequences)
        return microbatch_loss(outputs, batch, local, *settings, **state)

    return loss


@pytest.mark.parametrize("name", ONE_OF_EACH_AGGREGATION.values(), ids=ONE_OF_EACH_AGGREGATION)
def test_a_mean_over_each_microbatch_alone_is_another_update(
    take: Take,
    fresh: Callable[[Recipe, int], PpoLearner],
    batch: list[TrainingSample],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
):
    for budget in (WHOLE, CUT):
        right = take(name, budget)
        monkeypatch.setattr(ppo_learner, "microbatch_loss", mean_of_means(len(right.num_sequences)))
        found = differences(right, taken(fresh(RECIPES[name], budget), batch, budget))
        assert ("policy_loss" in found) == (budget == CUT), "of one microbatch the local mean is the global one"
        assert bool(found & right.moves.keys()) == (budget == CUT)
