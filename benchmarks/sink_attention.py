"""Speed and memory of sink attention on CPU: through the flash kernel against eager, one layer and the tiny model.

python benchmarks/sink_attention.py [--threads 1] [--repeats 7] [--out benchmarks/results/sink_attention.json]

Each row is forward and backward, median of the repeats after one warm-up. The peak is what resident memory grew by, in
a process of its own. Eager is the definition with its [B, H, T, S] scores; for the model, Transformers' own.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import write_results
from resident import resident_mib

from rl_actors.models import (
    allowed_pairs,
    build_tiny_model,
    eager_sink_attention,
    sink_attention,
    tiny_config,
    use_sink_attention,
)

# Rows, query heads, key heads, length, head dim: the tiny model's batch, then an eighth of a GPT-OSS-20B layer.
LAYERS = ((8, 4, 2, 256, 32), (1, 8, 1, 1024, 64), (1, 8, 1, 2048, 64))
WINDOWS = (None, 128)
MODELS = ((8, 256), (2, 1024), (1, 2048))
VOCAB = 900


def layer_step(path: str, shape: tuple[int, ...], window: int | None) -> Callable[[], None]:
    """Return one forward and backward of attention alone."""
    rows, heads, key_heads, length, dim = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((rows, heads, length, dim), (rows, key_heads, length, dim), (rows, key_heads, length, dim), (heads,))
    query, key, value, sinks = (torch.randn(size, generator=generator).requires_grad_() for size in sizes)
    weights = torch.randn(sizes[0], generator=generator)

    def step() -> None:
        if path == "kernel":
            out = sink_attention(query, key, value, sinks, sliding_window=window)
        else:
            out = eager_sink_attention(
                query, key, value, sinks, allowed_pairs(query, key, None, True, window), dim**-0.5
            )
        torch.autograd.grad(out, (query, key, value, sinks), weights)

    return step


def model_step(path: str, shape: tuple[int, ...], window: int | None) -> Callable[[], None]:
    """Return one forward and backward of the tiny model, whose layers alternate between `window` and full attention."""
    config = tiny_config(
        vocab_size=VOCAB, hidden_size=128, num_layers=4, num_experts=4, max_length=2048, eos_token_id=7
    )
    config.sliding_window = window
    model: Any = build_tiny_model(config, seed=0)
    if path == "kernel":
        use_sink_attention(model)
    ids = torch.randint(8, VOCAB, shape, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    return step


def timed(make_step: Callable[[], Callable[[], None]], threads: int, repeats: int) -> dict[str, float]:
    """Return median seconds of a step and the growth of resident memory over it."""
    torch.set_num_threads(threads)
    step = make_step()
    before = resident_mib("VmRSS")
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds[1:]), "peak_mib": resident_mib("VmHWM") - before}


def in_own_process(make_step: Callable[[], Callable[[], None]], threads: int, repeats: int) -> dict[str, float]:
    """Run `timed` in a child, so that no earlier measurement's memory is in it."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(timed, (make_step, threads, repeats))


def measure(threads: int, repeats: int) -> list[dict[str, Any]]:
    """Return a row per shape with tokens per second and peak memory of both paths."""
    cases = [("layer", layer_step, shape, window) for shape in LAYERS for window in WINDOWS]
    cases += [("tiny model", model_step, shape, 128) for shape in MODELS]
    rows = []
    for what, make, shape, window in cases:
        tokens = shape[0] * shape[-2] if what == "layer" else shape[0] * shape[1]
        found = {
            path: in_own_process(functools.partial(make, path, shape, window), threads, repeats)
            for path in ("kernel", "eager")
        }
        row = {
            "what": what,
            "shape": shape,
            "window": window,
            "tokens_per_s": {path: tokens / result["seconds"] for path, result in found.items()},
            "peak_mib": {path: result["peak_mib"] for path, result in found.items()},
            "ratio": found["eager"]["seconds"] / found["kernel"]["seconds"],
        }
        rows.append(row)
        print(describe(row), flush=True)  # noqa: T201
    return rows


def describe(row: dict[str, Any]) -> str:
    """Return a line for a human."""
    both = "; ".join(
        f"{path} {row['tokens_per_s'][path]:,.0f} tokens/s, {row['peak_mib'][path]:.0f} MiB"
        for path in ("kernel", "eager")
    )
    return f"{row['what']} {row['shape']} window {row['window']}: {both}; ratio {row['ratio']:.2f}"


def main() -> None:
    """Measure, print a table, and write the JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = measure(arguments.threads, arguments.repeats)
    if arguments.out:
        write_results(arguments.out, f"{arguments.threads} threads, no GPU", {"rows": rows})


if __name__ == "__main__":
    main()
