"""What both sides of `trl_step.py` are told to do, and how they answer; standard library only, for two environments.

A worker is a process that says `ready` once, then takes one step for every line it reads, and answers each with one
line of JSON. Libraries may print what they like: their standard output is the worker's standard error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

PARTS = ("generate_s", "score_s", "train_s", "sync_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One GRPO step: `tasks` prompts with `attempts` completions each, of exactly `completion_tokens` tokens.

    Prompts are token ids; step k takes the k-th run of `tasks` prompts. `microbatch` counts sequences. The model's end
    token lies outside its vocabulary, so that no completion can end early and neither side has to forbid it.
    """

    model_dir: str
    prompts: tuple[tuple[int, ...], ...]
    tasks: int
    attempts: int
    completion_tokens: int
    microbatch: int
    threads: int
    learning_rate: float = 1e-5
    kl_coef: float = 0.02
    clip: float = 0.2
    max_grad_norm: float = 1.0
    seed: int = 0

    @property
    def num_completions(self) -> int:
        """Completions of a step."""
        return self.tasks * self.attempts

    @property
    def num_tokens(self) -> int:
        """Sampled tokens of a step."""
        return self.num_completions * self.completion_tokens

    @property
    def sequence_tokens(self) -> int:
        """Prompt and completion of the longest prompt."""
        return max(map(len, self.prompts)) + self.completion_tokens

    def prompts_of(self, step: int) -> list[tuple[int, ...]]:
        """Return the prompts of a step, starting over when all were used."""
        return [self.prompts[(step * self.tasks + offset) % len(self.prompts)] for offset in range(self.tasks)]

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf8")

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read what `write` wrote."""
        found = json.loads(path.read_text(encoding="utf8"))
        return cls(**found | {"prompts": tuple(map(tuple, found["prompts"]))})


def as_text(token_ids: Sequence[int]) -> str:
    """Return the words that the benchmark's tokenizer turns into exactly these ids."""
    return " ".join(f"w{token}" for token in token_ids)


def reward(completion_ids: Sequence[int]) -> float:
    """Return the share of even token ids: cheap, and different for every completion."""
    return sum(token % 2 == 0 for token in completion_ids) / len(completion_ids)


class Answers:
    """A worker's side of the conversation."""

    def __init__(self) -> None:
        """Keep the real standard output for answers and give everybody else standard error."""
        self._out: TextIO = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf8")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(self, answer: Mapping[str, Any]) -> None:
        """Answer with one line."""
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()

    def requests(self) -> Iterator[int]:
        """Yield the number of each step asked for, until the coordinator hangs up."""
        for step, _ in enumerate(sys.stdin):
            yield step
