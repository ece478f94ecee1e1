"""The learner without engine and Ray: tokens per second against a bare PyTorch loop, and memory of the chunked head.

python benchmarks/learner_alone.py [--threads 2] [--repeats 9] [--out benchmarks/results/learner_alone.json]
python benchmarks/learner_alone.py --quick      the same on toy sizes, to prove the script; its figures mean nothing

Update: `PpoLearner.update` with the `grpo` recipe and no old pass, against a loop with nothing but the arithmetic: the
same loader (so the same kernels), the same microbatches, made beforehand; a reference pass, then per microbatch all
logits, log-softmax, the clipped loss with KL, backward; a norm clip and AdamW. Both make one forward pass of reference
and policy each and one backward pass, in turn, in one process; figures are medians after warm-up. Their weights are
compared at the end: equal to rounding means equal work. What the learner does on top, and pays for here: shaping
rewards, batching, engine-learner correction, metrics, tripwires, and the DeepSpeed engine.

Head: log-probabilities and gradients at a vocabulary of 200,064, `_ChunkedHead` against all logits at once
(`head_memory.py`), each in processes of its own, in turn. The peak is what resident memory grew by.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from record import write_results
from rich.console import Console
from rich.table import Table
from torch import Tensor
from trl_step import MODELS, write_model

from rl_actors.algorithms import TrainingBatch, collate, group_advantages, plan_microbatches
from rl_actors.contracts import RECIPES, TrainingSample
from rl_actors.learner import MAX_WASTE_FRACTION, PpoLearner, PpoSettings
from rl_actors.models import load_causal_lm

GOAL = 0.85
HEADS = ({"tokens": 2048, "hidden": 64, "vocab": 200_064}, {"tokens": 2048, "hidden": 256, "vocab": 200_064})
QUICK_HEADS = ({"tokens": 256, "hidden": 32, "vocab": 4_000},)
RATE, BETAS, KL_COEF, CLIP, MAX_NORM, BUDGET = 1e-5, (0.9, 0.98), 0.02, 0.2, 1.0, 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Rollouts of an update: `groups` of 8 attempts, prompts of `prompt` tokens, completions between two lengths."""

    name: str
    groups: int
    prompt: int
    shortest: int
    longest: int


WORKS = (
    Work(name="equal lengths", groups=8, prompt=32, shortest=128, longest=128),
    Work(name="ragged", groups=8, prompt=32, shortest=32, longest=224),
)
QUICK_WORKS = (Work(name="ragged", groups=2, prompt=8, shortest=8, longest=40),)
SIZES = {"vocab": 904, "hidden": 128, "layers": 4}
QUICK_SIZES = {"vocab": 200, "hidden": 64, "layers": 2}


def make_samples(work: Work, vocab: int) -> list[TrainingSample]:
    """Return random rollouts with random rewards, of no weights version yet."""
    rng = random.Random(0)
    samples = []
    for index in range(work.groups * 8):
        completion = rng.randint(work.shortest, work.longest)
        length = work.prompt + completion
        samples.append(
            TrainingSample(
                rollout_id=f"{index:04d}",
                group_id=index // 8,
                weights_versions=(),
                token_ids=tuple(rng.choices(range(1, vocab), k=length)),
                loss_mask=(False,) * work.prompt + (True,) * completion,
                rollout_logprobs=(0.0,) * length,
                reward=rng.random(),
                truncated=False,
            )
        )
    return samples


def sampled_by(learner: PpoLearner, samples: Sequence[TrainingSample]) -> list[TrainingSample]:
    """Return the samples as if the learner's own weights had sampled them: its version, its log-probabilities."""
    rows = learner.probe_logprobs([sample.token_ids for sample in samples])
    version = (learner.weights_version,)
    return [
        replace(sample, weights_versions=version, rollout_logprobs=(0.0, *row))
        for sample, row in zip(samples, rows, strict=True)
    ]


def settings() -> PpoSettings:
    """Return one epoch of one minibatch without an old pass."""
    return PpoSettings(
        learning_rate=RATE,
        kl_coef=KL_COEF,
        clip_low=CLIP,
        clip_high=CLIP,
        gamma=1.0,
        lam=1.0,
        epochs=1,
        num_minibatches=1,
        max_grad_norm=MAX_NORM,
        temperature=1.0,
        microbatch_tokens=BUDGET,
        seed=0,
        recipe=replace(RECIPES["grpo"], skip_old_pass=True),
    )


