"""Proof that the learning core learns: optimum reached, KL leash obeyed, reward hacking stopped, sinks needed.

python benchmarks/learning_proof.py [--quick] [--only proof kl hack ablation] [--out RESULTS.json] [--plot PLOT.png]

Every run is the real loop (`run_ppo`) and the real learner (`PpoLearner`) on the relay game of `token_game.py`, in one
process and one thread. Hyperparameters were chosen on seed 100; no reported run has that seed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import token_game
import torch
from game_loop import GameLoop, GameScorer, flattered_critic, honest_critic, join_own_process_group
from game_sampler import GameSampler, ReferenceSpec, fill_sinks, make_reference
from learning_proof_report import print_report, save_plot
from record import write_results
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rl_actors.agent import training_sample
from rl_actors.algorithms import StabilityLimits
from rl_actors.contracts import RECIPES, CorrectionMode, InstabilityError, Rollout, RolloutRequest
from rl_actors.learner import PpoLearner, PpoSettings
from rl_actors.models import load_causal_lm
from rl_actors.training import PpoSchedule, run_ppo

# The budget, fixed before the reported runs: 80 steps of 64 rollouts.
NUM_STEPS, TASKS_PER_STEP, ROLLOUTS_PER_TASK = 80, 8, 8
REQUIRED_SHARE = 0.95
SEEDS = {"proof": range(5), "kl": range(3), "hack": range(3), "ablation": range(3)}
PROOF_RECIPES = ("ppo_kl", "grpo")
KL_COEF = 0.03
KL_COEFS = (0.03, 0.1, 0.3, 1.0)
SETTINGS = PpoSettings(
    learning_rate=1e-3, kl_coef=KL_COEF, clip_low=0.2, clip_high=0.2, gamma=1.0, lam=1.0, epochs=1, num_minibatches=2,
    max_grad_norm=1.0, temperature=1.0, microbatch_tokens=4096, seed=0,
)  # fmt: skip
HACK_WEIGHT = 0.2  # share of the verified outcome in the reward; the critic is paid the rest
NO_SINK = -12.0  # e^-12 of the weight: no sink, yet a gradient above 0, so that the first-step check lets it pass
EVAL_ATTEMPTS, EVAL_SEED, EVAL_CHUNK = 16, 10**9, 512
UNLIMITED = StabilityLimits(
    max_grad_norm=None, max_mismatch_mean=None, max_kl=None, max_ratio=None, max_clip_fraction=None, min_entropy=None,
    max_reward_outcome_divergence=None,
)  # fmt: skip
CURVES = ("success", "grad_norm", "mismatch_abs_mean")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One run: everything that sets it apart from the others."""

    recipe: str
    seed: int
    num_steps: int = NUM_STEPS
    kl_coef: float = KL_COEF
    reference: ReferenceSpec = field(default_factory=ReferenceSpec)
    scorer: GameScorer = field(default_factory=GameScorer)
    limits: StabilityLimits = field(default_factory=StabilityLimits)
    correction: CorrectionMode = "token_tis"
    learner_has_sinks: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What an arm came to. `sampled` and `greedy` are verified success on fresh attempts, `kl` is nats per rollout.

    `paid` is the last step's mean reward, `divergence` the largest of the reward from the outcome.
    """

    sampled: float
    greedy: float
    kl: float
    paid: float
    divergence: float
    steps: int
    stopped: str
    curves: dict[str, list[float]]
    trips: dict[str, float]
    seconds: float


class References:
    """Frozen references, made once per seed and specification. `edit` makes a variant of one."""

    def __init__(self, directory: Path) -> None:
        """Keep them under this directory."""
        self._directory, self._made = directory, {}

    def path(self, spec: ReferenceSpec, seed: int, *, has_sinks: bool = True) -> str:
        """Return the directory of one reference, made when it is first asked for."""
        key = (spec, seed, has_sinks)
        if key not in self._made:
            target = self._directory / f"reference-{len(self._made)}"
            self._made[key] = (
                make_reference(target, seed=seed, spec=spec) if has_sinks else self._without_sinks(spec, seed, target)
            )
        return self._made[key]

    def _without_sinks(self, spec: ReferenceSpec, seed: int, target: Path) -> str:
        model = load_causal_lm(self.path(spec, seed))
        fill_sinks(model, NO_SINK)
        model.save_pretrained(target)
        return str(target)


def run_arm(arm: Arm, references: References, on_step: Callable[[], None]) -> Run:
    """Train one arm and evaluate what it ended with, also when a tripwire ended it."""
    started = time.monotonic()
    served = references.path(arm.reference, arm.seed)
    learned = references.path(arm.reference, arm.seed, has_sinks=arm.learner_has_sinks)
    recipe = replace(RECIPES[arm.recipe], correction=arm.correction)
    settings = replace(SETTINGS, kl_coef=arm.kl_coef, seed=arm.seed, recipe=recipe, limits=arm.limits)
    plan = PpoSchedule(
        num_steps=arm.num_steps,
        tasks_per_step=TASKS_PER_STEP,
        rollouts_per_task=ROLLOUTS_PER_TASK,
        checkpoint_every=20,
        seed=arm.seed,
    )
    with tempfile.TemporaryDirectory() as checkpoints:
        loop = GameLoop(
            learner=PpoLearner(learned, learned, settings),
            sampler=GameSampler(served, keeps_sinks=not arm.learner_has_sinks),
            checkpoints=Path(checkpoints),
            scorer=arm.scorer,
            on_step=lambda _step, _metrics: on_step(),
        )
        if not arm.learner_has_sinks:
            loop.tolerance = float("inf")  # attestation would refuse the very first publish; here its gap is the point
        try:
            run_ppo(token_game.tasks(arm.seed), plan, loop.ports(), arm.limits)
            stopped = ""
        except InstabilityError as error:
            stopped = str(error)
    return _finished(loop, GameSampler(served), stopped, time.monotonic() - started)


def _finished(loop: GameLoop, reference: GameSampler, stopped: str, seconds: float) -> Run:
    rollouts = attempts(loop.sampler, temperature=1.0)
    rows = loop.rows
    return Run(
        sampled=success_of(rollouts),
        greedy=success_of(attempts(loop.sampler, temperature=0.0)),
        kl=kl_per_rollout(loop.sampler, reference, rollouts),
        paid=rows[-1]["reward"] if rows else 0.0,
        divergence=max((row["reward_outcome_divergence"] for row in rows), default=0.0),
        steps=len(rows),
        stopped=stopped,
        curves={name: [row[name] for row in rows] for name in CURVES},
        trips={name: sum(row.get(name, 0.0) for row in rows) for row in rows for name in row if "trip_" in name},
        seconds=seconds,
    )


def attempts(sampler: GameSampler, *, temperature: float) -> list[Rollout]:
    """Play every world `EVAL_ATTEMPTS` times, with seeds that no training run uses."""
    every = [task for task in token_game.tasks(0) for _ in range(EVAL_ATTEMPTS)]
    requests = [RolloutRequest(task=task, group_id=0, seed=EVAL_SEED + n) for n, task in enumerate(every)]
    chunks = [requests[start : start + EVAL_CHUNK] for start in range(0, len(requests), EVAL_CHUNK)]
    return [rollout for chunk in chunks for rollout in sampler.rollouts(chunk, temperature)]


def success_of(rollouts: Sequence[Rollout]) -> float:
    """Return the share of verified successes."""
    return sum(rollout.outcome.success for rollout in rollouts) / len(rollouts)


def kl_per_rollout(policy: GameSampler, reference: GameSampler, rollouts: Sequence[Rollout]) -> float:
    """Return the mean over rollouts of KL(policy || reference), exact over the vocabulary, summed over its tokens."""
    total = 0.0
    for start in range(0, len(rollouts), EVAL_CHUNK):
        samples = [training_sample(rollout, 0.0) for rollout in rollouts[start : start + EVAL_CHUNK]]
        ids = [sample.token_ids for sample in samples]
        ours, theirs = policy.distributions(ids), reference.distributions(ids)
        kl_BT = (ours.exp() * (ours - theirs)).sum(-1)[:, :-1]
        masks = [torch.tensor(sample.loss_mask[1:]) for sample in samples]
        total += float((kl_BT * torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)).sum())
    return total / len(rollouts)


def arms_of(experiment: str, seeds: Sequence[int], num_steps: int) -> dict[str, list[Arm]]:
    """Return the arms of one experiment by the name of their row."""
    return {
        name: [replace(arm, seed=seed, num_steps=num_steps) for seed in seeds]
        for name, arm in _EXPERIMENTS[experiment].items()
    }


def _hack(recipe: str, *, is_hackable: bool, is_watched: bool = True) -> Arm:
    scorer = GameScorer(outcome_weight=HACK_WEIGHT, critic=flattered_critic if is_hackable else honest_critic)
    limits = StabilityLimits() if is_watched else StabilityLimits(max_reward_outcome_divergence=None)
    return Arm(recipe=recipe, seed=0, scorer=scorer, limits=limits)


def _sinks(*, learner_has_sinks: bool, correction: CorrectionMode, limits: StabilityLimits = UNLIMITED) -> Arm:
    return Arm(
        recipe="grpo",
        seed=0,
        limits=limits,
        correction=correction,
        learner_has_sinks=learner_has_sinks,
    )


_EXPERIMENTS: dict[str, dict[str, Arm]] = {
    "proof": {name: Arm(recipe=name, seed=0) for name in PROOF_RECIPES},
    "kl": {
        f"{name} {coef:g}": Arm(recipe=name, seed=0, kl_coef=coef) for name in PROOF_RECIPES for coef in KL_COEFS
    },
    "hack": {
        **{f"{name} hackable": _hack(name, is_hackable=True) for name in PROOF_RECIPES},
        **{f"{name} honest": _hack(name, is_hackable=False) for name in PROOF_RECIPES},
        "ppo_kl hackable, unwatched": _hack("ppo_kl", is_hackable=True, is_watched=False),
    },
    "ablation": {
        "sinks, token TIS": _sinks(learner_has_sinks=True, correction="token_tis"),
        "sinks, no correction": _sinks(learner_has_sinks=True, correction="none"),
        "no sinks, token TIS": _sinks(learner_has_sinks=False, correction="token_tis"),
        "no sinks, no correction": _sinks(learner_has_sinks=False, correction="none"),
        "no sinks, token TIS, tripwires on": _sinks(
            learner_has_sinks=False, correction="token_tis", limits=StabilityLimits()
        ),
    },
}  # fmt: skip


def measure(seeds: Mapping[str, Sequence[int]], num_steps: int) -> dict[str, dict[str, list[Run]]]:
    """Run experiments on these seeds, with a progress bar; an arm that two of them share is run once."""
    plan = {name: arms_of(name, of, num_steps) for name, of in seeds.items()}
    every = dict.fromkeys(arm for rows in plan.values() for arms in rows.values() for arm in arms)
    runs: dict[Arm, Run] = {}
    with tempfile.TemporaryDirectory() as directory, _progress() as bar:
        references = References(Path(directory))
        task = bar.add_task("", total=len(every) * num_steps)
        for number, arm in enumerate(every):
            bar.update(task, description=f"{arm.recipe}, seed {arm.seed}, run {number + 1} of {len(every)}")
            runs[arm] = run_arm(arm, references, lambda: bar.advance(task))
            bar.update(task, completed=(number + 1) * num_steps)  # a run that was stopped has nothing left to do
    return {name: {row: [runs[arm] for arm in arms] for row, arms in rows.items()} for name, rows in plan.items()}


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns)


def results_of(runs: Mapping[str, Mapping[str, Sequence[Run]]], num_steps: int) -> dict[str, Any]:
    """Return plain JSON: the game's exact numbers, the budget, and each row's runs in the order of the seeds."""
    skill, per_step = ReferenceSpec().skill, TASKS_PER_STEP * ROLLOUTS_PER_TASK
    right = token_game.demonstrator_right(skill)
    return {
        "game": {
            "optimum": token_game.optimum(),
            "demonstrator_reward": token_game.expected_reward(first=right, second=right, third=right),
            "leashed": {f"{c:g}": asdict(token_game.leashed_optimum(c, skill)) for c in KL_COEFS},
        },
        "budget": {"steps": num_steps, "rollouts": num_steps * per_step, "required_share": REQUIRED_SHARE},
        "eval_attempts": EVAL_ATTEMPTS * len(token_game.worlds()),
        "experiments": {name: {row: _row(of, name) for row, of in rows.items()} for name, rows in runs.items()},
    }


def _row(runs: Sequence[Run], experiment: str) -> dict[str, Any]:
    """Return one list per number, in the order of the seeds, and each curve's mean over the seeds still running."""
    fields = ("sampled", "greedy", "kl", "paid", "divergence", "steps", "stopped", "trips", "seconds")
    names = CURVES if experiment == "ablation" else CURVES[:1]
    curves = {name: [_mean(step) for step in zip_longest(*(run.curves[name] for run in runs))] for name in names}
    return {name: [getattr(run, name) for run in runs] for name in fields} | {"curves": curves}


def _mean(values: Iterable[float | None]) -> float:
    there = [value for value in values if value is not None]
    return float(f"{sum(there) / len(there):.4g}")


def main() -> None:
    """Measure, print the tables, and write JSON and plot when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, a tenth of the steps: does it run?")
    parser.add_argument("--only", nargs="+", choices=list(_EXPERIMENTS), default=list(_EXPERIMENTS))
    parser.add_argument("--read", type=Path, help="run nothing: tables and plot of results that --out wrote")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if arguments.read:
        results = json.loads(arguments.read.read_text(encoding="utf8"))
    else:
        join_own_process_group()
        seeds = {name: SEEDS[name][:1] if arguments.quick else SEEDS[name] for name in arguments.only}
        num_steps = NUM_STEPS // 10 if arguments.quick else NUM_STEPS
        results = results_of(measure(seeds, num_steps), num_steps)
    print_report(results)
    if arguments.out:
        write_results(arguments.out, "1 thread, no GPU", results)
    if arguments.plot:
        save_plot(arguments.plot, results)


if __name__ == "__main__":
    main()
