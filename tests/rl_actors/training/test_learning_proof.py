"""The relay game's numbers against exhaustive search, and the real loop and learner on it: they learn, repeat, stop."""

from __future__ import annotations

import io
import json
import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import learning_proof
import pytest
import token_game
import torch
from game_loop import GameLoop
from game_sampler import GameSampler, ReferenceSpec, fill_sinks, make_reference
from learning_proof import Run
from learning_proof_report import print_report, save_plot
from rich.console import Console
from token_game import LOOK, LOOK_WORKS, NUM_TURNS, SAY, SYMBOLS, Luck, Move, World

from rl_actors.agent.rollout import training_sample
from rl_actors.algorithms.stability import StabilityLimits
from rl_actors.contracts.errors import AttestationError, InstabilityError
from rl_actors.contracts.recipe import RECIPES
from rl_actors.learner.update import PpoLearner
from rl_actors.models.loading import load_causal_lm
from rl_actors.training.ppo import PpoSchedule, requests_for_step, run_ppo

torch.set_num_threads(1)
slow = pytest.mark.slow
SPEC = ReferenceSpec(skill=0.5, hidden_size=32, num_layers=1, num_steps=60)
PLAN = PpoSchedule(num_steps=3, tasks_per_step=4, rollouts_per_task=4, checkpoint_every=100, seed=3)

# --- the game, by exhaustive search over the real rules -------------------------------------------

Case = tuple[World, Luck]
Cases = Sequence[tuple[float, Case]]
"""Everything that may still be true, with its probability."""


def every_case() -> Cases:
    """All worlds and all luck with the looks; junk is drawn without regard to the world and is left out."""
    nothing: tuple[Move, Move] = ((), ())
    found = []
    for world, works in product(token_game.worlds(), product((True, False), repeat=2)):
        chance = math.prod(LOOK_WORKS if each else 1 - LOOK_WORKS for each in works)
        luck = Luck(works=(works[0], works[1]), junk=(nothing, nothing))
        found.append((chance / len(token_game.worlds()), (world, luck)))
    return found


def by_sight(cases: Cases, see: Callable[[Case], Move]) -> Mapping[Move, Cases]:
    """Split what may be true by what the player would see."""
    found = defaultdict(list)
    for chance, case in cases:
        found[see(case)].append((chance, case))
    return found


def search(cases: Cases, turn: int, ids: Move, choose: Callable[[Move, Mapping[Move, float]], float]) -> float:
    """Value of the position before `turn`, times the probability of what may be true; `choose` values the moves."""

    def worth(move: Move) -> float:
        if turn == NUM_TURNS - 1:
            return sum(chance for chance, (world, _) in cases if token_game.is_solved(world, move))
        seen = by_sight(cases, lambda case: token_game.tool_answer(*case, turn, move))
        return sum(search(rest, turn + 1, (*ids, *move, *answer), choose) for answer, rest in seen.items())

    mass = sum(chance for chance, _ in cases)
    moves = [(verb, symbol) for verb in (LOOK, SAY) for symbol in SYMBOLS]
    return mass * choose(ids, {move: worth(move) / mass for move in moves})


def value_of_game(choose: Callable[[Move, Mapping[Move, float]], float]) -> float:
    prompts = by_sight(every_case(), lambda case: token_game.prompt(case[0]))
    return sum(search(cases, 0, ids, choose) for ids, cases in prompts.items())


def reference(ids: Move, move: Move, skill: float) -> float:
    """Probability of a move under the demonstrator, by its definition."""
    turn = ids.count(token_game.TOOL)
    if move[0] != (SAY if turn == NUM_TURNS - 1 else LOOK):
        return 0.0
    shown = token_game.last_shown(ids)
    sober = 1 / len(SYMBOLS) if shown is None else float(move[1] == shown)
    return skill * sober + (1 - skill) / len(SYMBOLS)


def test_no_player_beats_the_optimum():
    assert value_of_game(lambda _ids, worth: max(worth.values())) == pytest.approx(token_game.optimum(), abs=1e-12)


@pytest.mark.parametrize("skill", [0.0, 0.5])
def test_the_demonstrator_is_worth_what_the_formula_says(skill: float):
    right = token_game.demonstrator_right(skill)
    found = value_of_game(lambda ids, worth: sum(reference(ids, move, skill) * worth[move] for move in worth))
    assert found == pytest.approx(token_game.expected_reward(first=right, second=right, third=right), abs=1e-12)