class BareLoop:
    """GRPO with nothing but the arithmetic."""

    def __init__(self, directory: str, samples: Sequence[TrainingSample]) -> None:
        """Load policy and reference and make the microbatches."""
        self.policy, self._reference = load_causal_lm(directory).train(), load_causal_lm(directory).eval()
        self._reference.requires_grad_(False)
        self._optimizer = torch.optim.AdamW(self.policy.parameters(), lr=RATE, betas=BETAS, weight_decay=0.0)
        self._batches, self._num_sequences = bare_batches(samples), len(samples)

    def update(self) -> None:
        """Take one update."""
        with torch.no_grad():
            references = [_logprobs(self._reference, batch) for batch in self._batches]
        for batch, reference_BT in zip(self._batches, references, strict=True):
            loss = bare_loss(_logprobs(self.policy, batch), reference_BT, batch)
            (loss / self._num_sequences).backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), MAX_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()


def bare_batches(samples: Sequence[TrainingSample]) -> list[TrainingBatch]:
    """Return microbatches of the learner's own plan; their rewards are group advantages already."""
    groups = torch.tensor([sample.group_id for sample in samples])
    rewards = group_advantages(torch.tensor([sample.reward for sample in samples]), groups, kind="grpo").tolist()
    done = [replace(sample, reward=reward) for sample, reward in zip(samples, rewards, strict=True)]
    lengths = [len(sample.token_ids) for sample in done]
    plan = plan_microbatches(lengths, token_budget=BUDGET, max_waste_fraction=MAX_WASTE_FRACTION)
    return [collate([done[index] for index in group]) for group in plan]


def bare_loss(logprobs_BT: Tensor, reference_BT: Tensor, batch: TrainingBatch) -> Tensor:
    """Sum over sequences of the token mean of clipped loss and KL, whose gradient is (log p - log ref) grad log p."""
    mask_BT = batch.loss_mask_BT[:, 1:]
    ratio_BT = (logprobs_BT - logprobs_BT.detach()).exp()
    advantages_B1 = batch.rewards_B[:, None]
    clipped_BT = ratio_BT.clamp(1 - CLIP, 1 + CLIP)
    terms_BT = -torch.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)
    terms_BT = terms_BT + KL_COEF * 0.5 * (logprobs_BT - reference_BT).square()
    return ((terms_BT * mask_BT).sum(-1) / mask_BT.sum(-1)).sum()


def _logprobs(model: Any, batch: TrainingBatch) -> Tensor:
    ids_BT = batch.token_ids_BT
    logits_BTV = model(input_ids=ids_BT, attention_mask=batch.attention_mask_BT.long()).logits
    return logits_BTV[:, :-1].log_softmax(-1).gather(-1, ids_BT[:, 1:, None]).squeeze(-1)


def in_turn(
    paths: Mapping[str, Callable[[], None]], before: Callable[[], None], repeats: int, warm_ups: int
) -> dict[str, list[float]]:
    """Return seconds of `repeats` calls of each path, taken in turn; the first of a round is the last of the next.

    `before` is called before each round and not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for number in range(warm_ups + repeats):
        before()
        for name in list(paths)[:: 1 if number % 2 == 0 else -1]:
            started = time.perf_counter()
            paths[name]()
            seconds[name].append(time.perf_counter() - started)
    return {name: values[warm_ups:] for name, values in seconds.items()}


def measure_update(model: str, work: Work, directory: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return a row: tokens per second of both, their ratio, and how far their weights are apart after all updates."""
    samples = make_samples(work, (QUICK_SIZES if arguments.quick else SIZES)["vocab"])
    learner, bare = PpoLearner(directory, directory, settings()), BareLoop(directory, samples)
    own: list[TrainingSample] = []

    def sample_anew() -> None:
        own[:] = sampled_by(learner, samples)

    paths: dict[str, Callable[[], None]] = {
        "learner": lambda: require_stepped(learner.update(own).trips),
        "bare": bare.update,
    }
    seconds = in_turn(paths, sample_anew, arguments.repeats, arguments.warm_ups)
    tokens = sum(len(sample.token_ids) for sample in samples)
    speeds = {name: tokens / statistics.median(values) for name, values in seconds.items()}
    by_round = [b / a for a, b in zip(seconds["learner"], seconds["bare"], strict=True)]
    return {
        "model": model,
        "work": work.name,
        "tokens": tokens,
        "tokens_per_s": speeds,
        "ratio": speeds["learner"] / speeds["bare"],
        "ratio_range": [min(by_round), max(by_round)],
        **weight_gap(learner.weights(), bare.policy.state_dict(), load_causal_lm(directory).state_dict()),
    }


def require_stepped(trips: Sequence[str]) -> None:
    """Refuse an update that a tripwire kept from training."""
    if trips:
        raise SystemExit(f"learner_alone: {', '.join(trips)}: this update trained nothing")


