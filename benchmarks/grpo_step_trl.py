"""The TRL side of `trl_step.py`: GRPOTrainer with its default generation; runs in an environment of its own.

python grpo_step_trl.py JOB.json        started by trl_step.py, which asks for one step at a time
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # pyright: ignore[reportMissingImports]
from grpo_job import Answers, Job, as_text, reward
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

ENDLESS = 1_000_000


class StepByStep(TrainerCallback):
    """Holds the trainer before each step until it is asked for, and answers with the step's seconds."""

    def __init__(self, job: Job, answers: Answers) -> None:
        """Say nothing yet: the trainer is not built."""
        self._job, self._answers = job, answers
        self._requests: Iterator[int] = answers.requests()
        self.seconds = {"generate_s": 0.0, "score_s": 0.0}
        self.num_tokens = 0
        self._started, self._cpu = 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for a request; without one, end the process, for a trainer cannot be stopped here."""
        if next(self._requests, None) is None:
            raise SystemExit(0)
        self.seconds, self.num_tokens = dict.fromkeys(self.seconds, 0.0), 0
        self._started, self._cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Answer; what is neither generation nor reward is training. Weights need no publishing: one model does all."""
        total, cpu = time.perf_counter() - self._started, time.process_time() - self._cpu
        parts = {**self.seconds, "train_s": total - sum(self.seconds.values()), "sync_s": 0.0}
        self._answers.say({"seconds": total, **parts, "cpu_s": cpu, "num_tokens": self.num_tokens})

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its seconds added to a part of the step."""

        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - started

        return call

    def rewards(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Score completions, and count their tokens."""
        self.num_tokens += sum(map(len, completion_ids))
        return [reward(ids) for ids in completion_ids]


def config(job: Job, output_dir: str) -> Any:
    """Return the trainer's settings: one generation and one optimizer step over all completions, float32, no extras."""
    return GRPOConfig(
        output_dir=output_dir,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=job.microbatch,
        gradient_accumulation_steps=job.num_completions // job.microbatch,
        num_generations=job.attempts,
        max_completion_length=job.completion_tokens,
        temperature=1.0,
        loss_type="grpo",
        beta=job.kl_coef,
        epsilon=job.clip,
        num_iterations=1,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=job.max_grad_norm,
        adam_beta2=0.98,
        weight_decay=0.0,
        max_steps=ENDLESS,
        shuffle_dataset=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=job.seed,
    )


def main() -> None:
    """Build the trainer and let it be asked for steps."""
    job, answers = Job.read(Path(sys.argv[1])), Answers()
    torch.set_num_threads(job.threads)
    steps = StepByStep(job, answers)
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(job.model_dir, dtype=torch.float32),
            reward_funcs=steps.rewards,
            args=config(job, output_dir),
            train_dataset=Dataset.from_list([{"prompt": as_text(prompt)} for prompt in job.prompts]),
            processing_class=AutoTokenizer.from_pretrained(job.model_dir),
            callbacks=[steps],
        )
        for part, name in (("generate_s", "_generate_single_turn"), ("score_s", "_calculate_rewards")):
            setattr(trainer, name, steps.timed(part, getattr(trainer, name)))
        answers.say({name: version(name) for name in ("trl", "transformers", "torch")})
        trainer.train()


if __name__ == "__main__":
    main()