@pytest.mark.parametrize("skill", [0.0, 0.5])
@pytest.mark.parametrize("coefficient", [0.01, 0.1, 0.3, 3.0])
def test_no_player_beats_the_optimum_on_the_leash(skill: float, coefficient: float):
    def soft(ids: Move, worth: Mapping[Move, float]) -> float:
        terms = [reference(ids, move, skill) * math.exp(value / coefficient) for move, value in worth.items()]
        return coefficient * math.log(sum(terms))

    best = token_game.leashed_optimum(coefficient, skill)
    assert value_of_game(soft) == pytest.approx(best.reward - coefficient * best.kl, abs=1e-9)


def test_the_leash_leads_from_the_optimum_to_the_reference():
    found = [token_game.leashed_optimum(coefficient, 0.0) for coefficient in (1e-3, 0.03, 0.1, 0.3, 1.0, 1e6)]
    assert [one.kl for one in found] == sorted((one.kl for one in found), reverse=True)
    assert found[0].reward == pytest.approx(token_game.optimum())
    assert (found[-1].reward, found[-1].kl) == (pytest.approx(0.25, abs=1e-4), pytest.approx(0.0, abs=1e-6))


def test_a_demonstrator_of_skill_one_takes_what_is_shown():
    games = token_game.demonstrations(random.Random(0), skill=1.0)
    lengths = set()
    for _ in range(500):
        ids, mask = (game := next(games)).token_ids, game.is_chosen
        symbols = [place for place, own in enumerate(mask) if own and mask[place - 1]]
        shown = [token_game.last_shown(ids[: place - 1]) for place in symbols]
        assert all(seen in (ids[place], None) for seen, place in zip(shown, symbols, strict=True))
        lengths.add(len(ids))
    assert max(lengths) <= token_game.MAX_LENGTH
    assert len(lengths) > 3, "junk varies in number"


# --- the loop -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_reference(tmp_path_factory.mktemp("relay"), seed=100, spec=SPEC)


def loop_of(model: str, directory: Path, *, recipe: str = "grpo", **changes: Any) -> GameLoop:
    settings = replace(learning_proof.SETTINGS, recipe=RECIPES[recipe], **changes)
    return GameLoop(learner=PpoLearner(model, model, settings), sampler=GameSampler(model), checkpoints=directory)


def train(loop: GameLoop, *, limits: StabilityLimits | None = None, **changes: Any) -> GameLoop:
    run_ppo(token_game.tasks(3), replace(PLAN, **changes), loop.ports(), limits or StabilityLimits())
    return loop


@slow
def test_only_what_the_policy_sampled_trains(model: str, tmp_path: Path, process_group: None):
    """Neither prompt nor tool tokens: what the engine would say of them changes no bit of the weights."""
    rollouts = GameSampler(model).rollouts(requests_for_step(token_game.tasks(3), PLAN, 0), 1.0)
    samples = [training_sample(one, float(one.outcome.success)) for one in rollouts]
    bent = []
    for sample, rollout in zip(samples, rollouts, strict=True):
        sampled = tuple(token for token, own in zip(sample.token_ids, sample.loss_mask, strict=True) if own)
        assert sampled == tuple(token for turn in rollout.turns for token in turn.completion.token_ids)
        assert sample.token_ids.count(token_game.TOOL) >= NUM_TURNS - 1
        pairs = zip(sample.rollout_logprobs, sample.loss_mask, strict=True)
        bent.append(replace(sample, rollout_logprobs=tuple(x if own else -9.0 for x, own in pairs)))
    same, other = (loop_of(model, tmp_path / name).learner for name in "ab")
    assert same.update(samples).metrics == other.update(bent).metrics
    assert all(torch.equal(x, other.weights()[name]) for name, x in same.weights().items())


@slow
@pytest.mark.parametrize("recipe", learning_proof.PROOF_RECIPES)
def test_the_same_seed_gives_the_same_run_bit_for_bit(model: str, tmp_path: Path, process_group: None, recipe: str):
    first, second = (train(loop_of(model, tmp_path / name, recipe=recipe)) for name in "ab")
    rows = [
        [{name: x for name, x in row.items() if not name.endswith("_s")} for row in loop.rows]
        for loop in (first, second)
    ]
    assert rows[0] == rows[1]
    weights = second.learner.weights()
    assert all(torch.equal(x, weights[name]) for name, x in first.learner.weights().items())
    other = train(loop_of(model, tmp_path / "c", recipe=recipe), seed=4)
    assert other.rows[0]["policy_loss"] != first.rows[0]["policy_loss"], "negative control: another seed is another run"