def weight_gap(ours: Mapping[str, Tensor], bare: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, float]:
    """Return how far both moved (mean absolute), and the mean absolute difference between them.

    The mean, not the largest: Adam moves a weight whose gradient is rounding noise by a whole step, either way.
    """
    moved = torch.cat([(bare[name] - start[name]).abs().flatten() for name in start])
    apart = torch.cat([(bare[name] - ours[name]).abs().flatten() for name in start])
    return {"mean_moved": float(moved.mean()), "mean_apart": float(apart.mean())}


def measure_updates(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row per model and kind of work."""
    from rl_actors.actors import LearnerRank, join_process_group
    from rl_actors.ports import free_port

    join_process_group(
        LearnerRank(
            rank=0, num_ranks=1, master_address="127.0.0.1", master_port=free_port(), num_threads=arguments.threads
        )
    )
    rows = []
    for model in MODELS:
        with tempfile.TemporaryDirectory() as directory:
            write_model(model, Path(directory), QUICK_SIZES if arguments.quick else SIZES)
            for work in QUICK_WORKS if arguments.quick else WORKS:
                rows.append(measure_update(model, work, directory, arguments))
    return rows


def measure_head(shape: Mapping[str, int], threads: int, rounds: int) -> dict[str, Any]:
    """Return a row: medians of seconds and peak memory of both paths over processes in turn, and how they differ."""
    found: dict[str, list[dict[str, float]]] = {"chunked": [], "naive": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for path, values in found.items():
                values.append(_head_process(path, shape, threads, folder))
        differences = largest_differences(*(torch.load(Path(folder) / f"{path}.pt") for path in found))
    row: dict[str, Any] = {**shape, "largest_difference": differences}
    for name in ("seconds", "peak_mib"):
        row[name] = {path: statistics.median(value[name] for value in values) for path, values in found.items()}
    return row


def _head_process(path: str, shape: Mapping[str, int], threads: int, folder: str) -> dict[str, float]:
    script = Path(__file__).with_name("head_memory.py")
    words = [path, *(f"--{name}={value}" for name, value in shape.items()), f"--threads={threads}"]
    done = subprocess.run(
        [sys.executable, str(script), *words, f"--results={folder}"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"learner_alone: {path} head failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def largest_differences(ours: Mapping[str, Tensor], naive: Mapping[str, Tensor]) -> dict[str, float]:
    """Return per result the largest difference, as a fraction of the largest entry."""
    return {name: float((ours[name] - naive[name]).abs().max() / naive[name].abs().max()) for name in naive}


def tables(updates: Sequence[Mapping[str, Any]], heads: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Return the rows for a person."""
    first = Table(
        "model", "work", "learner tokens/s", "bare tokens/s", "ratio", "weights apart / moved",
        title=f"update alone, goal {GOAL} of the bare loop",
    )  # fmt: skip
    for row in updates:
        speeds = [f"{row['tokens_per_s'][name]:,.0f}" for name in ("learner", "bare")]
        low, high = row["ratio_range"]
        apart = f"{row['mean_apart']:.1e} / {row['mean_moved']:.1e}"
        first.add_row(row["model"], row["work"], *speeds, f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})", apart)
    second = Table("tokens, hidden, vocabulary", "path", "s", "peak MiB", "largest difference", title="head alone")
    for row in heads:
        for path in ("chunked", "naive"):
            shape = f"{row['tokens']:,} x {row['hidden']} x {row['vocab']:,}" if path == "chunked" else ""
            gap = f"{max(row['largest_difference'].values()):.1e}" if path == "chunked" else ""
            second.add_row(shape, path, f"{row['seconds'][path]:.2f}", f"{row['peak_mib'][path]:,.0f}", gap)
    return [first, second]


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line; `--quick` also means few repeats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--warm-ups", type=int, default=2)
    parser.add_argument("--head-rounds", type=int, default=3, help="processes per path, with two timed steps each")
    parser.add_argument("--quick", action="store_true", help="toy sizes and few repeats")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.repeats, arguments.warm_ups, arguments.head_rounds = 2, 1, 1
    return arguments


def main() -> None:
    """Measure, print two tables, and write the JSON when asked to."""
    arguments = parsed(sys.argv[1:])
    updates = measure_updates(arguments)
    shapes = QUICK_HEADS if arguments.quick else HEADS
    heads = [measure_head(shape, arguments.threads, arguments.head_rounds) for shape in shapes]
    for table in tables(updates, heads):
        Console(width=max(120, Console().width)).print(table)
    if arguments.out:
        found = {"goal": GOAL, "is_quick": arguments.quick, "updates": updates, "heads": heads}
        write_results(arguments.out, f"{arguments.threads} threads, no GPU", found)


if __name__ == "__main__":
    main()
