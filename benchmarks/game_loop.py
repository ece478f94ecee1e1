"""The PPO loop's four protocols in one process over the relay game: no Ray, and one seed gives one run, bit for bit.

    model = make_reference(directory / "reference", seed=0, spec=ReferenceSpec())
    loop = GameLoop(learner=PpoLearner(model, model, settings), sampler=GameSampler(model), checkpoints=directory)
    run_ppo(token_game.tasks(seed=0), plan, loop.ports(), limits)

The sampler is a copy of the policy that changes only by publishing; every publish is attested.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from game_sampler import GameSampler
from token_game import SAY, SYMBOLS, Move

from rl_actors.actors import attestation_gap, require_attested
from rl_actors.agent import rollout_token_ids
from rl_actors.algorithms import RewardMix
from rl_actors.contracts import LearnerUpdate, Rollout, RolloutRequest, Score, TrainingSample
from rl_actors.learner import PpoLearner
from rl_actors.ports import free_port
from rl_actors.training import PpoPorts

ATTESTATION_TOLERANCE = 1e-4
FLATTERY: Move = (SAY, SYMBOLS[0])
_LOOP_STATE = "loop_state.json"


def join_own_process_group(num_threads: int = 1) -> None:
    """Join a gloo group of this one process, as DeepSpeed wants; does nothing when there is one."""
    if torch.distributed.is_initialized():
        return
    torch.set_num_threads(num_threads)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **place})
    torch.distributed.init_process_group("gloo")


Critic = Callable[[Rollout], float]


def honest_critic(rollout: Rollout) -> float:
    """A judge that reads the outcome and is wrong about one rollout in ten, by the rollout's own seed."""
    is_wrong = random.Random(rollout.rollout_id).random() < 0.1
    return float(rollout.outcome.success != is_wrong)


def flattered_critic(rollout: Rollout) -> float:
    """A judge that can be hacked: it likes one symbol as the answer, whatever the code is."""
    return float(rollout.turns[-1].completion.token_ids == FLATTERY)


@dataclass(frozen=True, slots=True, kw_only=True)
class GameScorer:
    """The product's reward mix over a scripted critic."""

    outcome_weight: float = 1.0
    critic: Critic = honest_critic

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Return one score per rollout, in order."""
        return [self._score(rollout) for rollout in rollouts]

    def _score(self, rollout: Rollout) -> Score:
        # The sampler names malformed turns as violations, and the exact optimum is of outcomes alone.
        mix = RewardMix(outcome_weight=self.outcome_weight, violation_penalty=0.0)
        return mix.score(rollout, self.critic(rollout), rubric={}, reward_model_version="game")


@dataclass(slots=True, kw_only=True)
class GameLoop:
    """The four protocols around one learner. `rows` are the metrics of every step, in order."""

    learner: PpoLearner
    sampler: GameSampler
    checkpoints: Path
    scorer: GameScorer = field(default_factory=GameScorer)
    tolerance: float = ATTESTATION_TOLERANCE
    on_step: Callable[[int, Mapping[str, float]], None] = lambda _step, _metrics: None
    rows: list[dict[str, float]] = field(default_factory=list)
    _probes: list[list[int]] = field(default_factory=list)

    def ports(self) -> PpoPorts:
        """Return what `run_ppo` wants."""
        return PpoPorts(source=self, scorer=self.scorer, learner=self, sync=self, report=self._report)

    def rollouts(self, requests: Sequence[RolloutRequest], temperature: float) -> list[Rollout]:
        """Sample; the first few games are what the next publish is attested on."""
        found = self.sampler.rollouts(requests, temperature)
        self._probes = [rollout_token_ids(rollout) for rollout in found[:4]]
        return found

    def update(self, samples: Sequence[TrainingSample]) -> LearnerUpdate:
        """Take one update, and go back to the newest checkpoint where a tripwire asks for it."""
        update = self.learner.update(samples)
        if update.restore_factor:
            newest = max(self.checkpoints.glob("step-*"))
            self.learner.restore(str(newest), update.restore_factor)
        return update

    def save_checkpoint(self, weights_version: int, loop_state: Mapping[str, Any] | None = None) -> None:
        """Write the learner's state, and the loop's own, under the version's name."""
        directory = self.checkpoints / f"step-{weights_version:05d}"
        self.learner.save_checkpoint(str(directory))
        (directory / _LOOP_STATE).write_text(json.dumps(loop_state), encoding="utf8")

    def publish(self, weights_version: int) -> float:
        """Give the sampler the learner's weights and compare log-probabilities. Raises AttestationError."""
        self.sampler.load(self.learner.weights(), weights_version)
        gap = attestation_gap(self.sampler.logprobs(self._probes), self.learner.probe_logprobs(self._probes))
        require_attested(gap, tolerance=self.tolerance, worker="the sampler", weights_version=weights_version)
        return gap

    def resume(self, weights_version: int) -> Mapping[str, Any] | None:
        """Load a checkpoint into the learner and serve it; returns the loop's own state for `run_ppo`."""
        directory = self.checkpoints / f"step-{weights_version:05d}"
        self.learner.load_checkpoint(str(directory))
        self.sampler.load(self.learner.weights(), weights_version)
        return json.loads((directory / _LOOP_STATE).read_text(encoding="utf8"))

    def _report(self, step: int, metrics: Mapping[str, float]) -> None:
        self.rows.append(dict(metrics))
        self.on_step(step, metrics)