@slow
def test_a_batch_of_any_size_samples_the_same_games(model: str):
    requests = requests_for_step(token_game.tasks(3), PLAN, 0)
    sampler = GameSampler(model)
    together = sampler.rollouts(requests, 1.0)
    apart = [one for request in requests for one in sampler.rollouts([request], 1.0)]
    ids = [[turn.completion.token_ids for turn in rollout.turns] for rollout in together]
    assert ids == [[turn.completion.token_ids for turn in rollout.turns] for rollout in apart]


@slow
def test_a_quick_run_improves_and_is_written_down(tmp_path: Path, process_group: None, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["learning_proof.py", "--quick", "--only", "proof", "--out", str(out)])
    learning_proof.main()
    found = json.loads(out.read_text(encoding="utf8"))
    assert {"date", "commit", "hardware"} <= set(found)
    assert found["budget"]["rollouts"] == 512
    for row in found["experiments"]["proof"].values():
        assert row["steps"] == [8]
        assert row["sampled"][0] > row["curves"]["success"][0] + 0.2


@slow
def test_an_engine_with_other_sinks_is_refused(model: str, tmp_path: Path, process_group: None):
    loop = loop_of(model, tmp_path)
    loop.sampler = GameSampler(model, keeps_sinks=True)
    fill_sinks(loop.sampler._model, 3.0)
    with pytest.raises(AttestationError, match="the sampler does not serve weights version 1"):
        train(loop)


@slow
def test_a_learner_whose_sinks_get_no_gradient_is_refused(model: str, tmp_path: Path, process_group: None):
    """Sinks at minus infinity are dropped sinks: the check of the first step names them."""
    lost: Any = load_causal_lm(model)
    fill_sinks(lost, -1e9)
    lost.save_pretrained(tmp_path / "lost")
    with pytest.raises(InstabilityError, match=r"^parameter_not_trained: .*sinks"):
        train(loop_of(str(tmp_path / "lost"), tmp_path))


@slow
def test_a_reward_that_pays_for_flattery_stops_the_run(model: str, tmp_path: Path, process_group: None):
    arms = learning_proof.arms_of("hack", [3], 40)
    loop = loop_of(model, tmp_path)
    loop.scorer = arms["grpo hackable"][0].scorer
    with pytest.raises(InstabilityError, match=r"^reward_outcome_divergence: "):
        train(loop, num_steps=40)
    assert len(loop.rows) < 40


@slow
def test_an_honest_judge_with_noise_stops_nothing(model: str, tmp_path: Path, process_group: None):
    loop = loop_of(model, tmp_path)
    loop.scorer = learning_proof.arms_of("hack", [3], 20)["grpo honest"][0].scorer
    assert len(train(loop, num_steps=20).rows) == 20


# --- the report -----------------------------------------------------------------------------------


def fake_run(**changes: Any) -> Run:
    curves = {name: [0.25, 0.5] for name in learning_proof.CURVES}
    made = Run(
        sampled=0.86, greedy=0.87, kl=1.0, paid=0.9, divergence=0.1, steps=2, stopped="", curves=curves, trips={},
        seconds=1.0,
    )  # fmt: skip
    return replace(made, **changes)


def results(**changes: Any) -> dict[str, Any]:
    """Every experiment with three runs a row, those of a row alike but for the seed."""
    names = learning_proof.SEEDS
    rows = {name: learning_proof.arms_of(name, range(3), 2) for name in names}
    runs = {
        name: {row: [fake_run(**changes, kl=1 / arm.kl_coef) for arm in arms] for row, arms in of.items()}
        for name, of in rows.items()
    }
    return json.loads(json.dumps(learning_proof.results_of(runs, 2)))


def printed(found: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=160)
    print_report(found, console)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_the_report_says_reached_and_falling(tmp_path: Path):
    found = results()
    assert "reached" in printed(found)
    assert not {"MISSED", "NO"} & set(printed(found).split())
    save_plot(tmp_path / "plot.png", found)
    assert 0 < (tmp_path / "plot.png").stat().st_size < 150_000


def test_the_report_says_missed_and_stopped_and_not_falling():
    found = results(sampled=0.8, stopped="reward_outcome_divergence: x = 2, limit 1")
    for row in found["experiments"]["kl"].values():
        row["kl"] = [1.0, 1.0, 1.0]
    assert {"MISSED", "NO", "reward_outcome_divergence"} <= set(printed(found).split())


def test_an_arm_of_two_experiments_is_one_arm():
    proof, kl = (learning_proof.arms_of(name, range(2), 80) for name in ("proof", "kl"))
    assert proof["grpo"] == kl["grpo 0.03"]
    assert len({arm for arms in kl.values() for arm in arms}) == 2 * len(kl)
