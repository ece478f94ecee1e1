"""Training throughput of the expert paths on CPU: Transformers' grouped path against the sorted one, in one run.

python benchmarks/expert_path.py [--threads 2] [--out benchmarks/results/expert_path.json]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from record import write_results

from rl_actors.models import SORTED_EXPERTS, build_tiny_model, sorted_experts, tiny_config

SHAPES = ((8, 256), (32, 256))
VOCAB = 900


def train_step_seconds(model: Any, rows: int, length: int, repeats: int) -> list[float]:
    """Return the seconds of `repeats` forward-backward passes over [rows, length] random tokens, after one warm-up."""
    ids = torch.randint(8, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def measure(threads: int, repeats: int) -> list[dict[str, Any]]:
    """Return a row per shape with median tokens per second of both paths, taken in turn."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    torch.set_num_threads(threads)
    ALL_EXPERTS_FUNCTIONS.register(SORTED_EXPERTS, sorted_experts)
    config = tiny_config(vocab_size=VOCAB, hidden_size=128, num_layers=4, num_experts=4, max_length=512, eos_token_id=7)
    rows = []
    for shape in SHAPES:
        speeds: dict[str, float] = {}
        for path in ("grouped_mm", SORTED_EXPERTS):
            model = build_tiny_model(config, seed=0)
            model.set_experts_implementation(path)
            speeds[path] = shape[0] * shape[1] / statistics.median(train_step_seconds(model, *shape, repeats))
        rows.append({"shape": shape, "tokens_per_s": speeds, "ratio": speeds[SORTED_EXPERTS] / speeds["grouped_mm"]})
    return rows


def main() -> None:
    """Measure, print a table, and write the JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = measure(arguments.threads, arguments.repeats)
    for row in rows:
        speeds = "  ".join(f"{path} {speed:,.0f} tokens/s" for path, speed in row["tokens_per_s"].items())
        print(f"{row['shape']}: {speeds}  ratio {row['ratio']:.2f}")  # noqa: T201
    if arguments.out:
        write_results(arguments.out, f"{arguments.threads} threads, no GPU", {"rows": rows})


if __name__ == "__main__":
    main()
